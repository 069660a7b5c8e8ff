"""A sampler's state on disk that is damaged is passed over, with a warning that names it."""

import json
import zipfile

import numpy as np
import pytest

from cosmos3_jax.runtime.sampler_state import StateFile

STATE = {"samples": np.ones((2, 3), np.float32)}
IDENTITY = {"prompt": "a"}


def write(out, **changes):
    stored = {name: json.dumps(value) for name, value in IDENTITY.items()}
    members = {"done": np.int32(2), "identity": np.str_(json.dumps(stored)), **STATE, **changes}
    state = StateFile(out, 1, IDENTITY)
    np.savez(state.path, **{name: value for name, value in members.items() if value is not None})
    return state


@pytest.mark.parametrize(
    "identity", [np.float32(1), np.str_("{"), np.str_("[1]"), np.str_("[" * 10_000), np.zeros(2)]
)
def test_an_identity_that_is_none(tmp_path, caplog, identity):
    assert write(tmp_path / "good.mp4").check()
    state = write(tmp_path / "odd.mp4", identity=identity)
    assert not state.check()
    [message] = caplog.messages
    assert message.startswith(f"{state.path} is not a sampler's state: ")
    assert len(message) < 500


@pytest.mark.parametrize(
    "changes",
    [
        {"done": None}, {"done": np.float32(2)}, {"done": np.int32([2])}, {"done": np.int32(-5)},
        {"samples": None}, {"samples": np.ones((2, 3))}, {"samples": np.ones(2, np.float32)},
    ],
)  # fmt: skip
def test_arrays_that_do_not_fit(tmp_path, changes):
    assert write(tmp_path / "good.mp4").restore(STATE)[0] == 2
    assert write(tmp_path / "odd.mp4", **changes).restore(STATE) == (0, STATE)


def test_a_member_that_is_no_array(tmp_path):
    state = write(tmp_path / "odd.mp4", samples=None)
    with zipfile.ZipFile(state.path, "a") as archive:
        archive.writestr("samples.npy", b"none")
    assert state.restore(STATE) == (0, STATE)


def test_a_full_disk_costs_no_work(tmp_path, caplog, monkeypatch):
    """An earlier state stays, and what could not be written is named."""
    state = write(tmp_path / "out.mp4")
    before = state.path.read_bytes()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    state.keep(4, 9, 1, STATE)
    assert caplog.messages == [
        f"going on without a new state: [Errno 28] {state.path} could not be written: "
        "No space left on device"
    ]
    assert state.path.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [state.path.name]


def test_generations_onto_one_name_have_states_of_their_own(tmp_path, caplog):
    """What the other is, is said; neither replaces or removes the other's."""
    first = write(tmp_path / "out.mp4")
    second = StateFile(tmp_path / "out.mp4", 1, {"prompt": "b"})
    assert not second.check()
    assert caplog.messages == [
        f"{first.path} is the state of another generation (prompt differ): it stays, and this one "
        "begins anew"
    ]
    second.keep(1, 9, 1, STATE)
    second.remove()
    assert first.path.is_file() and not second.path.is_file()
