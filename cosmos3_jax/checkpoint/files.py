"""Sharded safetensors files: read one tensor at a time, written whole or not at all."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from cosmos3_jax.checkpoint.rules import CheckpointError, canonical_key, raise_problems

MAX_SHARD_BYTES = (
    2 * 1024**3
)  # far below the 5 GB that is allowed: a shard being written is in memory
FLOAT_DTYPES = ("BF16", "F16", "F32", "F64")  # as safetensors calls them


class TensorFiles:
    """The tensors of one component folder, whichever shards they lie in.

    Opening reads only the headers. Raises CheckpointError if a shard is missing or truncated, if
    the index and the shards disagree, or if two shards hold the same tensor.

    Attributes:
        folder: where they lie.
        shapes: the shape of each tensor, by its canonical name.
        dtypes: what it is stored in, as safetensors calls it.
    """

    def __init__(self, folder: Path, stem: str):
        """Open `stem.safetensors`, or the shards that `stem.safetensors.index.json` names."""
        self.folder = folder
        index = folder / f"{stem}.safetensors.index.json"
        if index.is_file():
            listed = _read_index(index)
            names = sorted(set(listed.values()))
        else:
            listed, names = None, [f"{stem}.safetensors"]
        self._files = {name: _open(folder / name) for name in names}
        self._found = dict(self._scan())
        headers = {
            key: self._files[name].get_slice(stored) for key, (name, stored) in self._found.items()
        }
        self.shapes = {key: tuple(header.get_shape()) for key, header in headers.items()}
        self.dtypes = {key: header.get_dtype() for key, header in headers.items()}
        if listed is not None:
            raise_problems(
                f"{index} and its shards disagree",
                {
                    "in the index, not in a shard": sorted(set(listed) - set(self._found)),
                    "in a shard, not in the index": sorted(set(self._found) - set(listed)),
                },
            )

    def _scan(self) -> Iterator[tuple[str, tuple[str, str]]]:
        seen: dict[str, str] = {}
        for name, file in self._files.items():
            for stored in file.keys():  # noqa: SIM118 (not a dict)
                key = canonical_key(stored)
                if key in seen:
                    raise CheckpointError(
                        f"{self.folder}: tensor {key} is stored twice, in {seen[key]} and in "
                        f"{name}; download the checkpoint again"
                    )
                seen[key] = name
                yield key, (name, stored)

    def read(self, key: str) -> np.ndarray:
        """One tensor in its stored dtype. Raises CheckpointError if the file no longer gives it."""
        name, stored = self._found[key]
        try:
            return self._files[name].get_tensor(stored)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{self.folder / name}: {key} cannot be read ({error})"
            ) from error


def has_tensors(folder: Path, stem: str) -> bool:
    """Whether a folder holds tensors under this stem, sharded or not."""
    return any((folder / f"{stem}.safetensors{suffix}").is_file() for suffix in ("", ".index.json"))


def _open(path: Path):
    try:
        # Not mapped into memory: a file cut short while it is read is then an error instead of a
        # crash, and the memory that the process holds is what it uses.
        return safe_open(path, framework="np", backend="pread")
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing; download the checkpoint again") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is not a complete safetensors file ({error}); download the checkpoint again"
        ) from error


def _read_index(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        return {canonical_key(key): str(name) for key, name in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is not a safetensors index with a weight_map: {error!r}"
        ) from error


def plan_shards(sizes: Mapping[str, int], max_bytes: int = MAX_SHARD_BYTES) -> list[list[str]]:
    """Keys in order, cut into runs of at most `max_bytes`; a larger tensor is a run of its own."""
    shards: list[list[str]] = []
    filled = 0
    for key, size in sizes.items():
        if not shards or filled + size > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(key)
        filled += size
    return shards


def shard_name(stem: str, index: int, count: int) -> str:
    """`stem-00001-of-00007.safetensors` for index 0 of 7."""
    return f"{stem}-{index + 1:05d}-of-{count:05d}.safetensors"


def is_shard_of(path: Path, keys: Iterable[str]) -> bool:
    """Whether `path` is a whole safetensors file that holds just these tensors."""
    try:
        return sorted(_open(path).keys()) == sorted(keys)
    except CheckpointError:
        return False


def write_shard(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write one safetensors file under a temporary name, then give it its own.

    Raises OSError, leaving nothing behind, if the disk does not take it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    contiguous = {key: np.ascontiguousarray(value) for key, value in tensors.items()}
    try:
        # Loaders of the public layout insist on a format, and know this one.
        save_file(contiguous, temporary, {"format": "pt"})
        temporary.chmod(0o644)  # safetensors makes files that only their owner can read
        os.replace(temporary, path)
    except (SafetensorError, OSError) as error:
        temporary.unlink(missing_ok=True)
        raise OSError(f"{path} cannot be written: {error}") from error


def write_index(path: Path, shards: Iterable[tuple[str, Iterable[str]]], total_size: int) -> None:
    """Write `stem.safetensors.index.json`: which shard holds which key."""
    weight_map = {key: name for name, keys in shards for key in keys}
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)
