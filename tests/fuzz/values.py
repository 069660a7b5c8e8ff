"""Readers of values: settings of Python's API, environments, command lines, records, states."""

import contextlib
import datetime
import decimal
import fractions
import io
import json
import os
import re
import shutil
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from cosmos3_jax import Cosmos3
from cosmos3_jax.cli import bench, commands, options
from cosmos3_jax.cli import main as cli
from cosmos3_jax.io import media
from cosmos3_jax.io.prepare import prepare
from cosmos3_jax.io.settings import OTHER_NAMES, Settings, read_settings
from cosmos3_jax.parallel import launchers
from cosmos3_jax.sampling.request import Request
from fuzz import mutate
from fuzz.frame import Case
from fuzz.readers import checkpoint_of, reader

NAMES = tuple(Settings.__dataclass_fields__)
LARGEST = 2**24  # bytes of noise that are drawn here


def any_value(random: Random) -> Any:
    """A Python value of any kind."""
    kind = random.randrange(12)
    if kind < 4:
        return random.choice(mutate.NUMBERS)
    if kind < 6:
        return random.choice(mutate.TEXTS)
    if kind == 6:
        return mutate.any_json(random)
    if kind == 7:
        shape = random.choice(((), (1,), (0,), (2, 3), (1, 48, 2, 2, 2), (1, 3, 5, 32, 32)))
        dtype = random.choice(("f4", "f8", "f2", "i4", "?", "c8", "M8[s]", "U3", "O", "u1", "S2"))
        array = np.zeros(shape, dtype)
        if array.dtype.kind == "f" and random.random() < 0.5:
            array[...] = random.choice((np.nan, np.inf, 1.0, 1e30))
        return array
    if kind == 8:
        return random.choice((np.float32(2), np.int64(5), np.bool_(True), np.float16(np.nan)))
    if kind == 9:
        return random.choice((b"a", bytearray(b"1"), {1, 2}, frozenset(), range(10**9), slice(3)))
    if kind == 10:
        return random.choice((datetime.date(2020, 1, 1), decimal.Decimal("sNaN"), object, print,
                              decimal.Decimal("1e999"), fractions.Fraction(1, 3), 1j, iter([0]),
                              Path("x"), Path("/dev/zero"), object(), ..., NotImplemented,
                              (i for i in range(3)), Odd()))  # fmt: skip
    return random.choice((None, True, False, [None], [[]], ["a", 1], (32, 32), "32x32", [0, 1]))


class Odd:
    """It fails whatever is asked of it; what a caller's own object raises may pass."""

    def __repr__(self):
        raise ValueError("no")

    __str__ = __len__ = __iter__ = __float__ = __index__ = __array__ = __eq__ = __repr__
    __hash__ = None


GOOD_SETTINGS: dict[str, tuple] = {
    "negative_prompt": ("blurry", "", None, ["a"]), "num_frames": (1, 5, 9), "height": (16, 64),
    "width": (16, 64, None), "fps": (24, 12.5, 60, 1e-2, 1e4), "num_inference_steps": (1, 3, 50),
    "guidance_scale": (1, 0, 6.5, -3.0, 1e4), "flow_shift": (1, 0.01, 17), "seed": (0, [5], 2**32),
    "schedule": ("native", "karras", "diffusers"), "speed": ("fast", "exact"), "evaluations": (1,),
    "sigmas": ([1.0, 0.5, 0.0], [0.9, 0]), "sound": (True, False), "keep": ("first",),
    "prompt_style": ("phyai", "diffusers"), "system_prompt": (False, "be"), "aspect": ("1:1",),
    "prompt_metadata": (False,), "image": (np.zeros((8, 8, 3), np.uint8),),
    "video": (np.zeros((9, 8, 8, 3), np.uint8),), "condition_frames": ([0], [0, -1], (1,)),
    "noise": (np.zeros((1, 48, 2, 2, 2)), np.full((1, 48, 2, 2, 2), 9999.0)),
}  # fmt: skip


@reader("settings in Python", 32)
def settings(random: Random, folder: Path, valid: Path) -> Case:
    given: dict[str, Any] = {"num_frames": 5, "height": 32, "width": 32, "num_inference_steps": 2}
    for _ in range(random.choice((1, 1, 2, 4))):
        name = random.choice((*NAMES, *NAMES, *OTHER_NAMES, "Seed"))
        given[name] = random.choice(GOOD_SETTINGS.get(name, (1,)))
        if random.random() < 0.7:
            given[name] = any_value(random)
    prompt = any_value(random) if random.random() < 0.15 else "a red ball"
    config, tokenizer = checkpoint_of(valid)

    def fits(request: Request) -> None:
        size = len(request.text_ids) * int(np.prod((48, *request.video_shape))) * 4
        if size > LARGEST:
            raise ValueError(f"{size} bytes of noise are too many for this test")

    def read() -> Any:
        return prepare(config, tokenizer, prompt, read_settings(given), fits).request

    return Case(read, own=True, check=check_request)


def check_request(request: Request) -> str | None:
    """What is wrong with a request that was made."""
    noise, batch = request.noise, len(request.text_ids)
    if noise.dtype != np.float32 or noise.shape[0] != batch or not np.isfinite(noise).all():
        return f"noise {noise.dtype} {noise.shape}"
    if np.abs(noise).max(initial=0) > 1e4:
        return "noise that is not of unit size"
    if not (0 < float(request.fps) < 1e5 and np.isfinite(request.guidance_scale)):
        return f"fps {request.fps}, guidance {request.guidance_scale}"
    if not 1 <= request.num_inference_steps <= 1000:
        return f"{request.num_inference_steps} steps"
    sampler = [np.asarray(x) for x in vars(request.sampler).values()]
    finite = all(np.isfinite(x).all() for x in sampler if x.dtype.kind == "f")
    return None if finite else "a sampler that is not finite"


VARIABLES = (
    "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "SLURM_STEP_NUM_TASKS",
    "SLURM_PROCID", "SLURM_NODEID", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE", "SLURM_JOB_ID",
    "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_MCA_orte_hnp_uri",
    "PMIX_SERVER_URI2", "CUDA_VISIBLE_DEVICES", "SLURM_GPUS_ON_NODE",
)  # fmt: skip
GOOD = (
    "1", "2", "0", "8", "localhost:1234", "node[003-004,7]", "8(x2),4", "4(x999999999)", "9" * 30,
    "host:99999", "[::1]:80", ":1", "a:", "node[", "2(x", "-1", "1.5", "٣", "1e3",
)  # fmt: skip


STARTED = (
    {"JAX_COORDINATOR_ADDRESS": "localhost:99", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"},
    {"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "3", "SLURM_NODEID": "0", "SLURM_LOCALID": "3",
     "SLURM_STEP_TASKS_PER_NODE": "8", "SLURM_JOB_ID": "77", "SLURM_STEP_NODELIST": "node[1-2]"},
    {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
     "OMPI_COMM_WORLD_LOCAL_RANK": "0"},
)  # fmt: skip


@reader("environments", 20)
def environments(random: Random, folder: Path, valid: Path) -> Case:
    values = dict(random.choice(STARTED)) if random.random() < 0.7 else {}
    for name in random.sample([*VARIABLES, *values], random.choice((0, 1, 1, 2, 6))):
        values[name] = random.choice((*GOOD, *GOOD, *mutate.TEXTS))
    options = [random.choice((None, None, None, None, *GOOD[4:9])),
               *(random.choice((*[None] * 8, 0, 1, 2, -1, 10**9)) for _ in range(2))]  # fmt: skip
    gpus = random.choice((None, 0, 1, 8))

    def read() -> Any:
        found = launchers.find_processes(values, *options)
        return found, found and launchers.local_devices(found, values, gpus)

    def check(answer: Any) -> str | None:
        found, _ = answer
        right = found is None or (0 <= found.index < found.count and found.count > 1)
        return None if right else str(found)

    return Case(read, None, check=check)


class Prepared(Exception):
    """All has been judged, and the work would begin."""


def run(arguments: list[str], folder: Path) -> int:
    """A command up to where its work begins.

    Raises ValueError with the words of its error, if there are any, and AssertionError if it says
    more than one.
    """

    def begin(*_, **__):
        raise Prepared

    Cosmos3.load, commands.convert_checkpoint, bench.run_bench = begin, begin, begin
    said, before = folder / "said", os.dup(2)
    file = os.open(said, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 2)
    try:
        with open(2, "w", closefd=False, errors="backslashreplace") as stream:
            with contextlib.redirect_stderr(stream):
                status = cli.main(arguments)
    except Prepared:
        return 0
    except SystemExit as end:
        status = end.code
    finally:
        os.dup2(before, 2)
    words = said.read_text(errors="replace")
    if "Traceback" in words or status not in (0, 2):
        raise AssertionError(f"status {status}: {words[-1000:]}")
    if status == 2:
        raise ValueError(words.partition("error: ")[2].rstrip("\n"))
    return 0


VALUES = (
    "5", "32", "1", "0", "-1", "1e39", "nan", "inf", "4000000001", "99999999999999999999", "2.5",
    "0x5", "24", "480p", "16:9", "32x32", "1,0.5,0", "0,1", "a", "", "auto", "first", "cfg=2",
    "data=1", "karras", "fast", "bfloat16", "float32", "/dev/zero", "/", "missing.json", "tiny",
    "a/b", "x.mp4", "x.png", "/proc/x.mp4", "x.gif:2", "\udcff", "a\0b", "--", "-", "1" * 5000,
)  # fmt: skip
SMALL = ("--num-frames", "5", "--height", "32", "--width", "32", "--steps", "2")


def options_of(command: str) -> list[str]:
    """The long options of a command, as its help tells them."""
    text = io.StringIO()
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(text):
        options.parse([command, "--help"])
    return sorted(set(re.findall(r"--[a-z][a-z-]+", text.getvalue())) - {"--help"})


@reader("command lines", 12)
def command_lines(random: Random, folder: Path, valid: Path) -> Case:
    command = random.choice(("generate", "generate", "generate", "convert", "info", "bench"))
    names = [name for name in options_of(command) if name not in ("--coordinator", "--processes")]
    arguments = [command]
    if command == "generate":
        arguments += ["a ball", "--checkpoint", str(valid / "checkpoint"), *SMALL, "--out", "o.mp4"]
    elif command == "convert":
        arguments += [str(valid / "checkpoint"), random.choice(("new", *VALUES))]
    for _ in range(random.choice((1, 1, 2, 3))):
        arguments.append(random.choice(names))
        if random.random() < 0.8:
            arguments.append(random.choice((*VALUES, *mutate.TEXTS)))
    os.environ["HF_HUB_OFFLINE"] = "1"
    return Case(lambda: run(arguments, folder), None, check=lambda status: None)


@reader("records", 14)
def records(random: Random, folder: Path, valid: Path) -> Case:
    name = random.choice(("image.png", "video.mp4"))
    source = valid / "records" / name
    record = json.loads(source.with_suffix(".json").read_text())
    record["checkpoint"] = str(valid / "checkpoint")
    kind = random.randrange(8)
    if kind < 6:
        file = folder / "record.json"
        file.write_bytes(mutate.json_bytes(random, record))
    elif kind == 6:
        file = folder / f"record{source.suffix}"
        file.write_bytes(mutate.damaged(random, source.read_bytes()))
    else:
        file = folder / "record.png"
        comment = mutate.json_bytes(random, record).decode("utf-8", errors="replace")
        with contextlib.suppress(ValueError, OSError):
            media.save_image(np.zeros((3, 32, 32), np.float32), file, comment=comment)
    small = [] if random.random() < 0.7 else ["--num-frames", "1", "--out", "o.png"]
    arguments = ["generate", "--from-record", str(file), *small]
    os.environ["HF_HUB_OFFLINE"] = "1"
    return Case(lambda: run(arguments, folder), None, check=lambda status: None)


@reader("training states", 1)
def training_states(random: Random, folder: Path, valid: Path) -> Case:
    """A damaged state is refused, or the older one is taken, which is whole."""
    import jax
    import training_run

    from cosmos3_jax.training.checkpoints import Checkpoints

    states = folder / "states"
    shutil.copytree(valid / "training", states)
    files = sorted(path for path in (states / "2").rglob("*") if path.is_file())
    for _ in range(random.choice((1, 1, 3))):
        file = random.choice(files)
        kind = random.randrange(5)
        if kind == 0:
            file.unlink(missing_ok=True)
        elif kind == 1 and file.exists():
            file.write_bytes(b"")
        elif file.exists():
            content = file.read_bytes()
            is_json = content[:1] == b"{"
            file.write_bytes(
                mutate.json_bytes(random, json.loads(content))
                if is_json and kind == 2
                else mutate.damaged(random, content)
            )
    like, _ = training_run.start()

    def read() -> Any:
        with Checkpoints(states) as opened:
            return opened.restore(like)

    def check(found: Any) -> str | None:
        if int(found.step) not in (1, 2):
            return f"step {found.step}"
        whole = jax.tree.map(lambda x, y: bool((x == y).all()), found.params, like.params)
        return None if jax.tree.all(whole) else "other parameters"

    return Case(read, "states", check=check)
