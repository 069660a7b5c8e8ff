"""LoRA files: one safetensors file of public names.

We write diffusers' and PEFT's `transformer.<module>.lora_A.weight` [R, i] and
`transformer.<module>.lora_B.weight` [o, R], with the scale folded into B, so that a reader that
ignores the metadata gets the same model. We read every spelling of `lora_spellings.py`; the scale
is folded too.

Axes: L layers, R rank, i inputs, o outputs of a module.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import safe_open

from cosmos3_jax import guard, limits
from cosmos3_jax.checkpoint.files import FLOAT_DTYPES, write_shard
from cosmos3_jax.checkpoint.lora import Family, Lora, check_changes, families
from cosmos3_jax.checkpoint.lora_spellings import (
    PEFT_CONFIG,
    PEFT_PREFIX,
    WAY_OUT,
    Settings,
    finite,
    is_text_encoders,
    is_unread,
    other_kind,
    parse,
    scale,
)
from cosmos3_jax.checkpoint.names import near
from cosmos3_jax.checkpoint.rules import CheckpointError, raise_problems
from cosmos3_jax.config import TransformerConfig

FILE_NAME = "pytorch_lora_weights.safetensors"  # what diffusers looks for in a folder
PEFT_NAME = "adapter_model.safetensors"
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
    path = Path(path) if Path(path).suffix == ".safetensors" else Path(path) / FILE_NAME
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
    """Read an adapter of either tower, ours or another program's, in float32 and with scale 1.

    A family's layers may have several ranks: the smaller ones are padded with zeros. What adapts
    modules that generation does not read is left out: the sound's where the model is read without
    sound, and those of `lora_spellings.is_unread`.

    Args:
        path: a safetensors file, or a folder that holds one: diffusers' `FILE_NAME`, PEFT's
            `PEFT_NAME`, or the only one in it. `PEFT_CONFIG` is read beside PEFT's.
        config: the transformer's.

    Raises:
        CheckpointError: no such file; it is no LoRA but DoRA, LoKr or another; its scale is not
            known, odd or contradictory; or its tensors do not fit the model, with all that differ.
        ValueError: the adapter changes nothing, or is not finite.
    """
    path = _find(Path(path))
    with guard.parsing(path, "a LoRA", CheckpointError):
        guard.check_plain(path, CheckpointError)
        try:
            tensors, said = _read(path)
            pairs = _pairs(tensors, said, config)
            adapters = {
                name: _stack(family, pairs)
                for name, family in families(config).items()
                if pairs.keys() & set(family.modules)
            }
            check_changes(Lora(adapters))
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from error
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    return Lora(jax.tree.map(jnp.asarray, adapters))


def _find(path: Path) -> Path:
    if path.exists() and not path.is_dir():
        return path
    if path.suffix == ".safetensors" or not path.is_dir():
        raise CheckpointError(
            f"{path} is missing: give the LoRA's file or folder{_if_hub_id(path)}"
        )
    named = [path / name for name in (FILE_NAME, PEFT_NAME) if (path / name).is_file()]
    found = named or sorted(path.glob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(file.name for file in found)
        raise CheckpointError(f"{path} holds several LoRA files: {names}; give one of them")
    raise CheckpointError(f"{path / FILE_NAME} is missing, and so is any .safetensors beside it")


def _if_hub_id(path: Path) -> str:
    """What to say of `owner/name`, where no such folder is."""
    looks_so = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", path.as_posix()) and not path.parent.exists()
    if not looks_so or path.suffix == ".safetensors":
        return ""
    return "; LoRAs are not fetched from the Hub, so download its file first"


def _modules(family: Family) -> Iterator[tuple[str, tuple]]:
    """Each module of a family, and its place in the family's arrays."""
    for i, module in enumerate(family.modules):
        yield module, (i,) if family.stacked else ()


def _stack(family: Family, pairs: dict[str, tuple[np.ndarray, np.ndarray]]) -> dict:
    inputs, outputs = family.sizes
    rank = max(len(pairs[module][0]) for module in family.modules if module in pairs)
    layers = (len(family.modules),) * family.stacked
    a = np.zeros((*layers, inputs, rank), np.float32)
    b = np.zeros((*layers, rank, outputs), np.float32)
    for module, layer in _modules(family):
        if module in pairs:
            down, up = pairs[module]
            a[layer][:, : len(down)], b[layer][: len(down)] = down.T, up.T
    return {"a": a, "b": b}


def _read(path: Path) -> tuple[dict[str, np.ndarray], list[Settings]]:
    """The tensors in float32, and what is said of their scale."""
    tensors, stored = {}, {}
    way_out = "download it again, or, if it is a pickled .bin or .pt, save it as safetensors"
    with guard.parsing("this", "a whole safetensors file", CheckpointError, way_out):
        with safe_open(path, framework="np", backend="pread") as file:
            for key in file.keys():
                stored[key] = kind = file.get_slice(key).get_dtype()
                if kind in FLOAT_DTYPES or (kind in ("I32", "I64") and key.endswith(".alpha")):
                    tensors[key] = np.asarray(file.get_tensor(key), np.float32)
            metadata = (file.metadata() or {}).get(METADATA)
    odd = [f"{key}: {kind}" for key, kind in stored.items() if key not in tensors]
    raise_problems(
        f"matrices are read from {', '.join(FLOAT_DTYPES)} alone", {"stored otherwise": odd}
    )
    said = [] if metadata is None else [Settings.parse(METADATA, metadata)]
    if path.name == PEFT_NAME or any(key.startswith(PEFT_PREFIX) for key in tensors):
        beside = path.with_name(PEFT_CONFIG)
        if beside.exists():
            said.append(Settings.parse(PEFT_CONFIG, guard.read(beside, error=CheckpointError)))
        elif not any(said) and not any(key.endswith(".alpha") for key in tensors):
            raise CheckpointError(
                f"PEFT's {PEFT_CONFIG}, whose lora_alpha is the scale, is not beside it; copy it "
                "there"
            )
    return tensors, [settings for settings in said if settings is not None]


def _pairs(
    tensors: dict[str, np.ndarray], said: list[Settings], config: TransformerConfig
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Module -> (A, scale B), checked against the model."""
    sizes = {m: family.sizes for family in families(config).values() for m in family.modules}
    found: dict[str, dict[str, np.ndarray]] = {}
    problems: dict[str, list[str]] = {}
    others: dict[str, list[str]] = {}
    adapters, unread, unknown = Counter(), 0, {}
    for key, tensor in tensors.items():
        name, kind = parse(key, config), other_kind(key)
        if name is not None and name.half != "alpha":
            adapters[name.adapter] += 1
        if name is not None and name.module in sizes:
            halves = found.setdefault(name.module, {})
            if name.half in halves:
                problems.setdefault("in two spellings", []).append(f"{name.module}: {key}")
            halves[name.half] = tensor
        elif kind is not None:
            others.setdefault(kind, []).append(key)
        elif name is not None and is_unread(name.module, config):
            unread += 1
        else:
            unknown[key] = name.module if name else key
    raise_problems(f"this is no plain LoRA: {WAY_OUT}", others)
    # Of another model's LoRA all are unknown, and to find what is near takes time.
    problems["unexpected"] = [
        f"{key}; near: {near(module, {m: [m] for m in sizes})}" if i < 3 else key
        for i, (key, module) in enumerate(unknown.items())
    ]
    if len(adapters) > 1:
        names = ", ".join(name or "one without a name" for name in adapters)
        problems["several adapters in one file; save each in its own"] = [names]
    for module, halves in found.items():
        if problem := _misfit(halves, *sizes[module]):
            kind, words = problem
            problems.setdefault(kind, []).append(f"{module}: {words}")
    what = "the LoRA does not fit the model"
    if any(is_text_encoders(key) for key in unknown):
        what += (
            ", which has no separate text encoder: save it without the text encoder's tensors, or "
            "train it without them"
        )
    raise_problems(what, problems)
    if not found:
        what = "it adapts only what is not read here" if unread else "no <module>.lora_A.weight"
        raise CheckpointError(f"this is no LoRA for this model: {what}")
    pairs = {}
    for module, halves in found.items():
        a, b, alpha = halves["A"], halves["B"], halves.get("alpha")
        value = None if alpha is None else finite(f"{module}.alpha", alpha.item())
        pairs[module] = a, b * scale(module, len(a), value, said)
    return pairs


def _misfit(halves: dict[str, np.ndarray], inputs: int, outputs: int) -> tuple[str, str] | None:
    """What is wrong with the tensors of one module, its kind first."""
    if not {"A", "B"} <= halves.keys():
        return "half a pair", f"only {', '.join(_PUBLIC[half] for half in halves)}"
    a, b = halves["A"], halves["B"]
    fits = a.ndim == b.ndim == 2 and len(a) == b.shape[1] > 0
    if fits and len(a) > max(inputs, outputs):  # and other layers would be filled up to it
        return "rank beyond the module's sizes", f"{len(a)} of {inputs} x {outputs}"
    if not fits or (a.shape[1], len(b)) != (inputs, outputs):
        words = f"A {a.shape} and B {b.shape}, expected (R, {inputs}) and ({outputs}, R), R > 0"
        return "wrong shape", words
    if "alpha" in halves and halves["alpha"].size != 1:
        return "wrong shape", f"alpha {halves['alpha'].shape}, expected ()"
    return None


_PUBLIC = {"A": "lora_A", "B": "lora_B", "alpha": "alpha"}


def load_scaled(
    loras: str | Path | Sequence[str | Path | tuple[str | Path, float]], config: TransformerConfig
) -> list[Lora]:
    """Adapters from one path, or from several, each with or without a factor of its own.

    Raises as `load` does, and ValueError on a factor that is 0 or not finite in float32.
    """
    several = [loras] if isinstance(loras, str | Path) else loras
    pairs = [(each, 1.0) if isinstance(each, str | Path) else each for each in several]
    found = []
    for path, factor in pairs:
        if not limits.SMALLEST_FLOAT <= abs(factor) <= limits.LARGEST_FLOAT:  # as it is used
            raise ValueError(
                f"{path}: its scale is {factor}; give a factor that float32 holds, other than 0"
            )
        found.append(load(path, config).replace(scale=float(factor)))
    return found
