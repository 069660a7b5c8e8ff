"""Sharded safetensors files: read one tensor at a time, written whole or not at all."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from cosmos3_jax.checkpoint.rules import CheckpointError, canonical_key, raise_problems

MAX_SHARD_BYTES = 2 * 1024**3  # well under the 5 GB that hubs and old file systems take, for little memory


class TensorFiles:
    """The tensors of one component folder, whichever shards they lie in.

    Opening reads only the headers. Raises CheckpointError if a shard is missing or truncated, if the index
    and the shards disagree, or if two shards hold the same tensor.
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
        self.shapes = {
            key: tuple(self._files[name].get_slice(stored).get_shape())
            for key, (name, stored) in self._found.items()
        }
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
                        f"{self.folder}: tensor {key} is in both {seen[key]} and {name}; remove one of the files"
                    )
                seen[key] = name
                yield key, (name, stored)

    def read(self, key: str) -> np.ndarray:
        """One tensor in its stored dtype."""
        name, stored = self._found[key]
        return self._files[name].get_tensor(stored)


def has_tensors(folder: Path, stem: str) -> bool:
    """Whether a folder holds tensors under this stem, sharded or not."""
    return any((folder / f"{stem}.safetensors{suffix}").is_file() for suffix in ("", ".index.json"))


def _open(path: Path):
    try:
        return safe_open(path, framework="np")
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing; download the checkpoint again") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is not a complete safetensors file ({error}); download the checkpoint again"
        ) from error


def _read_index(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        return {canonical_key(key): name for key, name in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is not a safetensors index with a weight_map: {error!r}") from error


def plan_shards(sizes: Mapping[str, int], max_bytes: int = MAX_SHARD_BYTES) -> list[list[str]]:
    """Keys in order, cut into runs of at most `max_bytes` (a larger tensor is a shard of its own)."""
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


def write_shard(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write one safetensors file under a temporary name, then give it its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    # Loaders of the public layout insist on a format, and know this one.
    save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, temporary, {"format": "pt"})
    temporary.chmod(0o644)  # safetensors makes files that only their owner can read
    os.replace(temporary, path)


def write_index(path: Path, shards: Iterable[tuple[str, Iterable[str]]], total_size: int) -> None:
    """Write `stem.safetensors.index.json`: which shard holds which key."""
    weight_map = {key: name for name, keys in shards for key in keys}
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)
