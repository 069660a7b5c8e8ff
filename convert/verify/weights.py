"""Every public tensor against the part of our parameter tree that it belongs in, bit for bit.

`names` says where each belongs. Ours are read by the package's own loader, from public or converted
files. What differs is named with its public tensor and our leaf, and with the tensor whose values
ours holds instead, if any does: sums of the values and of their squares find it in any order.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable

import jax.numpy as jnp
import numpy as np

from convert.verify.compare import Mismatch, Outcome
from convert.verify.names import Target
from cosmos3_jax.checkpoint.load import Component

# Weight norm folded by two libraries: roundings of float32, of 6e-8 each. Rounded to bfloat16
# afterwards, few values fall to the other side, each by 4e-3 of itself: one in 400 is the bar.
FOLDED = {"float32": 5e-7, "bfloat16": 2e-4}
BLOCK = 2**24  # values that are compared at a time
SAME = 1e-5  # sums of the same values, folded or in another order, differ by less
SHOWN_ROWS = 3


def compare(
    outcome: Outcome,
    name: str,
    component: Component,
    tensors: Iterable[tuple[str, np.ndarray]],
    target_of: Callable[[str, int], Target | None],
    *,
    folded: Callable[[str], bool] = lambda name: False,
    dtype: str = "float32",
    layers: int | None = None,
) -> list[Target]:
    """Compare the tensors of one component.

    Args:
        outcome: mismatches are added to it, and the number of tensors to its details.
        name: of the component.
        component: ours, opened.
        tensors: public names and values in float32, rounded as ours are stored; each is read once.
        target_of: (public name, number of axes) -> where it belongs; None if nothing reads it.
        folded: whether a tensor is the product of weight norm.
        dtype: in which folded tensors of ours are stored.
        layers: of stacked leaves the first so many are compared; None for all.

    Returns:
        Where the tensors belong that differ.
    """
    pieces = {(piece.leaf, *piece.place): piece for piece in component.pieces(jnp.dtype("float32"))}
    filled = dict.fromkeys(pieces, 0)
    last_read: tuple = (None, None)  # several tensors may fill one piece
    sums: dict[str, np.ndarray] = {}
    wrong: list[tuple[Mismatch, Target, np.ndarray | None]] = []
    outcome.details["tensors"] = 0
    for public, tensor in tensors:
        sums[public] = _sums(tensor)
        target = target_of(public, tensor.ndim)
        if target is None:
            continue
        outcome.details["tensors"] += 1
        normed = folded(public)
        stored = (f"{public}_g", f"{public}_v") if normed else (public,)
        bar = FOLDED[dtype] if normed else 0.0
        place = (target.leaf,) if target.layer is None else (target.leaf, target.layer)
        if place not in pieces:
            why = "there is no such leaf"
            wrong.append(
                (Mismatch(name, public, stored, target.label, np.inf, bar, why), target, None)
            )
            continue
        if last_read[0] != place:
            last_read = place, component.read(pieces[place])
        ours, exact = last_read[1][target.index], target.arrange(tensor)
        filled[place] += tensor.size
        error = _error(ours, exact)
        if not error <= bar:  # NaN misses every bar
            hint = _own_hint(ours, exact)
            mismatch = Mismatch(name, public, stored, target.label, error, bar, hint)
            wrong.append((mismatch, target, _sums(ours)))
    for mismatch, _, own in wrong:
        hint = mismatch.hint or _holder(mismatch.operation, own, sums)
        outcome.mismatches.append(dataclasses.replace(mismatch, hint=hint))
    for place, values in filled.items():
        layer = place[1] if len(place) > 1 else 0
        left_out = layers is not None and (layer >= layers or "/last_layer/" in place[0])
        if values != np.prod(pieces[place].shape) and not left_out:
            step = f"{'/'.join(map(str, place))}: public tensors fill {values} of its values"
            outcome.mismatches.append(Mismatch(name, step, (), place[0], np.inf, 0.0))
    return [target for _, target, _ in wrong]


def natural_order(name: str) -> tuple:
    """A key for sorting: what has no layer first, then layers by number, then by name."""
    layer = re.match(r"layers\.(\d+)\.", name)
    parts = re.split(r"(\d+)", name)
    numbered = tuple((part.isdigit(), int(part) if part.isdigit() else part) for part in parts)
    return (-1 if layer is None else int(layer[1]), numbered)


def _blocks(*arrays: np.ndarray):
    """Slices of a few values along the first axis: no copy of a large array is made."""
    rows = max(1, BLOCK // max(1, arrays[0][:1].size)) if arrays[0].ndim else 1
    for start in range(0, len(arrays[0]), rows):
        yield tuple(array[start : start + rows].astype(np.float64) for array in arrays)


def _error(ours: np.ndarray, exact: np.ndarray) -> float:
    """Relative L2; 0 only for equal values, infinity for another shape."""
    if ours.shape != exact.shape:
        return np.inf
    if np.array_equal(ours, exact):
        return 0.0
    error = norm = 0.0
    for mine, theirs in _blocks(ours, exact):
        error, norm = error + np.sum((mine - theirs) ** 2), norm + np.sum(theirs**2)
    return float(np.sqrt(error / norm)) if norm else np.inf


def _sums(values: np.ndarray) -> np.ndarray:
    """Size, sum and sum of squares: the same for the same values in any order."""
    total = squares = 0.0
    for (block,) in _blocks(values):
        total, squares = total + block.sum(), squares + np.sum(block**2)
    return np.array([values.size, total, squares])


def _own_hint(ours: np.ndarray, exact: np.ndarray) -> str:
    """What is wrong with our tensor, as far as these two say."""
    if ours.shape != exact.shape:
        return f"ours has shape {ours.shape}, the reference's is {exact.shape} in our axes"
    for value in (0, 1):
        if np.all(ours == value):
            return f"ours is all {('zeros', 'ones')[value]}"
    if not np.all(np.isfinite(ours)):
        return "ours is not finite"
    if ours.ndim > 1:
        rows = np.flatnonzero([not np.array_equal(a, b) for a, b in zip(ours, exact, strict=True)])
        if 0 < len(rows) <= len(ours) // 2:
            shown = ", ".join(map(str, rows[:SHOWN_ROWS])) + ", ..." * (len(rows) > SHOWN_ROWS)
            return f"{len(rows)} of {len(ours)} rows differ: {shown}"
    return ""


def _holder(public: str, own: np.ndarray, sums: dict[str, np.ndarray]) -> str:
    """The public tensor that has our values."""
    scale = np.array([1, np.sqrt(own[0] * own[2]), own[2]])
    same = [
        name for name, theirs in sums.items()
        if own[0] == theirs[0] and np.all(np.abs(own - theirs) <= SAME * scale)
    ]  # fmt: skip
    if public in same:
        return "ours holds its values in another order: transposed, reversed or moved"
    return f"ours holds {same[0]}" if same else "ours holds no public tensor that was compared"
