"""Write a checkpoint in the converted layout: our leaves, ready to use, in shards with an index.

The public layout loads as well; the converted one loads faster and without folding or transposing.
One shard is in memory at a time. Everything is written into `DST.partial`, which becomes DST when
it is whole; a run that was killed continues where it stopped, with the shards whose content is
still what it wrote.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import jax.numpy as jnp

from cosmos3_jax.checkpoint import publish
from cosmos3_jax.checkpoint.digests import Sums
from cosmos3_jax.checkpoint.files import CONVERTED_STEM, MAX_SHARD_BYTES, plan_shards, write_tensors
from cosmos3_jax.checkpoint.load import (
    RECIPE_FILE,
    TOKENIZER_FOLDER,
    Component,
    load_config,
    open_components,
)
from cosmos3_jax.checkpoint.rules import CheckpointError
from cosmos3_jax.config import read_json

DTYPES = ("bfloat16", "float32")
COPIED = (".json", ".txt", ".jinja", ".model")  # of configurations and tokenizers
LARGEST_SHARD = 5 * 10**9  # bytes; hubs refuse, and old file systems cannot hold, much larger files


def convert_checkpoint(
    source: Path,
    target: Path,
    *,
    dtype: str = "bfloat16",
    sound: bool | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    on_bytes: Callable[[int], None] | None = None,
) -> Path:
    """Convert a checkpoint folder. Returns `target`.

    Args:
        source: a checkpoint in either layout.
        target: the folder to make; its parent is made if needed.
        dtype: of the weights; the few that must be float32 stay so.
        sound: None keeps sound if there is any, False leaves it out, True insists.
        overwrite: replace an existing checkpoint at `target`.
        max_shard_bytes: size of a shard, at most 5 GB. A tensor larger than this gets its own.
        on_bytes: called with the size of each shard written or found.

    Raises:
        CheckpointError: the source does not fit the model, a file to copy is a link that leads out
            of it, or an unfinished conversion of something else is in the way.
        FileExistsError: `target` exists and `overwrite` is not set, or it is no checkpoint.
        BlockingIOError: another process is writing `target`.
        ValueError: an option is not one of those above, or one folder lies in the other.
        OSError: the disk does not take a file.
    """
    if not 0 < max_shard_bytes <= LARGEST_SHARD:
        raise ValueError(f"max_shard_bytes={max_shard_bytes} is not between 1 and {LARGEST_SHARD}")
    place = target.resolve()
    check_place(place, source.resolve(), dtype, overwrite)
    config = load_config(source, sound)
    if not (source / TOKENIZER_FOLDER).is_dir():
        raise CheckpointError(f"{source} has no {TOKENIZER_FOLDER}/; download the checkpoint again")
    components = open_components(source, config)
    plan = _plan(source, components, dtype, config.has_sound, max_shard_bytes)
    configs = _configs(source, config.has_sound)
    pieces = {
        component.name: {piece.key: piece for piece in component.pieces(jnp.dtype(dtype))}
        for component in components
    }
    sizes = {
        name: {key: piece.nbytes for key, piece in found.items()} for name, found in pieces.items()
    }
    expected = {file.relative_to(source).as_posix() for file in configs} | {"SHA256SUMS"}
    for name, of_each in sizes.items():
        shards = plan_shards(CONVERTED_STEM, of_each, max_shard_bytes)
        expected |= {f"{name}/{file}" for file in shards}
        expected.add(f"{name}/{CONVERTED_STEM}.safetensors.index.json")
    plan_file = place.with_name(f"{place.name}.partial.json")
    kept_sums = place.with_name(f"{place.name}.partial.SHA256SUMS")
    with publish.locked(place):
        with publish.folder(place, overwrite=overwrite, resume=True, lock=False) as partial:
            _start(partial, plan_file, plan, kept_sums, expected)
            sums, files = Sums(partial), []
            for component in components:
                files += write_tensors(
                    partial / component.name,
                    CONVERTED_STEM,
                    sizes[component.name],
                    lambda key, c=component: c.read(pieces[c.name][key]),
                    max_shard_bytes,
                    sums=sums,
                    on_bytes=on_bytes,
                )
            files += _write_configs(source, configs, partial, config.has_sound)
            publish.check_files(partial, [*files, sums.path])
            os.replace(sums.path, kept_sums)  # for another run, if this one does not come to rename
        kept_sums.unlink()
        plan_file.unlink()
    return target


def check_place(target: Path, source: Path, dtype: str, overwrite: bool) -> None:
    """Raise unless `target` can be made from `source`, or replaced, without losing anything else.

    Raises:
        ValueError: one folder lies in the other, or the dtype is not supported.
        FileExistsError, OSError: see `check_target`.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is not supported; choose {' or '.join(DTYPES)}")
    if source == target or source in target.parents or target in source.parents:
        raise ValueError(
            f"{target} and the checkpoint being read, {source}, overlap; choose a folder beside it"
        )
    check_target(target, overwrite)


def check_target(target: Path, overwrite: bool) -> None:
    """Raise unless `target` is free, or a checkpoint that may be replaced, and can be written.

    Raises:
        FileExistsError: it is there, and is not to be replaced.
        OSError: its folder, or the nearest one above that is there, cannot be written.
    """
    if target.exists() and not overwrite:
        raise FileExistsError(f"{target} exists; choose another folder or pass --overwrite")
    if target.exists() and not (target / "transformer" / "config.json").is_file():
        raise FileExistsError(
            f"{target} is not a checkpoint and is not replaced; choose another folder"
        )
    publish.check_parent(target)


def _plan(
    source: Path, components: Iterable[Component], dtype: str, sound: bool, max_bytes: int
) -> str:
    """What identifies a conversion: the same text means that finished shards can be kept."""
    files = {
        f"{component.name}/{path.name}": [path.stat().st_size, path.stat().st_mtime_ns]
        for component in components
        for path in sorted((source / component.name).glob("*.safetensors"))
    }
    plan = {
        "source": str(source.resolve()),
        "files": files,
        "dtype": dtype,
        "sound": sound,
        "max_shard_bytes": max_bytes,
    }
    return json.dumps(plan, indent=2)


def _start(partial: Path, plan_file: Path, plan: str, kept_sums: Path, expected: set[str]) -> None:
    """Begin an empty folder, or go on in one that has the same plan and only expected files."""
    if not partial.exists():
        # The plan first: a folder without one could not be continued.
        with publish.file(plan_file) as temporary:
            temporary.write_text(plan, encoding="utf-8")
        kept_sums.unlink(missing_ok=True)
        partial.mkdir()
    elif not (plan_file.is_file() and plan_file.read_text(encoding="utf-8") == plan):
        raise CheckpointError(
            f"{partial} holds an unfinished conversion of another source or with other options; "
            "remove it, or choose another folder"
        )
    for stray in (*partial.glob(".*"), *partial.glob("*/.*")):  # of a run killed while it wrote
        publish.remove(stray)
    found = (path for path in partial.rglob("*") if not path.is_dir())
    if strays := sorted({path.relative_to(partial).as_posix() for path in found} - expected):
        raise CheckpointError(
            f"{partial} holds files that are not of this conversion, such as {strays[0]!r:.100}; "
            "remove them, and it continues"
        )
    if kept_sums.is_file() and not (partial / "SHA256SUMS").exists():
        os.replace(kept_sums, partial / "SHA256SUMS")


def _configs(source: Path, sound: bool) -> list[Path]:
    """The configurations and the tokenizer. Raises CheckpointError if one leads elsewhere."""
    folders = ["transformer", "vae", "scheduler"] + ["sound_tokenizer"] * sound
    files = [source / name for name in ("model_index.json", RECIPE_FILE)]
    files += [path for name in folders for path in (source / name).glob("*config.json")]
    files += (source / TOKENIZER_FOLDER).rglob("*")
    files = [file for file in files if file.suffix in COPIED and file.is_file()]
    for file in files:
        _check_inside(source, file)
    return files


def _check_inside(source: Path, file: Path) -> None:
    """Raise CheckpointError if a file is a link out of its checkpoint, which could be to anything
    that the user alone may read. In a cache of the Hub, links lead to `blobs` beside `snapshots`.
    """
    folder, found = source.resolve(), file.resolve()
    inside = [folder]
    if folder.parent.name == "snapshots":
        inside.append(folder.parent.parent / "blobs")
    if not any(found.is_relative_to(each) for each in inside):
        raise CheckpointError(
            f"{file} is a link out of the checkpoint, and is not copied; put the file itself there"
        )


def _write_configs(source: Path, files: list[Path], partial: Path, sound: bool) -> list[Path]:
    """Copy files; without sound, the configurations say so. Returns the copies."""
    written = []
    for file in files:
        path = partial / file.relative_to(source)
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, path)
        written.append(path)
    if not sound:
        _update_json(partial / "transformer" / "config.json", sound_gen=False)
        if (partial / "model_index.json").is_file():
            # How diffusers writes that a pipeline is without a component.
            _update_json(partial / "model_index.json", sound_tokenizer=[None, None])
    return written


def _update_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps(read_json(path) | values, indent=2) + "\n", encoding="utf-8")
