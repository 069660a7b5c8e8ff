"""Settings are held to their types and limits, from Python and from the command line alike."""

import dataclasses
import datetime
import decimal
import fractions

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cosmos3_jax import limits
from cosmos3_jax.io.settings import Settings
from cosmos3_jax.sampling import unipc

COMPLEX = np.ones((1, 2), complex)
DATES = np.array([["2020-01-01", "2020-01-02"]], "datetime64[D]")
STRUCTURED = np.zeros((1, 2), [("a", np.float32), ("b", np.float32)])

# What is no value of a setting, though parts of it could be computed with.
WRONG = [
    ("num_frames", True, "num_frames=True must be a whole number"),
    ("num_frames", np.True_, "num_frames=.*True.* must be a whole number"),
    ("num_frames", "9", "num_frames='9' must be a whole number"),
    ("num_frames", 9.0, "num_frames=9.0 must be a whole number"),
    ("num_frames", np.array([9]), "num_frames holds int64: give a whole number"),
    ("height", [480], r"height=\[480\] must be a whole number"),
    ("fps", "24", "fps='24' must be a finite number"),
    ("fps", b"24", "fps=b'24' must be a finite number"),
    ("fps", True, "fps=True must be a finite number"),
    ("fps", np.str_("24"), "must be a finite number"),
    ("fps", 24 + 0j, r"fps=\(24\+0j\) must be a finite number"),
    ("fps", np.complex64(24), "must be a finite number"),
    ("fps", np.datetime64("2020-01-01"), "must be a finite number"),
    ("fps", datetime.timedelta(seconds=24), "must be a finite number"),
    ("guidance_scale", np.ones(2), "guidance_scale holds float64: give a finite number"),
    ("flow_shift", {}, "flow_shift={} must be a finite number"),
    ("num_inference_steps", decimal.Decimal(2), "must be a whole number"),
    ("seed", True, "seed=True must be a whole number, or one for each prompt"),
    ("seed", [True], "must be a whole number"),
    ("seed", {1: 2}, "must be a whole number"),
    ("seed", np.ones((2, 2), int), "seed holds int64: give a whole number"),
    ("size", True, "size=True must be"),
    ("size", (832.0, 480.0), "size=.* must be"),
    ("size", (832, 480, 1), "size=.* must be"),
    ("aspect", (16, 9), "aspect=.* must be a text"),
    ("schedule", 1, "schedule=1 must be a text"),
    ("keep", "middle", 'keep=\'middle\' must be "first" or "last"'),
    ("sound", "no", "sound='no' must be True or False"),
    ("sound", None, "sound=None must be True or False"),
    ("prompt_metadata", 2, "prompt_metadata=2 must be True or False"),
    ("system_prompt", True, "system_prompt=True must be a text, or False"),
    ("negative_prompt", {"a": 1}, "negative_prompt=.* must be a text or a list of texts"),
    ("negative_prompt", {"a"}, "negative_prompt=.* must be a text or a list of texts"),
    ("negative_prompt", b"a", "negative_prompt=b'a' must be a text or a list of texts"),
    ("condition_frames", {0: 1}, "condition_frames={0: 1} must be whole numbers"),
    ("sigmas", 0.5, "sigmas=0.5 must be a list of numbers"),
    ("sigmas", np.array(0.5), "must be a list of numbers"),
    ("negative_prompt", [3], "must be a text or a list of texts"),
    ("sigmas", ["0.5", "0"], "must be a list of numbers"),
    ("sigmas", "0.5,0", "must be a list of numbers"),
    ("sigmas", [True, False], "must be a list of numbers"),
    ("noise", DATES, r"noise holds datetime64\[D\]: give real numbers"),
    ("noise", STRUCTURED, "noise holds .*: give real numbers"),
    ("noise", COMPLEX, "noise holds complex128: give real numbers"),
    ("noise", COMPLEX.astype(object), "noise holds object: give real numbers"),
    ("noise", np.ones((1, 2), bool), "noise holds bool: give real numbers"),
    ("noise", jnp.ones((1, 2), bool), "noise holds bool: give real numbers"),
    ("noise", [["a"]], "noise=.* must be real numbers"),
    ("sound_noise", [[1], [1, 2]], "sound_noise=.* must be real numbers"),
    ("sound_noise", jax.random.key(0), "sound_noise=.* must be real numbers"),
    ("clean_latents", COMPLEX, "clean_latents holds complex128: give real numbers"),
    ("frame_mask", np.ones((1, 2)), "frame_mask holds float64: give bool"),
    ("frame_mask", "yes", "frame_mask='yes' must be bool"),
]


@pytest.mark.parametrize(("name", "value", "message"), WRONG, ids=lambda x: str(x)[:30])
def test_a_value_of_another_type_is_refused(name, value, message):
    with pytest.raises(ValueError, match=message) as caught:
        Settings(**{name: value})
    assert str(caught.value).startswith(name) and "\n" not in str(caught.value)


# Given, and as it is kept: of Python's own types where it is one number.
RIGHT = [
    ("num_frames", np.int32(9), 9),
    ("num_frames", np.array(9, np.uint8), 9),
    ("num_frames", jnp.asarray(9), 9),
    ("fps", 24, 24),
    ("fps", np.float32(23.976), float(np.float32(23.976))),
    ("fps", np.array(24.0), 24.0),
    ("fps", jnp.asarray(24, jnp.bfloat16), 24.0),
    ("fps", fractions.Fraction(24000, 1001), 24000 / 1001),
    ("fps", decimal.Decimal("23.976"), 23.976),
    ("guidance_scale", np.int64(3), 3),
    ("seed", np.uint32(2**32 - 1), 2**32 - 1),
    ("seed", np.array([1, 2]), [1, 2]),
    ("seed", range(2), [0, 1]),
    ("seed", (1, 2), [1, 2]),
    ("size", 480, 480),
    ("size", "480p", "480p"),
    ("size", [832, 480], (832, 480)),
    ("sound", np.True_, True),
    ("system_prompt", False, False),
    ("system_prompt", "", ""),
    ("negative_prompt", ("a", "b"), ("a", "b")),
    ("negative_prompt", np.array(["a", "b"]), ["a", "b"]),
    ("negative_prompt", lambda: iter(["a", None]), ["a", None]),
    ("keep", "last", "last"),
]


def name_of(value) -> str:
    """Of a test, the same in each process: without an address."""
    return "iterator" if callable(value) else str(value)[:30]


@pytest.mark.parametrize(("name", "given", "kept"), RIGHT, ids=name_of)
def test_numbers_of_other_libraries_are_taken(name, given, kept):
    given = given() if callable(given) else given
    found = getattr(Settings(**{name: given}), name)
    assert found == kept and type(found) is type(kept)


@pytest.mark.parametrize(
    "noise", [np.zeros((1, 2)), np.zeros((1, 2), int), jnp.zeros((1, 2), jnp.bfloat16), [[0, 1]]]
)
def test_arrays_of_real_numbers_are_taken(noise):
    for name in ("noise", "sound_noise", "clean_latents", "sigmas"):
        assert np.shape(getattr(Settings(**{name: noise}), name)) == (1, 2)
    assert Settings(frame_mask=[[True, False]]).frame_mask.dtype == bool


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_frames", 4000000001), ("height", 16 * 10**9), ("width", 16400),
        ("num_inference_steps", 2**31), ("num_inference_steps", 1000001),
        ("guidance_scale", 1e39), ("guidance_scale", -1e39), ("fps", 1e39), ("flow_shift", 1e39),
    ],
)  # fmt: skip
def test_what_is_beyond_a_limit_is_refused(name, value):
    with pytest.raises(ValueError, match=f"{name}=.* is beyond the limit of .*: take less"):
        Settings(**{name: value})


def test_limits_of_one_thing_agree():
    assert limits.STEPS == unipc.NUM_TRAIN_TIMESTEPS
    assert np.float32(limits.LARGEST_FLOAT) == np.finfo(np.float32).max
    assert np.float32(limits.SMALLEST_FLOAT) == np.finfo(np.float32).tiny
    names = {field.name for field in dataclasses.fields(Settings)}
    assert {"num_frames", "fps", "guidance_scale", "flow_shift"} <= names & limits.SETTINGS.keys()
