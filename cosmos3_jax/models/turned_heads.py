"""Norm and rotation of heads as they leave their product, on Hopper, in Pallas (Mosaic GPU).

Queries are read by one block of attention's kernel each, which turns them itself (`turn`). Keys are
read by many, and have a kernel of their own (`turned_heads`). Both do what `layers.rms_norm` and
`rope.apply_rope` do, but for the rotation's products, which are summed in float32.

Axes: B batch, S tokens, N heads, H head dimension.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

HEAD_DIM = 128
ROWS = 64  # tokens of a warpgroup
WARPGROUPS = 2  # of a block
LAYOUT = plgpu.Layout.WGMMA
HALVES = pl.ds(0, HEAD_DIM // 2), pl.ds(HEAD_DIM // 2, HEAD_DIM // 2)  # of a head
TRANSFORMS = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))  # of shared memory


def load(tile) -> list[Array]:
    """Both halves of each row, [rows, H / 2], in registers."""
    return [_load(tile.at[:, half], layout=LAYOUT) for half in HALVES]


def _load(reference, **options) -> Array:
    """`plgpu.load` of all of a reference. JAX 0.10 requires an index, which 0.11 deprecates."""
    index = [()] if jax.__version_info__ < (0, 11) else []
    return plgpu.load(reference, *index, **options)


def turn(heads: list[Array], table: list[Array], scale, epsilon: float) -> list[Array]:
    """Halves of rows, normed and rotated; `table` has cosines and sines, `scale` is [H]."""
    dtype, shape = heads[0].dtype, heads[0].shape
    heads, (cos, sin) = ([x.astype(jnp.float32) for x in halves] for halves in (heads, table))
    square = sum(x * x for x in heads).sum(axis=1)
    rms = lax.broadcast_in_dim(lax.rsqrt(square / HEAD_DIM + epsilon), shape, [0])
    normed = []
    for x, half in zip(heads, HALVES, strict=True):
        scales = _load(scale.at[half], layout=LAYOUT.reduce(0), optimized=False)
        x = (x * rms).astype(dtype) * lax.broadcast_in_dim(scales, shape, [1])
        normed.append(x.astype(jnp.float32))
    first, second = normed
    return [(first * cos - second * sin).astype(dtype), (second * cos + first * sin).astype(dtype)]


@partial(jax.jit, static_argnames=("first", "heads", "epsilon"))
def turned_heads(
    product: Array, scale: Array, table: Array, *, first: int, heads: int, epsilon: float
) -> Array:
    """Heads `first` to `first + heads` of a product [B, S, N, 128], normed and rotated.

    Args:
        product: in bfloat16 or float16; S is a multiple of 8.
        scale: [B, 128], the norm's.
        table: [B, S, 128], cosines and sines of the rotation side by side.
        epsilon: the norm's.

    Returns:
        [B, S, heads, 128] in the dtype of the product.
    """
    batch, tokens, *_ = product.shape
    kernel = plgpu.kernel(
        partial(_turn_tile, first=first, epsilon=epsilon),
        out_type=jax.ShapeDtypeStruct((batch, tokens, heads, HEAD_DIM), product.dtype),
        # Blocks that run together share tokens, and find their angles in the L2 cache.
        grid=(batch, pl.cdiv(tokens, WARPGROUPS * ROWS), heads),
        grid_names=("batch", "tile", "head"),
        num_threads=WARPGROUPS,
        thread_name="warpgroup",
        kernel_name=f"turned_heads_{batch}x{tokens}x{heads}",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )
    return kernel(product, scale, table)


def _turn_tile(product, scale, table, out, *, first: int, epsilon: float) -> None:
    """One head of the tokens of a block."""

    def run(tiles, tables, ready):
        warpgroup, batch, head = map(lax.axis_index, ("warpgroup", "batch", "head"))
        tile, angles, ready = (x.at[warpgroup] for x in (tiles, tables, ready))
        rows = pl.ds((lax.axis_index("tile") * WARPGROUPS + warpgroup) * ROWS, ROWS)
        plgpu.copy_gmem_to_smem(product.at[batch, rows, first + head], tile, ready)
        plgpu.copy_gmem_to_smem(table.at[batch, rows], angles, ready)
        plgpu.barrier_wait(ready)
        turned = turn(load(tile), load(angles), scale.at[batch], epsilon)
        for half, x in zip(HALVES, turned, strict=True):
            tile.at[:, half][...] = x
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(tile, out.at[batch, rows, head])
        plgpu.wait_smem_to_gmem(0)

    shared = plgpu.SMEM((WARPGROUPS, ROWS, HEAD_DIM), product.dtype, transforms=TRANSFORMS)
    ready = plgpu.Barrier(num_barriers=WARPGROUPS, num_arrivals=2)
    pl.run_scoped(run, shared, shared, ready, collective_axes="warpgroup")
