"""Random weights to measure with, made on the device.

Random, never zeros: a GPU draws less power on zeros and runs faster than it ever will on a video.
"""

import functools
import math
import os

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cosmos3_jax.config import Config
from cosmos3_jax.models import sound_vae, transformer, video_vae
from cosmos3_jax.parallel import sharding
from cosmos3_jax.parallel.device import default_device, memory_limit
from cosmos3_jax.runtime.measure import GIB

BLOCK_BITS = 22  # 4 million normal values, which all weights are taken from


def weight_shapes(config: Config, dtype: jnp.dtype) -> dict:
    """What generation reads, as `jax.ShapeDtypeStruct`s: both towers and the decoders.

    As a checkpoint is loaded: the media tower's layers unstacked, the timestep embedding in float32
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


def random_params(config: Config, dtype: jnp.dtype, mesh: Mesh | None = None) -> dict:
    """Normal weights in the tree of `weight_shapes`, made where they stay.

    All are values of one block, in a scattered order that differs from leaf to leaf: to draw
    64 billion would take longer than what is measured. Beside the weights this takes the block
    alone, 16 MiB: a device's peak memory never resets, and it is to be the generation's.

    Args:
        config: the sizes.
        dtype: see `weight_shapes`.
        mesh: each of its devices makes its own part; None is the default device.

    Raises:
        ValueError: if the weights alone are more than the default device can hold.
    """
    shapes = weight_shapes(config, dtype)
    if mesh is None:
        check_fits(shapes)
    block = jax.random.normal(jax.random.key(0), 2**BLOCK_BITS)
    if mesh is not None:
        block = jax.device_put(block, NamedSharding(mesh, PartitionSpec()))
    paths, tree = jax.tree.flatten_with_path(shapes)
    made = []
    for seed, (path, leaf) in enumerate(paths):
        name = "/".join(key.key for key in path)
        placed = sharding.weight_sharding(mesh, name, leaf.shape)
        scatter = leaf_program(leaf.shape, leaf.dtype, placed)
        made.append(scatter(block, seed, *distribution(name)))
    return tree.unflatten(made)


def distribution(name: str) -> tuple[float, float]:
    """Mean and standard deviation of the weights of a leaf: scales are near 1, all else near 0."""
    return (1.0, 0.1) if "scale" in name.split("/") else (0.0, 0.02)


@functools.cache
def leaf_program(shape: tuple[int, ...], dtype: jnp.dtype, placed: NamedSharding | None):
    """The program that makes a leaf: each value's place, hashed, says which of the block it is."""

    def scatter(block: Array, seed: Array, mean: Array, spread: Array) -> Array:
        index = jnp.full(shape, seed, jnp.uint32)
        for axis in range(len(shape)):
            place = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
            index = (index ^ (index >> 15)) * jnp.uint32(0x9E3779B1) + place
        index = (index ^ (index >> 13)) * jnp.uint32(0x85EBCA6B)
        return (mean + spread * block[index >> (32 - BLOCK_BITS)]).astype(dtype)

    return jax.jit(scatter, out_shardings=placed)


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
