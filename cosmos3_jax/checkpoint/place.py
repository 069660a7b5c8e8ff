"""Tensors on their way from files to the device: read ahead, written into their leaf in place.

However large a leaf is, it takes at most `READ_AHEAD_BYTES` and one tensor in host memory, and one
tensor beside itself on the device.
"""

import dataclasses
import gc
import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from cosmos3_jax.checkpoint.rules import Rule

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
    read: Callable[[Piece], np.ndarray], pieces: Iterable[Piece], shapes: Mapping[str, tuple]
) -> Iterator[tuple[str, jax.Array]]:
    """Each leaf's path and the leaf, on the default device, once all its pieces are in it.

    Args:
        read: the values of a piece; called from several threads.
        pieces: those of one leaf in a row.
        shapes: of the leaves.
    """
    arriving = _read_ahead(read, pieces)
    for path, group in itertools.groupby(arriving, lambda item: item[0].leaf):
        leaf = None
        for piece, values in group:
            # Not jnp.asarray, which makes another copy on the host first.
            values = jax.device_put(values)
            if not piece.place:
                leaf = values
            else:
                if leaf is None:
                    leaf = _zeros(shapes[path], piece.dtype)
                leaf = _write(leaf, values, *piece.place)
            # The transfer is over, and what was read can go before more is. JAX itself holds on to
            # it until the next collection.
            leaf.block_until_ready()
            del values
            gc.collect(generation=0)
        yield path, leaf


def compile_placing(pieces: Iterable[Piece], shapes: Mapping[str, tuple]) -> None:
    """Compile what `place_pieces` would for the same arguments."""
    stacked = {(shapes[piece.leaf], piece.shape, piece.dtype) for piece in pieces if piece.place}
    for shape, layer, dtype in stacked:
        _zeros.lower(shape, dtype).compile()
        leaf, values = (jax.ShapeDtypeStruct(x, dtype) for x in (shape, layer))
        _write.lower(leaf, values, 0).compile()


def _read_ahead(
    read: Callable[[Piece], np.ndarray], pieces: Iterable[Piece]
) -> Iterator[tuple[Piece, np.ndarray]]:
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


@partial(jax.jit, static_argnums=(0, 1))
def _zeros(shape: tuple[int, ...], dtype: np.dtype) -> jax.Array:
    return jnp.zeros(shape, dtype)


@partial(jax.jit, donate_argnums=0)
def _write(leaf: jax.Array, values: jax.Array, layer: int) -> jax.Array:
    """In place: the leaf's memory is the result's."""
    return jax.lax.dynamic_update_index_in_dim(leaf, values, layer, 0)
