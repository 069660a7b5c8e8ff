"""Time, memory and rate of each stage of a generation, compiled anew and measured warm.

Its inputs are in `bench_inputs`, how it compiles and times in `bench_measure`.
"""

import dataclasses
import math
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import jax

from cosmos3_jax.cli.bench_inputs import (
    SIZES,
    Job,
    jobs,
    random_params,
    random_request,
    silent,
)
from cosmos3_jax.cli.bench_measure import (
    GIB,
    compile_cold_and_cached,
    device_peak_gib,
    measure,
)
from cosmos3_jax.config import Config
from cosmos3_jax.io.prepare import TEXT_BUCKET
from cosmos3_jax.models import sound_vae, transformer
from cosmos3_jax.models.layers import TimestepEmbedding
from cosmos3_jax.runtime import memory
from cosmos3_jax.sampling.generate import (
    decode,
    encode_conditions,
    params_dtype,
    sample_latents,
)
from cosmos3_jax.sampling.request import T2VRequest

__all__ = [
    "SIZES", "Job", "denoise_flops", "jobs", "memory_sizes", "random_params", "random_request",
    "run_bench", "silent",
]  # fmt: skip


def denoise_flops(config: Config, request: T2VRequest) -> float:
    """Arithmetic of all steps: matrix products and attention of the media tower, each branch.

    A multiplication and an addition are two. Keys are the media tokens and the prompt's real ones:
    padding, and what a kernel adds, are no work that has to be done.
    """
    model = config.transformer
    width, heads = model.hidden_size, model.num_attention_heads * model.head_dim
    kv_heads = model.num_key_value_heads * model.head_dim
    video = math.prod(transformer.patch_grid(model, request.video_shape))
    tokens = video + request.sound_frames
    a_token = 2 * (width * (2 * heads + 2 * kv_heads) + 3 * width * model.intermediate_size)
    ends = 4 * width * video * model.patch_latent_dim
    if request.sound_frames:
        ends += 4 * width * request.sound_frames * model.sound_dim
    embedding = 2 * width * (2 * TimestepEmbedding.frequencies + width)
    masks = [mask for mask in (request.text_mask, request.neg_text_mask) if mask is not None]
    layers = sum(
        tokens * a_token + 4 * heads * tokens * (tokens + float(mask.sum())) for mask in masks
    )
    once = len(masks) * (ends + embedding)
    return float(request.num_inference_steps * (model.num_hidden_layers * layers + once))


def run_bench(config: Config, params: dict, job: Job) -> dict:
    """Compile and run one job stage by stage.

    Args:
        config: the sizes.
        params: see `random_params`, or a checkpoint's.
        job: what to run. Stages are warm, see `measure`.

    Returns:
        What `json` can write:

        - `job`: its fields.
        - `stages`: `condition` (both prompts), `denoise` (all steps), `video decode` and, with
          sound, `sound decode`. Each has `seconds` (the median), `samples`, `temporary_gib`,
          `output_gib`, `compile_seconds` and `compile_seconds_cached` (see
          `compile_cold_and_cached`). `one step` has seconds alone: a part of `denoise`; with sound,
          of a loop of two, to be compared with `one step without sound`.
        - `seconds`: of the whole job: condition, loop and decoding.
        - `denoise_tflop`, `denoise_tflops_per_second`: counted by `denoise_flops`, and its rate.
        - `weights_gib`, `peak_gib` and `peak_gib_before` (of this process so far and up to this
          job; None where the device does not say), `estimated_gib` (see `memory`).

    Raises:
        ValueError: see `Job.check`.
    """
    request = random_request(config, job)
    flops = denoise_flops(config, request)
    peak_before = device_peak_gib()
    encode = partial(encode_conditions, config=config)
    sample = partial(sample_latents, config=config)
    stages: dict[str, dict] = {}

    def stage(name: str, function: Callable, *arguments) -> Any:
        program, compiling = compile_cold_and_cached(function, *arguments)
        result, ran = measure(program, *arguments, repeats=job.repeats)
        note(name, ran | compiling)
        return result

    def note(name: str, found: dict) -> None:
        stages[name] = found
        compiled = found.get("compile_seconds", 0.0)
        print(f"{name}: {found['seconds']:.3f} s, compiled in {compiled:.1f} s", file=sys.stderr)

    request = jax.device_put(request)
    conditions = stage("condition", encode, params["und"], request)
    loop, compiling = compile_cold_and_cached(sample, params["gen"], conditions, request)
    arguments = params["gen"], conditions, request
    (latents, _), ran = measure(loop, *arguments, repeats=job.repeats)
    note("denoise", ran | compiling)
    stages["one step"] = {"seconds": ran["seconds"] / job.steps}
    del loop, conditions, request, arguments
    if job.sound:
        video_alone = dataclasses.replace(job, sound=False)
        stages["one step"] = _one_step(config, params, job)
        stages["one step without sound"] = _one_step(config, params, video_alone)
    decode_video = partial(decode, config=config, chunk_size=job.decode_chunk_size)
    stage("video decode", decode_video, params, latents.replace(sound=None))
    if job.sound:
        vae = params["sound_vae"]
        decode_sound = partial(sound_vae.decode, config=config.sound_vae, dtype=params_dtype(vae))
        stage("sound decode", lambda p, z: decode_sound(p, latents=z), vae, latents.sound)
    whole = ("condition", "denoise", "video decode", "sound decode")
    return {
        "job": dataclasses.asdict(job),
        "stages": stages,
        "seconds": sum(stages[name]["seconds"] for name in whole if name in stages),
        "denoise_tflop": flops / 1e12,
        "denoise_tflops_per_second": flops / 1e12 / stages["denoise"]["seconds"],
        "weights_gib": sum(leaf.nbytes for leaf in jax.tree.leaves(params)) / GIB,
        "peak_gib": device_peak_gib(),
        "peak_gib_before": peak_before,
        "estimated_gib": _estimated_gib(config, params, job),
    }


def _one_step(config: Config, params: dict, job: Job) -> dict:
    """Half of a loop of two steps, in seconds and memory."""
    request = jax.device_put(random_request(config, dataclasses.replace(job, steps=2)))
    conditions = jax.jit(partial(encode_conditions, config=config))(params["und"], request)
    sample = jax.jit(partial(sample_latents, config=config))
    program = sample.lower(params["gen"], conditions, request).compile()
    _, ran = measure(program, params["gen"], conditions, request, repeats=job.repeats)
    return {"seconds": ran["seconds"] / 2, "samples": [s / 2 for s in ran["samples"]]}


def memory_sizes(job: Job) -> dict:
    """The arguments of `memory.generation_bytes` that a job determines."""
    names = ("num_frames", "height", "width", "fps", "sound", "decode_chunk_size")
    longest = max(job.text_tokens, job.negative_tokens)
    return {name: getattr(job, name) for name in names} | {
        "guidance": job.negative_tokens > 0,
        "text_tokens": -(-longest // TEXT_BUCKET) * TEXT_BUCKET,
    }


def _estimated_gib(config: Config, params: dict, job: Job) -> float:
    dtype = str(transformer.compute_dtype(params["gen"]))
    return memory.generation_bytes(config, **memory_sizes(job), dtype=dtype)["peak"] / GIB
