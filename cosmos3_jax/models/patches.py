"""Patches of latents, p x p pixels of one frame: a video token of the transformer each.

Axes: B batch, t frames, h rows, w columns and C channels of latents, p rows and columns of a patch,
M tokens.
"""

import einops
import jax.numpy as jnp
from jax import Array

from cosmos3_jax.config import TransformerConfig


def patch_grid(
    config: TransformerConfig, video_shape: tuple[int, int, int]
) -> tuple[int, int, int]:
    """Patches along (time, height, width) of latents (t, h, w); odd h and w are padded up."""
    frames, height, width = video_shape
    return frames, -(-height // config.latent_patch_size), -(-width // config.latent_patch_size)


def patchify(config: TransformerConfig, video: Array) -> Array:
    """[B, t, h, w, C] -> [B, M, p p C], zero rows and columns added at the bottom and right where
    needed.

    The features of a patch run over (row, column, channel).
    """
    p = config.latent_patch_size
    padding = [(0, -size % p) for size in video.shape[2:4]]
    video = jnp.pad(video, [(0, 0), (0, 0), *padding, (0, 0)])
    return einops.rearrange(video, "b t (h p) (w q) c -> b (t h w) (p q c)", p=p, q=p)


def unpatchify(config: TransformerConfig, tokens: Array, grid: tuple[int, int, int]) -> Array:
    """The inverse of `patchify`, padding included."""
    t, h, w = grid
    p = config.latent_patch_size
    return einops.rearrange(
        tokens, "b (t h w) (p q c) -> b t (h p) (w q) c", t=t, h=h, w=w, p=p, q=p
    )
