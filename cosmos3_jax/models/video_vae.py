"""The Wan2.2 residual video VAE: pixels to latents and back, streamed over time.

Axes: B batch, T frames (of pixels or latents, whichever the array holds), H height, W width, C
channels. Latents are [B, T, H, W, C]; video is [B, C, T, H, W].

The modules are in `video_vae_modules.py`. Here a clip goes through them in pieces of a few latent
frames, so memory does not grow with its length.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax import lax
from jax.typing import DTypeLike

from cosmos3_jax import limits
from cosmos3_jax.config import VideoVAEConfig
from cosmos3_jax.models.layers import over_last, traced_once
from cosmos3_jax.models.video_vae_modules import Convolve, Decoder, Encoder, Plan, convolve_on
from cosmos3_jax.parallel import sharding
from cosmos3_jax.parallel.device import AnyDevice, default_device
from cosmos3_jax.parallel.rows import Rows, are_divided, divide_rows, row_axes

SMALL_PICTURE = 320  # latent pixels; 192x320 has 240


def _latent_statistics(config: VideoVAEConfig, dtype: DTypeLike) -> tuple[np.ndarray, np.ndarray]:
    """Mean and 1 / std of each channel, all rounded to `dtype` as in training."""
    std = np.asarray(config.latents_std, dtype)
    return np.asarray(config.latents_mean, dtype), np.ones_like(std) / std


def normalize_latents(config: VideoVAEConfig, latents: jax.Array) -> jax.Array:
    """The encoder's output [..., z_dim] -> latents of about unit variance, which the transformer
    reads.
    """
    mean, inverse_std = _latent_statistics(config, latents.dtype)
    return (latents - over_last(mean, latents)) * over_last(inverse_std, latents)


def denormalize_latents(config: VideoVAEConfig, latents: jax.Array) -> jax.Array:
    """The inverse of `normalize_latents`, for the decoder. Cast to the compute dtype first."""
    mean, inverse_std = _latent_statistics(config, latents.dtype)
    return latents / over_last(inverse_std, latents) + over_last(mean, latents)


def pixel_to_latent_shape(
    config: VideoVAEConfig, num_frames: int, height: int, width: int
) -> tuple[int, int, int]:
    """The latent grid (t, h, w) of a video: t = (num_frames - 1) / 4 + 1, h = height / 16, w =
    width / 16.

    Raises ValueError unless num_frames is 4k+1 and height and width are multiples of 16, or beyond
    `limits`.
    """
    time, space = config.scale_factor_temporal, config.scale_factor_spatial
    for name, size in (("num_frames", num_frames), ("height", height), ("width", width)):
        limits.check_most(name, size)
    if num_frames < 1 or (num_frames - 1) % time:
        below = max((num_frames - 1) // time * time + 1, 1)
        raise ValueError(
            f"num_frames={num_frames} is not {time}k+1; nearest are {below} and {below + time}"
        )
    for name, size in (("height", height), ("width", width)):
        if size < 1 or size % space:
            below = max(size // space * space, space)
            raise ValueError(
                f"{name}={size} is not a multiple of {space}; nearest are {below} and "
                f"{below + space}"
            )
    return (num_frames - 1) // time + 1, height // space, width // space


def _first_pixel_frame(config: VideoVAEConfig, latent_frame: int | jax.Array) -> jax.Array:
    """Latent frame 0 stands for pixel frame 0, and latent frame i for the four from 4i - 3."""
    return jnp.maximum(config.scale_factor_temporal * (latent_frame - 1) + 1, 0)


def _over_time(step: Callable, output: jax.Array, latent_frames: int, chunk_size: int) -> jax.Array:
    """Run `step(cache, output, start, frames, first) -> (cache, output)` over a clip, in latent
    frames.

    The output is a buffer of which each step writes its part in place: memory does not grow with
    the clip, where stacked outputs of a scan would be copied into their final layout.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} must be at least 1")
    carry = step({}, output, 0, 1, first=True)
    chunks, rest = divmod(latent_frames - 1, chunk_size)

    @partial(
        jax.checkpoint, prevent_cse=False
    )  # a gradient keeps each chunk's cache, not all it computed
    def body(carry, start):
        return step(*carry, start, chunk_size), None

    if chunks:
        carry, _ = lax.scan(body, carry, 1 + chunk_size * jnp.arange(chunks))
    if rest:
        carry = step(*carry, latent_frames - rest, rest)
    return carry[1]


def decode_chunk_size(height: int, width: int, device: AnyDevice | None = None) -> int:
    """Latent frames of `height` x `width` to decode at a time, as measured in benchmarks/NOTES.md.

    A small picture alone leaves a GPU idle. Elsewhere more at a time is more memory and a longer
    compilation for nothing. Without a `device`, for the default one.
    """
    device = device or default_device()
    return 4 if height * width <= SMALL_PICTURE and device.platform == "gpu" else 1


def decode(
    params: Mapping[str, Any],
    config: VideoVAEConfig,
    latents: jax.Array,
    *,
    chunk_size: int | None = None,
    dtype: DTypeLike = jnp.float32,
    video_dtype: DTypeLike | None = None,
    clip: bool = True,
    convolve: Convolve | None = None,
) -> jax.Array:
    """Decode normalised latents into video.

    Args:
        params: the tree of `param_shapes`; only "decoder" is read.
        config: the VAE's configuration.
        latents: normalised, [B, t, h, w, z_dim].
        chunk_size: latent frames at a time after the first; None is `decode_chunk_size`. The result
            does not depend on it; memory does.
        dtype: of the computation.
        video_dtype: of the result; `dtype` if None.
        clip: False leaves what is below 0 or above 1 as it is: a clipped pixel has no gradient.
        convolve: the arithmetic of convolutions; None is the default device's, see `convolve_on`.

    Returns:
        Video [B, 3, 4(t-1)+1, 16h, 16w] in [0, 1].

    Raises:
        ValueError: latents have another number of axes or channels, or chunk_size is below 1.
    """
    if latents.ndim != 5 or latents.shape[-1] != config.z_dim:
        raise ValueError(f"latents have shape {latents.shape}, not [B, t, h, w, {config.z_dim}]")
    B, t, h, w, _ = latents.shape
    chunk_size = decode_chunk_size(h, w) if chunk_size is None else chunk_size
    time, space = config.scale_factor_temporal, config.scale_factor_spatial
    rows = Rows.of(h)
    decoder = Decoder(config, _plan(dtype, rows, convolve))

    def step(cache, video, start, frames, first=False):
        z = lax.dynamic_slice_in_dim(latents, start, frames, axis=1).astype(dtype)
        variables = {"params": params["decoder"], "cache": cache}
        x, state = decoder.apply(
            variables, denormalize_latents(config, z), first, mutable=["cache"]
        )
        x = x.astype(jnp.float32)
        x = ((jnp.clip(x, -1, 1) if clip else x) + 1) / 2
        x = rearrange(x, "B T H W C -> B C T H W").astype(video.dtype)
        at = _first_pixel_frame(config, start)
        video = lax.dynamic_update_slice_in_dim(video, _divided(x), at, axis=2)
        return state["cache"], _divided(video)

    latents = _pad_rows(latents, 2, rows.padded - h)
    shape = (B, 3, time * (t - 1) + 1, space * rows.padded, space * w)
    video = _divided(jnp.zeros(shape, video_dtype or dtype))
    return _divided(_rows(_over_time(step, video, t, chunk_size), 3, space * h))


def encode(
    params: Mapping[str, Any],
    config: VideoVAEConfig,
    video: jax.Array,
    *,
    chunk_size: int = 1,
    dtype: DTypeLike = jnp.float32,
) -> jax.Array:
    """Encode video into normalised latents: the posterior's mean, nothing is sampled.

    Args:
        params: the tree of `param_shapes`; only "encoder" is read.
        config: the VAE's configuration.
        video: [B, 3, T, H, W] in [0, 1]; T is 4k+1, H and W are multiples of 16.
        chunk_size: latent frames (four pixel frames) at a time after the first. The result does not
            depend on it; memory does.
        dtype: of the computation and of the result.

    Returns:
        Latents [B, (T-1)/4 + 1, H/16, W/16, z_dim]. Those of a prefix of the video are a prefix of
        them.

    Raises:
        ValueError: the video has another shape, or chunk_size is below 1.
    """
    return _encode(params, config, video, chunk_size, dtype, moments=False)


def posterior(
    params: Mapping[str, Any],
    config: VideoVAEConfig,
    video: jax.Array,
    *,
    chunk_size: int = 1,
    dtype: DTypeLike = jnp.float32,
    convolve: Convolve | None = None,
) -> tuple[jax.Array, jax.Array]:
    """What training samples latents from: a normal distribution for each number, not normalised.

    Args and errors as for `encode`, whose result is this mean, normalised; `convolve` as for
    `decode`.

    Returns:
        Mean and standard deviation, float32 [B, (T-1)/4 + 1, H/16, W/16, z_dim] each. The encoder
        gives log-variances, kept within -30 and 20 as in the public code.
    """
    moments = _encode(params, config, video, chunk_size, dtype, moments=True, convolve=convolve)
    mean, log_variance = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
    return mean, jnp.exp(jnp.clip(log_variance, -30.0, 20.0) / 2)


def _encode(
    params: Mapping[str, Any],
    config: VideoVAEConfig,
    video: jax.Array,
    chunk_size: int,
    dtype: DTypeLike,
    moments: bool,
    convolve: Convolve | None = None,
) -> jax.Array:
    """Normalised means, [B, t, h, w, z_dim], or `moments` as they are, [B, t, h, w, 2 z_dim]."""
    if video.ndim != 5 or video.shape[1] != 3:
        raise ValueError(f"video has shape {video.shape}, not [B, 3, T, H, W]")
    grid = pixel_to_latent_shape(config, *video.shape[2:])
    rows = Rows.of(grid[1])
    encoder = Encoder(config, _plan(dtype, rows, convolve), moments)

    def step(cache, latents, start, frames, first=False):
        pixel_frames = 1 if first else config.scale_factor_temporal * frames
        at = _first_pixel_frame(config, start)
        x = lax.dynamic_slice_in_dim(video, at, pixel_frames, axis=2).astype(jnp.float32)
        x = rearrange(2 * x - 1, "B C T H W -> B T H W C")
        variables = {"params": params["encoder"], "cache": cache}
        z, state = encoder.apply(variables, x, first, mutable=["cache"])
        z = z if moments else normalize_latents(config, z)
        return state["cache"], lax.dynamic_update_slice_in_dim(latents, z, start, axis=1)

    padding = config.scale_factor_spatial * (rows.padded - rows.real)
    video = _divided(_pad_rows(video, 3, padding))
    shape = (len(video), grid[0], rows.padded, grid[2], config.z_dim * (2 if moments else 1))
    latents = divide_rows(jnp.zeros(shape, dtype))
    latents = _rows(_over_time(step, latents, grid[0], chunk_size), 2, rows.real)
    return sharding.constrain(latents, sharding.PROMPTS, *[None] * 4)


def _plan(dtype: DTypeLike, rows: Rows, convolve: Convolve | None) -> Plan:
    return Plan(jnp.dtype(dtype), rows, convolve or convolve_on(default_device()))


def _divided(video: jax.Array) -> jax.Array:
    """Video [B, C, T, H, W], its rows divided by the ambient mesh, if they are a multiple."""
    axes = row_axes() if are_divided(video.shape[3]) else None
    return sharding.constrain(video, sharding.PROMPTS, None, None, axes, None)


def _pad_rows(x: jax.Array, axis: int, count: int) -> jax.Array:
    """Rows of zeros behind the last; none on one device."""
    return jnp.pad(x, [(0, count * (i == axis)) for i in range(x.ndim)]) if count else x


def _rows(x: jax.Array, axis: int, count: int) -> jax.Array:
    """The inverse of `_pad_rows`."""
    return x if x.shape[axis] == count else lax.slice_in_dim(x, 0, count, axis=axis)


@traced_once
def param_shapes(config: VideoVAEConfig) -> dict[str, Any]:
    """`{"encoder": ..., "decoder": ...}` of float32 `jax.ShapeDtypeStruct`s, at no cost."""

    def shapes(module: nn.Module, *inputs: int) -> dict[str, Any]:
        return jax.eval_shape(
            lambda: module.init(jax.random.key(0), jnp.zeros(inputs), first=True)
        )["params"]

    space, plan = config.scale_factor_spatial, Plan(jnp.float32)
    return {
        "encoder": shapes(Encoder(config, plan), 1, 1, space, space, 3),
        "decoder": shapes(Decoder(config, plan), 1, 1, 1, 1, config.z_dim),
    }
