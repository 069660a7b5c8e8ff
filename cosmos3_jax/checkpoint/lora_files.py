"""LoRA files as diffusers and PEFT write and read them: one safetensors file of public names.

`transformer.<module>.lora_A.weight` [R, i] and `transformer.<module>.lora_B.weight` [o, R]. What we
write has its scale folded into B, so that a reader that ignores the metadata gets the same model.
What we read may have its scale in diffusers' metadata (alpha, rank, rank_pattern, alpha_pattern) or
in `.alpha` tensors; it is folded too.

Axes: L layers, R rank, i inputs, o outputs of a module.
"""

import dataclasses
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from cosmos3_jax.checkpoint.files import write_shard
from cosmos3_jax.checkpoint.lora import Lora, check_changes, families
from cosmos3_jax.checkpoint.names import near
from cosmos3_jax.checkpoint.rules import CheckpointError, raise_problems
from cosmos3_jax.config import TransformerConfig

FILE_NAME = "pytorch_lora_weights.safetensors"  # what diffusers looks for in a folder
PREFIX = "transformer."
METADATA = "lora_adapter_metadata"  # diffusers' key for PEFT's LoraConfig


def save(lora: Lora, path: str | Path, config: TransformerConfig, dtype: str = "float32") -> Path:
    """Write an adapter; layers that it does not adapt are left out. Returns the file's path.

    Args:
        lora: see `lora.Lora`.
        path: a `.safetensors` file, or a folder in which `FILE_NAME` is written.
        config: the transformer's.
        dtype: `float32` or `bfloat16`.

    Raises:
        ValueError: the adapter changes nothing or is not finite, or another dtype.
        OSError: it cannot be written.
    """
    check_changes(lora)
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype={dtype!r} is not supported; choose float32 or bfloat16")
    path = _file(Path(path))
    known, tensors, ranks = families(config), {}, {}
    for name, pair in lora.adapters.items():
        a, b = np.asarray(pair["a"], np.float32), np.asarray(pair["b"], np.float32)
        for module, layer in _modules(known[name]):
            if a[layer].any() or b[layer].any():
                tensors[f"{PREFIX}{module}.lora_A.weight"] = a[layer].T
                tensors[f"{PREFIX}{module}.lora_B.weight"] = b[layer].T * lora.scale
                ranks[module] = a.shape[-1]
    rank = max(ranks.values())
    settings = {
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": {f"^{m}": r for m, r in ranks.items() if r != rank},
        "alpha_pattern": {f"^{m}": r for m, r in ranks.items() if r != rank},
        "target_modules": sorted(ranks),
    }
    settings = {f"{PREFIX}{name}": value for name, value in settings.items()}
    metadata = {METADATA: json.dumps(settings, sort_keys=True)}
    kept = {key: x.astype(jnp.dtype(dtype)) for key, x in sorted(tensors.items())}
    write_shard(path, kept, metadata)
    return path


def load(path: str | Path, config: TransformerConfig) -> Lora:
    """Read an adapter, ours or PEFT's, in float32 and with scale 1.

    A family's layers may have several ranks: the smaller ones are padded with zeros. What adapts
    the sound's projections is left out where the model is read without sound.

    Args:
        path: a `.safetensors` file, or a folder that holds `FILE_NAME`.
        config: the transformer's.

    Raises:
        CheckpointError: no such file; or its tensors do not fit the model, with all that differ.
        ValueError: the adapter changes nothing, or is not finite.
    """
    path = _file(Path(path))
    tensors, settings = _read(path)
    pairs = _pairs(path, tensors, config)
    known = families(config)
    adapters = {}
    for name, family in known.items():
        found = {module: pairs[module] for module in family.modules if module in pairs}
        if not found:
            continue
        rank, layers = max(len(a) for a, _ in found.values()), (len(family.modules),)
        shape = layers if family.stacked else ()
        a, b = (np.zeros((*shape, *x), np.float32) for x in _shapes(family.sizes, rank))
        for module, layer in _modules(family):
            if module in found:
                down, up = found[module]
                a[layer][:, : len(down)] = down.T
                alpha = tensors.get(f"{PREFIX}{module}.alpha")
                b[layer][: len(down)] = up.T * _scale(module, len(down), alpha, settings)
        adapters[name] = {"a": jnp.asarray(a), "b": jnp.asarray(b)}
    lora = Lora(adapters)
    try:
        check_changes(lora)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return lora


def _file(path: Path) -> Path:
    return path if path.suffix == ".safetensors" else path / FILE_NAME


def _modules(family) -> list[tuple[str, tuple]]:
    """Each module of a family, and its place in the family's arrays."""
    return [(module, (i,) if family.stacked else ()) for i, module in enumerate(family.modules)]


def _shapes(sizes: tuple[int, int], rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
    return (sizes[0], rank), (rank, sizes[1])


def _read(path: Path) -> tuple[dict[str, np.ndarray], dict]:
    """The tensors, and PEFT's settings without their prefix; {} if there are none."""
    try:
        with safe_open(path, framework="flax") as file:
            tensors = {key: np.asarray(file.get_tensor(key), np.float32) for key in file.keys()}
            settings = json.loads((file.metadata() or {}).get(METADATA, "{}"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing: give the LoRA's file or folder") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not a safetensors file with a LoRA: {error}") from error
    return tensors, {name.removeprefix(PREFIX): value for name, value in settings.items()}


def _pairs(
    path: Path, tensors: dict[str, np.ndarray], config: TransformerConfig
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Module -> (A, B), checked against the model."""
    sizes = {m: family.sizes for family in families(config).values() for m in family.modules}
    silenced = {
        m
        for family in families(dataclasses.replace(config, sound_gen=True)).values()
        for m in family.modules
        if m not in sizes
    }
    halves: dict[str, dict[str, np.ndarray]] = {}
    problems: dict[str, list[str]] = {"unexpected": [], "half a pair": [], "wrong shape": []}
    for key, tensor in tensors.items():
        known = re.fullmatch(
            rf"{re.escape(PREFIX)}(.+)\.(lora_A\.weight|lora_B\.weight|alpha)", key
        )
        if known is not None and known[1] in silenced:
            continue
        if known is None or known[1] not in sizes:
            module = key.removeprefix(PREFIX).partition(".lora_")[0]
            problems["unexpected"].append(f"{key}; near: {near(module, {m: [m] for m in sizes})}")
        elif known[2] != "alpha":
            halves.setdefault(known[1], {})[known[2][5]] = tensor
    pairs = {}
    for module, half in halves.items():
        if half.keys() != {"A", "B"}:
            problems["half a pair"].append(f"{module}: only lora_{''.join(half)}")
            continue
        a, b = pairs[module] = half["A"], half["B"]
        inputs, outputs = sizes[module]
        fits = a.ndim == b.ndim == 2 and len(a) == b.shape[1] > 0
        if not fits or (a.shape[1], len(b)) != (inputs, outputs):
            problems["wrong shape"].append(
                f"{module}: A {a.shape} and B {b.shape}, expected (R, {inputs}) and ({outputs}, R)"
            )
    raise_problems(f"{path} does not fit the model", problems)
    if not pairs:
        what = "sound alone is adapted" if silenced and tensors else f"no {PREFIX}<module>.lora_A"
        raise CheckpointError(f"{path} holds no LoRA for this model: {what}")
    return pairs


def _scale(module: str, rank: int, alpha: np.ndarray | None, settings: dict) -> float:
    """alpha / rank, as PEFT resolves it; 1 where nothing is said."""
    if alpha is not None:
        value = float(np.ravel(alpha)[0])
    elif "lora_alpha" in settings:
        value = settings["lora_alpha"]
        for pattern, special in (settings.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):  # as PEFT looks it up
                value = special
                break
    else:
        return 1.0
    return value / (np.sqrt(rank) if settings.get("use_rslora") else rank)


def load_scaled(
    loras: str | Path | Sequence[str | Path | tuple[str | Path, float]], config: TransformerConfig
) -> list[Lora]:
    """Adapters from one path, or from several, each with or without a factor of its own.

    Raises as `load` does, and ValueError on a factor of 0 or one that is not finite.
    """
    several = [loras] if isinstance(loras, str | Path) else loras
    pairs = [(each, 1.0) if isinstance(each, str | Path) else each for each in several]
    found = []
    for path, scale in pairs:
        if scale == 0 or not math.isfinite(scale):
            raise ValueError(f"{path}: its scale is {scale}; give a finite factor other than 0")
        found.append(load(path, config).replace(scale=float(scale)))
    return found
