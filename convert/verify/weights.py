"""Every public tensor against the part of our parameter tree that it belongs in, bit for bit.

`names` says where each belongs. Ours are read by the package's own loader, from public or converted
files. What differs is named with its public tensor and our leaf, and with the tensor whose values
ours holds instead, if any does: sums of the values and of their squares find it in any order.
"""

import re
from collections.abc import Callable, Container, Iterable

import jax.numpy as jnp
import numpy as np

from convert.verify.compare import Outcome
from convert.verify.names import Target
from cosmos3_jax.checkpoint.load import Component

# Weight norm folded by two libraries: roundings of float32, of 6e-8 each. Rounded to bfloat16
# afterwards, few values fall to the other side, each by 4e-3 of itself: one in 400 is the bar.
FOLDED = {"float32": 5e-7, "bfloat16": 2e-4}
SAME = 1e-5  # sums of the same values, folded or in another order, differ by less
SHOWN_ROWS = 3


def compare(
    outcome: Outcome,
    component: Component,
    tensors: Iterable[tuple[str, np.ndarray]],
    target_of: Callable[[str, int], Target | None],
    *,
    folded: Container[str] = (),
    dtype: str = "float32",
    layers: int | None = None,
) -> list[Target]:
    """Compare the tensors of one component.

    Args:
        outcome: mismatches are added to it, and the number of tensors to its details.
        component: ours, opened.
        tensors: public names and values in float32, rounded as ours are stored; each is read once.
        target_of: (public name, number of axes) -> where it belongs; None if nothing reads it.
        folded: the tensors that are products of weight norm.
        dtype: in which folded tensors of ours are stored.
        layers: of stacked leaves the first so many are compared; None for all.

    Returns:
        Where the tensors belong that differ.
    """
    pieces = {(piece.leaf, *piece.place): piece for piece in component.pieces(jnp.dtype("float32"))}
    filled = dict.fromkeys(pieces, 0)
    held, values = None, np.empty(0)  # several tensors may fill one piece
    sums: dict[str, np.ndarray] = {}
    wrong: list[tuple[Target, dict, np.ndarray]] = []
    outcome.details["tensors"] = 0
    for public, tensor in tensors:
        sums[public] = _sums(tensor)
        target = target_of(public, tensor.ndim)
        if target is None:
            continue
        outcome.details["tensors"] += 1
        normed = public in folded
        what = {
            "operation": public, "leaf": target.label, "bar": FOLDED[dtype] if normed else 0.0,
            "tensors": (f"{public}_g", f"{public}_v") if normed else (public,),
        }  # fmt: skip
        place = (target.leaf,) if target.layer is None else (target.leaf, target.layer)
        if place not in pieces:
            wrong.append((target, what | {"hint": "there is no such leaf"}, np.zeros(3)))
            continue
        if held != place:
            held, values = place, component.read(pieces[place])
        ours, exact = values[target.index], target.arrange(tensor)
        filled[place] += tensor.size
        error = _error(ours, exact)
        if not error <= what["bar"]:  # NaN misses every bar
            what |= {"relative_l2": error, "hint": _own_hint(ours, exact)}
            wrong.append((target, what, _sums(ours)))
    for _, what, own in wrong:
        outcome.add(**what | {"hint": what["hint"] or _holder(what["operation"], own, sums)})
    for (leaf, *layer), count in filled.items():
        left_out = layers is not None and (sum(layer) >= layers or "/last_layer/" in leaf)
        if count != np.prod(pieces[leaf, *layer].shape) and not left_out:
            step = "/".join(map(str, (leaf, *layer)))
            outcome.add(f"{step}: public tensors fill {count} of its values", leaf=leaf)
    return [target for target, _, _ in wrong]


def natural_order(name: str) -> tuple:
    """A key for sorting: what has no layer first, then layers by number, then by name."""
    layer = re.match(r"layers\.(\d+)\.", name)
    parts = re.split(r"(\d+)", name)
    numbered = tuple((part.isdigit(), int(part) if part.isdigit() else part) for part in parts)
    return (-1 if layer is None else int(layer[1]), numbered)


def _error(ours: np.ndarray, exact: np.ndarray) -> float:
    """Relative L2; 0 only for equal values, infinity for another shape. No float64: some tensors
    take gigabytes.
    """
    if ours.shape != exact.shape:
        return np.inf
    if np.array_equal(ours, exact):
        return 0.0
    norm = np.linalg.norm(exact)
    return float(np.linalg.norm(ours - exact) / norm) if norm else np.inf


def _sums(values: np.ndarray) -> np.ndarray:
    """Size, sum and sum of squares: the same for the same values in any order."""
    squares = np.sum(np.square(values), dtype=np.float64)
    return np.array([values.size, np.sum(values, dtype=np.float64), squares])


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
