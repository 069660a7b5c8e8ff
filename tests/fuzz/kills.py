"""Commands that are killed, and pairs that write to one name: `python -m fuzz.kills`.

What is whole stays whole; TERM and INT leave no temporary files; the same command, given again
after a kill, makes what it would have made.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import jax

from fuzz import jobs
from fuzz.__main__ import KEPT, REPORT, replaced
from fuzz.frame import spread
from fuzz.originals import make
from fuzz.readers import warm

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGKILL)
# Words of `generate` that begin a stage; the kill comes a moment after one of them.
STAGES = {
    "reading the options": "", "loading": "loading", "denoising": "denoising",
    "decoding": "decoding", "encoding": "writing",
}  # fmt: skip
MARKERS = ("<!-- kills -->", "<!-- end of kills -->")


class World:
    """A checkpoint, and what whole commands make of it.

    Attributes:
        videos: of seeds 1 and 2, with the options that kills use.
        folders: of both dtypes.
        seconds: that a conversion takes.
        steps: of training.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        shutil.rmtree(folder, ignore_errors=True)
        make(folder / "originals", training=False)
        self.checkpoint = folder / "originals" / "checkpoint"
        # All programs are kept: those of the commands to come start at once.
        settings = {
            "jax_compilation_cache_dir": str(folder / "programs"),
            "jax_persistent_cache_min_compile_time_secs": 0,
            "jax_persistent_cache_min_entry_size_bytes": -1,
        }
        for name, value in settings.items():
            os.environ[name.upper()] = str(value)  # or the command line would set its own
            jax.config.update(name, value)
        warm(folder / "originals")
        self.videos, self.folders = {}, {}
        for seed in (1, 2):
            out = folder / f"seed{seed}" / "out.mp4"
            self.whole(jobs.command(self.generate(out, seed), folder / "log"))
            self.videos[seed] = jobs.digest(out)
        for dtype in ("float32", "bfloat16"):
            target, start = folder / dtype, time.monotonic()
            self.whole(jobs.command(self.convert(target, dtype), folder / "log"))
            self.folders[dtype], self.seconds = jobs.digest(target), time.monotonic() - start

    def whole(self, job: jobs.Job) -> None:
        """Raise RuntimeError unless a job succeeds."""
        if status := job.wait():
            raise RuntimeError(f"status {status}: {job.said()[-2000:]}")

    def generate(self, out: Path, seed: int, *options: str) -> list[str]:
        every = ("--checkpoint-every", "1", "--steps-per-program", "1")
        return jobs.generate(self.checkpoint, out, seed, *every, *options)

    def convert(self, target: Path, dtype: str, *options: str) -> list[str]:
        return jobs.convert(self.checkpoint, target, dtype, *options)


def end(job: jobs.Job, number: signal.Signals, folder: Path) -> tuple[int, list[str]]:
    """Kill a job. Its status, and what is wrong with the way it ended."""
    sent = time.monotonic()
    os.kill(job.pid, number)
    status = job.wait(30)
    seconds, problems = time.monotonic() - sent, []
    if status not in (0, -number, 128 + number):  # by itself, or before it had its handlers
        problems.append(f"status {status}")
    if number != signal.SIGKILL and seconds > 5:
        problems.append(f"it took {seconds:.1f} s to end")
    if "Traceback" in job.said() or "Fatal" in job.said():
        problems.append(f"a traceback: {job.said()[-800:]}")
    return status, problems


def kill_generation(
    world: World, seed: random.Random, folder: Path, count: int
) -> tuple[str, list[str]]:
    number, stage = SIGNALS[count % 3], [*STAGES][count // 3 % len(STAGES)]
    out, older = folder / "out.mp4", seed.random() < 0.5
    if older:
        shutil.copytree(world.folder / "seed2", folder, dirs_exist_ok=True)
    arguments = world.generate(out, 1, *["--overwrite"] * older)
    job, until = jobs.command(arguments, folder.with_suffix(".log")), time.monotonic() + 60
    while STAGES[stage] not in job.said() and time.monotonic() < until and job.poll() is None:
        time.sleep(0.001)
    time.sleep(seed.choice((0, 0.002, 0.01, 0.05, 0.3)) * seed.random())
    status, problems = end(job, number, folder)
    problems += [f"left {name}" for name in jobs.left(folder) if number != signal.SIGKILL]
    wanted = [world.videos[1]] + [world.videos[2] if older else {}]
    if jobs.digest(out) not in wanted or (status == 0 and jobs.digest(out) != wanted[0]):
        problems.append("the video is neither the older nor the new one")
    if not problems and seed.random() < 0.1:
        again = [*arguments, *["--overwrite"] * (out.exists() and not older)]
        world.whole(jobs.command(again, folder.with_suffix(".log")))
        if jobs.digest(out) != world.videos[1] or jobs.record_of(out) is None:
            problems.append("the same command made something else afterwards")
    return f"{stage}, {number.name[3:]}", problems


def kill_conversion(
    world: World, seed: random.Random, folder: Path, count: int
) -> tuple[str, list[str]]:
    number, older, target = SIGNALS[count % 3], seed.random() < 0.5, folder / "target"
    if older:
        shutil.copytree(world.folder / "bfloat16", target)
    arguments = world.convert(target, "float32", *["--overwrite"] * older)
    job = jobs.command(arguments, folder.with_suffix(".log"))
    time.sleep(seed.uniform(0, 1.1) * world.seconds)
    status, problems = end(job, number, folder)
    kept = ("target.partial", "target.partial.json", "target.partial.SHA256SUMS")
    hidden = [name for name in jobs.left(folder) if Path(name).parts[0] not in kept]
    inside = [name for name in jobs.left(folder) if Path(name).name.startswith(".")]
    if number != signal.SIGKILL:
        problems += [f"left {name}" for name in {*hidden, *inside}]
    found = [jobs.digest(target), jobs.digest(folder / ".target.replaced")]
    whole = [world.folders["float32"]] + [world.folders["bfloat16"] if older else {}]
    if found[0] not in [*whole, {}] or not any(each in whole for each in found):
        problems.append("the target is neither the older nor the new one")
    if not problems:
        overwrite = ["--overwrite"] * (target.exists() or older)
        again = world.convert(target, "float32", *overwrite)
        world.whole(jobs.command(again, folder.with_suffix(".log")))
        others = [name.name for name in folder.iterdir() if name.name != "target"]
        if number == signal.SIGKILL:  # nobody is left to remove what was being written
            others = [name for name in others if not name.startswith(".cosmos3-")]
        if jobs.digest(target) != world.folders["float32"] or others:
            problems.append(f"the same command made something else afterwards: {others}")
    return f"converting, {number.name[3:]}", problems


def kill_training(
    world: World, seed: random.Random, folder: Path, count: int
) -> tuple[str, list[str]]:
    """Python's own loop, which has no handlers of signals: TERM kills it, as KILL does."""
    number, log = SIGNALS[count % 3], folder.with_suffix(".log")
    job, step = jobs.train(folder / "states", 6, log), seed.randrange(1, 6)
    until = time.monotonic() + 60
    while f"saving {step}" not in job.said() and time.monotonic() < until and job.poll() is None:
        time.sleep(0.001)
    time.sleep(seed.uniform(0, 0.2))
    whole = [int(path.name) for path in (folder / "states").glob("*") if path.name.isdecimal()]
    os.kill(job.pid, number)
    job.wait(30)
    reader, problems = jobs.restored(folder / "states", log), []
    if status := reader.wait():
        return f"training, {number.name[3:]}", [f"status {status}: {reader.said()[-800:]}"]
    if int(reader.said().split("step ")[-1]) < max(whole, default=0):
        problems.append(f"step {max(whole)} is lost: {reader.said()[-300:]}")
    problems += [f"left {name}" for name in jobs.left(folder) if "tmp" in name]
    return f"training, {number.name[3:]}", problems


def pair_of_conversions(
    world: World, seed: random.Random, folder: Path, count: int
) -> tuple[str, list[str]]:
    """Into one folder, of two dtypes."""
    target, overwrite, problems = folder / "target", seed.random() < 0.3, []
    started: dict[str, jobs.Job] = {}
    for dtype in seed.sample(["float32", "bfloat16"], 2):
        arguments = world.convert(target, dtype, *["--overwrite"] * overwrite)
        started[dtype] = jobs.command(arguments, folder.with_suffix(f".{dtype}.log"))
        time.sleep(seed.choice((0, 0.01, 0.1, 1.0)) * seed.random() * world.seconds)
    statuses = {dtype: job.wait() for dtype, job in started.items()}
    winners = [dtype for dtype, status in statuses.items() if status == 0]
    if any(status not in (0, 2) for status in statuses.values()):
        problems.append(f"statuses {statuses}")
    if not winners or (len(winners) == 2 and not overwrite):
        problems.append(f"statuses {statuses}, of two into one folder")
    if jobs.digest(target) not in [world.folders[dtype] for dtype in winners]:
        problems.append("the target is what neither made")
    problems += [f"left {path.name}" for path in folder.iterdir() if path.name != "target"]
    said = "".join(job.said() for job in started.values())
    if "Traceback" in said:
        problems.append(said[-800:])
    return "two conversions into one folder", problems


def pair_of_generations(
    world: World, seed: random.Random, folder: Path, count: int
) -> tuple[str, list[str]]:
    """Onto one name, of two seeds: the second takes a free name, or is refused at its start."""
    out, problems, started = folder / "out.mp4", [], {}
    for number in seed.sample([1, 2], 2):
        arguments = jobs.generate(world.checkpoint, out, number, "--steps-per-program", "1")
        started[number] = jobs.command(arguments, folder.with_suffix(f".{number}.log"))
        time.sleep(seed.choice((0, 0.01, 0.3, 3.0)) * seed.random())
    statuses = {number: job.wait() for number, job in started.items()}
    if any(status not in (0, 2) for status in statuses.values()):
        problems.append(f"statuses {statuses}")
    winners = [number for number, status in statuses.items() if status == 0]
    videos = sorted(folder.glob("*.mp4"))
    records = [jobs.record_of(video) for video in videos]
    seeds = sorted(record["seed"] for record in records if record)
    if seeds != sorted(winners) or None in records or not winners:
        problems.append(f"statuses {statuses}, {[v.name for v in videos]} of seeds {seeds}")
    problems += [f"left {name}" for name in jobs.left(folder)]
    return "two generations onto one name", problems


KINDS: dict[str, tuple[Callable[..., tuple[str, list[str]]], int]] = {
    "generations": (kill_generation, 120), "conversions": (kill_conversion, 150),
    "trainings": (kill_training, 30), "pairs of conversions": (pair_of_conversions, 160),
    "pairs of generations": (pair_of_generations, 40),
}  # fmt: skip


def table(counts: Counter, failures: Counter) -> str:
    lines = ["| what | times | failures |", "|---|---|---|"]
    lines += [f"| {what} | {counts[what]} | {failures[what]} |" for what in sorted(counts)]
    return "\n".join([*lines, f"| all | {counts.total()} | {failures.total()} |"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--share", type=float, default=1.0, help="of 300 kills and 200 pairs")
    parser.add_argument("--kind", action="append", choices=[*KINDS])
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--write", action="store_true", help=f"the table into {REPORT.name}")
    options = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's `&` has it ignored
    world = World(KEPT / f"world-{os.getpid()}")

    def one(task: tuple[str, int]) -> tuple[str, int, str, list[str]]:
        kind, seed = task
        folder = world.folder / "work" / f"{kind}-{seed}"
        folder.mkdir(parents=True)
        try:
            what, problems = KINDS[kind][0](world, random.Random(f"{kind} {seed}"), folder, seed)
        except (TimeoutError, RuntimeError) as error:
            what, problems = kind, [str(error)]
        if not problems:
            shutil.rmtree(folder, ignore_errors=True)
        return kind, seed, what, problems

    tasks = [
        (kind, options.first_seed + i)
        for kind in options.kind or KINDS
        for i in range(round(KINDS[kind][1] * options.share))
    ]
    start, counts, failures = time.monotonic(), Counter(), Counter()
    for kind, seed, what, problems in spread(one, tasks, options.workers):
        counts[what] += 1
        if problems:
            failures[what] += 1
            print(f"{kind} {seed}: {what}: {'; '.join(problems)}", flush=True)
    if counts.total() < len(tasks):
        failures["not tried"] = len(tasks) - counts.total()
    print(f"{table(counts, failures)}\n\n{time.monotonic() - start:.0f} s")
    if options.write:
        text = replaced(REPORT.read_text("utf-8"), table(counts, failures), MARKERS)
        REPORT.write_text(text, "utf-8")
    if not failures:
        shutil.rmtree(world.folder, ignore_errors=True)
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
