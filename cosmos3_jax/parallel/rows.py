"""Rows of an autoencoder's pictures, divided over the devices of a mesh.

XLA exchanges the rows at the borders for every convolution. Rows are padded so that they divide
evenly at every scale.

Axes: B batch, T frames, H rows, W columns, C channels.
"""

import dataclasses
from collections.abc import Callable
from typing import Self

import jax
import jax.numpy as jnp
from jax import Array

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
    """x [B, T, H, W, C], or in blocks of rows, [B, T, n, rows, W, C]: H or n divided."""
    return constrain(x, PROMPTS, None, ROWS, *[None] * (x.ndim - 3))


def are_divided(rows: int) -> bool:
    """Whether a mesh divides this many rows, evenly."""
    n = num_shards(ROWS)
    return n > 1 and rows % n == 0


def blocks_of_rows(x: Array) -> Array:
    """x [B, T, H, W, C] -> [B, T, n, H / n + 2, W, C]: each device's rows, and one of each
    neighbour's; zeros beyond the picture.
    """
    n = num_shards(ROWS)
    blocks = divide_rows(x.reshape(*x.shape[:2], n, -1, *x.shape[3:]))
    # Placed once more, or else XLA would first move whole blocks and then take their ends.
    last, first = (divide_rows(x) for x in (blocks[:, :, :, -1:], blocks[:, :, :, :1]))
    others = [(0, 0)] * 3
    above = jnp.pad(last[:, :, :-1], [(0, 0), (0, 0), (1, 0), *others])
    below = jnp.pad(first[:, :, 1:], [(0, 0), (0, 0), (0, 1), *others])
    return divide_rows(jnp.concatenate([above, blocks, below], axis=3))


def over_blocks(function: Callable, blocks: Array, *whole: Array) -> Array:
    """`function(block, *whole)` on each device: of its block of `blocks_of_rows`, and of arrays
    that each has whole. [B, T, rows + 2, W, C] -> [B, T, rows, W, C']; together [B, T, H, W, C'].
    """
    placed = spec(PROMPTS, None, ROWS)
    mapped = jax.shard_map(
        lambda blocks, *whole: function(blocks[:, :, 0], *whole)[:, :, None],
        in_specs=(placed, *[spec()] * len(whole)), out_specs=placed, check_vma=False,
    )  # fmt: skip
    y = mapped(blocks, *whole)
    return y.reshape(*y.shape[:2], -1, *y.shape[4:])
