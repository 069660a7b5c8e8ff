"""The files of `cosmos3-jax generate`: their names, what they can hold, how they are written."""

import argparse
import dataclasses
import logging
import re
import secrets
import tempfile
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cosmos3_jax.checkpoint import publish
from cosmos3_jax.cli.options import numbers
from cosmos3_jax.cli.record import Record, parse_lora, to_comment, to_text
from cosmos3_jax.io import media
from cosmos3_jax.io.encode import (
    ANIMATIONS,
    CONTAINERS,
    IMAGE_SUFFIXES,
    VIDEO_SUFFIXES,
    check_size,
)
from cosmos3_jax.io.prepare import Prepared
from cosmos3_jax.io.settings import Settings
from cosmos3_jax.parallel import device, distributed
from cosmos3_jax.runtime.memory import OutOfDeviceMemory
from cosmos3_jax.runtime.sampler_state import beside

ONLY_IMAGES = tuple(suffix for suffix in IMAGE_SUFFIXES if suffix not in ANIMATIONS)
MOST_FILES = 10_000  # of one command

log = logging.getLogger("cosmos3_jax")


@dataclasses.dataclass
class Take:
    """One of the files to make: its seed, its paths and the seconds of its stages.

    Attributes:
        resumed: whether it goes on from a sampler's state on disk: then the latents that are there
            may be the interrupted run's, and are replaced.
        failures: what could not be written where it should be, in words.
        denoised: the latents, once they are made.
    """

    seed: int
    out: Path
    record_path: Path
    latents_path: Path | None
    resumed: bool = False
    times: dict[str, float] = dataclasses.field(default_factory=dict)
    failures: list[str] = dataclasses.field(default_factory=list)
    denoised: Mapping[str, Any] | None = None


def plan(options: argparse.Namespace) -> list[Take]:
    """The files to make, after a check that they can be written.

    A name such as `still.png` sets `options.num_frames` to 1 where nothing else is said.

    Raises:
        ValueError: a file would be written and is also read, or a seed cannot be read.
        OSError: a file exists, or cannot be written.
    """
    out = options.out or Path("output.png" if options.num_frames == 1 else "output.mp4")
    if options.num_frames is None and out.suffix.lower() in ONLY_IMAGES:
        options.num_frames = 1
    inputs = [
        options.prompt_file, options.negative_prompt_file, options.noise, options.image,
        options.video, options.from_record,
    ]  # fmt: skip
    inputs += [path for path, _ in map(parse_lora, options.lora or [])]
    read = {Path(path).resolve() for path in inputs if path is not None}
    seeds = _seeds(options)
    takes = []
    for seed in seeds:
        several = f"-seed{seed}" if len(seeds) > 1 else ""
        path, latents = out.with_stem(out.stem + several), options.save_latents
        if latents is not None:
            latents = latents.with_stem(latents.stem + several)
        take = Take(seed, path, _record_path(path, read, options.overwrite), latents)
        interrupted = options.checkpoint_every is not None and any(beside(path))
        outputs: dict[Path, tuple[str, ...] | None] = {
            path: (*dict.fromkeys((*VIDEO_SUFFIXES, *IMAGE_SUFFIXES)),), take.record_path: None
        }  # fmt: skip
        if latents is not None:
            outputs[latents] = (".npz",)
        for path, suffixes in outputs.items():
            if path.resolve() in read:
                raise ValueError(f"{path} would be written and is also read; choose another --out")
            if distributed.is_writer():
                replace = options.overwrite or (interrupted and path == latents)
                media.check_writable(path, replace, suffixes)
        takes.append(take)
    return takes


def _record_path(out: Path, read: set[Path], overwrite: bool) -> Path:
    """`car.json` for `car.mp4`; `car.mp4.json` if that is another file's, such as a prompt."""
    path = out.with_suffix(".json")
    taken = path.resolve() in read or (path.exists() and not overwrite)
    return out.with_name(f"{out.name}.json") if taken else path


def _seeds(options: argparse.Namespace) -> list[int]:
    if not 1 <= options.count <= MOST_FILES:
        raise ValueError(f"--count {options.count} must be at least 1 and at most {MOST_FILES}")
    if options.seeds is not None:
        seeds = numbers("--seeds", _listed(options.seeds), int, "whole numbers")
        if options.count != 1:
            raise ValueError(f"--count {options.count} beside --seeds {options.seeds}: give one")
        if len(seeds) > MOST_FILES:
            raise ValueError(f"--seeds has {len(seeds)} seeds; give at most {MOST_FILES}")
        if len(set(seeds)) != len(seeds):
            raise ValueError(f"--seeds {options.seeds} has a seed twice")
        return seeds
    seed = Settings().seed if options.seed is None else options.seed
    if seed == -1:
        if distributed.are_several():
            raise ValueError("--seed -1 would draw another one in each process: name a seed")
        seed = secrets.randbelow(2**32 - options.count)
        log.info("seed %d", seed)
    return [seed + number for number in range(options.count)]


def _listed(seeds: str) -> str:
    """`1-3,7` -> `1,2,3,7`, cut off where there are too many."""

    def one(found: re.Match) -> str:
        first, last = int(found[1]), int(found[2])
        return ",".join(map(str, range(first, min(last, first + MOST_FILES) + 1)))

    return re.sub(r"(?<![^,])(\d+)-(\d+)(?![^,])", one, seeds)


def check_kind(options: argparse.Namespace, out: Path, prepared: Prepared) -> None:
    """Raise ValueError if the file that is named cannot hold what is made."""
    settings, suffix = prepared.settings, out.suffix.lower()
    one_frame = settings.num_frames == 1
    if one_frame and suffix not in IMAGE_SUFFIXES:
        raise ValueError(
            f"--out {out}: one frame is an image, {', '.join(IMAGE_SUFFIXES)}; name such a file, "
            "or change --num-frames"
        )
    if not one_frame and suffix not in VIDEO_SUFFIXES:
        raise ValueError(
            f"--out {out}: a video is one of {', '.join(VIDEO_SUFFIXES)}; name such a file, or "
            "change --num-frames"
        )
    if options.sound and suffix not in CONTAINERS:
        raise ValueError(
            f"--out {out}: such a file holds no sound; name one of {', '.join(CONTAINERS)}, or "
            "say --no-sound"
        )
    media.frame_rate(float(settings.fps))  # raises on a rate that no file can have
    check_size(suffix, settings.width, settings.height)


def write(options: argparse.Namespace, take: Take, result: Mapping, record: Record) -> None:
    """The file and its record, and the times on the terminal.

    Raises OSError if one of them, or the latents before, could not be written where it should be;
    it says where it is instead (see `_saved`).
    """
    log.info("writing %s", take.out)
    comment = to_comment(record) if options.metadata else None
    save = media.save_image if result["video"].shape[2] == 1 else media.save_video
    with timed(take.times, "encode"):
        out = _saved(take, take.out, options.overwrite, partial(save, result, comment=comment))
    take.times["total"] = sum(take.times.values())
    record |= {
        "peak_memory_bytes": device.memory_peak(),
        "seconds": {stage: round(seconds, 3) for stage, seconds in take.times.items()},
    }
    if out is None:
        raise OSError("; ".join(take.failures))
    path = take.record_path if out == take.out else out.with_name(f"{out.name}.json")
    path = _saved(take, path, options.overwrite, partial(_write_text, to_text(record)))
    for stage, seconds in take.times.items():
        print(f"{stage:>10}  {seconds:8.2f} s")
    print(f"wrote {', '.join(str(name) for name in (out, path, take.latents_path) if name)}")
    if take.failures:
        again = f"; {out} is whole, so that the same command needs --overwrite or another --out"
        raise OSError("; ".join(take.failures) + again * (out == take.out))


@contextmanager
def latents_kept(take: Take) -> Generator[None, None, None]:
    """If the device's memory ends while latents are decoded, they are written beside the output.

    Raises OutOfDeviceMemory, with a line on where they are.
    """
    try:
        yield
    except OutOfDeviceMemory as error:
        # In several processes all would have to ask for them.
        if take.denoised is None or distributed.are_several():
            raise
        if take.latents_path is None:
            take.latents_path = take.out.with_suffix(".latents.npz")
            save_latents(take, {k: np.asarray(v) for k, v in take.denoised.items()}, False)
        if take.latents_path is None:
            raise
        raise OutOfDeviceMemory(
            f"{error} The denoised latents are kept in {take.latents_path}: Cosmos3.decode, in "
            "Python, makes the video of them"
        ) from error
    finally:
        take.denoised = None  # of many files, each would keep some of the device


def save_latents(take: Take, arrays: Mapping[str, Any], overwrite: bool) -> None:
    """Write an npz file. Where it cannot be written, the video is made nevertheless: that is said
    now, and raised by `write`. Sets `take.latents_path` to the path that was written, or to None.
    """

    def save(path: Path, overwrite: bool) -> Path:
        with media.writing(path, overwrite, (".npz",)) as target:
            with target.temporary.open("wb") as file:
                np.savez(file, **arrays)
        return target.path

    if take.latents_path is not None:
        take.latents_path = _saved(take, take.latents_path, overwrite, save)
        for failure in take.failures:
            log.warning("%s", failure)


def _write_text(text: str, path: Path, overwrite: bool) -> Path:
    return media.write_text(path, text, overwrite)


def _saved(take: Take, path: Path, overwrite: bool, write: Callable[..., Path]) -> Path | None:
    """The path that `write(path, overwrite=...)` returns.

    If the disk or its folder does not take the file, what was made is saved among the temporary
    files, under a free name, and `take.failures` gets the words; None if they do not take it
    either.
    """
    cleaned = publish.times_cleaned()
    try:
        return write(path, overwrite=overwrite)
    except OSError as error:
        if publish.times_cleaned() > cleaned:  # this process is about to end
            raise
        failure = f"{error.strerror or error}"
    saved = None
    try:
        saved = write(Path(tempfile.gettempdir()) / path.name, overwrite=False)
    except OSError as error:
        take.failures.append(f"{failure}; nor elsewhere: {error.strerror or error}")
    else:
        take.failures.append(f"{failure}; instead it is in {saved}")
    return saved


@contextmanager
def timed(times: dict[str, float], stage: str) -> Generator[None, None, None]:
    """Notes the seconds of its block."""
    start = time.perf_counter()
    yield
    times[stage] = time.perf_counter() - start
