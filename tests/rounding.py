"""How tests compare programs that may round differently, and where their tolerances come from.

Two programs for the same arithmetic differ in the order of their sums: another batch, another block
length, another framework, another processor. So no test demands that their results are equal. It
demands `relative_l2(ours, expected) <= tolerance`, and a tolerance stands on a measurement: move
every input by one unit in the last place, see how far the result moves, and allow at least five
times that.

    TOLERANCE = 1e-5

    def test_tolerance(record_property, params):
        rounding.check(record_property, TOLERANCE, decode, params, latents)

Equality is for what is copied, indexed or counted, and for one compiled program that runs twice.
A bfloat16 result is judged beside the reference's own bfloat16: at most 1.2 times its error. Of an
elementwise operation the roundings may be counted instead; the comment does so.
`pytest --sensitivities` prints what was measured.
"""

import jax
import jax.numpy as jnp
import numpy as np

MARGIN = 5
SEEDS = (0, 1)  # of the directions in which inputs are moved


def relative_l2(ours, reference) -> float:
    """|ours - reference| / |reference| over all values, in float64."""
    ours, reference = (np.asarray(x, np.float64) for x in (ours, reference))
    assert ours.shape == reference.shape, (ours.shape, reference.shape)
    return float(np.linalg.norm(ours - reference) / np.linalg.norm(reference))


def farthest(ours, reference) -> float:
    """The largest `relative_l2` among the arrays of two trees alike; NaN if any is."""
    return float(np.max(jax.tree.leaves(jax.tree.map(relative_l2, ours, reference))))


def nudged(tree, seed: int = 0):
    """Every floating-point array of a tree, each value one unit in the last place up or down.

    Zeros and values that are not finite stay, as do integers and booleans.
    """
    random = np.random.RandomState(seed)

    def move(value):
        if not hasattr(value, "dtype") or not jnp.issubdtype(value.dtype, jnp.floating):
            return value
        array = np.asarray(value)
        up = random.randint(0, 2, array.shape).astype(bool)
        towards = np.where(up, np.inf, -np.inf).astype(array.dtype)
        moved = np.nextafter(array, towards)
        return np.where(np.isfinite(array) & (array != 0), moved, array).astype(array.dtype)

    return jax.tree.map(move, tree)


def sensitivity(function, *inputs, distance=farthest) -> float:
    """How far the result of `function` moves when every input moves by one unit in the last place.

    Args:
        function: of `inputs`, trees of arrays, to a tree of arrays.
        distance: of a moved result from the result; relative L2 of the worst array by default.
    """
    result = jax.tree.map(np.asarray, function(*inputs))
    return float(np.max([distance(function(*nudged(inputs, seed)), result) for seed in SEEDS]))


def check(record_property, tolerance: float, function, *inputs, name="", distance=farthest) -> None:
    """A tolerance is at least five times the sensitivity of what it is used for.

    Args:
        record_property: pytest's fixture; the table of `--sensitivities` is made of it.
        name: of the row, beside the test's own.
    """
    found = sensitivity(function, *inputs, distance=distance)
    # Plain numbers: workers of xdist can send no others.
    record_property("sensitivity", (name, found, float(tolerance)))
    assert 0 < MARGIN * found <= tolerance, (
        f"one unit in the last place moves the result by {found:.1e}; a tolerance of at least "
        f"{MARGIN * found:.1e} is needed, and this one is {tolerance:.1e}"
    )


def rounded_to(bits: int, x: np.ndarray) -> np.ndarray:
    """Round to `bits` of mantissa after the leading one: 23 float32, 10 TF32, 7 bfloat16."""
    mantissa, exponent = np.frexp(x)
    return np.ldexp(np.rint(mantissa * 2 ** (bits + 1)) / 2 ** (bits + 1), exponent).astype(x.dtype)
