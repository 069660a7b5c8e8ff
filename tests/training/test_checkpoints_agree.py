"""A disk that does not answer says nothing of a state, and processes take the same one."""

import errno
import os

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.experimental import multihost_utils

from cosmos3_jax.training import checkpoints
from cosmos3_jax.training.checkpoints import Checkpoints
from cosmos3_jax.training.step import TrainState


def state_of(step: int) -> TrainState:
    w = jnp.full(3, step, jnp.float32)
    return TrainState(jnp.int32(step), {"w": w}, (), None, jax.random.key(step))


@pytest.fixture
def run(tmp_path):
    """A folder of a run with states of steps 1 and 2."""
    with Checkpoints(tmp_path / "run") as saved:
        for step in (1, 2):
            saved.save(state_of(step))
    return tmp_path / "run"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def fail_once(monkeypatch, error: Exception) -> None:
    """The first reading of arrays raises."""
    left, restore = [error], ocp.CheckpointManager.restore

    def fail(self, *args, **kwargs):
        if left:
            raise left.pop()
        return restore(self, *args, **kwargs)

    monkeypatch.setattr(ocp.CheckpointManager, "restore", fail)


def of_disk(number: int) -> OSError:
    return OSError(number, os.strerror(number), "a file")


@pytest.mark.parametrize(
    "error",
    [
        *map(of_disk, (errno.EMFILE, errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EACCES)),
        TimeoutError("a barrier"),
        MemoryError(),
        ValueError("UNKNOWN: Failed to read: Input/output error [os_error_code='5']"),
        ValueError("PERMISSION_DENIED: no"),
    ],
    ids=lambda error: f"{type(error).__name__} {str(error)[:12]}",
)
def test_what_the_disk_says_is_no_damage(run, monkeypatch, error):
    fail_once(monkeypatch, error)
    with Checkpoints(run) as saved:
        with pytest.raises(type(error)) as raised:
            saved.restore(state_of(0))
        assert raised.value is error and names(run) == ["1", "2"]
        assert saved.restore(state_of(0)).params["w"][0] == 2


@pytest.mark.parametrize(
    "error",
    [
        of_disk(errno.ENOENT),
        FileNotFoundError("no default/"),
        ValueError("NOT_FOUND: [os_error_code='2']"),
        ValueError("checksum of a chunk"),
    ],
)
def test_what_is_missing_is_damage(run, monkeypatch, error):
    fail_once(monkeypatch, error)
    with Checkpoints(run) as saved:
        assert saved.restore(state_of(0)).params["w"][0] == 1
    assert names(run) == ["1", "2.damaged"]


# ---------------------------------------------------------------- several processes


def with_another(monkeypatch, *kinds: int) -> list[int]:
    """Process 1 says `kinds`, one after the other, and then 0; what this one said is returned."""
    said, left = [], list(kinds)

    def both(number: int) -> list[int]:
        said.append(number)
        return [number, left.pop(0) if left else 0]

    monkeypatch.setattr(checkpoints, "of_all_processes", both)
    return said


@pytest.mark.parametrize("kinds", [(1,), (0, 1), (0, 0, 1)])
def test_a_state_damaged_for_another_process_is_not_taken(run, monkeypatch, caplog, kinds):
    said = with_another(monkeypatch, *kinds)
    with Checkpoints(run) as saved:
        assert saved.restore(state_of(0)).params["w"][0] == 1
    assert names(run) == ["1", "2.damaged"] and not any(said)
    assert "process 1 cannot read it" in caplog.text


def test_a_disk_that_fails_another_process_stops_all(run, monkeypatch):
    with_another(monkeypatch, 0, 2)
    with Checkpoints(run) as saved:
        with pytest.raises(OSError, match="a state is not read: process 1 "):
            saved.restore(state_of(0))
    assert names(run) == ["1", "2"]


@pytest.mark.parametrize("error", [of_disk(errno.EIO), ValueError("checksum")])
def test_the_others_learn_what_this_process_found(run, monkeypatch, error):
    said = with_another(monkeypatch)
    fail_once(monkeypatch, error)
    with Checkpoints(run) as saved:
        if isinstance(error, OSError):
            with pytest.raises(OSError) as raised:
                saved.restore(state_of(0))
            assert raised.value is error and said == [0, 2]
        else:  # the next state, after the name and the renaming
            assert saved.restore(state_of(0)).params["w"][0] == 1
            assert said == [0, 1, 0, 0, 0, 0, 0]


def test_all_processes_are_asked_where_there_are_several(monkeypatch):
    def gather(number):
        return np.stack([number, np.int32(2)])

    monkeypatch.setattr(multihost_utils, "process_allgather", gather)
    assert checkpoints.of_all_processes(1) == [1]
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert checkpoints.of_all_processes(1) == [1, 2]
