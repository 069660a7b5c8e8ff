"""Write a checkpoint in the converted layout: our leaves, ready to use, in shards with an index.

The public layout loads as well; the converted one loads faster and without folding or transposing. One
shard is in memory at a time. Everything is written into `DST.partial`, which becomes DST when it is whole;
a run that was killed continues where it stopped.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from cosmos3_jax.checkpoint.files import (
    MAX_SHARD_BYTES,
    TensorFiles,
    plan_shards,
    shard_name,
    write_index,
    write_shard,
)
from cosmos3_jax.checkpoint.load import (
    CONVERTED_STEM,
    RECIPE_FILE,
    TOKENIZER_FOLDER,
    Component,
    converted_layout,
    load_config,
    open_components,
)
from cosmos3_jax.checkpoint.rules import CheckpointError, Rule
from cosmos3_jax.config import read_json

PLAN_FILE = "conversion.json"


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """A tensor of the converted layout: its name, shape and dtype, and the rules that fill it."""

    key: str
    shape: tuple[int, ...]
    dtype: np.dtype
    rules: tuple[tuple[Rule, tuple], ...]  # each with its index inside this tensor

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize


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
        overwrite: replace an existing `target`.
        max_shard_bytes: size of a shard, at most 5 GB.
        on_bytes: called with the size of each shard written or found.

    Raises:
        CheckpointError: the source does not fit the model, or an unfinished conversion of something else is
            in the way.
        FileExistsError: `target` exists and `overwrite` is not set.
    """
    if target.exists() and not overwrite:
        raise FileExistsError(f"{target} exists; choose another folder or pass --overwrite")
    if target.exists() and (target.samefile(source) or target.resolve() in source.resolve().parents):
        raise ValueError(f"{target} is, or holds, the checkpoint being read; choose another folder")
    config = load_config(source, sound)
    components = open_components(source, config)
    partial = target.with_name(f"{target.name}.partial")
    _start(partial, _plan(source, components, dtype, config.has_sound, max_shard_bytes))
    for component in components:
        _write_component(component, partial / component.name, jnp.dtype(dtype), max_shard_bytes, on_bytes)
    _write_configs(source, partial, config.has_sound)
    (partial / PLAN_FILE).unlink()
    if target.exists():
        shutil.rmtree(target)
    os.replace(partial, target)
    return target


def _plan(source: Path, components: Iterable[Component], dtype: str, sound: bool, max_bytes: int) -> str:
    """What identifies a conversion: the same text means that finished shards can be kept."""
    files = {
        f"{component.name}/{path.name}": [path.stat().st_size, path.stat().st_mtime_ns]
        for component in components
        for path in sorted((source / component.name).glob("*.safetensors"))
    }
    plan = {"source": str(source.resolve()), "files": files, "dtype": dtype, "sound": sound, "max": max_bytes}
    return json.dumps(plan, indent=2)


def _start(partial: Path, plan: str) -> None:
    """Begin in an empty folder, or go on in one that has the same plan."""
    plan_file = partial / PLAN_FILE
    if partial.exists() and not (plan_file.is_file() and plan_file.read_text(encoding="utf-8") == plan):
        raise CheckpointError(
            f"{partial} holds an unfinished conversion of another source or with other options: remove it"
        )
    partial.mkdir(parents=True, exist_ok=True)
    plan_file.write_text(plan, encoding="utf-8")


def _tensors(component: Component, dtype: jnp.dtype) -> list[_Tensor]:
    """The converted tensors of a component, in a fixed order."""
    sources = component.rules_by_leaf()
    layout = converted_layout(component.layout.name, component.leaves, component.layout.float32)
    tensors = []
    for rule in layout.rules:
        stacked = len(rule.index)  # 1 where the tensor is one layer of the leaf
        inside = tuple(
            (source, source.index[stacked:])
            for source in sources[rule.leaf]
            if not stacked or source.index[:1] == rule.index
        )
        shape = component.leaves[rule.leaf][stacked:]
        tensors.append(_Tensor(rule.key, shape, component.dtype_of(rule.leaf, dtype), inside))
    return tensors


def _write_component(
    component: Component,
    folder: Path,
    dtype: jnp.dtype,
    max_bytes: int,
    on_bytes: Callable[[int], None] | None,
) -> None:
    folder.mkdir(exist_ok=True)
    tensors = {tensor.key: tensor for tensor in _tensors(component, dtype)}
    shards = plan_shards({key: tensor.nbytes for key, tensor in tensors.items()}, max_bytes)
    names = [shard_name(CONVERTED_STEM, i, len(shards)) for i in range(len(shards))]
    for name, keys in zip(names, shards, strict=True):
        if not (folder / name).exists():
            write_shard(folder / name, {key: _assemble(component, tensors[key]) for key in keys})
        if on_bytes is not None:
            on_bytes(sum(tensors[key].nbytes for key in keys))
    total = sum(tensor.nbytes for tensor in tensors.values())
    write_index(folder / f"{CONVERTED_STEM}.safetensors.index.json", zip(names, shards, strict=True), total)
    TensorFiles(folder, CONVERTED_STEM)  # what was written opens, and is all there


def _assemble(component: Component, tensor: _Tensor) -> np.ndarray:
    values = np.empty(tensor.shape, tensor.dtype)
    for rule, index in tensor.rules:
        values[index] = component.read(rule)
    return values


def _write_configs(source: Path, partial: Path, sound: bool) -> None:
    """Copy the configurations and the tokenizer; without sound, say so in the transformer's."""
    folders = ["transformer", "vae", "scheduler"] + ["sound_tokenizer"] * sound
    for path in [source / name for name in ("model_index.json", RECIPE_FILE)]:
        if path.is_file():
            shutil.copyfile(path, partial / path.name)
    for folder in folders:
        for path in sorted((source / folder).glob("*config.json")):
            (partial / folder).mkdir(exist_ok=True)
            shutil.copyfile(path, partial / folder / path.name)
    if (source / TOKENIZER_FOLDER).is_dir():
        shutil.copytree(source / TOKENIZER_FOLDER, partial / TOKENIZER_FOLDER, dirs_exist_ok=True)
    if not sound:
        path = partial / "transformer" / "config.json"
        path.write_text(json.dumps(read_json(path) | {"sound_gen": False}, indent=2) + "\n", encoding="utf-8")
        path = partial / "model_index.json"
        if path.is_file():
            values = {key: value for key, value in read_json(path).items() if key != "sound_tokenizer"}
            path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
