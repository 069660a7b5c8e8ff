"""The measurement that tolerances stand on."""

import jax.numpy as jnp
import numpy as np
import pytest
import rounding


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, jnp.bfloat16])
def test_every_value_moves_by_one_unit(dtype):
    values = np.asarray([1.5, -3.25, 1e-3, 0.0, np.inf, -np.inf, np.nan], dtype)
    tree = {"values": values, "ids": np.arange(3), "mask": np.array([True]), "none": None}
    moved = rounding.nudged(tree)
    assert moved["values"].dtype == values.dtype
    other = rounding.nudged(tree, seed=1)["values"]
    for i, value in enumerate(values[:3]):
        neighbours = [np.nextafter(value, values.dtype.type(end)) for end in (-np.inf, np.inf)]
        assert moved["values"][i] in neighbours and other[i] in neighbours
    assert (moved["values"][:3] != other[:3]).any()  # the seed is that of the directions
    np.testing.assert_array_equal(np.float64(moved["values"][3:]), np.float64(values[3:]))
    assert moved["ids"] is tree["ids"] and moved["mask"] is tree["mask"]


def test_nan_is_far():
    """In whichever array, so that no bar is met."""
    ones, nan = np.ones(3), np.full(3, np.nan)
    for ours in ({"a": ones, "b": nan}, {"a": nan, "b": ones}):
        assert not rounding.farthest(ours, {"a": ones, "b": ones}) <= 1
    with pytest.raises(AssertionError):
        rounding.check(lambda *_: None, 1.0, lambda x: x * np.nan, np.ones(3, np.float32))


def test_sensitivity_is_that_of_the_function():
    """A difference of near numbers moves by what their last place is of it."""
    near = np.linspace(1, 1.9, 1000, dtype=np.float32), np.linspace(1, 1.9, 1000, dtype=np.float32)
    near[1][:] += np.float32(2**-10)
    unit = 2.0**-23  # of numbers from 1 to 2; two of them, each way at random
    found = rounding.sensitivity(lambda x: x[1] - x[0], near)
    assert found == pytest.approx(np.sqrt(2) * unit * 2**10, rel=0.1)
    assert rounding.sensitivity(lambda x: {"a": x[0], "b": x[1] - x[0]}, near) == found


def test_a_tolerance_below_five_times_the_sensitivity_is_refused():
    rows = []
    values = np.full(100, 1.5, np.float32)

    def check(tolerance):
        rounding.check(lambda *row: rows.append(row), tolerance, np.negative, values, name="-")

    unit = 2.0**-23 / 1.5
    check(6 * unit)
    assert rows == [("sensitivity", ("-", pytest.approx(unit), 6 * unit))]
    with pytest.raises(AssertionError, match="a tolerance of at least 4.0e-07 is needed"):
        check(4 * unit)
    with pytest.raises(AssertionError):  # what nothing moves, nothing is known of
        rounding.check(lambda *row: None, 1.0, lambda x: 0 * x + 1, np.ones(3, np.float32))
