"""The autoencoders' modules: what ours are called in the reference, and how arrays are laid out.

Names are written out here, rather than taken from `checkpoint/*_layout.py`: a mistake there must
not be made twice.

Axes: T frames, C channels.
"""

import re
from typing import Any

import numpy as np
import torch

from convert.verify.compare import ALIKE, FLOAT32, relative_l2
from convert.verify.witness import Operation, Recording, Witness

# What lies between the modules before and these.
BEFORE = {
    "encoder.conv_in": "patch order",
    "post_quant_conv": "statistics of the latents",
    "encoder.layers.0": "spectrum",
}
BETWEEN = (
    (r".*attentions\.\d+\.proj", "attention"),
    (r".*(resample\.1|time_conv)", "change of rate"),
    (r".*\.block\.\d+\.snake1|.*resnets\.0\.norm1", "shortcut"),
    (r".*pwconv1|.*norm2|.*norm1|.*conv[12]", "activation or sum"),
)


def modules_with_weights(module: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The reference's modules that have weights of their own, by name."""
    return {n: m for n, m in module.named_modules() if n and list(m.parameters(recurse=False))}


def arrange(name: str, module: torch.nn.Module, x: torch.Tensor, made: bool) -> torch.Tensor:
    """What a module read or made as [1, T, ..., C], without what was put around its input."""
    if not (x.ndim == 3 and isinstance(module, torch.nn.LayerNorm)):
        x = x.movedim(1, -1)
    if x.ndim == 4:  # the frames of one clip, each by itself
        x = x[None]
    if not made and name.endswith("downsampler.time_conv"):
        return x[:, 1:]  # the frame before
    if not made and name.endswith("dwconv.1"):
        return x[:, 3:-3]
    return x


def make_witness(name: str, module: torch.nn.Module, params: dict, way: str) -> Witness:
    """Of one half of an autoencoder, `way` is `decode` or `encode`."""
    half, known = "decoder" if way == "decode" else "encoder", modules_with_weights(module)

    def public(path: str) -> str:
        """Our module's path -> the public name: written out, not taken from the layout's rules."""
        dotted = re.sub(r"_(\d+)(?=/|$)", r".\1", path).replace("/", ".")
        return dotted if dotted in ("quant_conv", "post_quant_conv") else f"{half}.{dotted}"

    def operation(path: str) -> Operation | None:
        key = public(path)
        if key not in known:
            return None
        between = (why for pattern, why in BETWEEN if re.fullmatch(pattern, key))
        return Operation((key,), BEFORE.get(key) or next(between, ""))

    def hint(key: str, path: str) -> str:
        node: Any = params[half]
        for part in path.split("/"):
            node = node[part]
        return _hint(key, node, known)

    return Witness(
        name,
        operation,
        Recording(),
        leaf=lambda path: f"{name}/{half}/{path}",
        tensors=lambda key: tuple(
            f"{key}.{part}" for part, _ in known[key].named_parameters(recurse=False)
        ),
        hint=hint,
    )


def _hint(key: str, ours: dict, modules: dict[str, torch.nn.Module]) -> str:
    """What our kernel looks like instead of the reference's, or "" where it is the same."""
    if "kernel" not in ours:
        return "our scale is all ones" if np.all(np.asarray(ours.get("scale", 0)) == 1) else ""
    mine, theirs = np.moveaxis(np.asarray(ours["kernel"]), (-1, -2), (0, 1)), _kernel(modules[key])
    bias = getattr(modules[key], "bias", None)
    if bias is not None and "bias" in ours:
        exact = bias.detach().float().cpu().numpy()
        if relative_l2(ours["bias"], exact) > FLOAT32["operation"]:
            zeros = "is all zeros here" if not np.any(ours["bias"]) else "differs"
            if relative_l2(mine, theirs) < ALIKE:
                return f"{key}.bias {zeros}"
    if relative_l2(mine, theirs) < ALIKE:
        return ""
    if not mine.any():
        return "our kernel is all zeros"
    if mine.shape != theirs.shape:
        return f"our kernel is {mine.shape}, the reference's {theirs.shape}"
    swapped = np.swapaxes(theirs, 0, 1)
    if swapped.shape == mine.shape and relative_l2(mine, swapped) < ALIKE:
        return "ours is transposed, inputs for outputs"
    for axis in range(2, mine.ndim):
        if relative_l2(mine, np.flip(theirs, axis)) < ALIKE:
            return f"ours is reversed along axis {axis}"
    for name, module in modules.items():
        if hasattr(module, "weight") and name != key:
            other = _kernel(module)
            if other.shape == mine.shape and relative_l2(mine, other) < ALIKE:
                return f"ours holds {name}.weight"
    cosine = np.sum(mine * theirs) / np.linalg.norm(mine) / np.linalg.norm(theirs)
    folded = ", after weight norm" if hasattr(modules[key], "weight_g") else ""
    return f"kernels{folded} have cosine {cosine:.3f}"


def _kernel(module: torch.nn.Module) -> np.ndarray:
    """Outputs first, then inputs, then space; weight norm folded."""
    weight = module.weight.detach().float().cpu().numpy()
    transposed = isinstance(module, torch.nn.ConvTranspose1d)
    return np.swapaxes(weight, 0, 1) if transposed else weight
