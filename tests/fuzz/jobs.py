"""Whole commands in forked processes, as the command line runs them: how one is started, and what
each leaves when it is whole.
"""

import hashlib
import json
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

SMALL = ("--num-frames", "5", "--height", "32", "--width", "32", "--steps", "3")
TEMPORARY = (".cosmos3-", ".tmp", ".partial", "orbax-checkpoint-tmp")
ENDS = (signal.SIGINT, signal.SIGTERM)
LIMIT = 120  # seconds, after which a command hangs


class Job:
    """A process that was forked to run a function, and what it says.

    Attributes:
        log: the file of what it says.
    """

    def __init__(self, function: Callable[[], int | None], log: Path):
        self.log, self.begun = log, time.monotonic()
        sys.stdout.flush()
        log.touch()
        # In the hooks of a fork, which libraries have, Python would pass over a signal.
        held = signal.pthread_sigmask(signal.SIG_BLOCK, ENDS)
        self.pid = os.fork()
        if self.pid > 0:
            signal.pthread_sigmask(signal.SIG_SETMASK, held)
        else:
            status = 1
            try:
                signal.pthread_sigmask(signal.SIG_SETMASK, held)
                file = os.open(log, os.O_WRONLY | os.O_TRUNC)
                os.dup2(file, 1)
                os.dup2(file, 2)
                resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
                status = function() or 0
            except KeyboardInterrupt:  # before the command has its own handlers
                status = 128 + signal.SIGINT
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)

    def poll(self) -> int | None:
        """The status once it has ended."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if pid else None

    def wait(self, seconds: float = LIMIT) -> int:
        """The status, negative of a signal. Raises TimeoutError if it does not end."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if (status := self.poll()) is not None:
                return status
            time.sleep(0.002)
        os.kill(self.pid, 9)
        os.waitpid(self.pid, 0)
        raise TimeoutError(f"it does not end: {self.said()[-500:]}")

    def said(self) -> str:
        return self.log.read_text(errors="replace")


def command(arguments: list[str], log: Path) -> Job:
    """`cosmos3-jax` with these arguments, signal handlers and the ends of a process included."""

    def run() -> int:
        from cosmos3_jax.checkpoint import publish
        from cosmos3_jax.cli import main as cli

        sys.argv = ["cosmos3-jax", *arguments]
        try:
            return cli.main()
        except SystemExit as end:
            return int(end.code or 0)
        finally:
            publish.clean_up()  # which the interpreter calls at its end

    return Job(run, log)


def generate(checkpoint: Path, out: Path, seed: int, *options: str) -> list[str]:
    return [
        "generate", "a red ball", "--checkpoint", str(checkpoint), *SMALL, "--seed", str(seed),
        "--out", str(out), *options,
    ]  # fmt: skip


def convert(checkpoint: Path, target: Path, dtype: str, *options: str) -> list[str]:
    return ["convert", str(checkpoint), str(target), "--dtype", dtype, *options]


def train(folder: Path, steps: int, log: Path) -> Job:
    """The small training run, which goes on from what the folder holds."""

    def run() -> None:
        import training_run

        training_run.run(folder, steps)

    return Job(run, log)


def restored(folder: Path, log: Path) -> Job:
    """Restores the newest state, and says its step."""

    def run() -> None:

        from cosmos3_jax.training.checkpoints import Checkpoints

        with Checkpoints(folder) as states:
            print("step", 0 if states.last is None else int(states.restore(state()).step))

    def state():
        import training_run

        return training_run.start()[0]

    return Job(run, log)


def digest(path: Path) -> dict[str, str]:
    """A file, or all files of a folder, by their contents; empty if there is none."""
    if path.is_file():
        return {"": hashlib.sha256(path.read_bytes()).hexdigest()}
    files = sorted(each for each in path.rglob("*") if each.is_file())
    return {
        str(each.relative_to(path)): hashlib.sha256(each.read_bytes()).hexdigest() for each in files
    }


def left(folder: Path) -> list[str]:
    """Names of temporary files and folders, and of locks."""
    return sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.name.startswith(".") or any(part in path.name for part in TEMPORARY)
    )


def record_of(video: Path) -> dict | None:
    """The record beside a video that has its seed, or None."""
    from cosmos3_jax.cli.record import read_record

    inside = read_record(video)
    for name in (video.with_suffix(".json"), video.with_name(f"{video.name}.json")):
        if name.is_file() and json.loads(name.read_text())["seed"] == inside["seed"]:
            return inside
    return None
