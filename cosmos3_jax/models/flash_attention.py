"""Attention of many queries over many keys as one Hopper kernel, written in Pallas (Mosaic GPU).

The schedule is FlashAttention-3's (Shah et al., 2024). Two warpgroups of a block compute, 64 rows
each, and a third does nothing but copy keys and values ahead of them. Within a warpgroup, the
product of the scores of one key block and that of the values of the block before are in flight
together, and the second runs on under the softmax of the first. Only the last key block is masked:
neither text padding nor a number of keys that is no multiple of a block costs anything, as both do
in cuDNN's kernel. Two blocks read the same keys and values, each of which crosses from the L2 cache
once for both. Queries stay in registers. They may come as they leave their product: each is read by
one block alone, which norms and rotates it first.

Axes: B batch, S queries, T keys, N query heads, K key/value heads, H head dimension.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from cosmos3_jax.parallel.device import AnyDevice, hopper_obstacle

HEAD_DIM = 128
COMPUTE_WARPGROUPS = 2
WARPGROUP_ROWS = 64  # queries of a warpgroup: the rows of Hopper's matrix instruction
KEY_BLOCK = 128  # two score and value tiles, 64 registers each, leave room for the probabilities
SLOTS = 2  # blocks of keys, and of values, that wait in shared memory
CLUSTER = 2  # blocks that read keys and values together: each copies half, for both
COMPUTE_REGISTERS, COPY_REGISTERS = 232, 40  # a thread's, of the 168 that each would get

_SCORES = (WARPGROUP_ROWS, KEY_BLOCK)
_MIXED = (WARPGROUP_ROWS, HEAD_DIM)
_LAYOUT = plgpu.Layout.WGMMA
_HALVES = pl.ds(0, HEAD_DIM // 2), pl.ds(HEAD_DIM // 2, HEAD_DIM // 2)  # of a head


def obstacle(query: Array, key: Array, device: AnyDevice) -> str | None:
    """Why the kernel cannot run on a device, or None if it can.

    Of the keys, all have to be real: padding comes on top.
    """
    if (found := hopper_obstacle(query.dtype, device)) is not None:
        return found
    if query.shape[-1] != HEAD_DIM:
        return f"the head dimension is {query.shape[-1]}, not {HEAD_DIM}"
    if key.shape[1] < KEY_BLOCK:
        return f"there are {key.shape[1]} keys, fewer than a block of {KEY_BLOCK}"
    return None


class Turn(NamedTuple):
    """What norms (`layers.rms_norm`) and rotates (`rope.apply_rope`) queries, in their dtype.

    Attributes:
        scale: [B, H], the norm's.
        table: [B, S, H], cosines and sines of the rotation side by side.
        epsilon: the norm's.
        heads: how many of the query's heads are queries; what follows them is not read.
    """

    scale: Array
    table: Array
    epsilon: float
    heads: int


def flash_attention(
    query: Array, key: Array, value: Array, length: Array, turn: Turn | None = None
) -> Array:
    """Scaled dot-product attention over the first `length` keys; scale H^-1/2, softmax in float32.

    Args:
        query: [B, S, N, 128] in bfloat16 or float16; with a `turn`, of more heads than N.
        key, value: [B, T, K, 128]; query head i reads key head i // (N / K). What stands behind
            `length` must be finite.
        length: int32 [B], from `KEY_BLOCK` to T.
        turn: what queries still need; None for nothing.

    Returns:
        [B, S, N, 128] in the query's dtype. It has no derivative of its own.
    """
    fixed = {} if turn is None else {"epsilon": turn.epsilon, "heads": turn.heads}

    @jax.custom_batching.custom_vmap
    def attend(*arrays: Array) -> Array:
        return run_tiles(*arrays, **fixed)

    @attend.def_vmap
    def fold_into_batch(size: int, is_batched: list[bool], *arrays: Array) -> tuple[Array, bool]:
        """vmap is more batch."""

        def fold(x: Array, batched: bool) -> Array:
            x = x if batched else jnp.broadcast_to(x, (size, *x.shape))
            return x.reshape(-1, *x.shape[2:])

        out = attend(*map(fold, arrays, is_batched))
        return out.reshape(size, -1, *out.shape[1:]), True

    arrays = [_pad_to_tile(x) for x in (query, key, value)]
    turning = () if turn is None else (turn.scale, _pad_to_tile(turn.table))
    return attend(*arrays, length, *turning)[:, : query.shape[1]]


@partial(jax.jit, static_argnames=("epsilon", "heads"))
def run_tiles(
    query: Array, key: Array, value: Array, length: Array, *turning: Array,
    epsilon: float = 0.0, heads: int | None = None,
) -> Array:  # fmt: skip
    """The kernel for whole tiles: one in a program, however many layers call it.

    JAX 0.11 numbers the kernels that a process lowers, and the number is part of the compilation
    cache's key. A program is found there by a process that lowered as many kernels before.
    """
    batch, queries, heads_there, _ = query.shape
    heads = heads or heads_there
    shape = (batch, queries, heads, HEAD_DIM)
    kernel = plgpu.kernel(
        partial(_allocate, heads_per_key=heads // key.shape[2], epsilon=epsilon),
        out_type=jax.ShapeDtypeStruct(shape, query.dtype),
        # Blocks that run together share a head, and find its keys and values in the L2 cache.
        grid=(batch, heads, pl.cdiv(queries, CLUSTER * COMPUTE_WARPGROUPS * WARPGROUP_ROWS)),
        grid_names=("batch", "head", "tile"),
        cluster=(CLUSTER,),
        cluster_names=("member",),
        num_threads=COMPUTE_WARPGROUPS + 1,
        thread_name="warpgroup",
        kernel_name="flash_attention_" + "x".join(map(str, (*shape, *key.shape[1:3]))),
        compiler_params=plgpu.CompilerParams(approx_math=True),  # exp2 of the GPU, 2 ulp
    )
    return kernel(query, key, value, length, *turning)


def _pad_to_tile(x: Array) -> Array:
    """A multiple of 8 rows, the smallest piece that the copy engine lays out in shared memory.

    Nothing else need be whole: it reads zeros behind the end of an array and writes nothing there.
    """
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % 8), *[(0, 0)] * (x.ndim - 2)])


def _allocate(query, key, value, length, *others, heads_per_key: int, epsilon: float) -> None:
    """Shared memory and barriers of one block, then its warpgroups' work."""
    *turning, out = others
    transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))

    def shared(count: int, rows: int):
        return plgpu.SMEM((count, rows, HEAD_DIM), query.dtype, transforms=transforms)

    tile_ready = plgpu.Barrier(num_barriers=COMPUTE_WARPGROUPS, num_arrivals=1 + bool(turning))
    ready = plgpu.Barrier(num_barriers=SLOTS)  # by the copy engine
    free = plgpu.ClusterBarrier(
        collective_axes=("member",), num_barriers=SLOTS, num_arrivals=COMPUTE_WARPGROUPS
    )
    done = plgpu.ClusterBarrier(collective_axes=("member",), num_arrivals=COMPUTE_WARPGROUPS + 1)

    def run(tiles, tables, keys, values, done):
        index = lax.axis_index("warpgroup")
        count = length[lax.axis_index("batch")]

        @pl.when(index < COMPUTE_WARPGROUPS)
        def _():
            plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
            tile, ready = (x.at[index] for x in tiles)
            rows = _rows(index)
            plgpu.copy_gmem_to_smem(query.at[rows], tile, ready)
            if turning:
                scale, table = turning
                plgpu.copy_gmem_to_smem(table.at[rows[:2]], tables.at[index], ready)
            plgpu.barrier_wait(ready)
            own = _load(tile)
            if turning:
                own = _turn(own, _load(tables.at[index]), scale.at[rows[0]], epsilon)
            _attend(own, keys, values, count, tile)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(tile, out.at[rows])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(index == COMPUTE_WARPGROUPS)
        def _():
            plgpu.set_max_registers(COPY_REGISTERS, action="decrease")
            _copy_ahead(key, value, keys, values, count, heads_per_key)

        plgpu.barrier_arrive(done)  # the other member may still write into this one's memory
        plgpu.barrier_wait(done)

    pl.run_scoped(
        run,
        (shared(COMPUTE_WARPGROUPS, WARPGROUP_ROWS), tile_ready),
        shared(COMPUTE_WARPGROUPS, WARPGROUP_ROWS) if turning else None,
        (shared(SLOTS, KEY_BLOCK), ready, free),
        (shared(SLOTS, KEY_BLOCK), ready, free),
        done,
        collective_axes="warpgroup",
    )


def _copy_ahead(key, value, keys, values, count: Array, heads_per_key: int) -> None:
    """Keep the slots of keys and values filled."""
    batch = lax.axis_index("batch")
    head = lax.div(lax.axis_index("head"), jnp.int32(heads_per_key))

    def fill(step: Array, _, wait: bool) -> None:
        block, slot = (batch, pl.ds(step * KEY_BLOCK, KEY_BLOCK), head), _slot(step)
        for source, (target, ready, free) in ((key, keys), (value, values)):
            if wait:
                plgpu.barrier_wait(free.at[slot])
            plgpu.copy_gmem_to_smem(
                source.at[block], target.at[slot], ready.at[slot], collective_axes="member"
            )

    steps = _steps(count)
    lax.fori_loop(0, jnp.minimum(steps, SLOTS), lambda i, _: fill(i, _, False), None)
    lax.fori_loop(SLOTS, steps, lambda i, _: fill(i, _, True), None)


def _rows(warpgroup: Array) -> tuple:
    """Which queries are a warpgroup's."""
    block = lax.axis_index("tile") * CLUSTER + lax.axis_index("member")
    first = (block * COMPUTE_WARPGROUPS + warpgroup) * WARPGROUP_ROWS
    return lax.axis_index("batch"), pl.ds(first, WARPGROUP_ROWS), lax.axis_index("head")


def _load(tile) -> list[Array]:
    """Both halves of each row, in registers: the matrix unit then reads no queries from memory."""
    return [plgpu.load(tile.at[:, half], (), layout=_LAYOUT) for half in _HALVES]


def _turn(query: list[Array], table: list[Array], scale, epsilon: float) -> list[Array]:
    """Norm and rotate a warpgroup's queries: as `layers.rms_norm` and `rope.apply_rope` do, but for
    the rotation's products, which are summed in float32.
    """
    dtype, shape = query[0].dtype, (WARPGROUP_ROWS, HEAD_DIM // 2)
    query, (cos, sin) = ([x.astype(jnp.float32) for x in halves] for halves in (query, table))
    square = sum(x * x for x in query).sum(axis=1)
    rms = lax.broadcast_in_dim(lax.rsqrt(square / HEAD_DIM + epsilon), shape, [0])
    normed = []
    for x, half in zip(query, _HALVES, strict=True):
        scales = plgpu.load(scale.at[half], (), layout=_LAYOUT.reduce(0), optimized=False)
        x = (x * rms).astype(dtype) * lax.broadcast_in_dim(scales, shape, [1])
        normed.append(x.astype(jnp.float32))
    first, second = normed
    return [(first * cos - second * sin).astype(dtype), (second * cos + first * sin).astype(dtype)]


def _attend(query: list[Array], keys, values, count: Array, out) -> None:
    """One warpgroup: its 64 queries over all key blocks, in their order."""
    (keys, key_ready, key_free), (values, value_ready, value_free) = keys, values
    dtype = out.dtype

    def add_scores(scores, slot) -> None:
        for x, half in zip(query, _HALVES, strict=True):
            plgpu.wgmma(scores, x, keys.at[slot, :, half].transpose((1, 0)))

    def first_scores(scores):
        plgpu.barrier_wait(key_ready.at[0])
        add_scores(scores, 0)
        return scores[...]

    def first_block():
        scores = pl.run_scoped(first_scores, plgpu.ACC(_SCORES, jnp.float32))
        plgpu.barrier_arrive(key_free.at[0])
        start = jnp.full((WARPGROUP_ROWS,), -jnp.inf), jnp.zeros((WARPGROUP_ROWS,))
        start = (plgpu.layout_cast(x, _LAYOUT.reduce(1)) for x in start)
        probabilities, maximum, total, _ = _softmax(scores, *start)
        mixed = plgpu.layout_cast(jnp.zeros(_MIXED), _LAYOUT)
        return mixed, probabilities.astype(dtype), maximum, total

    def block(step, carry, last: bool):
        mixed, probabilities, maximum, total = carry
        slot, before = _slot(step), _slot(step - 1)

        def products(scores_ref, mixed_ref):
            mixed_ref[...] = mixed
            plgpu.barrier_wait(key_ready.at[slot])
            add_scores(scores_ref, slot)
            plgpu.barrier_wait(value_ready.at[before])
            plgpu.wgmma(mixed_ref, probabilities, values.at[before])
            scores = plgpu.wgmma_accumulator_load(scores_ref, wait_n=1)
            plgpu.barrier_arrive(key_free.at[slot])
            scores = lax.optimization_barrier(scores)
            if last:
                index = plgpu.broadcasted_iota(jnp.int32, _SCORES, 1, layout=_LAYOUT)
                scores = jnp.where(index < count - step * KEY_BLOCK, scores, -jnp.inf)
            softmax = lax.optimization_barrier(_softmax(scores, maximum, total))
            new_probabilities, new_maximum, new_total, decay = softmax
            # The second product reads its registers until here: were the new probabilities rounded
            # before, the compiler would run the two products one after the other.
            new_mixed, new_probabilities = lax.optimization_barrier(
                (mixed_ref[...], new_probabilities)
            )
            plgpu.barrier_arrive(value_free.at[before])
            new_mixed *= lax.broadcast_in_dim(decay, _MIXED, [0])
            return new_mixed, new_probabilities.astype(dtype), new_maximum, new_total

        return pl.run_scoped(
            products, plgpu.ACC(_SCORES, jnp.float32), plgpu.ACC(_MIXED, jnp.float32)
        )

    whole = lax.div(count, jnp.int32(KEY_BLOCK))
    carry = lax.fori_loop(1, whole, lambda i, c: block(i, c, False), first_block())
    carry = lax.fori_loop(whole, _steps(count), lambda i, c: block(i, c, True), carry)
    mixed, probabilities, _, total = carry

    def last_values(mixed_ref):
        mixed_ref[...] = mixed
        slot = _slot(_steps(count) - 1)
        plgpu.barrier_wait(value_ready.at[slot])
        plgpu.wgmma(mixed_ref, probabilities, values.at[slot])
        return mixed_ref[...]

    mixed = pl.run_scoped(last_values, plgpu.ACC(_MIXED, jnp.float32))
    out[...] = (mixed * lax.broadcast_in_dim(1 / total, _MIXED, [0])).astype(dtype)


def _softmax(scores: Array, maximum: Array, total: Array) -> tuple[Array, Array, Array, Array]:
    """One block of a running softmax (Milakov & Gimelshein, 2018), in powers of two.

    Returns the block's probabilities, the new maximum and total, and by how much what was summed
    before has to shrink.
    """
    scale = math.log2(math.e) / math.sqrt(HEAD_DIM)
    new_maximum = jnp.maximum(maximum, scores.max(axis=1) * scale)
    decay = jnp.exp2(maximum - new_maximum)
    probabilities = jnp.exp2(scores * scale - lax.broadcast_in_dim(new_maximum, _SCORES, [0]))
    return probabilities, new_maximum, total * decay + probabilities.sum(axis=1), decay


def _steps(count: Array) -> Array:
    return lax.div(count + jnp.int32(KEY_BLOCK - 1), jnp.int32(KEY_BLOCK))


def _slot(step: Array) -> Array:
    return lax.rem(step, jnp.int32(SLOTS))
