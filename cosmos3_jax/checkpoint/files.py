"""Sharded safetensors files: read one tensor at a time, written whole or not at all."""

import contextlib
import dataclasses
import itertools
import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from cosmos3_jax import guard
from cosmos3_jax.checkpoint import publish
from cosmos3_jax.checkpoint.digests import Sums
from cosmos3_jax.checkpoint.finite import is_finite
from cosmos3_jax.checkpoint.rules import CheckpointError, canonical_key, raise_problems

PUBLIC_STEM, CONVERTED_STEM = "diffusion_pytorch_model", "params"
MAX_SHARD_BYTES = 2 * 2**30  # far below the 5 GB allowed: a shard being written is in memory
ALIGNMENT = 64
# By the names that safetensors has for them.
FLOAT_DTYPES = {
    "BF16": np.dtype(jnp.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}

log = logging.getLogger("cosmos3_jax")


@dataclasses.dataclass(frozen=True)
class _Stored:
    """Where a tensor lies: `start` and `size` in bytes, `dtype` as safetensors calls it."""

    file: BinaryIO
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


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
        self._found: dict[str, _Stored] = {}
        for name in names:
            self._add(folder / name)
        self.shapes = {key: stored.shape for key, stored in self._found.items()}
        self.dtypes = {key: stored.dtype for key, stored in self._found.items()}
        if listed is not None:
            raise_problems(
                f"{index} and its shards disagree",
                {
                    "in the index, not in a shard": sorted(set(listed) - set(self._found)),
                    "in a shard, not in the index": sorted(set(self._found) - set(listed)),
                },
            )

    def _add(self, path: Path) -> None:
        for name, stored in _read_header(path).items():
            key = canonical_key(name)
            if key in self._found:
                other = Path(self._found[key].file.name).name
                raise CheckpointError(
                    f"{self.folder}: tensor {key} is stored twice, in {other} and in "
                    f"{path.name}; download the checkpoint again"
                )
            self._found[key] = stored

    def read(self, key: str, index: Sequence[slice] | None = None) -> np.ndarray:
        """One tensor in its stored dtype, or a part of it with a start and a stop on each axis:
        nothing else is read. Raises CheckpointError if the file no longer gives it, or if it holds
        NaN or infinity.

        Threads may read at the same time, and the interpreter is free meanwhile. Safetensors' own
        reader is not used: it holds the interpreter, and reads at half the rate.
        """
        stored = self._found[key]
        index = [slice(0, size) for size in stored.shape] if index is None else index
        shape = [part.stop - part.start for part in index]
        dtype = FLOAT_DTYPES[stored.dtype]
        values = _aligned(math.prod(shape) * dtype.itemsize)
        done = 0
        try:
            for start, size in _runs(stored.shape, index):
                end = done + size * dtype.itemsize
                at = stored.start + start * dtype.itemsize - done
                while done < end:  # the system reads at most 2 GiB at a time
                    count = os.preadv(stored.file.fileno(), [values[done:end]], at + done)
                    if count == 0:
                        raise OSError("the file has become shorter")
                    done += count
        except OSError as error:
            raise CheckpointError(f"{stored.file.name}: {key} cannot be read ({error})") from error
        values = values.view(dtype).reshape(shape)
        if not is_finite(values):
            raise CheckpointError(
                f"{stored.file.name}: {key} holds NaN or infinity; download the checkpoint again, "
                "or take an earlier state of the training"
            )
        return values


def _runs(shape: Sequence[int], index: Sequence[slice]) -> Iterator[tuple[int, int]]:
    """Where the elements of a part lie in an array: the start and the length of each run."""
    cut = [i for i, part in enumerate(index) if part.stop - part.start != shape[i]]
    depth = cut[-1] if cut else 0  # axes behind it are whole, so that it is in one run with them
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    last = index[depth] if shape else slice(0, 1)
    stride = strides[depth] if shape else 1
    for outer in itertools.product(*(range(part.start, part.stop) for part in index[:depth])):
        start = sum(i * n for i, n in zip(outer, strides, strict=False)) + last.start * stride
        yield start, (last.stop - last.start) * stride


def _aligned(size: int) -> np.ndarray:
    """Bytes at an address from which XLA on a CPU takes them without a copy."""
    values = np.empty(size + ALIGNMENT, np.uint8)
    start = -values.ctypes.data % ALIGNMENT
    return values[start : start + size]


def has_tensors(folder: Path, stem: str) -> bool:
    """Whether a folder holds tensors under this stem, sharded or not."""
    return any((folder / f"{stem}.safetensors{suffix}").is_file() for suffix in ("", ".index.json"))


def _read_header(path: Path) -> dict[str, _Stored]:
    """Every tensor of a file by the name it is stored under; the file is checked and kept open."""
    again = "download the checkpoint again"
    try:
        guard.check_plain(path, CheckpointError)
        with guard.parsing(path, "a complete safetensors file", CheckpointError, again):
            file = path.open("rb", buffering=0)
            length = int.from_bytes(file.read(8), "little")
            if length > guard.MOST_JSON:
                raise ValueError(f"its header has {length} bytes, more than {guard.MOST_JSON}")
            # Not mapped into memory: a file cut short while it is read is then an error instead of
            # a crash, and the memory that the process holds is what it uses.
            with safe_open(path, framework="np", backend="pread"):
                pass  # whole, and its header is sound
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            return {
                name: _Stored(
                    file,
                    entry["dtype"],
                    tuple(entry["shape"]),
                    8 + length + entry["data_offsets"][0],
                    entry["data_offsets"][1] - entry["data_offsets"][0],
                )
                for name, entry in header.items()
            }
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing; {again}") from error
    except OSError as error:
        raise CheckpointError(
            f"{path} is not a complete safetensors file ({error}); {again}"
        ) from error


def _read_index(path: Path) -> dict[str, str]:
    """Canonical key -> the name of a file beside the index."""
    content = guard.read(path, error=CheckpointError)
    with guard.parsing(path, "a safetensors index with a weight_map", CheckpointError):
        weight_map = json.loads(content)["weight_map"]
        listed = {canonical_key(key): name for key, name in weight_map.items()}
    for key, name in listed.items():
        if not (isinstance(name, str) and _is_name(name)):
            raise CheckpointError(
                f"{path} says that {key!r:.100} lies in {name!r:.100}, and it may name nothing but "
                "files beside it; download the checkpoint again"
            )
    return listed


def _is_name(name: str) -> bool:
    """Whether it names a file in whatever folder it is looked for. What that links to is not
    asked: a cache of the Hub has links only.
    """
    named = name not in ("", ".", "..") and len(name) <= 255
    return named and name.isprintable() and not set(name) & set("/\\")


def plan_shards(
    stem: str, sizes: Mapping[str, int], max_bytes: int = MAX_SHARD_BYTES
) -> dict[str, list[str]]:
    """The name of each file to write, and its tensors, in the order of `sizes`.

    A file holds at most `max_bytes`, or one tensor that is larger. Where one file is enough, it is
    `stem.safetensors` in the public layout, and `stem-00001-of-00001.safetensors` in ours.
    """
    shards: list[list[str]] = []
    filled = 0
    for key, size in sizes.items():
        if not shards or filled + size > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(key)
        filled += size
    if len(shards) == 1 and stem == PUBLIC_STEM:
        return {f"{stem}.safetensors": shards[0]}
    return {f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors": x for i, x in enumerate(shards, 1)}


def is_shard_of(path: Path, keys: Iterable[str]) -> bool:
    """Whether `path` is a whole safetensors file that holds just these tensors."""
    try:
        return sorted(_read_header(path)) == sorted(keys)
    except CheckpointError:
        return False


def write_shard(
    path: Path,
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str] | None = None,
    *,
    room: Path | None = None,
) -> None:
    """Write one safetensors file, in `room` until it is whole (see `publish.room`).

    Raises OSError, leaving nothing behind, if the disk does not take it.
    """
    contiguous = {key: np.ascontiguousarray(value) for key, value in tensors.items()}
    try:
        with publish.room(path.parent) if room is None else contextlib.nullcontext(room) as made:
            # Loaders of the public layout insist on a format, and know this one.
            save_file(contiguous, made / path.name, {"format": "pt", **(metadata or {})})
            # Safetensors makes files that only their owner can read.
            (made / path.name).chmod(0o644)
            publish.replace(made / path.name, path)
    except (SafetensorError, OSError) as error:
        raise OSError(f"{path} cannot be written: {error}") from error


def write_index(
    folder: Path, stem: str, shards: Mapping[str, Iterable[str]], sizes: Mapping[str, int]
) -> Path | None:
    """Write `stem.safetensors.index.json`, which says what is in which shard, if it is needed.
    Returns its path, or None.
    """
    if f"{stem}.safetensors" in shards:
        return None
    weight_map = {key: name for name, keys in shards.items() for key in keys}
    index = {
        "metadata": {"total_size": sum(sizes.values())},
        "weight_map": dict(sorted(weight_map.items())),
    }
    path = folder / f"{stem}.safetensors.index.json"
    with publish.file(path) as temporary:
        temporary.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return path


def write_tensors(
    folder: Path,
    stem: str,
    sizes: Mapping[str, int],
    read: Callable[[str], np.ndarray],
    max_bytes: int = MAX_SHARD_BYTES,
    *,
    sums: Sums | None = None,
    on_bytes: Callable[[int], None] | None = None,
) -> list[Path]:
    """Write the tensors of a component, in shards if need be. One shard is in memory at a time.

    Args:
        folder: to write into; made if it is missing.
        stem: `PUBLIC_STEM` or `CONVERTED_STEM`.
        sizes: of each tensor, in bytes.
        read: a tensor by its name.
        max_bytes: size of a shard; a larger tensor gets its own.
        sums: of the shards that an interrupted run has left. Those that have their content still
            are kept; what is written is added.
        on_bytes: called with the size of each shard written or kept.

    Returns:
        The files.

    Raises:
        OSError: the disk does not take a file.
    """
    shards = plan_shards(stem, sizes, max_bytes)
    noted: Future | None = None
    with publish.room(folder) as room, ThreadPoolExecutor(1) as hashing:
        for name, keys in shards.items():
            path = folder / name
            if sums is None or not _is_kept(path, keys, sums):
                tensors = {key: read(key) for key in keys}
                if noted is not None:  # the shard before is hashed while this one is read
                    noted.result()
                write_shard(path, tensors, room=room)
                del tensors  # or two shards were in memory
                noted = None if sums is None else hashing.submit(sums.add, path)
            if on_bytes is not None:
                on_bytes(sum(sizes[key] for key in keys))
        if noted is not None:
            noted.result()
    index = write_index(folder, stem, shards, sizes)
    TensorFiles(folder, stem)  # what was written opens, and is all there
    return [folder / name for name in shards] + [index] * (index is not None)


def _is_kept(path: Path, keys: Iterable[str], sums: Sums) -> bool:
    if not path.exists():
        return False
    kept = is_shard_of(path, keys) and sums.hold(path)
    if not kept:
        log.warning("%s is not known to be what was written: it is written again", path)
    return kept
