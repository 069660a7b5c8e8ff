"""What was trained as a checkpoint in the public layout: the inverse of reading one.

A base checkpoint gives everything that was not trained: tensors that we never read (the language
head, actions), other components, tokenizer, configurations. One shard is in memory at a time.
"""

import dataclasses
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax import Array

from cosmos3_jax.checkpoint import publish
from cosmos3_jax.checkpoint.convert import check_place
from cosmos3_jax.checkpoint.files import (
    FLOAT_DTYPES,
    MAX_SHARD_BYTES,
    PUBLIC_STEM,
    write_tensors,
)
from cosmos3_jax.checkpoint.load import Component, is_converted, load_config, open_components
from cosmos3_jax.checkpoint.rules import (
    CheckpointError,
    Rule,
    is_stacked,
    layer_path,
    raise_problems,
    split_weight_norm,
)

PARTS = {"transformer": ("und", "gen"), "vae": ("video_vae",), "sound_tokenizer": ("sound_vae",)}


def write_public_checkpoint(
    folder: str | Path,
    params: dict,
    base: str | Path,
    *,
    dtype: str = "bfloat16",
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Write a checkpoint that differs from `base` in the trained parts alone. Returns its folder.

    Args:
        folder: to make; it appears when it is whole.
        params: any of `und`, `gen`, `video_vae` and `sound_vae`, each whole; the media tower's
            layers stacked or unstacked.
        base: a checkpoint in the public layout.
        dtype: of the trained tensors, `bfloat16` or `float32`; what inference keeps in float32 is
            stored so. All others stay as they are.
        overwrite: replace a checkpoint at `folder`.
        max_shard_bytes: size of a shard.

    Raises:
        CheckpointError: the base is in the converted layout, or the parameters are of another
            model, or have leaves that no tensor of it is, such as a LoRA that is not merged.
        FileExistsError: `folder` exists and `overwrite` is not set, or it is no checkpoint.
        ValueError: an unknown part or dtype, or one folder lies in the other.
        OSError: the disk does not take a file.
    """
    folder, base = Path(folder).resolve(), Path(base).resolve()
    known = [part for parts in PARTS.values() for part in parts]
    if not params or set(params) - set(known):
        raise ValueError(f"params has {sorted(params)}: expected any of {', '.join(known)}")
    check_place(folder, base, dtype, overwrite)
    for name in PARTS:
        if is_converted(base / name):
            raise CheckpointError(f"{base / name} is in the converted layout; give the public one")
    components = {c.name: c for c in open_components(base, load_config(base))}
    trained = {
        name: components[name]
        for name, parts in PARTS.items()
        if name in components and set(parts) & set(params)
    }
    if missing := set(params) - {part for name in trained for part in PARTS[name]}:
        raise CheckpointError(f"{base} has nothing that {', '.join(sorted(missing))} would replace")
    tensors = {name: _replacements(component, params) for name, component in trained.items()}

    def not_copied(place: str, files: list[str]) -> list[str]:
        weights = (".safetensors", ".safetensors.index.json")
        return [f for f in files if Path(place).name in trained and f.endswith(weights)]

    with publish.folder(folder, overwrite=overwrite) as partial:
        shutil.copytree(base, partial, ignore=not_copied)
        for name, component in trained.items():
            _write(component, tensors[name], partial / name, jnp.dtype(dtype), max_shard_bytes)
    return folder


def _replacements(component: Component, params: dict) -> dict[str, tuple[Rule, Array]]:
    """Each public tensor to replace -> the leaf of `params` that it is in, and the rule for that.

    Raises CheckpointError unless every tensor has its shape, and every leaf is some tensor's.
    """
    trained = {part: params[part] for part in PARTS[component.name] if part in params}
    leaves = flatten_dict(trained, sep="/")
    unread, replacements = set(leaves), {}
    problems: dict[str, list[str]] = {"missing": [], "wrong shape": []}
    for rule in component.layout.rules:
        path, index = component.path(rule.leaf), rule.index
        if path.partition("/")[0] not in trained:
            continue
        if path not in leaves and is_stacked(path):
            path, index = layer_path(path, index[0]), index[1:]
        if path not in leaves:
            problems["missing"].append(rule.leaf)
            continue
        unread.discard(path)
        expected = component.leaves[rule.leaf][len(rule.index) - len(index) :]
        found = tuple(leaves[path].shape)
        if found != expected:
            problems["wrong shape"].append(f"{rule.leaf}: {found}, expected {expected}")
        placed = dataclasses.replace(rule, index=index)
        replacements |= {key: (placed, leaves[path]) for key in rule.keys}
    problems["unexpected"] = [
        f"{path}: merge the LoRA first" if "/lora_" in path else path for path in unread
    ]
    problems = {kind: sorted(set(names)) for kind, names in problems.items()}
    raise_problems(f"the parameters do not fit {component.files.folder}", problems)
    return replacements


def _write(
    component: Component,
    replacements: dict[str, tuple[Rule, Array]],
    folder: Path,
    dtype: np.dtype,
    max_bytes: int,
) -> None:
    files, float32 = component.files, component.layout.float32

    def kind(key: str) -> np.dtype:
        if key not in replacements:
            return FLOAT_DTYPES[files.dtypes[key]]
        kept = replacements[key][0].leaf.startswith(float32)
        return np.dtype(np.float32) if kept else dtype

    def read(key: str) -> np.ndarray:
        if key not in replacements:
            return files.read(key)
        rule, leaf = replacements[key]
        tensor = np.asarray(rule.to_public(leaf)).astype(kind(key))
        if not rule.weight_norm:
            return tensor
        return split_weight_norm(tensor)[rule.keys.index(key)].astype(kind(key))

    sizes = {key: int(np.prod(files.shapes[key])) * kind(key).itemsize for key in files.shapes}
    write_tensors(folder, PUBLIC_STEM, dict(sorted(sizes.items())), read, max_bytes)
