"""The compiled programs of a generation, one for each part of the parameters.

They are separate so that the part which one has read can leave the device before the next comes.
Arrays go in and out channels first.

Axes: as in `pipeline`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import einops
import jax
import jax.numpy as jnp
from jax import Array

from cosmos3_jax.config import Config, SoundVAEConfig, VideoVAEConfig
from cosmos3_jax.models import sound_vae, video_vae
from cosmos3_jax.models.transformer import Condition
from cosmos3_jax.parallel import sharding
from cosmos3_jax.sampling import unipc
from cosmos3_jax.sampling.generate import (
    channels_first,
    channels_last,
    guided_velocity,
    keep_given,
    params_dtype,
)
from cosmos3_jax.sampling.generate import encode_conditions as _encode_conditions
from cosmos3_jax.sampling.generate import encode_given as _encode_given
from cosmos3_jax.sampling.generate import sample_latents as _sample_latents
from cosmos3_jax.sampling.generate import start_sampling as _start_sampling
from cosmos3_jax.sampling.request import T2VRequest

encode_given = jax.jit(_encode_given, static_argnames="config")
encode_conditions = jax.jit(_encode_conditions, static_argnames="config")


def text_request(request: T2VRequest) -> T2VRequest:
    """What `encode_conditions` reads of a request: for another number of steps the same program."""
    return request.replace(
        noise=None, sound_noise=None, sampler=None, seed=None, num_inference_steps=1
    )


def loop_request(request: T2VRequest) -> T2VRequest:
    """What `sample_latents` reads of a request: given frames are in the conditions already, so that
    one program serves with and without.
    """
    return request.replace(frame_mask=None, clean_latents=None, clean_video=None)


@partial(jax.jit, static_argnames=("config", "return_trajectory"))
def sample_latents(
    params: dict,
    conditions: list[Condition],
    request: T2VRequest,
    *,
    config: Config,
    return_trajectory: bool = False,
) -> tuple[dict[str, Array], dict | None]:
    """The media tower over all steps: final latents and, if asked for, every step's."""
    latents, trajectory = _sample_latents(
        params, conditions, request, config, return_trajectory=return_trajectory
    )
    if trajectory is not None:
        trajectory = {name: jax.vmap(channels_first)(states) for name, states in trajectory.items()}
    return channels_first(latents), trajectory


@partial(jax.jit, static_argnames="config")
def start_sampling(
    conditions: list[Condition], request: T2VRequest, *, config: Config
) -> tuple[list[Condition], unipc.State]:
    """The conditions and the state that `sample_step` goes on from."""
    conditions, noise = _start_sampling(conditions, request, config)
    return conditions, unipc.initial_state(noise)


def start_request(request: T2VRequest) -> T2VRequest:
    """What `start_sampling` reads of a request: for another number of steps the same program."""
    return request.replace(sampler=None, num_inference_steps=1)


@partial(jax.jit, static_argnames=("config", "return_trajectory"), donate_argnames="state")
def sample_step(
    params: dict,
    conditions: list[Condition],
    guidance_scale: Array | float,
    state: unipc.State,
    row: unipc.Tableau,
    *,
    config: Config,
    return_trajectory: bool = False,
) -> tuple[unipc.State, dict[str, dict]]:
    """The media tower over one step, by one row of the tableau; the same program at every step.

    The new state takes the memory of `state`, which is gone afterwards.

    Returns:
        The new state, and the step's `latents` and, if asked for, its `clean` prediction, each as
        `sample_latents` has them.
    """
    velocity = partial(guided_velocity, params, config, conditions, guidance_scale)
    state = unipc.step(velocity, state, row)
    made = {"latents": state.latents}
    if return_trajectory:
        made["clean"] = state.clean
    keep = partial(keep_given, conditions)
    return state, {name: channels_first(keep(latents)) for name, latents in made.items()}


@jax.jit
def stack_steps(steps: list[dict[str, dict]]) -> dict[str, dict]:
    """What `sample_step` made, K times -> the trajectory that `sample_latents` returns."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *steps)


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


def compile_for(program: Callable, *arguments, **options) -> Any:
    """Compile for arguments of these shapes; what it would return. A later call finds it ready."""
    compiled = program.lower(*arguments, **options).compile()
    made = program.eval_shape(*arguments, **options)
    if not sharding.mesh_sizes():
        return made
    return jax.tree.map(
        lambda x, placed: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed),
        made, compiled.output_shardings,
    )  # fmt: skip
