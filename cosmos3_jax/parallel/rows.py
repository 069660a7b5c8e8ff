"""Rows of an autoencoder's pictures, divided over the devices of a mesh.

For a convolution wider than a pixel, devices exchange the rows at their borders; where it has a
stride, XLA does it. Rows are padded so that they divide evenly at every scale.

Axes: B batch, T frames, H rows, W columns, C channels.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import Array, lax

from cosmos3_jax.parallel.sharding import PROMPTS, ROWS, constrain, mesh_sizes, num_shards, spec


@dataclasses.dataclass(frozen=True)
class Rows:
    """How rows divide: evenly at every scale, so that no operation has to move whole pictures.

    Attributes:
        real: how many rows of latents there are.
        padded: the same with those added behind the last.
    """

    real: int = 1
    padded: int = 1

    @classmethod
    def of(cls, real: int) -> Self:
        """Of pictures of `real` rows of latents, on the ambient mesh."""
        return cls(real, real + -real % num_shards(ROWS))

    def real_of(self, padded: int) -> int:
        """Of the rows of a picture, at any scale, those that are not padding."""
        return padded * self.real // self.padded

    def place(self, x: Array) -> Array:
        """x [B, T, H, W, C], its rows divided, and zero where they are padding.

        A convolution reads zeros behind the last row; after another layer, padding is no longer
        zero. So each layer that reads more than a pixel places its input first.
        """
        real = self.real_of(x.shape[2])
        if real < x.shape[2]:
            x = jnp.where(jnp.arange(x.shape[2])[:, None, None] < real, x, 0)
        return divide_rows(x)

    def gather(self, pixels: Array, height: int, width: int) -> Array:
        """Pixels [B, T, H W, C] -> all that are not padding, on each device."""
        real = self.real_of(height)
        pixels = constrain(pixels, PROMPTS, None, None, None)
        return pixels if real == height else pixels[:, :, : real * width]


def divide_rows(x: Array) -> Array:
    """x [B, T, H, W, C], H divided."""
    return constrain(x, PROMPTS, None, row_axes(), None, None)


def row_axes() -> tuple[str, ...]:
    """The axes that divide rows, in the order of the ambient mesh, in which `ppermute` counts."""
    return tuple(name for name in mesh_sizes() if name in ROWS)


def are_divided(rows: int) -> bool:
    """Whether a mesh divides this many rows, evenly."""
    n = num_shards(ROWS)
    return n > 1 and rows % n == 0


def rows_around(x: Array) -> Array | None:
    """The row above and the row below each device's rows of x [B, T, H, W, C], which its neighbours
    hold: [B, T, 2 n, W, C], two a device. Zeros beyond the picture; None where no mesh divides the
    rows.
    """
    if not are_divided(x.shape[2]):
        return None
    n, axes = num_shards(ROWS), row_axes()

    def exchange(x: Array, _: None) -> Array:
        first, last, device = x[:, :, :1], x[:, :, -1:], lax.axis_index(axes)
        if n == 2:  # one exchange: each has one neighbour, and sends the row that this one needs
            row = lax.ppermute(jnp.where(device == 0, last, first), axes, [(0, 1), (1, 0)])
            above, below = (jnp.where(device == i, row, 0) for i in (1, 0))
        else:  # who receives nothing has zeros
            above = lax.ppermute(last, axes, [(i, i + 1) for i in range(n - 1)])
            below = lax.ppermute(first, axes, [(i + 1, i) for i in range(n - 1)])
        return jnp.concatenate([above, below], axis=2)

    return on_own_rows(exchange, divide_rows(x))


def surround(x: Array, around: Array | None = None) -> Array:
    """On one device, x [B, T, rows, W, C] with its two of `rows_around` above and below; x itself
    where there are none.
    """
    if around is None:
        return x
    return jnp.concatenate([around[:, :, :1], x, around[:, :, 1:]], axis=2)


def on_own_rows(function: Callable, divided: Any, whole: Any = None) -> Array:
    """`function(divided, whole)` on each device; once, of all, where no mesh divides the rows.

    Args:
        function: of a device's parts, to an array of which axis 2 is a part, too.
        divided: a tree of arrays [B, T, H, W, C]; each device gets its part of axis 2. They have
            elements: on empty ones jaxlib 0.11's partitioner crashes.
        whole: a tree of arrays that each device has whole.

    Returns:
        The parts of all devices, one after the other on axis 2.
    """
    if not are_divided(jax.tree.leaves(divided)[0].shape[2]):
        return function(divided, whole)
    own = spec(PROMPTS, None, row_axes())
    mapped = jax.shard_map(function, in_specs=(own, spec()), out_specs=own, check_vma=False)
    return mapped(divided, whole)
