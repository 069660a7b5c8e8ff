"""silu(x gate) * (x up) as one Hopper kernel, written in Pallas (Mosaic GPU).

Gate and up of a block are summed side by side in registers and meet there: the product of both,
twice as wide as what is kept, is never written down. Blocks stay on their multiprocessors and take
one tile after the other; a warpgroup copies ahead, across tiles, for two that compute. Neighbours
in a cluster have the same columns and read half of the weights each, for both.

Axes: M tokens, D model, F features.
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from cosmos3_jax.parallel.device import AnyDevice, hopper_obstacle

COMPUTE_WARPGROUPS = 2
ROWS, COLUMNS, DEPTH = 64, 128, 64  # of a warpgroup's tile, and of one step of its sums
SLOTS = 4  # steps that wait in shared memory
CLUSTER = 2
GROUP = 8  # clusters of rows that pass over the columns together, and find them in the L2 cache
MULTIPROCESSORS = 132  # of a device that does not say how many it has
COMPUTE_REGISTERS, COPY_REGISTERS = 232, 40

_TILE_ROWS = COMPUTE_WARPGROUPS * ROWS


def obstacle(x: Array, kernel: Array, device: AnyDevice) -> str | None:
    """Why the kernel cannot run on a device, or None if it can."""
    if (found := hopper_obstacle(x.dtype, device)) is not None:
        return found
    depth, _, features = kernel.shape
    if depth % DEPTH or features % COLUMNS:
        return f"{depth} x {features} weights are not whole blocks of {DEPTH} x {COLUMNS}"
    return None


def gated_product(x: Array, kernel: Array, device: AnyDevice) -> Array:
    """silu(x kernel[:, 0]) * (x kernel[:, 1]); sums and activation in float32.

    Args:
        x: [..., D] in bfloat16 or float16.
        kernel: [D, 2, F], gate and up.
        device: it runs on this one, or one like it.

    Returns:
        [..., F] in the dtype of x. It has no derivative of its own.
    """
    multiprocessors = getattr(device, "core_count", MULTIPROCESSORS)

    @jax.custom_batching.custom_vmap
    def multiply(x: Array, kernel: Array) -> Array:
        tokens = math.prod(x.shape[:-1])
        flat = jnp.pad(x.reshape(tokens, -1), [(0, -tokens % 8), (0, 0)])
        out = run_tiles(flat, kernel, multiprocessors=multiprocessors)
        return out[:tokens].reshape(*x.shape[:-1], -1)

    @multiply.def_vmap
    def fold_into_tokens(size: int, is_batched: list[bool], x: Array, kernel: Array):
        """vmap is more tokens; of weights, one product after the other."""
        if is_batched[1]:
            xs = x if is_batched[0] else jnp.broadcast_to(x, (size, *x.shape))
            return lax.map(lambda pair: multiply(*pair), (xs, kernel)), True
        return multiply(x, kernel), True

    return multiply(x, kernel)


@partial(jax.jit, static_argnames="multiprocessors")
def run_tiles(x: Array, kernel: Array, multiprocessors: int) -> Array:
    """The kernel, for a multiple of 8 tokens: one in a program, see `flash_attention.run_tiles`."""
    tokens, depth = x.shape
    features = kernel.shape[2]
    tiles = (pl.cdiv(tokens, CLUSTER * _TILE_ROWS), features // COLUMNS)
    blocks = min(multiprocessors // CLUSTER, math.prod(tiles))
    run = plgpu.kernel(
        partial(_allocate, tiles=tiles, blocks=blocks),
        out_type=jax.ShapeDtypeStruct((tokens, features), x.dtype),
        grid=(blocks,),
        grid_names=("block",),
        cluster=(CLUSTER,),
        cluster_names=("member",),
        num_threads=COMPUTE_WARPGROUPS + 1,
        thread_name="warpgroup",
        kernel_name=f"gated_product_{tokens}x{depth}x{features}",
        compiler_params=plgpu.CompilerParams(approx_math=True),  # exp2 of the GPU, 2 ulp
    )
    return run(x, kernel.reshape(depth, 2 * features))


def _allocate(x, kernel, out, *, tiles: tuple[int, int], blocks: int) -> None:
    """Shared memory and barriers of one block, then its warpgroups' work."""
    transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    steps = x.shape[1] // DEPTH
    block = lax.axis_index("block")
    mine = lax.div(math.prod(tiles) - block + blocks - 1, jnp.int32(blocks))

    def each_tile(work: Callable[[Array, Array, Array], None]) -> None:
        """`work` at this block's tiles: how many came before, first row and first column."""

        def at(i: Array, _) -> None:
            row, column = place(block + i * blocks, *tiles)
            row = row * CLUSTER + lax.axis_index("member")
            work(i, row * _TILE_ROWS, column * COLUMNS)

        lax.fori_loop(0, mine, at, None)

    def run(rows, weights, results, ready, free, done):
        index = lax.axis_index("warpgroup")

        @pl.when(index < COMPUTE_WARPGROUPS)
        def _():
            plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
            own = rows.at[:, pl.ds(index * ROWS, ROWS)]
            each_tile(partial(_compute, out, own, weights, results.at[index], ready, free, steps))
            plgpu.wait_smem_to_gmem(0)

        @pl.when(index == COMPUTE_WARPGROUPS)
        def _():
            plgpu.set_max_registers(COPY_REGISTERS, action="decrease")
            each_tile(partial(_copy_ahead, x, kernel, rows, weights, ready, free, steps))

        plgpu.barrier_arrive(done)  # the other member may still write into this one's memory
        plgpu.barrier_wait(done)

    pl.run_scoped(
        run,
        plgpu.SMEM((SLOTS, _TILE_ROWS, DEPTH), x.dtype, transforms=transforms),
        plgpu.SMEM((SLOTS, 2, DEPTH, COLUMNS), x.dtype, transforms=transforms),
        plgpu.SMEM((COMPUTE_WARPGROUPS, ROWS, COLUMNS), x.dtype, transforms=transforms),
        plgpu.Barrier(num_barriers=SLOTS, num_arrivals=3),  # rows, and gate's and up's columns
        plgpu.ClusterBarrier(
            collective_axes=("member",), num_barriers=SLOTS, num_arrivals=COMPUTE_WARPGROUPS
        ),
        plgpu.ClusterBarrier(collective_axes=("member",), num_arrivals=COMPUTE_WARPGROUPS + 1),
        collective_axes="warpgroup",
    )


def place(index: Array, rows: int, columns: int) -> tuple[Array, Array]:
    """Row and column of a tile: groups of rows, one after the other, pass over all columns."""
    whole = jnp.int32(GROUP * columns)
    first = lax.div(index, whole) * GROUP
    height = jnp.minimum(rows - first, GROUP)
    within = lax.rem(index, whole)
    return first + lax.rem(within, height), lax.div(within, height)


def _copy_ahead(
    x, kernel, rows, weights, ready, free, steps: int, tile: Array, row: Array, column: Array
) -> None:
    """Keep the slots filled, of one tile after the other."""

    def fill(step: Array, _) -> None:
        count = tile * steps + step
        slot, depth = lax.rem(count, jnp.int32(SLOTS)), pl.ds(step * DEPTH, DEPTH)

        @pl.when(count >= SLOTS)
        def _():
            plgpu.barrier_wait(free.at[slot])

        plgpu.copy_gmem_to_smem(x.at[pl.ds(row, _TILE_ROWS), depth], rows.at[slot], ready.at[slot])
        for i in range(2):
            source = kernel.at[depth, pl.ds(i * (kernel.shape[1] // 2) + column, COLUMNS)]
            plgpu.copy_gmem_to_smem(
                source, weights.at[slot, i], ready.at[slot], collective_axes="member"
            )

    lax.fori_loop(0, steps, fill, None)


def _compute(
    out, rows, weights, result, ready, free, steps: int, tile: Array, row: Array, column: Array
) -> None:
    """One warpgroup: its 64 rows of one tile."""

    def slot_of(step: Array) -> Array:
        return lax.rem(tile * steps + step, jnp.int32(SLOTS))

    def sums(gate, up):
        def add(step: Array, _) -> None:
            slot = slot_of(step)
            plgpu.barrier_wait(ready.at[slot])
            plgpu.wgmma(gate, rows.at[slot], weights.at[slot, 0])
            plgpu.wgmma(up, rows.at[slot], weights.at[slot, 1])
            plgpu.wgmma_wait(2)  # those of the step before are done

            @pl.when(step > 0)
            def _():
                plgpu.barrier_arrive(free.at[slot_of(step - 1)])

        lax.fori_loop(0, steps, add, None)
        plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(free.at[slot_of(jnp.int32(steps - 1))])
        return gate[...], up[...]

    accumulator = plgpu.ACC((ROWS, COLUMNS), jnp.float32)
    gate, up = pl.run_scoped(sums, accumulator, accumulator)
    hidden = gate / (1 + jnp.exp2(gate * -math.log2(math.e))) * up
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the tile before has left
    result[...] = hidden.astype(out.dtype)
    plgpu.commit_smem()
    row += lax.axis_index("warpgroup") * ROWS

    @pl.when(row < out.shape[0])
    def _():
        plgpu.copy_smem_to_gmem(result, out.at[pl.ds(row, ROWS), pl.ds(column, COLUMNS)])
