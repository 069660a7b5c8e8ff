"""How one bad input is tried: in a process of its own, with limits, and what is said of its end.

A process that has imported everything and started no device is forked for each input, so that one
costs milliseconds, and nothing that one input does is seen by the next.
"""

import dataclasses
import gc
import json
import os
import random
import re
import resource
import select
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import av

SECONDS = 10.0  # of a processor; what waits for longer than WAIT hangs too
WAIT = 30.0
BYTES = 2 * 2**30  # of the memory that a process holds
ROOM = 4 * 2**30  # that it may ask for: what asks for more is stopped, and told from a refusal
LONGEST = 1000  # letters of a message
# What may come of an input; all but the first two are failures.
OUTCOMES = ("accepted", "refused", "wrong", "words", "traceback", "hang", "memory", "crash")
REFUSALS = (ValueError, OSError, TypeError)


@dataclasses.dataclass(frozen=True)
class Case:
    """One input, made.

    Attributes:
        read: asks the package to read it.
        name: what a refusal must name; None if there is no file.
        own: whether it is the caller's own value, which a refusal may say back as it is.
        check: given what `read` returned, says what is wrong with it, or returns None.
    """

    read: Callable[[], Any]
    name: str | None = None
    own: bool = False
    check: Callable[[Any], str | None] = lambda _: None


Make = Callable[[random.Random, Path], Case]


@dataclasses.dataclass(frozen=True)
class Result:
    """What came of one input: an outcome, words about it, seconds, and bytes of memory."""

    reader: str
    seed: int
    outcome: str
    words: str
    seconds: float
    memory: int

    @property
    def failed(self) -> bool:
        return self.outcome not in OUTCOMES[:2]


def attempt(case: Case) -> tuple[str, str]:
    """The outcome of a case, in this process, and words about it."""
    try:
        found = case.read()
    except MemoryError as error:
        return "memory", repr(error)
    except REFUSALS as error:
        return _judge(error, case)
    except SystemExit as error:
        return "traceback", f"SystemExit {error.code!r}"
    except BaseException as error:
        return "traceback", _where(error)
    problem = case.check(found)
    return ("wrong", problem) if problem else ("accepted", "")


def _judge(error: BaseException, case: Case) -> tuple[str, str]:
    cause: BaseException | None = error
    while cause is not None:
        # FFmpeg has a bound of its own for what it asks for at once, and such an error for it.
        if isinstance(cause, MemoryError) and not isinstance(cause, av.error.FFmpegError):
            return "memory", f"{error}"
        cause = cause.__cause__ or cause.__context__
    words = str(error)
    if case.own:
        words = "".join(x if x.isprintable() else "?" for x in re.sub(r"(.)\1{99,}", r"\1", words))
    if problem := wrong_words(words, case.name):
        return "words", f"{problem}: {type(error).__name__}: {words[:2000]}"
    return "refused", f"{type(error).__name__}: {words}"


def wrong_words(words: str, name: str | None) -> str | None:
    """What is wrong with a message: it is one line, of bounded length, that names the file. A list
    of tensors that differ may follow, each on a short line of its own.
    """
    first, *others = words.split("\n")
    if not words.strip():
        return "no words"
    if any(not line.startswith("  ") for line in others):
        return "several lines"
    if len(first) > LONGEST or len(words) > 12 * LONGEST:
        return "too long"
    if not all(letter.isprintable() or letter == "\n" for letter in words):
        return "unprintable letters"
    if name is not None and name not in words:
        return f"does not name {name}"
    return None


def _where(error: BaseException) -> str:
    """An exception that nobody caught, and the last place in the package that it went through."""
    places, trace = [], error.__traceback__
    while trace is not None:
        places.append(f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}")
        trace = trace.tb_next
    return f"{type(error).__name__}: {str(error)[:300]} at {' '.join(places[-6:])}"


def try_input(reader: str, make: Make, seed: int, folder: Path) -> Result:
    """Make one input in a forked process, read it there, and wait for the end.

    Args:
        reader: its name, for the result.
        make: of the reader.
        seed: says which input.
        folder: a new one, for the files of the input.
    """
    folder.mkdir(parents=True)
    ours, theirs = os.pipe()
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        os.close(ours)
        _in_child(reader, make, seed, folder, theirs)
    os.close(theirs)
    answer, in_time = _received(ours, start + WAIT)
    if not in_time:
        os.kill(child, signal.SIGKILL)
    _, status, usage = os.wait4(child, 0)
    spent, memory = time.monotonic() - start, usage.ru_maxrss * 1024
    computed = usage.ru_utime + usage.ru_stime
    if not in_time or computed > SECONDS:
        outcome, words = "hang", f"{computed:.1f} s of a processor in {spent:.1f} s"
    elif not answer:
        outcome, words = "crash", f"status {os.waitstatus_to_exitcode(status)}"
    else:
        outcome, words = json.loads(answer)
        if memory > BYTES:
            outcome, words = "memory", f"{memory / 2**20:.0f} MiB, {outcome}: {words}"
    return Result(reader, seed, outcome, words, spent, memory)


def _received(pipe: int, until: float) -> tuple[bytes, bool]:
    """What a pipe brings to its end, and whether it came in time."""
    answer = b""
    with open(pipe, "rb", buffering=0) as file:
        while (left := until - time.monotonic()) > 0:
            if select.select([file], [], [], left)[0]:
                part = file.read(2**16)
                if not part:
                    return answer, True
                answer += part
    return answer, False


def _in_child(reader: str, make: Make, seed: int, folder: Path, pipe: int) -> None:
    """In the forked process, which it ends."""
    try:
        silence = os.open(os.devnull, os.O_RDWR)
        for stream in range(3):
            os.dup2(silence, stream)
        used = next(
            int(line.split()[1]) * 1024
            for line in Path("/proc/self/status").read_text().splitlines()
            if line.startswith("VmData:")
        )
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (used + ROOM, hard))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.chdir(folder)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                case = make(random.Random(f"{reader} {seed}"), folder)
                outcome = attempt(case)
        except BaseException as error:
            outcome = ("traceback", f"of the fuzzer itself: {_where(error)}")
        with open(pipe, "wb") as file:
            file.write(json.dumps(outcome).encode())
    finally:
        os._exit(0)


def try_all(
    inputs: Iterable[tuple[str, Make, int]], kept: Path, workers: int = 1
) -> Iterator[Result]:
    """Try inputs; the files of those that fail stay in a folder.

    Args:
        inputs: the reader's name, its `make` and the seed of each.
        kept: for the folders `READER-SEED`.
        workers: how many are tried at a time.
    """

    def one(given: tuple[str, Make, int]) -> dict[str, Any]:
        reader, make, seed = given
        folder = kept / f"{reader}-{seed}"
        shutil.rmtree(folder, ignore_errors=True)
        result = try_input(reader, make, seed, folder)
        if not result.failed:
            shutil.rmtree(folder, ignore_errors=True)
        return dataclasses.asdict(result)

    yield from (Result(**found) for found in spread(one, [*inputs], workers))


def spread(function: Callable[[Any], Any], values: list[Any], workers: int) -> Iterator[Any]:
    """What a function returns of each value, as it comes, from so many forked processes. Those that
    end early leave values out.
    """
    gc.collect()
    gc.freeze()  # else each child would copy pages to count references in them
    pipes = {}
    sys.stdout.flush()
    for worker in range(workers):
        ours, theirs = os.pipe()
        if (pid := os.fork()) == 0:
            status = 1
            try:
                os.close(ours)
                with open(theirs, "wb", buffering=0) as file:
                    for value in values[worker::workers]:
                        file.write(json.dumps(function(value)).encode() + b"\n")
                status = 0
            finally:
                os._exit(status)
        os.close(theirs)
        pipes[os.fdopen(ours, "rb", buffering=0)] = pid
    while pipes:
        for pipe in select.select([*pipes], [], [])[0]:
            if line := pipe.readline():
                yield json.loads(line)
                continue
            os.waitpid(pipes.pop(pipe), 0)
            pipe.close()
