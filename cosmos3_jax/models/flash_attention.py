"""Attention of many queries over many keys as one Hopper kernel, written in Pallas (Mosaic GPU).

The schedule is FlashAttention-3's (Shah et al., 2024). Two warpgroups of a block compute, 64 rows
each, and a third does nothing but copy keys and values ahead of them. Within a warpgroup, the
product of the scores of one key block and that of the values of the block before are in flight
together, and the second runs on under the softmax of the first. Media are read where they lie, in
whole blocks; what is left of them is put before the text, and only these blocks are masked: neither
text padding nor a number of keys that is no multiple of a block costs anything, as both do in
cuDNN's kernel. Two blocks read the same keys and values, each of which crosses from the L2 cache
once for both. Queries stay in registers.

Axes: B batch, S media tokens, T text tokens, N query heads, K key/value heads, H head dimension.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from cosmos3_jax.models.turned_heads import (
    HALVES,
    HEAD_DIM,
    LAYOUT,
    TRANSFORMS,
    load,
    turn,
    turned_heads,
)
from cosmos3_jax.parallel.device import AnyDevice, hopper_obstacle

COMPUTE_WARPGROUPS = 2
WARPGROUP_ROWS = 64  # queries of a warpgroup: the rows of Hopper's matrix instruction
KEY_BLOCK = 128  # two score and value tiles, 64 registers each, leave room for the probabilities
SLOTS = 2  # blocks of keys, and of values, that wait in shared memory
CLUSTER = 2  # blocks that read keys and values together: each copies half, for both
COMPUTE_REGISTERS, COPY_REGISTERS = 232, 40  # a thread's, of the 168 that each would get

_SCORES = (WARPGROUP_ROWS, KEY_BLOCK)
_MIXED = (WARPGROUP_ROWS, HEAD_DIM)


def obstacle(media: Array, device: AnyDevice) -> str | None:
    """Why the kernel cannot run on a device, or None if it can; of media's [B, S, heads, H]."""
    if (found := hopper_obstacle(media.dtype, device)) is not None:
        return found
    if media.shape[-1] != HEAD_DIM:
        return f"the head dimension is {media.shape[-1]}, not {HEAD_DIM}"
    if media.shape[1] < KEY_BLOCK:
        return f"there are {media.shape[1]} keys of media, fewer than a block of {KEY_BLOCK}"
    return None


class Turns(NamedTuple):
    """What norms and rotates the queries and keys of a product.

    Attributes:
        query_scale, key_scale: [B, H], the norms', in the dtype of the product.
        table: [B, S, H], cosines and sines of the rotation side by side, in that dtype, too.
        epsilon: the norms'.
    """

    query_scale: Array
    key_scale: Array
    table: Array
    epsilon: float


def flash_attention(
    query: Array, key: Array, value: Array, text_key: Array, text_value: Array, length: Array
) -> Array:
    """Scaled dot-product attention of media tokens over themselves and the text; scale H^-1/2,
    softmax in float32.

    Args:
        query: [B, S', N, 128] in bfloat16 or float16.
        key, value: [B, S, K, 128]; query head i reads key head i // (N / K). S is `KEY_BLOCK` or
            more.
        text_key, text_value: [B, T, K, 128]. What stands behind `length` must be finite.
        length: int32 [B], from 0 to T: how much of the text is real.

    Returns:
        [B, S', N, 128] in the query's dtype. It has no derivative of its own.
    """

    queries, media = query.shape[1], key.shape[1]

    def attend(query, key, value, text_key, text_value, length) -> Array:
        tail = _tail(key, text_key, media), _tail(value, text_value, media)
        keys = length + media % KEY_BLOCK
        return run_tiles(query, key, value, *tail, keys, heads=query.shape[2], media=media)

    query, key, value = (_pad_to_tile(x) for x in (query, key, value))
    return _over_batch(attend)(query, key, value, text_key, text_value, length)[:, :queries]


def attention_of_product(
    product: Array, key_heads: int, turns: Turns, text_key: Array, text_value: Array, length: Array
) -> Array:
    """`flash_attention` of queries, keys and values as they leave their product, [B, S, N + 2 K,
    128], queries and keys still to be normed and rotated. Values are read where they are.
    """
    heads, media = product.shape[2] - 2 * key_heads, product.shape[1]

    def attend(product, query_scale, key_scale, table, text_key, text_value, length) -> Array:
        key = turned_heads(
            product, key_scale, table, first=heads, heads=key_heads, epsilon=turns.epsilon
        )
        tail = _tail(key, text_key, media), _tail(product[:, :, -key_heads:], text_value, media)
        return run_tiles(
            product, key, product, *tail, length + media % KEY_BLOCK, query_scale, table,
            heads=heads, media=media, value_head=heads + key_heads, epsilon=turns.epsilon,
        )  # fmt: skip

    product, table = _pad_to_tile(product), _pad_to_tile(turns.table)
    scales = turns.query_scale, turns.key_scale
    out = _over_batch(attend)(product, *scales, table, text_key, text_value, length)
    return out[:, :media]


def _tail(media: Array, text: Array, count: int) -> Array:
    """Keys or values behind the media's last whole block: the rest of the media, then the text."""
    rest = media[:, count // KEY_BLOCK * KEY_BLOCK : count]
    return _pad_to_tile(jnp.concatenate([rest, text], axis=1))


def _over_batch(function: Callable[..., Array]) -> Callable[..., Array]:
    """Of a function of arrays with a batch in front: vmap is more batch."""
    mapped = jax.custom_batching.custom_vmap(function)

    @mapped.def_vmap
    def fold_into_batch(size: int, is_batched: list[bool], *arrays: Array) -> tuple[Array, bool]:
        def fold(x: Array, batched: bool) -> Array:
            x = x if batched else jnp.broadcast_to(x, (size, *x.shape))
            return x.reshape(-1, *x.shape[2:])

        out = mapped(*map(fold, arrays, is_batched))
        return out.reshape(size, -1, *out.shape[1:]), True

    return mapped


@partial(jax.jit, static_argnames=("heads", "media", "value_head", "epsilon"))
def run_tiles(
    query: Array, key: Array, value: Array, tail_key: Array, tail_value: Array, length: Array,
    *turning: Array, heads: int, media: int, value_head: int = 0, epsilon: float = 0.0,
) -> Array:  # fmt: skip
    """The kernel for whole tiles: one in a program, however many layers call it.

    JAX 0.11 numbers the kernels that a process lowers, and the number is part of the compilation
    cache's key. A program is found there by a process that lowered as many kernels before.

    Args:
        key, value: of which whole blocks are read.
        tail_key, tail_value: see `_tail`.
        length: int32 [B], how much of the tail is real.
        turning: scale and table, if queries are to be normed and rotated.
        heads: how many of the query's are queries.
        media: how many keys are real.
        value_head: the first of the value's that is one.
    """
    batch, queries, *_ = query.shape
    shape = (batch, queries, heads, HEAD_DIM)
    kernel = plgpu.kernel(
        partial(
            _allocate, media=media, heads_per_key=heads // key.shape[2], value_head=value_head,
            epsilon=epsilon,
        ),
        out_type=jax.ShapeDtypeStruct(shape, query.dtype),
        # Blocks that run together share a head, and find its keys and values in the L2 cache.
        grid=(batch, heads, pl.cdiv(queries, CLUSTER * COMPUTE_WARPGROUPS * WARPGROUP_ROWS)),
        grid_names=("batch", "head", "tile"),
        cluster=(CLUSTER,),
        cluster_names=("member",),
        num_threads=COMPUTE_WARPGROUPS + 1,
        thread_name="warpgroup",
        kernel_name="flash_attention_" + "x".join(map(str, (*shape, media, *tail_key.shape[1:3]))),
        compiler_params=plgpu.CompilerParams(approx_math=True),  # exp2 of the GPU, 2 ulp
    )  # fmt: skip
    return kernel(query, key, value, tail_key, tail_value, length, *turning)


def _pad_to_tile(x: Array) -> Array:
    """A multiple of 8 rows, the smallest piece that the copy engine lays out in shared memory.

    Nothing else need be whole: it reads zeros behind the end of an array and writes nothing there.
    """
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % 8), *[(0, 0)] * (x.ndim - 2)])


def _allocate(
    query, key, value, tail_key, tail_value, length, *others,
    media: int, heads_per_key: int, value_head: int, epsilon: float,
) -> None:  # fmt: skip
    """Shared memory and barriers of one block, then its warpgroups' work."""
    *turning, out = others

    def shared(count: int, rows: int):
        return plgpu.SMEM((count, rows, HEAD_DIM), query.dtype, transforms=TRANSFORMS)

    tile_ready = plgpu.Barrier(num_barriers=COMPUTE_WARPGROUPS, num_arrivals=1 + bool(turning))
    ready = plgpu.Barrier(num_barriers=SLOTS)  # by the copy engine
    free = plgpu.ClusterBarrier(
        collective_axes=("member",), num_barriers=SLOTS, num_arrivals=COMPUTE_WARPGROUPS
    )
    done = plgpu.ClusterBarrier(collective_axes=("member",), num_arrivals=COMPUTE_WARPGROUPS + 1)

    def run(tiles, tables, keys, values, done):
        index = lax.axis_index("warpgroup")
        blocks = _Blocks(media // KEY_BLOCK, length[lax.axis_index("batch")])

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
            own = load(tile)  # in registers: the matrix unit then reads no queries from memory
            if turning:
                own = turn(own, load(tables.at[index]), scale.at[rows[0]], epsilon)
            _attend(own, keys, values, blocks, tile)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(tile, out.at[rows])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(index == COMPUTE_WARPGROUPS)
        def _():
            plgpu.set_max_registers(COPY_REGISTERS, action="decrease")
            head = lax.div(lax.axis_index("head"), jnp.int32(heads_per_key))
            copied = (key, tail_key, head, keys), (value, tail_value, head + value_head, values)
            _copy_ahead(copied, head, blocks)

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


class _Blocks(NamedTuple):
    """Blocks of keys: whole ones of the media, then those of the tail, of so many real keys."""

    of_media: int
    tail: Array

    @property
    def all(self) -> Array:
        return self.of_media + lax.div(self.tail + jnp.int32(KEY_BLOCK - 1), jnp.int32(KEY_BLOCK))

    def real(self, block: Array) -> Array:
        """How many keys there are from the first of a tail's block on."""
        return self.tail - (block - self.of_media) * KEY_BLOCK


def _copy_ahead(copied: tuple, tail_head: Array, blocks: _Blocks) -> None:
    """Keep the slots filled: of keys, and of values, from the media, the tail, into slots."""
    batch = lax.axis_index("batch")

    def fill(step: Array, _, wait: bool) -> None:
        slot, in_tail = _slot(step), step - blocks.of_media
        for media, tail, head, (target, ready, free) in copied:
            if wait:
                plgpu.barrier_wait(free.at[slot])

            def copy(source, step, head, target=target.at[slot], ready=ready.at[slot]):
                block = source.at[batch, pl.ds(step * KEY_BLOCK, KEY_BLOCK), head]
                plgpu.copy_gmem_to_smem(block, target, ready, collective_axes="member")

            pl.when(in_tail < 0)(partial(copy, media, step, head))
            pl.when(in_tail >= 0)(partial(copy, tail, in_tail, tail_head))

    lax.fori_loop(0, jnp.minimum(blocks.all, SLOTS), lambda i, _: fill(i, _, False), None)
    lax.fori_loop(SLOTS, blocks.all, lambda i, _: fill(i, _, True), None)


def _rows(warpgroup: Array) -> tuple:
    """Which queries are a warpgroup's."""
    block = lax.axis_index("tile") * CLUSTER + lax.axis_index("member")
    first = (block * COMPUTE_WARPGROUPS + warpgroup) * WARPGROUP_ROWS
    return lax.axis_index("batch"), pl.ds(first, WARPGROUP_ROWS), lax.axis_index("head")


def _attend(query: list[Array], keys, values, blocks: _Blocks, out) -> None:
    """One warpgroup: its 64 queries over all key blocks, in their order."""
    (keys, key_ready, key_free), (values, value_ready, value_free) = keys, values
    dtype = out.dtype

    def add_scores(scores, slot) -> None:
        for x, half in zip(query, HALVES, strict=True):
            plgpu.wgmma(scores, x, keys.at[slot, :, half].transpose((1, 0)))

    def first_scores(scores):
        plgpu.barrier_wait(key_ready.at[0])
        add_scores(scores, 0)
        return scores[...]

    def first_block():
        scores = pl.run_scoped(first_scores, plgpu.ACC(_SCORES, jnp.float32))
        plgpu.barrier_arrive(key_free.at[0])
        start = jnp.full((WARPGROUP_ROWS,), -jnp.inf), jnp.zeros((WARPGROUP_ROWS,))
        start = (plgpu.layout_cast(x, LAYOUT.reduce(1)) for x in start)
        probabilities, maximum, total, _ = _softmax(scores, *start)
        mixed = plgpu.layout_cast(jnp.zeros(_MIXED), LAYOUT)
        return mixed, probabilities.astype(dtype), maximum, total

    def block(step, carry, masked: bool):
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
            if masked:
                index = plgpu.broadcasted_iota(jnp.int32, _SCORES, 1, layout=LAYOUT)
                scores = jnp.where(index < blocks.real(step), scores, -jnp.inf)
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

    carry = lax.fori_loop(1, blocks.of_media, lambda i, c: block(i, c, False), first_block())
    carry = lax.fori_loop(blocks.of_media, blocks.all, lambda i, c: block(i, c, True), carry)
    mixed, probabilities, _, total = carry

    def last_values(mixed_ref):
        mixed_ref[...] = mixed
        slot = _slot(blocks.all - 1)
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


def _slot(step: Array) -> Array:
    return lax.rem(step, jnp.int32(SLOTS))
