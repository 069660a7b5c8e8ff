"""Time and memory of each stage at a checkpoint's real sizes, with random weights and inputs.

Random, never zeros: a GPU draws less power on zeros and runs faster than it ever will on a video.

Axes: as in `generate`.
"""

import math
import statistics
import time
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from cosmos3_jax import memory, sound_vae, transformer, unipc, video_vae
from cosmos3_jax.config import Config
from cosmos3_jax.generate import (
    T2VRequest,
    decode,
    encode_conditions,
    initial_noise,
    sample_latents,
)


def random_params(config: Config, dtype: jnp.dtype, sound: bool) -> dict:
    """A parameter tree of the configuration's sizes, normal weights made on the device."""
    shapes = dict(transformer.param_shapes(config.transformer))
    shapes["video_vae"] = {"decoder": video_vae.param_shapes(config.video_vae)["decoder"]}
    if sound:
        shapes["sound_vae"] = sound_vae.param_shapes(config.sound_vae, with_encoder=False)
    paths, tree = jax.tree.flatten_with_path(shapes)
    return tree.unflatten(
        [_random_leaf(seed, path[-1].key, leaf, dtype) for seed, (path, leaf) in enumerate(paths)]
    )


def _random_leaf(seed: int, name: str, leaf: jax.ShapeDtypeStruct, dtype: jnp.dtype) -> jax.Array:
    draw = jax.jit(jax.random.normal, static_argnums=(1, 2))
    values = draw(jax.random.key(seed), leaf.shape, dtype)
    return 1 + 0.1 * values if name == "scale" else 0.02 * values


def random_request(
    config: Config,
    *,
    num_frames: int,
    height: int,
    width: int,
    steps: int,
    sound: bool,
    text_tokens: int,
    negative_tokens: int,
) -> T2VRequest:
    """A guided request of the given sizes: random tokens, native schedule, fps 24."""
    shape = video_vae.pixel_to_latent_shape(config.video_vae, num_frames, height, width)
    rng = np.random.RandomState(0)

    def tokens(count: int) -> tuple[np.ndarray, np.ndarray]:
        padded = -(-count // 128) * 128
        ids = rng.randint(0, config.transformer.vocab_size, (1, padded)).astype(np.int32)
        return ids, np.arange(padded)[None] < count

    (ids, mask), (neg_ids, neg_mask) = tokens(text_tokens), tokens(negative_tokens)
    frames = sound_vae.sound_latent_length(config.sound_vae, num_frames, 24.0) if sound else 0
    channels, sound_channels = config.transformer.latent_channel, config.transformer.sound_dim
    return T2VRequest(
        text_ids=ids, text_mask=mask, neg_text_ids=neg_ids, neg_text_mask=neg_mask,
        video_shape=shape, fps=np.float32(24), num_inference_steps=steps,
        guidance_scale=np.float32(6), sound_frames=frames,
        noise=initial_noise(0, (1, channels, *shape)),
        sound_noise=initial_noise(0, (1, sound_channels, frames)) if sound else None,
        sampler=unipc.tableau(unipc.sigmas("native", steps)),
    )  # fmt: skip


def denoise_flops(config: Config, request: T2VRequest) -> float:
    """Arithmetic of all steps: matrix products and attention of the media tower, both branches."""
    model = config.transformer
    width, heads = model.hidden_size, model.num_attention_heads * model.head_dim
    kv_heads = model.num_key_value_heads * model.head_dim
    a_token = 2 * (width * (2 * heads + 2 * kv_heads) + 3 * width * model.intermediate_size)
    tokens = math.prod(transformer.patch_grid(model, request.video_shape)) + request.sound_frames
    masks = [mask for mask in (request.text_mask, request.neg_text_mask) if mask is not None]
    layer = sum(tokens * a_token + 4 * heads * tokens * (tokens + mask.sum()) for mask in masks)
    return float(request.num_inference_steps * model.num_hidden_layers * layer)


def measure(function: Callable, *arguments, repeats: int) -> tuple[float, dict]:
    """Compile and run: the result of nothing, but its compile time, median time and memory."""
    start = time.perf_counter()
    compiled = jax.jit(function).lower(*arguments).compile()
    compiling = time.perf_counter() - start
    samples = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = jax.block_until_ready(compiled(*arguments))
        samples.append(time.perf_counter() - start)
        if len(samples) < repeats:
            del result
    analysis = compiled.memory_analysis()
    return result, {
        "seconds": statistics.median(samples),
        "samples": samples,
        "compile_seconds": compiling,
        "temporary_gib": analysis.temp_size_in_bytes / 2**30,
        "output_gib": analysis.output_size_in_bytes / 2**30,
    }


def run_bench(
    config: Config, params: dict, *, repeats: int = 3, decode_chunk_size: int = 1, **job
) -> dict:
    """Measure one job stage by stage, warm.

    Args:
        config: the sizes.
        params: see `random_params`.
        repeats: of the whole loop and of each decode; the median counts. A two-step loop runs
            before, so that the first repeat finds the libraries started.
        decode_chunk_size: latent frames decoded at a time.
        **job: see `random_request`.

    Returns:
        Per stage seconds, compile seconds and memory; the whole job's seconds; achieved TFLOP/s.
    """
    request = random_request(config, **job)
    stages: dict[str, dict] = {}
    conditions, stages["condition"] = measure(
        partial(encode_conditions, config=config), params["und"], request, repeats=3
    )
    sample = partial(sample_latents, config=config)
    short = random_request(config, **job | {"steps": 2})
    _, two_steps = measure(sample, params["gen"], conditions, short, repeats=2)
    stages["one step"] = {"seconds": two_steps["samples"][-1] / 2}
    (latents, _), stages["denoise"] = measure(
        sample, params["gen"], conditions, request, repeats=repeats
    )
    silent = latents.replace(sound=None)
    decode_video = partial(decode, config=config, chunk_size=decode_chunk_size)
    _, stages["video decode"] = measure(decode_video, params, silent, repeats=repeats + 1)
    if latents.sound is not None:
        _, stages["sound decode"] = measure(
            lambda p, z: sound_vae.decode(p, config.sound_vae, z, dtype=jnp.bfloat16),
            params["sound_vae"], latents.sound, repeats=repeats,
        )  # fmt: skip
    counted = ("condition", "denoise", "video decode", "sound decode")
    whole = sum(stages[name]["seconds"] for name in counted if name in stages)
    flops = denoise_flops(config, request)
    stats = jax.devices()[0].memory_stats() or {}
    return {
        "job": job,
        "stages": stages,
        "seconds": whole,
        "denoise_tflops_per_second": flops / stages["denoise"]["seconds"] / 1e12,
        "peak_gib": stats.get("peak_bytes_in_use", 0) / 2**30,
        "estimated_gib": memory.generation_bytes(
            config,
            num_frames=job["num_frames"],
            height=job["height"],
            width=job["width"],
            sound="sound_vae" in params,
            text_tokens=job["negative_tokens"],
        )["peak"]
        / 2**30,
        "device": jax.devices()[0].device_kind,
        "versions": {"jax": jax.__version__},
    }
