"""Position ids of text, video and sound, and the interleaved mRoPE tables made from them.

Every token has a position on three axes: time, height, width. Text counts on all three alike; video
and sound start together, a fixed margin behind the text. There, a second of video is 6 positions
(latent frames at 24 fps), one of sound 24, as in the reference. Positions reach 15,000 and more:
bfloat16 cannot hold them and a TF32 product cannot either, so angles are float32 elementwise
products, never a matrix product.

Axes: B batch, S tokens, J half of the head dimension.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from cosmos3_jax.config import TransformerConfig

Rope = tuple[Array, Array]  # cos and sin, each [B, S, J]


class Item(NamedTuple):
    """A part of a media sequence on the frame axis, with positions of its own.

    Items with the same offset share their positions in time, as a control and what it controls.
    """

    frames: int  # latent frames
    offset: float = 0.0  # positions in time behind the beginning of the media


def text_positions(length: int) -> np.ndarray:
    """float32 [3, S]: token i sits at (i, i, i)."""
    return np.broadcast_to(np.arange(length, dtype=np.float32), (3, length))


def video_positions(
    config: TransformerConfig,
    grid: tuple[int, int, int],
    fps: Array,
    text_length: Array,
    items: tuple[Item, ...] | None = None,
    temporal_compression: int = 4,
) -> Array:
    """Positions of the video patches, in the order (frame, row, column).

    Args:
        grid: patches along (time, height, width).
        fps: float32 [B], frames per second of the pixels.
        text_length: int32 [B], tokens of the prompt; the media begin a margin behind it.
        items: which of the frames begin anew, and where; None is one item of all.
        temporal_compression: pixel frames to one latent frame.

    Returns:
        float32 [B, 3, S]. A frame's time is its latent index, in latent frames of the base frame
        rate.
    """
    items = items or (Item(grid[0]),)
    time = np.concatenate([np.arange(item.frames, dtype=np.float32) for item in items])
    offsets = np.repeat(
        [np.float32(item.offset) for item in items], [item.frames for item in items]
    )
    rows, columns = (np.arange(n, dtype=np.float32) for n in grid[1:])
    time = jnp.broadcast_to(time, (len(text_length), grid[0]))
    if config.enable_fps_modulation:
        # Each operation rounds, as in the reference. Left alone, a compiler multiplies by the
        # divisor's reciprocal and fuses product and sum; the barrier and the idle maximum stop it.
        latent_fps = jnp.broadcast_to(fps[:, None] / temporal_compression, time.shape)
        time = time / jax.lax.optimization_barrier(latent_fps)
        time = jnp.maximum(time * (config.base_fps / temporal_compression), 0)
    time = time + (_media_offset(config, text_length) + offsets[None])
    shape = (len(text_length), *grid)
    axes = (time[:, :, None, None], rows[:, None], columns)
    return jnp.stack([jnp.broadcast_to(axis, shape) for axis in axes], axis=1).reshape(
        len(time), 3, -1
    )


def sound_positions(config: TransformerConfig, frames: int, text_length: Array) -> Array:
    """float32 [B, 3, S]: sound latents, from the first video frame's time on, row 0, column 0."""
    # Computed here, not on the device: a compiler may turn the division into a product, an ulp
    # away.
    time = np.arange(frames, dtype=np.float32)
    if config.enable_fps_modulation:
        time = time / np.float32(config.sound_latent_fps) * np.float32(config.base_fps)
    time = time[None] + _media_offset(config, text_length)
    return jnp.stack([time, jnp.zeros_like(time), jnp.zeros_like(time)], axis=1)


def _media_offset(config: TransformerConfig, text_length: Array) -> Array:
    offset = text_length + config.unified_3d_mrope_temporal_modality_margin
    return offset.astype(jnp.float32)[:, None]


def inverse_frequencies(config: TransformerConfig) -> np.ndarray:
    """float32 [J]: theta^(-2j / head_dim), the power rounded to float32 before it is inverted."""
    exponent = np.arange(0, config.head_dim, 2) / config.head_dim
    return np.float32(1) / (config.rope_theta**exponent).astype(np.float32)


def axis_of_slot(config: TransformerConfig) -> np.ndarray:
    """int [J]: the axis (0 time, 1 height, 2 width) whose position turns each frequency.

    Interleaved as THW THW ... TT (Qwen3-VL): height and width take every third slot until theirs
    are used.
    """
    axes = np.zeros(config.head_dim // 2, dtype=np.int32)
    for axis in (1, 2):
        axes[axis : 3 * config.rope_axes_dim[axis] : 3] = axis
    return axes


def rope_table(config: TransformerConfig, positions: Array | np.ndarray) -> Rope:
    """cos and sin of the rotation angles, float32 [B, S, J], from positions [B, 3, S] or [3, S]."""
    positions = jnp.asarray(positions).reshape(-1, 3, positions.shape[-1])
    per_slot = jnp.take(positions, axis_of_slot(config), axis=1)  # [B, J, S]
    angles = jnp.swapaxes(per_slot, 1, 2) * inverse_frequencies(config)[None, None]
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x: Array, rope: Rope) -> Array:
    """Rotate pairs (j, j + J) of the last axis of x [B, S, heads, 2J] by the table's angles."""
    cos, sin = (
        jnp.concatenate([table, table], axis=-1)[:, :, None].astype(x.dtype) for table in rope
    )
    first, second = jnp.split(x, 2, axis=-1)
    return x * cos + jnp.concatenate([-second, first], axis=-1) * sin


def concatenate(tables: list[Rope]) -> Rope:
    """Join tables along their tokens."""
    return jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *tables)
