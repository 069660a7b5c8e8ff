"""The compiled programs of a generation, one for each part of the parameters.

They are separate so that the part which one has read can leave the device before the next comes.
Arrays go in and out channels first.

Axes: as in `pipeline`.
"""

from collections.abc import Callable
from functools import partial

import einops
import jax
import jax.numpy as jnp
from jax import Array

from cosmos3_jax import sound_vae, video_vae
from cosmos3_jax.config import Config, SoundVAEConfig, VideoVAEConfig
from cosmos3_jax.generate import T2VRequest, channels_first, channels_last, params_dtype
from cosmos3_jax.generate import encode_conditions as _encode_conditions
from cosmos3_jax.generate import sample_latents as _sample_latents
from cosmos3_jax.transformer import Condition

encode_conditions = jax.jit(_encode_conditions, static_argnames="config")


def text_request(request: T2VRequest) -> T2VRequest:
    """What `encode_conditions` reads of a request: for another number of steps the same program."""
    return request.replace(
        noise=None, sound_noise=None, sampler=None, seed=None, num_inference_steps=1
    )


@partial(jax.jit, static_argnames=("config", "on_step", "return_trajectory"))
def sample_latents(
    params: dict,
    conditions: list[Condition],
    request: T2VRequest,
    *,
    config: Config,
    on_step: Callable[[int], None] | None = None,
    return_trajectory: bool = False,
) -> tuple[dict[str, Array], dict | None]:
    """The media tower over all steps: final latents and, if asked for, every step's."""
    latents, trajectory = _sample_latents(
        params, conditions, request, config, on_step, return_trajectory
    )
    if trajectory is not None:
        trajectory = {name: jax.vmap(channels_first)(states) for name, states in trajectory.items()}
    return channels_first(latents), trajectory


@partial(jax.jit, static_argnames=("config", "chunk_size"))
def decode_video(
    params: dict, latents: Array, *, config: VideoVAEConfig, chunk_size: int | None
) -> Array:
    """Latents [B, C, t, h, w] -> float32 video [B, 3, T, H, W] in [0, 1]."""
    return video_vae.decode(
        params,
        config,
        channels_last(latents).video,
        chunk_size=chunk_size,
        dtype=params_dtype(params),
        video_dtype=jnp.float32,
    )


@partial(jax.jit, static_argnames=("config", "chunk_size"))
def encode_video(params: dict, video: Array, *, config: VideoVAEConfig, chunk_size: int) -> Array:
    """Video [B, 3, T, H, W] in [0, 1] -> latents [B, C, t, h, w]."""
    dtype = params_dtype(params)
    latents = video_vae.encode(params, config, video, chunk_size=chunk_size, dtype=dtype)
    return einops.rearrange(latents, "b t h w c -> b c t h w")


@partial(jax.jit, static_argnames="config")
def decode_sound(params: dict, latents: Array, *, config: SoundVAEConfig) -> Array:
    """Latents [B, C_sound, s] -> waveform [B, channels, samples] in [-1, 1]."""
    latents = einops.rearrange(latents, "b c s -> b s c")
    return sound_vae.decode(params, config, latents, dtype=params_dtype(params))


@partial(jax.jit, static_argnames="config")
def encode_sound(params: dict, waveform: Array, *, config: SoundVAEConfig) -> Array:
    """Waveform [B, channels, samples] in [-1, 1] -> latents [B, C_sound, s]."""
    latents = sound_vae.encode(params, config, waveform, dtype=params_dtype(params))
    return einops.rearrange(latents, "b s c -> b c s")
