"""A sampler's state on disk that is damaged is passed over, with a warning that names it."""

import json
import zipfile

import numpy as np
import pytest

from cosmos3_jax.runtime.sampler_state import StateFile

STATE = {"samples": np.ones((2, 3), np.float32)}
IDENTITY = {"prompt": "a"}


def write(path, **changes):
    stored = {name: json.dumps(value) for name, value in IDENTITY.items()}
    members = {"done": np.int32(2), "identity": np.str_(json.dumps(stored)), **STATE, **changes}
    np.savez(path, **{name: value for name, value in members.items() if value is not None})
    return StateFile(path, 1, IDENTITY)


@pytest.mark.parametrize(
    "identity", [np.float32(1), np.str_("{"), np.str_("[1]"), np.str_("[" * 10_000), np.zeros(2)]
)
def test_an_identity_that_is_none(tmp_path, caplog, identity):
    assert write(tmp_path / "good.npz").check()
    assert not write(tmp_path / "odd.npz", identity=identity).check()
    [message] = caplog.messages
    assert message.startswith(f"{tmp_path / 'odd.npz'} is not a sampler's state: ")
    assert len(message) < 500


@pytest.mark.parametrize(
    "changes",
    [
        {"done": None}, {"done": np.float32(2)}, {"done": np.int32([2])}, {"done": np.int32(-5)},
        {"samples": None}, {"samples": np.ones((2, 3))}, {"samples": np.ones(2, np.float32)},
    ],
)  # fmt: skip
def test_arrays_that_do_not_fit(tmp_path, changes):
    assert write(tmp_path / "good.npz").restore(STATE)[0] == 2
    assert write(tmp_path / "odd.npz", **changes).restore(STATE) == (0, STATE)


def test_a_member_that_is_no_array(tmp_path):
    state = write(tmp_path / "odd.npz", samples=None)
    with zipfile.ZipFile(tmp_path / "odd.npz", "a") as archive:
        archive.writestr("samples.npy", b"none")
    assert state.restore(STATE) == (0, STATE)
