"""`cosmos3-jax generate`: from the command line's options to files and the records beside them."""

import argparse
import dataclasses
import logging
import os
import secrets
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import jax
import numpy as np

from cosmos3_jax.checkpoint import digests, publish
from cosmos3_jax.checkpoint.find import find_checkpoint
from cosmos3_jax.cli.options import DEFAULT_PROMPT
from cosmos3_jax.cli.record import (
    Record,
    differences,
    make_record,
    parse_lora,
    read_record,
    to_comment,
    to_text,
)
from cosmos3_jax.io import media
from cosmos3_jax.io.encode import ANIMATIONS, CONTAINERS, IMAGE_SUFFIXES, VIDEO_SUFFIXES
from cosmos3_jax.io.prepare import Prepared
from cosmos3_jax.io.prompt import read_prompt
from cosmos3_jax.io.settings import Settings
from cosmos3_jax.parallel import device, distributed
from cosmos3_jax.parallel.mesh import IDLE, Meshes, describe
from cosmos3_jax.pipeline import Cosmos3
from cosmos3_jax.runtime import memory
from cosmos3_jax.runtime.job import Job
from cosmos3_jax.sampling.request import Request
from cosmos3_jax.sampling.stages import Stage, Values

ONLY_IMAGES = tuple(suffix for suffix in IMAGE_SUFFIXES if suffix not in ANIMATIONS)

log = logging.getLogger("cosmos3_jax")


@dataclasses.dataclass
class Take:
    """One file of several: its seed, its paths, its request and the seconds of its stages."""

    seed: int
    out: Path
    record_path: Path
    latents_path: Path | None
    times: dict[str, float] = dataclasses.field(default_factory=dict)


def run_generate(options: argparse.Namespace) -> int:
    distributed.start(
        distributed.find_processes(
            os.environ, options.coordinator, options.processes, options.process_id
        )
    )
    if not distributed.is_writer():
        log.setLevel(logging.ERROR)
    out = options.out or Path("output.png" if options.num_frames == 1 else "output.mp4")
    if options.num_frames is None and out.suffix.lower() in ONLY_IMAGES:
        options.num_frames = 1
    takes = _takes(options, out)
    prompt, settings = _prompt(options), _settings(options)
    times: dict[str, float] = {}
    with _timed(times, "preprocess"):
        loras = [parse_lora(text) for text in options.lora or []]
        model = Cosmos3.open(
            options.checkpoint, load_sound=options.sound, lora=loras or None,
            revision=options.revision,
        )  # fmt: skip
        prepared = [model.resolve(prompt, **settings, seed=take.seed) for take in takes]
        request = prepared[0].request
        _check_kind(options, out, request)
        block_steps = model.steps_per_program(request, options.steps_per_program)
    device.use_compilation_cache(not options.no_compilation_cache)
    job, meshes = _place(options, model, request)
    for one in prepared:
        _check_alike(options, one.request, job)
    memory.check_fits(model.config, device.memory_limit(), job)
    log.info(_summary(options, prepared[0], job))
    files = _files(options) if distributed.is_writer() else {}
    negative = settings["negative_prompt"]
    records = [
        make_record(options, files, one, job, block_steps, prompt, negative, take.seed)
        for take, one in zip(takes, prepared, strict=True)
    ] if distributed.is_writer() else []  # fmt: skip
    if options.from_record and records:
        for words in differences(read_record(options.from_record), records[0]):
            log.warning("differs from the record: %s", words)
    with memory.exhaustion_explained(model.config, device.memory_limit(), job):
        with _timed(times, "model_load"):
            model.load(job.dtype, offload=job.offload, mesh=meshes)
    for number, (take, one) in enumerate(zip(takes, prepared, strict=True)):
        take.times = dict(times) if number == 0 else {}
        if len(takes) > 1:
            log.info("%d of %d: seed %d", number + 1, len(takes), take.seed)
        result = model.run(
            one.request,
            steps_per_program=block_steps,
            progress=sys.stderr.isatty() and distributed.is_writer(),
            after=partial(_after, take.latents_path, _Clock(take.times)),
        )
        with _timed(take.times, "to_cpu"):
            result = distributed.to_host(result)
        if distributed.is_writer():
            _write(options, take, result, records[number])
    return 0


def _takes(options: argparse.Namespace, out: Path) -> list[Take]:
    """The files to make, after a check that they can be written."""
    seeds = _seeds(options)
    inputs = [
        options.prompt_file, options.negative_prompt_file, options.noise, options.image,
        options.video,
    ]  # fmt: skip
    read = {path.resolve() for path in inputs if path is not None}
    takes = []
    for seed in seeds:
        several = f"-seed{seed}" if len(seeds) > 1 else ""
        path = out.with_stem(out.stem + several)
        latents = options.save_latents
        if latents is not None:
            latents = latents.with_stem(latents.stem + several)
        take = Take(seed, path, _record_path(path, read, options.overwrite), latents)
        outputs: dict[Path, tuple[str, ...] | None] = {
            path: (*VIDEO_SUFFIXES, *IMAGE_SUFFIXES), take.record_path: None
        }  # fmt: skip
        if latents is not None:
            outputs[latents] = (".npz",)
        for path, suffixes in outputs.items():
            if path.resolve() in read:
                raise ValueError(f"{path} would be written and is also read; choose another --out")
            if distributed.is_writer():
                media.check_writable(path, options.overwrite, suffixes)
        takes.append(take)
    return takes


def _record_path(out: Path, read: set[Path], overwrite: bool) -> Path:
    """`car.json` for `car.mp4`; `car.mp4.json` if that is another file's, such as a prompt."""
    path = out.with_suffix(".json")
    taken = path.resolve() in read or (path.exists() and not overwrite)
    return out.with_name(f"{out.name}.json") if taken else path


def _seeds(options: argparse.Namespace) -> list[int]:
    if options.count < 1:
        raise ValueError(f"--count {options.count} must be at least 1")
    if options.seeds is not None:
        seeds = _numbers("--seeds", options.seeds, int, "whole numbers")
        if options.count != 1:
            raise ValueError(f"--count {options.count} beside --seeds {options.seeds}: give one")
        if len(set(seeds)) != len(seeds):
            raise ValueError(f"--seeds {options.seeds} has a seed twice")
        return seeds
    seed = Settings().seed if options.seed is None else options.seed
    if seed == -1:
        seed = secrets.randbelow(2**32 - options.count)
        log.info("seed %d", seed)
    return [seed + number for number in range(options.count)]


def _prompt(options: argparse.Namespace) -> str:
    given = {
        "PROMPT": options.text, "--prompt": options.prompt, "--prompt-file": options.prompt_file
    }  # fmt: skip
    named = [name for name, value in given.items() if value is not None]
    if len(named) > 1 and not (options.from_record and named[-1] == "--prompt"):
        raise ValueError(f"{' and '.join(named)} are both given: give one prompt")
    if options.prompt_file:
        return read_prompt(options.prompt_file)
    if options.text is not None:
        return options.text
    return DEFAULT_PROMPT if options.prompt is None else options.prompt


def _check_kind(options: argparse.Namespace, out: Path, request: Request) -> None:
    """Raise if the file that is named cannot hold what is made."""
    suffix, one_frame = out.suffix.lower(), request.video_shape[0] == 1
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
            "leave --sound out"
        )
    media.frame_rate(float(request.fps))  # raises on a rate that no file can have


def _files(options: argparse.Namespace) -> Record:
    folder = find_checkpoint(options.checkpoint, weights=True, revision=options.revision)
    return digests.of_folder(folder, whole=options.full_digest)


def _summary(options: argparse.Namespace, prepared: Prepared, job: Job) -> str:
    settings = prepared.settings
    length = f"{settings.num_frames} frames at {settings.fps:g} a second"
    what = "an image" if settings.num_frames == 1 else length
    return (
        f"{options.checkpoint}: {what}, {settings.width}x{settings.height}, "
        f"{prepared.request.num_inference_steps} steps, guidance {settings.guidance_scale:g}, "
        f"{job.dtype}"
    )


def _place(options: argparse.Namespace, model: Cosmos3, request: Request) -> tuple[Job, Meshes]:
    """Choose the devices for a request and whether to offload, and say which they are."""
    job = Job.of_request(model.config, request, dtype=options.dtype or device.default_dtype())
    wanted = {"auto": None, "yes": True, "no": False}[options.offload]
    meshes, offload = memory.choose_devices(
        model.config, device.memory_limit(), options.mesh, wanted, job
    )
    mesh = meshes.of(job.batch, job.guidance)
    if mesh is not None:
        used = mesh.size // mesh.shape.get(IDLE, 1)
        log.info("mesh %s: %d of %d devices", describe(mesh.shape), used, len(jax.devices()))
    sizes = {} if mesh is None else dict(mesh.shape)
    return job.replace(offload=offload, mesh=sizes), meshes


def _write(options: argparse.Namespace, take: Take, result: dict, record: Record) -> None:
    """The file and its record, and the times on the terminal."""
    log.info("writing %s", take.out)
    comment = to_comment(record) if options.metadata else None
    with _timed(take.times, "encode"):
        save = media.save_image if result["video"].shape[2] == 1 else media.save_video
        out = save(result, take.out, overwrite=options.overwrite, comment=comment)
    take.times["total"] = sum(take.times.values())
    record |= {
        "peak_memory_bytes": device.memory_peak(),
        "seconds": {stage: round(seconds, 3) for stage, seconds in take.times.items()},
    }
    path = take.record_path if out == take.out else out.with_name(f"{out.name}.json")
    path = media.write_text(path, to_text(record), overwrite=options.overwrite)
    for stage, seconds in take.times.items():
        print(f"{stage:>10}  {seconds:8.2f} s")
    written = [out, path] + ([take.latents_path] if take.latents_path else [])
    print(f"wrote {', '.join(map(str, written))}")


class _Clock:
    """Adds the seconds since it was last asked to a stage's."""

    def __init__(self, times: dict[str, float]):
        self.times, self.last = times, time.perf_counter()

    def __call__(self, stage: str) -> None:
        now = time.perf_counter()
        self.times[stage] = self.times.get(stage, 0.0) + now - self.last
        self.last = now


def _after(save_latents: Path | None, clock: _Clock, stage: Stage, values: Values) -> None:
    """When a stage has ended: note its time, and keep the latents before they are decoded."""
    clock("decode" if "decode" in stage.name else "denoise")
    if stage.loop and save_latents:
        arrays = distributed.to_host(values["latents"])
        if distributed.is_writer():
            with publish.file(save_latents) as temporary, temporary.open("wb") as file:
                np.savez(file, **arrays)


def _check_alike(options: argparse.Namespace, request: Request, job: Job) -> None:
    """Raise if processes that work together were told different things."""
    said = {field.name: getattr(request, field.name) for field in dataclasses.fields(request)}
    said["sampler"] = [np.asarray(x).tolist() for x in jax.tree.leaves(request.sampler)]
    said |= {"--checkpoint": str(options.checkpoint), "--dtype": job.dtype}
    said |= {"--offload": job.offload, "--mesh": dict(job.mesh), "sound": options.sound}
    distributed.check_alike(said)


def _settings(options: argparse.Namespace) -> dict:
    """The arguments of `Cosmos3.prepare` that the command line names; the rest comes from the
    recipe.
    """
    names = (
        "num_frames", "size", "aspect", "height", "width", "fps", "num_inference_steps",
        "guidance_scale", "flow_shift", "schedule", "prompt_style", "prompt_metadata",
        "system_prompt", "negative_prompt", "image", "video", "keep",
    )  # fmt: skip
    for one, other in (("image", "video"), ("negative_prompt", "negative_prompt_file")):
        if getattr(options, one) is not None and getattr(options, other) is not None:
            options.parser.error(
                f"--{other} and --{one} are both given: give one".replace("_", "-")
            )
    settings = {name: getattr(options, name) for name in names} | {"sound": bool(options.sound)}
    if options.negative_prompt_file:
        settings["negative_prompt"] = read_prompt(options.negative_prompt_file)
    if options.sigmas:
        settings["sigmas"] = _numbers("--sigmas", options.sigmas)
    if options.condition_frames is not None:
        settings["condition_frames"] = _numbers(
            "--condition-frames", options.condition_frames, int, "whole numbers"
        )
    if options.noise:
        settings |= _load_noise(options.noise)
    return settings


def _numbers(option: str, text: str, kind: type = float, kinds: str = "numbers") -> list:
    try:
        return [kind(number) for number in text.split(",")]
    except ValueError as error:
        raise ValueError(f"{option} {text!r} must be {kinds} with commas between them") from error


def _load_noise(path: Path) -> dict[str, np.ndarray]:
    """`noise` and, if it is there, `sound_noise` of an npz file."""
    try:
        with np.load(path) as arrays:
            found = {name: arrays[name] for name in ("noise", "sound_noise") if name in arrays}
    except Exception as error:  # numpy, zipfile and zlib raise half a dozen kinds
        raise ValueError(f"--noise {path} cannot be read as an npz file: {error}") from error
    if "noise" not in found:
        raise ValueError(f"--noise {path} holds no array named noise")
    return found


@contextmanager
def _timed(times: dict[str, float], stage: str) -> Generator[None, None, None]:
    start = time.perf_counter()
    yield
    times[stage] = time.perf_counter() - start
