"""Tensors on their way from files to the device: read ahead, written into their leaf in place.

However large a leaf is, it takes at most `READ_AHEAD_BYTES` and one tensor in host memory, and one
tensor beside itself on the device.
"""

import dataclasses
import functools
import gc
import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from cosmos3_jax.checkpoint.rules import Rule

Index = tuple[tuple[int, int], ...]  # the start and the stop of a part on each axis
Where = Callable[[str, tuple[int, ...]], NamedSharding | None]

READERS = 4  # threads; more add nothing, measured on a disk in memory
READ_AHEAD_BYTES = 2**30


@dataclasses.dataclass(frozen=True)
class Piece:
    """A leaf, or a layer of a stacked one: a tensor of the converted layout.

    Attributes:
        key: its name in the converted layout.
        leaf: path of the leaf in the component's tree.
        place: where in the leaf: `(layer,)`, or `()` if it is the whole.
        shape, dtype: of the piece.
        parts: the rules that fill it, and where in it.
    """

    key: str
    leaf: str
    place: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: np.dtype
    parts: tuple[tuple[Rule, tuple[int | slice, ...]], ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def place_pieces(
    read: Callable[[Piece, tuple[slice, ...] | None], np.ndarray],
    pieces: Iterable[Piece],
    shapes: Mapping[str, tuple],
    where: Where = lambda *_: None,
) -> Iterator[tuple[str, jax.Array]]:
    """Each leaf's path and the leaf, once all its pieces are in it.

    Args:
        read: the values of a piece, or of a part of it; called from several threads.
        pieces: those of one leaf in a row.
        shapes: of the leaves.
        where: the sharding of the leaf of this path and shape; None is the default device.
    """
    arriving = _read_ahead(partial(_read_parts, read, shapes, where), pieces)
    for path, group in itertools.groupby(arriving, lambda item: item[0].leaf):
        leaf = None
        for piece, parts in group:
            values = _put(piece, parts, _piece_sharding(piece, shapes, where))
            if not piece.place:
                leaf = values
            else:
                zeros, write = _writer(where(path, shapes[path]))
                if leaf is None:
                    leaf = zeros(shapes[path], piece.dtype)
                leaf = write(leaf, values, *piece.place)
            # The transfer is over, and what was read can go before more is. JAX itself holds on to
            # it until the next collection.
            leaf.block_until_ready()
            del values, parts
            gc.collect(generation=0)
        yield path, leaf


def compile_placing(
    pieces: Iterable[Piece], shapes: Mapping[str, tuple], where: Where = lambda *_: None
) -> None:
    """Compile what `place_pieces` would for the same arguments."""
    stacked = {}
    for piece in pieces:
        if piece.place:
            shape, part = shapes[piece.leaf], _piece_sharding(piece, shapes, where)
            stacked[shape, piece.shape, piece.dtype, where(piece.leaf, shape)] = part
    for (shape, layer, dtype, whole), part in stacked.items():
        zeros, write = _writer(whole)
        zeros.lower(shape, dtype).compile()
        leaf = jax.ShapeDtypeStruct(shape, dtype, sharding=whole)
        values = jax.ShapeDtypeStruct(layer, dtype, sharding=part)
        write.lower(leaf, values, 0).compile()


def _piece_sharding(
    piece: Piece, shapes: Mapping[str, tuple], where: Where
) -> NamedSharding | None:
    """That of the leaf, without the axes along which pieces are stacked."""
    whole = where(piece.leaf, shapes[piece.leaf] if piece.place else piece.shape)
    return whole and NamedSharding(whole.mesh, PartitionSpec(*whole.spec[len(piece.place) :]))


def _read_parts(
    read: Callable[[Piece, tuple[slice, ...] | None], np.ndarray],
    shapes: Mapping[str, tuple],
    where: Where,
    piece: Piece,
) -> dict[Index | None, np.ndarray]:
    """The parts of a piece that devices of this process hold, each read once."""
    sharding = _piece_sharding(piece, shapes, where)
    if sharding is None:
        return {None: read(piece, None)}
    wanted = set(_parts(piece, sharding).values())
    return {index: read(piece, tuple(slice(*ends) for ends in index)) for index in wanted}


def _parts(piece: Piece, sharding: NamedSharding) -> dict[jax.Device, Index]:
    """Which part of a piece each device of this process holds."""
    held = sharding.addressable_devices_indices_map(piece.shape)
    return {
        device: tuple(part.indices(n)[:2] for part, n in zip(index, piece.shape, strict=True))
        for device, index in held.items()
    }


def _put(
    piece: Piece, parts: dict[Index | None, np.ndarray], sharding: NamedSharding | None
) -> jax.Array:
    """On the devices. Not by jnp.asarray, which makes another copy on the host first."""
    if sharding is None:
        return jax.device_put(parts[None])
    held = _parts(piece, sharding).items()
    arrays = [jax.device_put(parts[index], device) for device, index in held]
    return jax.make_array_from_single_device_arrays(piece.shape, sharding, arrays)


def _read_ahead(
    read: Callable[[Piece], Any], pieces: Iterable[Piece]
) -> Iterator[tuple[Piece, Any]]:
    """Pieces and their values in order; reading goes on while the caller works."""
    waiting: deque[tuple[Piece, Future]] = deque()
    ahead = 0
    readers = ThreadPoolExecutor(READERS, thread_name_prefix="checkpoint")
    try:
        for piece in itertools.chain(pieces, [None]):
            while waiting and (piece is None or ahead + piece.nbytes > READ_AHEAD_BYTES):
                first, values = waiting.popleft()
                yield first, values.result()
                del values
                ahead -= first.nbytes
            if piece is not None:
                waiting.append((piece, readers.submit(read, piece)))
                ahead += piece.nbytes
    finally:
        readers.shutdown(cancel_futures=True)


@functools.cache
def _writer(sharding: NamedSharding | None) -> tuple[Callable, Callable]:
    """Programs for leaves that lie so: zeros of a shape; and a layer written into a leaf, in place:
    the leaf's memory is the result's.
    """

    def write(leaf: jax.Array, values: jax.Array, layer: int) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(leaf, values, layer, 0)

    zeros = jax.jit(jnp.zeros, static_argnums=(0, 1), out_shardings=sharding)
    return zeros, jax.jit(write, donate_argnums=0, out_shardings=sharding)
