"""Rows of an autoencoder's pictures, divided over the devices of a mesh.

For every convolution, devices exchange the rows at their borders. Rows are padded so that they
divide evenly at every scale.

Axes: B batch, T frames, H rows, W columns, C channels.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import Array, lax

from cosmos3_jax.parallel.sharding import PROMPTS, ROWS, constrain, num_shards, spec


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
        zero.
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
    return constrain(x, PROMPTS, None, ROWS, None, None)


def are_divided(rows: int) -> bool:
    """Whether a mesh divides this many rows, evenly."""
    n = num_shards(ROWS)
    return n > 1 and rows % n == 0


def rows_around(x: Array) -> Array | None:
    """Of each device's rows of x [B, T, H, W, C] the row above and the row below, which are its
    neighbours': [B, T, 2 n, W, C]. Zeros beyond the picture; None where no mesh divides the rows.
    """
    if not are_divided(x.shape[2]):
        return None
    n, axes = num_shards(ROWS), spec(ROWS)[0]

    def exchange(x: Array, _: None) -> Array:
        first, last, device = x[:, :, :1], x[:, :, -1:], lax.axis_index(axes)
        if n == 2:  # one exchange: each has one neighbour, and sends the row that this one needs
            row = lax.ppermute(jnp.where(device == 0, last, first), axes, [(0, 1), (1, 0)])
            above, below = (jnp.where(device == i, row, 0) for i in (1, 0))
        else:  # who receives nothing has zeros
            above = lax.ppermute(last, axes, [(i, i + 1) for i in range(n - 1)])
            below = lax.ppermute(first, axes, [(i + 1, i) for i in range(n - 1)])
        return jnp.concatenate([above, below], axis=2)

    return over_blocks(exchange, divide_rows(x))


def surround(x: Array, around: Array | None = None) -> Array:
    """On one device: x [B, T, rows, W, C] between its two of `rows_around`, if there are any."""
    if around is None:
        return x
    return jnp.concatenate([around[:, :, :1], x, around[:, :, 1:]], axis=2)


def over_blocks(function: Callable, rows: Any, whole: Any = None) -> Array:
    """`function(rows, whole)` on each device, of its own rows.

    Args:
        function: to [B, T, rows, W, C'].
        rows: a tree of arrays like this, H or 2 n in place of rows.
        whole: a tree of arrays that each device has whole.

    Returns:
        The rows of all, [B, T, H, W, C'].
    """
    if not are_divided(jax.tree.leaves(rows)[0].shape[2]):
        return function(rows, whole)
    own = spec(PROMPTS, None, ROWS)
    mapped = jax.shard_map(function, in_specs=(own, spec()), out_specs=own, check_vma=False)
    return mapped(rows, whole)
