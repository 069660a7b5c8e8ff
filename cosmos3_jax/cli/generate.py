"""`cosmos3-jax generate`: from the command line's options to files and the records beside them."""

import argparse
import logging
import math
import os
import sys
import time
from functools import partial

import jax
from jax.sharding import Mesh

from cosmos3_jax.checkpoint import digests
from cosmos3_jax.checkpoint.find import BUILT_IN, find_checkpoint
from cosmos3_jax.cli import told
from cosmos3_jax.cli.options import DEFAULT_PROMPT, numbers
from cosmos3_jax.cli.outputs import Take, check_kind, latents_kept, plan, save_latents, timed, write
from cosmos3_jax.cli.record import (
    Record,
    differences,
    make_record,
    parse_lora,
    read_record,
    sampled_only,
)
from cosmos3_jax.io.noise import load_noise
from cosmos3_jax.io.prepare import Prepared, with_seed
from cosmos3_jax.io.prompt import read_prompt
from cosmos3_jax.parallel import device, distributed, launchers
from cosmos3_jax.parallel.mesh import IDLE, Meshes, describe
from cosmos3_jax.pipeline import Cosmos3
from cosmos3_jax.runtime import memory
from cosmos3_jax.runtime.job import Job
from cosmos3_jax.runtime.sampler_state import StateFile
from cosmos3_jax.sampling.request import Request
from cosmos3_jax.sampling.stages import Stage, Values

log = logging.getLogger("cosmos3_jax")


def run_generate(options: argparse.Namespace) -> int:
    distributed.start(
        launchers.find_processes(
            os.environ, options.coordinator, options.processes, options.process_id
        )
    )
    if not distributed.is_writer():
        log.setLevel(logging.ERROR)
    takes = plan(options)
    settings = _settings(options)
    times: dict[str, float] = {}
    with timed(times, "preprocess"):
        loras = [parse_lora(text) for text in options.lora or []]
        model = Cosmos3.open(
            options.checkpoint, load_sound=bool(options.sound), lora=loras or None,
            revision=options.revision,
        )  # fmt: skip
        prompt = _prompt(options)
        check = partial(_check_fits, options, model)
        first = model.resolve(prompt, **settings, seed=takes[0].seed, check=check)
        prepared = [first, *(with_seed(first, take.seed) for take in takes[1:])]
        request = first.request
        check_kind(options, takes[0].out, first)
        block_steps = model.steps_per_program(request, options.steps_per_program)
    device.use_compilation_cache(not options.no_compilation_cache)
    job, meshes = _place(options, model, request)
    _say_mesh(meshes.of(job.batch, job.guidance))
    memory.check_fits(model.config, device.memory_limit(), job)  # with the pixels that are given
    log.info(_summary(options, prepared[0], job))
    files, negative = _files(options), settings["negative_prompt"]
    records = [
        make_record(options, files, one, job, block_steps, prompt, negative, take.seed)
        for take, one in zip(takes, prepared, strict=True)
    ]
    if distributed.are_several():
        for record, one in zip(records, prepared, strict=True):
            distributed.check_alike(told.everything(options, record, one.request))
    states = [
        None if options.checkpoint_every is None
        else StateFile(take.out, options.checkpoint_every, told.settled(record))
        for take, record in zip(takes, records, strict=True)
    ]  # fmt: skip
    if distributed.is_writer():
        for take, state in zip(takes, states, strict=True):
            take.resumed = state is not None and state.check()
    if options.from_record and distributed.is_writer():
        recorded = read_record(options.from_record)
        for words in differences(recorded, records[0]):
            log.warning("differs from the record: %s", words)
        if sampled := sampled_only(recorded, records[0]):
            log.info("compared by samples only, for want of --full-digest: %s", ", ".join(sampled))
    bars = sys.stderr.isatty() and distributed.is_writer()
    with memory.exhaustion_explained(model.config, device.memory_limit(), job):
        with timed(times, "model_load"):
            model.load(job.dtype, offload=job.offload, mesh=meshes, progress=bars)
    for number, (take, one) in enumerate(zip(takes, prepared, strict=True)):
        take.times = dict(times) if number == 0 else {}
        if len(takes) > 1:
            log.info("%d of %d: seed %d", number + 1, len(takes), take.seed)
        with latents_kept(take):
            result = model.run(
                one.request,
                steps_per_program=block_steps,
                progress=bars,
                after=partial(_after, take, options.overwrite, _Clock(take.times)),
                states=states[number],
            )
        with timed(take.times, "to_cpu"):
            result = distributed.to_host(result)
        if distributed.is_writer():
            write(options, take, result, records[number])
            if states[number] is not None:
                states[number].remove()
    return 0


def _prompt(options: argparse.Namespace) -> str:
    if options.prompt_file:
        return read_prompt(options.prompt_file)
    for text in (options.text, options.prompt):
        if text is not None:
            return text
    if str(options.checkpoint) in BUILT_IN:
        return DEFAULT_PROMPT
    raise ValueError(
        'there is no prompt: give one, as in generate "A red ball rolls over grass", or '
        "--prompt-file caption.json"
    )


def _files(options: argparse.Namespace) -> Record:
    folder = find_checkpoint(options.checkpoint, weights=True, revision=options.revision)
    return digests.of_folder(folder, whole=options.full_digest)


def _summary(options: argparse.Namespace, prepared: Prepared, job: Job) -> str:
    settings = prepared.settings
    length = f"{settings.num_frames} frames at {settings.fps:g} a second"
    steps = prepared.request.num_inference_steps
    evaluated = f"{steps} step{'' if steps == 1 else 's'}"
    if settings.speed == "fast":
        evaluated = f"{steps} of {settings.num_inference_steps} steps (fast)"
    what = "an image" if settings.num_frames == 1 else length
    return (
        f"{options.checkpoint}: {what}, {settings.width}x{settings.height}, "
        f"{evaluated}, guidance {settings.guidance_scale:g}, "
        f"{job.dtype}"
    )


def _place(options: argparse.Namespace, model: Cosmos3, request: Request) -> tuple[Job, Meshes]:
    """Choose the devices for a request and whether to offload."""
    job = Job.of_request(model.config, request, dtype=options.dtype or device.default_dtype())
    wanted = {"auto": None, "yes": True, "no": False}[options.offload]
    meshes, offload = memory.choose_devices(
        model.config, device.memory_limit(), options.mesh or recorded_mesh(options), wanted, job
    )
    mesh = meshes.of(job.batch, job.guidance)
    sizes = {} if mesh is None else dict(mesh.shape)
    return job.replace(offload=offload, mesh=sizes), meshes


def _check_fits(options: argparse.Namespace, model: Cosmos3, request: Request) -> None:
    job, _ = _place(options, model, request)
    memory.check_fits(model.config, device.memory_limit(), job)


def _say_mesh(mesh: Mesh | None) -> None:
    if mesh is not None:
        used = mesh.size // mesh.shape.get(IDLE, 1)
        log.info("mesh %s: %d of %d devices", describe(mesh.shape), used, len(jax.devices()))


def recorded_mesh(options: argparse.Namespace) -> str | None:
    """The mesh of `--from-record`, where there are as many devices."""
    sizes, devices = getattr(options, "recorded_mesh", None), jax.device_count()
    if sizes is None or IDLE in sizes or devices == 1:  # as is chosen here too
        return None
    count = math.prod(sizes.values())
    if count > devices or (count < devices and jax.process_count() > 1):
        return None
    return ",".join(f"{name}={size}" for name, size in sizes.items()) or "data=1"


class _Clock:
    """Adds the seconds since it was last asked to a stage's."""

    def __init__(self, times: dict[str, float]):
        self.times, self.last = times, time.perf_counter()

    def __call__(self, stage: str) -> None:
        now = time.perf_counter()
        self.times[stage] = self.times.get(stage, 0.0) + now - self.last
        self.last = now


def _after(take: Take, overwrite: bool, clock: _Clock, stage: Stage, values: Values) -> None:
    """When a stage has ended: note its time, and keep the latents before they are decoded."""
    clock("decode" if "decode" in stage.name else "denoise")
    if stage.loop:
        take.denoised = values["latents"]
    if stage.loop and take.latents_path:
        arrays = distributed.to_host(values["latents"])
        if distributed.is_writer():
            save_latents(take, arrays, overwrite or take.resumed)


def _settings(options: argparse.Namespace) -> dict:
    """The arguments of `Cosmos3.prepare` that the command line names; the rest comes from the
    recipe.
    """
    names = (
        "num_frames", "size", "aspect", "height", "width", "fps", "num_inference_steps",
        "guidance_scale", "flow_shift", "schedule", "prompt_style", "prompt_metadata",
        "system_prompt", "negative_prompt", "image", "video", "keep", "speed", "evaluations",
    )  # fmt: skip
    settings = {name: getattr(options, name) for name in names} | {"sound": bool(options.sound)}
    if options.negative_prompt_file:
        settings["negative_prompt"] = read_prompt(options.negative_prompt_file)
    if options.sigmas:
        settings["sigmas"] = numbers("--sigmas", options.sigmas)
    if options.condition_frames is not None:
        settings["condition_frames"] = numbers(
            "--condition-frames", options.condition_frames, int, "whole numbers"
        )
    if options.noise:
        settings |= load_noise(options.noise)
    return settings
