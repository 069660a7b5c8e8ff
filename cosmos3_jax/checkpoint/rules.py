"""How a public tensor becomes a place in our parameter tree: strict, invertible rules.

A layout (see `layouts.py`) is a list of `Rule`s, one for each public tensor that generation reads,
and a list of patterns for those that it never reads. A leaf of our tree may be filled by several
tensors: layers are stacked; q, k and v share one kernel. `check` compares a layout with the keys
and shapes of a checkpoint and raises with all that differs.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import einops
import numpy as np
from flax.traverse_util import flatten_dict

from cosmos3_jax import guard


class CheckpointError(ValueError):
    """A checkpoint does not have the tensors, shapes or files that the model needs."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """One public tensor and where it lives in our tree.

    Attributes:
        key: public name, for example `layers.3.mlp.gate_proj.weight`.
        leaf: path in our tree, for example `gen/layers/mlp/gate_up/kernel`.
        rearrange: einops pattern from the public axes to the axes of `leaf[index]`.
        index: the part of the leaf that the tensor fills, for example `(3, slice(None), 0)`.
        sizes: sizes of the axes that the pattern splits.
        weight_norm: the tensor is stored as `key_v` and `key_g` and folded when it is read.
    """

    key: str
    leaf: str
    rearrange: str
    index: tuple[int | slice, ...] = ()
    sizes: tuple[tuple[str, int], ...] = ()
    weight_norm: bool = False

    @property
    def keys(self) -> tuple[str, ...]:
        """The public tensors that are read: one, or direction and gain under weight norm."""
        return (f"{self.key}_v", f"{self.key}_g") if self.weight_norm else (self.key,)

    def to_leaf(self, *tensors: np.ndarray) -> np.ndarray:
        """Public tensors (in the order of `keys`) -> the values of `leaf[index]`."""
        tensor = fold_weight_norm(*tensors) if self.weight_norm else tensors[0]
        return einops.rearrange(tensor, self.rearrange, **dict(self.sizes))

    def public_index(self, index: Sequence[slice], shape: Sequence[int]) -> tuple[slice, ...]:
        """The part of the public tensor that holds a part of `leaf[self.index]`.

        Args:
            index: with a start and a stop on each axis.
            shape: of `leaf[self.index]`.

        Raises:
            ValueError: if that part is not in one piece.
        """
        if self.rearrange == "... -> ...":
            return tuple(index)
        public, ours = self.rearrange.split("->")
        axes = ours.split()
        cut = dict(zip(axes, zip(index, shape, strict=True), strict=True))
        found = []
        for group in re.findall(r"\(([^)]*)\)|(\S+)", public):
            first, *inner = (group[0] or group[1]).split()
            if any(part.stop - part.start != size for part, size in (cut[x] for x in inner)):
                raise ValueError(f"{self.key} has no part for {index} of {self.leaf}")
            step = math.prod(cut[name][1] for name in inner)
            part = cut[first][0]
            found.append(slice(part.start * step, part.stop * step))
        return tuple(found)

    def to_public(self, leaf: np.ndarray) -> np.ndarray:
        """The inverse: our leaf -> the public tensor (the folded one under weight norm)."""
        public, ours = self.rearrange.split("->")
        sizes = {name: size for name, size in self.sizes if re.search(rf"\b{name}\b", ours)}
        return einops.rearrange(leaf[self.index], f"{ours} -> {public}", **sizes)

    def public_shapes(self, leaf_shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
        """The shapes that the tensors of `keys` must have, given the leaf's."""
        # A broadcast scalar has the shape and none of the memory.
        shape = self.to_public(np.broadcast_to(np.float32(0), leaf_shape)).shape
        gain = (shape[0],) + (1,) * (len(shape) - 1)
        return dict(zip(self.keys, (shape, gain), strict=False))


@dataclasses.dataclass(frozen=True)
class Layout:
    """How one component is stored.

    Attributes:
        name: the component, for messages.
        rules: one for each tensor that is read.
        unused: regular expressions for the keys that generation never reads.
        float32: prefixes of the leaves that stay in float32 whatever dtype is asked for.
    """

    name: str
    rules: tuple[Rule, ...]
    unused: tuple[str, ...] = ()
    float32: tuple[str, ...] = ()

    def is_unused(self, key: str) -> bool:
        return any(re.fullmatch(pattern, key) for pattern in self.unused)


def fold_weight_norm(direction: np.ndarray, gain: np.ndarray) -> np.ndarray:
    """w = g v / |v|, the norm over all axes but the first, in float32 (Salimans & Kingma, 2016).

    The first axis is `out` for a convolution and `in` for a transposed one, as PyTorch has it.
    """
    direction = direction.astype(np.float32)
    axes = tuple(range(1, direction.ndim))
    norm = np.sqrt(np.sum(np.square(direction), axis=axes, keepdims=True))
    return gain.astype(np.float32) * direction / norm


def split_weight_norm(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A direction and a gain, float32, that fold to a weight: the weight itself, and its norm.

    Where the norm is 0 the direction is 1 and the gain 0, since a direction of 0 folds to 0 / 0.
    """
    weight = weight.astype(np.float32)
    axes = tuple(range(1, weight.ndim))
    gain = np.sqrt(np.sum(np.square(weight), axis=axes, keepdims=True))
    return np.where(gain == 0, np.float32(1), weight), gain


def canonical_key(key: str) -> str:
    """The older spelling of a weight-norm tensor, whichever of the two a file uses."""
    key = key.replace("parametrizations.weight.original0", "weight_g")
    return key.replace("parametrizations.weight.original1", "weight_v")


def leaf_shapes(tree: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """`{path: shape}` of a nested dict of arrays or `jax.ShapeDtypeStruct`s."""
    return {path: tuple(leaf.shape) for path, leaf in flatten_dict(tree, sep="/").items()}


def is_stacked(path: str) -> bool:
    """Whether a leaf is that of all layers of a tower, stacked [L, ...]."""
    return re.match(r"(und|gen)/layers/(?!\d)", path) is not None


def layer_path(path: str, layer: int) -> str:
    """The path of one layer of a stacked leaf in a tree whose layers are unstacked."""
    return path.replace("/layers/", f"/layers/{layer}/")


def check(
    layout: Layout, shapes: Mapping[str, Sequence[int]], leaves: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise CheckpointError unless a checkpoint fits a layout and the layout fills our tree.

    Args:
        layout: the rules.
        shapes: public key -> shape, as found in the files.
        leaves: path -> shape of every leaf of our tree (see `leaf_shapes`).

    Every difference is in the message: missing, unexpected and mis-shaped keys of the checkpoint,
    and leaves of ours that no tensor, or more than one, fills.
    """
    expected: dict[str, tuple[int, ...]] = {}
    filled = {path: 0 for path in leaves}
    problems: dict[str, list[str]] = {"duplicate": [], "leaf unknown": []}
    for rule in layout.rules:
        if rule.leaf not in leaves:
            problems["leaf unknown"].append(rule.leaf)
            continue
        for key, shape in rule.public_shapes(leaves[rule.leaf]).items():
            if key in expected:
                problems["duplicate"].append(key)
            expected[key] = shape
            filled[rule.leaf] += math.prod(shape) if key == rule.keys[0] else 0
    size = {path: math.prod(shape) for path, shape in leaves.items()}
    problems["leaf not filled exactly once"] = [p for p in leaves if filled[p] != size[p]]
    problems["missing"] = [key for key in expected if key not in shapes]
    problems["unexpected"] = [
        key for key in shapes if key not in expected and not layout.is_unused(key)
    ]
    problems["wrong shape"] = [
        f"{key}: {tuple(shapes[key])} in the checkpoint, {shape} in the model"
        for key, shape in expected.items()
        if key in shapes and tuple(shapes[key]) != shape
    ]
    raise_problems(f"the {layout.name} checkpoint does not fit the model", problems)


def raise_problems(title: str, problems: Mapping[str, Iterable[str]], shown: int = 12) -> None:
    """Raise CheckpointError listing the non-empty kinds of problem, the first `shown` of each."""
    lines = []
    for kind, items in problems.items():
        items = list(items)
        if items:
            more = [f"... and {len(items) - shown} more"] if len(items) > shown else []
            lines.append(f"  {kind} ({len(items)}):")
            lines += [f"    {guard.line(item)}" for item in items[:shown] + more]
    if lines:
        raise CheckpointError("\n".join([f"{title}:", *lines]))
