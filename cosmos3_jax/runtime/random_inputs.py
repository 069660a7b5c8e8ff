"""Random weights to measure with, made on the device.

Random, never zeros: a GPU draws less power on zeros and runs faster than it ever will on a video.
"""

import math
import os
from functools import partial

import jax
import jax.numpy as jnp

from cosmos3_jax.config import Config
from cosmos3_jax.models import sound_vae, transformer, video_vae
from cosmos3_jax.parallel.device import default_device, memory_limit
from cosmos3_jax.runtime.measure import GIB

DRAW_VALUES = 2**22  # random values that are drawn at a time: 16 MiB before they are rounded


def weight_shapes(config: Config, dtype: jnp.dtype) -> dict:
    """What generation reads, as `jax.ShapeDtypeStruct`s: both towers and the decoders.

    As a checkpoint is loaded: the media tower's layers apart, the timestep embedding in float32
    and all else in `dtype`.
    """
    shapes = dict(transformer.param_shapes(config.transformer))
    shapes["gen"] = jax.eval_shape(transformer.unstack_layers, shapes["gen"])
    shapes["video_vae"] = {"decoder": video_vae.param_shapes(config.video_vae)["decoder"]}
    if config.has_sound:
        shapes["sound_vae"] = sound_vae.param_shapes(config.sound_vae, with_encoder=False)

    def typed(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        kept = any(key.key == "time_embedder" for key in path)
        return jax.ShapeDtypeStruct(leaf.shape, jnp.float32 if kept else dtype)

    return jax.tree.map_with_path(typed, shapes)


def random_params(config: Config, dtype: jnp.dtype) -> dict:
    """Normal weights in the tree of `weight_shapes`, made on the device.

    On a GPU this takes a few lots of `DRAW_VALUES` more than the weights: a device's peak memory
    never resets, and it is to be the generation's.

    Raises:
        ValueError: if the weights alone are more than the device can hold.
    """
    shapes = weight_shapes(config, dtype)
    check_fits(shapes)
    paths, tree = jax.tree.flatten_with_path(shapes)
    return tree.unflatten(
        [_random_leaf(seed, path[-1].key, leaf) for seed, (path, leaf) in enumerate(paths)]
    )


def check_fits(shapes: dict) -> None:
    """Raise ValueError if these leaves cannot be held, before the first of them is made."""
    device = default_device()
    limit = memory_limit()
    if device.platform == "cpu":
        limit = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    needed = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(shapes))
    if limit is not None and needed > limit:
        raise ValueError(
            f"the weights take {needed / GIB:.1f} GiB, {device.device_kind} has "
            f"{limit / GIB:.1f} GiB: use a larger device, --dtype bfloat16 or --checkpoint tiny"
        )


def _random_leaf(seed: int, name: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    """Normal values, `DRAW_VALUES` at a time, each lot rounded and written in place.

    The leading axes are merged into rows, none longer than a lot: a flat index of the largest leaf
    would overflow int32. Lots are drawn in powers of two, so that a few programs draw all leaves.
    """
    mean, spread = (1.0, 0.1) if name == "scale" else (0.0, 0.02)
    shape = leaf.shape
    split = next(i for i in range(len(shape) + 1) if math.prod(shape[i:]) <= DRAW_VALUES)
    rows, width = math.prod(shape[:split]), math.prod(shape[split:])
    lot = min(rows, DRAW_VALUES // width)
    count = 1 << (lot * width - 1).bit_length()
    values = jnp.zeros(shape, leaf.dtype)
    for start in range(0, rows, lot):
        start = min(start, rows - lot)  # the last lot starts where it fits
        drawn = _draw(seed, start, mean, spread, count=count)
        values = _write(values, drawn, start, rows=(rows, width), lot=lot)
    return values


@partial(jax.jit, static_argnames="count")
def _draw(seed: int, start: int, mean: float, spread: float, *, count: int) -> jax.Array:
    key = jax.random.fold_in(jax.random.key(seed), start)
    return mean + spread * jax.random.normal(key, count)


@partial(jax.jit, donate_argnums=0, static_argnames=("rows", "lot"))
def _write(values: jax.Array, drawn: jax.Array, start: int, *, rows: tuple[int, int], lot: int):
    """`values` as `rows` with `drawn` in the `lot` rows from `start` on, in the same buffer."""
    drawn = drawn[: lot * rows[1]].reshape(lot, rows[1]).astype(values.dtype)
    filled = jax.lax.dynamic_update_slice_in_dim(values.reshape(rows), drawn, start, 0)
    return filled.reshape(values.shape)
