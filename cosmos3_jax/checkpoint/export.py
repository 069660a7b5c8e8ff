"""What was trained as a checkpoint in the public layout: the inverse of reading one.

A base checkpoint gives everything that was not trained: tensors that we never read (the language
head, actions), other components, tokenizer, configurations. One shard is in memory at a time.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from cosmos3_jax.checkpoint import publish
from cosmos3_jax.checkpoint.convert import DTYPES, check_target
from cosmos3_jax.checkpoint.files import (
    FLOAT_DTYPES,
    MAX_SHARD_BYTES,
    TensorFiles,
    plan_shards,
    shard_name,
    write_index,
    write_shard,
)
from cosmos3_jax.checkpoint.load import (
    PUBLIC_STEM,
    Component,
    is_converted,
    load_config,
    open_components,
)
from cosmos3_jax.checkpoint.rules import (
    CheckpointError,
    Rule,
    leaf_shapes,
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
            layers together or apart.
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
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is not supported; choose {' or '.join(DTYPES)}")
    if folder == base or base in folder.parents or folder in base.parents:
        raise ValueError(f"{folder} and the base, {base}, overlap; choose a folder beside it")
    check_target(folder, overwrite)
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
    for component in trained.values():
        _check(component, params)

    def not_copied(place: str, files: list[str]) -> list[str]:
        weights = (".safetensors", ".safetensors.index.json")
        return [f for f in files if Path(place).name in trained and f.endswith(weights)]

    with publish.folder(folder, overwrite=overwrite) as partial:
        shutil.copytree(base, partial, ignore=not_copied)
        for component in trained.values():
            _write(component, params, partial / component.name, jnp.dtype(dtype), max_shard_bytes)
    return folder


def _trained_rules(component: Component, params: Mapping) -> list[Rule]:
    """The rules whose leaves are among the parameters."""
    return [
        rule
        for rule in component.layout.rules
        if (component.prefix or rule.leaf.partition("/")[0]) in params
    ]


def _check(component: Component, params: Mapping) -> None:
    """Raise CheckpointError unless every tensor that is to be replaced has its shape, and every
    leaf is one of them.
    """
    problems: dict[str, list[str]] = {"missing": [], "wrong shape": [], "unexpected": []}
    read = set()
    for rule in _trained_rules(component, params):
        try:
            leaf, index, path = _leaf(component, params, rule)
        except KeyError:
            problems["missing"].append(rule.leaf)
            continue
        read.add(path)
        expected = component.leaves[rule.leaf][len(rule.index) - len(index) :]
        if tuple(leaf.shape) != expected:
            problems["wrong shape"].append(f"{rule.leaf}: {tuple(leaf.shape)}, expected {expected}")
    parts = {name: params[name] for name in PARTS[component.name] if name in params}
    for path in leaf_shapes(parts).keys() - read:
        adapter = path.rpartition("/")[2].startswith("lora_")
        problems["unexpected"].append(f"{path}: merge the LoRA first" if adapter else path)
    problems = {kind: sorted(set(names)) for kind, names in problems.items()}
    raise_problems(f"the parameters do not fit {component.files.folder}", problems)


def _leaf(component: Component, params: Mapping, rule: Rule) -> tuple:
    """The array that a rule reads, the rule's index in it, less the layer if that is apart; and
    the array's path.
    """
    node, index, path = params, rule.index, []
    names = f"{component.prefix}/{rule.leaf}".strip("/").split("/")
    for name in names:
        node = node[name]
        path.append(name)
        if name == "layers" and index and str(index[0]) in node:
            path.append(str(index[0]))
            node, index = node[path[-1]], index[1:]
    return node, index, "/".join(path)


def _write(
    component: Component, params: Mapping, folder: Path, dtype: np.dtype, max_bytes: int
) -> None:
    files = component.files
    rules = {key: rule for rule in _trained_rules(component, params) for key in rule.keys}
    float32 = component.layout.float32

    def kind(key: str) -> np.dtype:
        if key not in rules:
            return FLOAT_DTYPES[files.dtypes[key]]
        return np.dtype(np.float32) if rules[key].leaf.startswith(float32) else dtype

    def read(key: str) -> np.ndarray:
        if key not in rules:
            return files.read(key)
        leaf, index, _ = _leaf(component, params, rules[key])
        tensor = np.asarray(_placed(rules[key], index).to_public(leaf)).astype(kind(key))
        if not rules[key].weight_norm:
            return tensor
        halves = split_weight_norm(tensor)
        return halves[rules[key].keys.index(key)].astype(kind(key))

    sizes = {key: int(np.prod(files.shapes[key])) * kind(key).itemsize for key in files.shapes}
    shards = plan_shards(dict(sorted(sizes.items())), max_bytes)
    names = [shard_name(PUBLIC_STEM, i, len(shards)) for i in range(len(shards))]
    if len(shards) == 1:
        names = [f"{PUBLIC_STEM}.safetensors"]
    for name, keys in zip(names, shards, strict=True):
        write_shard(folder / name, {key: read(key) for key in keys})
    if len(shards) > 1:
        index = folder / f"{PUBLIC_STEM}.safetensors.index.json"
        write_index(index, zip(names, shards, strict=True), sum(sizes.values()))
    TensorFiles(folder, PUBLIC_STEM)  # what was written opens, and is all there


def _placed(rule: Rule, index: tuple) -> Rule:
    return Rule(rule.key, rule.leaf, rule.rearrange, index, rule.sizes)
