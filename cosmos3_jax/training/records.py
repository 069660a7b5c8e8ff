"""What a saved state is to hold: of each leaf its shape, dtype and a checksum, and whether its
numbers are finite.
"""

import json
import zlib
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.tree_util import keystr

Record = dict[str, dict[str, str]]  # path of a leaf -> its `kind` and, where known, its `sum`


@jax.jit
def _look(x: Array) -> tuple[Array, Array]:
    """Whether all numbers are finite, and a checksum: one pass over them, each device its own part,
    in whole numbers, so that no mesh changes them. A program for each shape, of which few differ.
    """
    return _all_finite(x), _checksum(x)


def _all_finite(x: Array) -> Array:
    """A single number may be infinite: optimizers begin so with the best loss that they saw."""
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        return jnp.array(True)
    return jnp.all(jnp.isfinite(x)) if x.ndim else ~jnp.isnan(x)


def _checksum(x: Array) -> Array:
    """uint32: the sum of all numbers' bits, each hashed together with its place.

    The hash is one to one (the end of MurmurHash3), so that no single change is missed.
    """
    if x.dtype == bool:
        x = x.astype(jnp.uint8)
    unsigned = jnp.dtype(f"uint{8 * min(x.dtype.itemsize, 4)}")
    bits = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
    place, stride = jnp.uint32(0), 1
    for axis in reversed(range(bits.ndim)):
        along = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        place, stride = place + along * jnp.uint32(stride % 2**32), stride * bits.shape[axis]
    bits = bits ^ (place * jnp.uint32(0x9E3779B9))
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits = (bits ^ (bits >> shift)) * jnp.uint32(factor)
    return jnp.sum(bits ^ (bits >> 16), dtype=jnp.uint32)


def record_of(state: Any) -> dict[str, dict[str, Any]]:
    """Of each leaf: its `kind`, a checksum `sum`, and whether all of it is `finite`."""
    leaves = leaves_of(state)
    looks = jax.device_get([_look(leaf) for leaf in leaves.values()])
    return {
        path: {"kind": describe(leaf), "sum": f"{total:08x}", "finite": bool(finite)}
        for (path, leaf), (finite, total) in zip(leaves.items(), looks, strict=True)
    }


def not_finite(record: dict[str, dict[str, Any]]) -> list[str]:
    """The paths of leaves that have numbers which are NaN or infinite."""
    return [path for path, leaf in record.items() if not leaf["finite"]]


def check_same(record: Record, state: Any) -> None:
    """Raise ValueError unless a state has the numbers that its record says, where it does."""
    for path, leaf in record_of(state).items():
        if record[path].get("sum", leaf["sum"]) != leaf["sum"]:
            raise ValueError(f"{path} is not what was saved")


def sealed(record: Record) -> dict[str, Any]:
    """A record as JSON can hold it, with a checksum of its own."""
    leaves = {path: {name: leaf[name] for name in ("kind", "sum")} for path, leaf in record.items()}
    return {"leaves": leaves, "sum": _seal(leaves)}


def opened(metadata: dict[str, Any]) -> Record | None:
    """The record that `sealed` made; None if there is none.

    Raises:
        ValueError, KeyError: it is damaged.
    """
    if not metadata:
        return None
    if _seal(metadata["leaves"]) != metadata["sum"]:
        raise ValueError("its record of what was saved is damaged")
    return metadata["leaves"]


def _seal(leaves: Record) -> str:
    return f"{zlib.crc32(json.dumps(leaves, sort_keys=True).encode()):08x}"


def describe(leaf) -> str:
    # Orbax would cast to the run's dtype without a word.
    return f"{jnp.dtype(leaf.dtype).name} {tuple(leaf.shape)}"


def leaves_of(tree) -> dict[str, Any]:
    """Path -> what has a shape and a dtype.

    Orbax has numbers where a tuple is, and names where a dataclass is.
    """
    leaves = jax.tree.leaves_with_path(tree)
    return {keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
