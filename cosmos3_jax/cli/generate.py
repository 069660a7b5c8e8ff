"""`cosmos3-jax generate`: from the command line's options to a file and the record beside it."""

import argparse
import dataclasses
import hashlib
import json
import os
import platform
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import av
import jax
import numpy as np
import PIL

import cosmos3_jax
from cosmos3_jax.checkpoint import publish
from cosmos3_jax.io import media
from cosmos3_jax.io.prepare import Prepared
from cosmos3_jax.io.prompt import read_prompt
from cosmos3_jax.parallel import device, distributed
from cosmos3_jax.parallel.mesh import IDLE, Meshes, describe
from cosmos3_jax.pipeline import Cosmos3
from cosmos3_jax.runtime import memory
from cosmos3_jax.runtime.job import Job
from cosmos3_jax.sampling.denoise import all_steps
from cosmos3_jax.sampling.request import Request
from cosmos3_jax.sampling.stages import Stage, Values


def run_generate(options: argparse.Namespace) -> int:
    distributed.start(
        distributed.find_processes(
            os.environ, options.coordinator, options.processes, options.process_id
        )
    )
    out = options.out or Path("output.png" if options.num_frames == 1 else "output.mp4")
    record_path = out.with_suffix(".json")
    outputs: dict[Path, tuple[str, ...] | None] = {
        out: (".mp4", *media.IMAGE_SUFFIXES), record_path: None
    }  # fmt: skip
    if options.save_latents:
        outputs[options.save_latents] = (".npz",)
    inputs = [
        options.prompt_file, options.negative_prompt_file, options.noise, options.image,
        options.video,
    ]  # fmt: skip
    read = {path.resolve() for path in inputs if path is not None}
    for path, suffixes in outputs.items():
        if path.resolve() in read:
            raise ValueError(f"{path} would be written and is also read; choose another --out")
        if distributed.is_writer():
            media.check_writable(path, options.overwrite, suffixes)
    given = {name: _file(getattr(options, name)) for name in ("image", "video")}
    settings = _settings(options)
    prompt = read_prompt(options.prompt_file) if options.prompt_file else options.prompt
    times: dict[str, float] = {}
    with _timed(times, "preprocess"):
        loras = [parse_lora(text) for text in options.lora]
        model = Cosmos3.open(options.checkpoint, load_sound=options.sound, lora=loras or None)
        prepared = model.resolve(prompt, **settings)
        request = prepared.request
        one_frame = request.video_shape[0] == 1
        if one_frame != (out.suffix.lower() in media.IMAGE_SUFFIXES):
            kind = "one frame is an image: .png or .jpg" if one_frame else "a video is an .mp4"
            raise ValueError(f"--out {out}: {kind}; name such a file, or change --num-frames")
        media.frame_rate(float(request.fps))  # raises on a rate that no mp4 can have
        block_steps = model.steps_per_program(request, options.steps_per_program)
    device.use_compilation_cache(not options.no_compilation_cache)
    job, meshes = _place(options, model, request)
    _check_alike(options, request, job)
    memory.check_fits(model.config, device.memory_limit(), job)
    with memory.exhaustion_explained(model.config, device.memory_limit(), job):
        with _timed(times, "model_load"):
            model.load(job.dtype, offload=job.offload, mesh=meshes)
    result = model.run(
        request,
        steps_per_program=block_steps,
        progress=sys.stderr.isatty() and distributed.is_writer(),
        after=partial(_after, options.save_latents, _Clock(times)),
    )
    with _timed(times, "to_cpu"):
        result = distributed.to_host(result)
    if not distributed.is_writer():
        return 0
    with _timed(times, "encode"):
        if one_frame:
            media.save_image(result["video"][0], out, overwrite=options.overwrite)
        else:
            media.save_mp4(result, out, fps=float(request.fps), overwrite=options.overwrite)
    times["total"] = sum(times.values())
    negative_prompt = settings["negative_prompt"]
    record = _record(options, prepared, job, block_steps, prompt, negative_prompt, times) | given
    media.write_text(record_path, json.dumps(record, indent=2) + "\n", overwrite=options.overwrite)
    for stage, seconds in times.items():
        print(f"{stage:>10}  {seconds:8.2f} s")
    print(f"wrote {', '.join(map(str, outputs))}")
    return 0


def _place(options: argparse.Namespace, model: Cosmos3, request: Request) -> tuple[Job, Meshes]:
    """Choose the devices for a request and whether to offload, and say which they are."""
    job = Job.of_request(model.config, request, dtype=options.dtype or device.default_dtype())
    wanted = {"auto": None, "yes": True, "no": False}[options.offload]
    meshes, offload = memory.choose_devices(
        model.config, device.memory_limit(), options.mesh, wanted, job
    )
    mesh = meshes.of(job.batch, job.guidance)
    if mesh is not None and distributed.is_writer():
        used = mesh.size // mesh.shape.get(IDLE, 1)
        print(
            f"mesh {describe(mesh.shape)}: {used} of {len(jax.devices())} devices", file=sys.stderr
        )
    sizes = {} if mesh is None else dict(mesh.shape)
    return job.replace(offload=offload, mesh=sizes), meshes


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
        "num_frames", "height", "width", "fps", "num_inference_steps", "guidance_scale",
        "flow_shift", "schedule", "seed", "sound", "prompt_style",
        "system_prompt", "negative_prompt", "image", "video", "keep",
    )  # fmt: skip
    settings = {name: getattr(options, name) for name in names}
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


def parse_lora(text: str) -> tuple[Path, float]:
    """FILE or FILE:FACTOR -> the file and its factor."""
    name, _, factor = text.rpartition(":")
    try:
        return Path(name or text), float(factor) if name else 1.0
    except ValueError:  # a colon that belongs to the name
        return Path(text), 1.0


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


def _record(
    options: argparse.Namespace,
    prepared: Prepared,
    job: Job,
    block_steps: int,
    prompt: str,
    negative_prompt: str | None,
    times: dict[str, float],
) -> dict:
    """Everything needed to make the same video again, from what was resolved."""
    request, settings, [texts] = prepared.request, prepared.settings, prepared.texts
    negative_mask = request.neg_text_mask
    return {
        "checkpoint": str(options.checkpoint),
        "lora": [
            {"factor": factor, **(_file(path) or {"path": str(path)})}
            for path, factor in map(parse_lora, options.lora)
        ],
        "prompt": prompt,
        "negative_prompt": negative_prompt,
        "system_prompt": options.system_prompt,
        "resolved_prompt": texts.prompt,
        "resolved_negative_prompt": texts.negative_prompt if job.guidance else None,
        "resolved_system_prompt": texts.system_prompt,
        "prompt_style": options.prompt_style,
        "prompt_tokens": int(request.text_mask.sum()),
        "negative_prompt_tokens": None if negative_mask is None else int(negative_mask.sum()),
        "num_frames": settings.num_frames,
        "height": settings.height,
        "width": settings.width,
        "fps": float(settings.fps),
        "sound_frames": request.sound_frames,
        "seed": options.seed,
        "noise": str(options.noise) if options.noise else None,
        "condition_frames": np.flatnonzero(request.frame_mask[0]).tolist()
        if request.frame_mask is not None
        else [],
        "keep": (options.keep or "first") if options.video else None,
        "num_inference_steps": request.num_inference_steps,
        "guidance_scale": float(request.guidance_scale),
        "sigmas": prepared.sigmas.tolist(),
        "steps_per_program": block_steps,
        "timesteps": [*map(int, all_steps(request).solver.timestep)],
        "dtype": job.dtype,
        "offload": job.offload,
        "device": device.default_device().device_kind,
        "mesh": dict(job.mesh),
        "processes": jax.process_count(),
        "peak_memory_bytes": device.memory_peak(),
        "versions": {
            "cosmos3_jax": cosmos3_jax.__version__,
            "jax": jax.__version__,
            "numpy": np.__version__,
            "pillow": PIL.__version__,
            "av": av.__version__,
            "python": platform.python_version(),
        },
        "seconds": {stage: round(seconds, 3) for stage, seconds in times.items()},
    }


def _file(path: Path | None) -> dict[str, str] | None:
    """A file that will be read, and what is in it."""
    if path is None or not path.is_file():
        return None
    with path.open("rb") as file:
        return {"path": str(path), "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


@contextmanager
def _timed(times: dict[str, float], stage: str) -> Generator[None, None, None]:
    start = time.perf_counter()
    yield
    times[stage] = time.perf_counter() - start
