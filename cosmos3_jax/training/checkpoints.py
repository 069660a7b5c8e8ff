"""The training state on disk, by orbax: written whole or not at all, the last few kept.

No state is saved that has a number which is NaN or infinite. Each has a record of its leaves, with
checksums: what orbax reads without a word though it was damaged is noticed.

A run that resumes continues to the same numbers, if its batches are a function of the step: the
randomness of a step is (see `step.TrainState`).
"""

import contextlib
import errno
import itertools
import logging
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from cosmos3_jax.checkpoint.rules import raise_problems
from cosmos3_jax.guard import reason
from cosmos3_jax.training import records
from cosmos3_jax.training.step import TrainState

log = logging.getLogger("cosmos3_jax")


class Checkpoints:
    """The states of one run, by step, in a folder of their own."""

    def __init__(self, folder: str | Path, *, keep: int = 3):
        """Open or make a folder. What a killed run left unfinished in it is removed. A state that
        Orbax cannot even list is set aside as `restore` does.

        Args:
            folder: of this run alone.
            keep: how many states stay, the last ones; at least 1.
        """
        if keep < 1:
            raise ValueError(f"keep={keep} would keep no state; choose at least 1")
        folder = Path(folder).resolve()
        if jax.process_index() == 0:
            # Orbax would do it in a thread, which does not wait for that of a manager just closed.
            for unfinished in folder.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(unfinished)
            if folder.is_dir():
                _set_unlisted_aside(folder)
        options = ocp.CheckpointManagerOptions(max_to_keep=keep)
        self._manager = ocp.CheckpointManager(
            folder, options=options, item_handlers=ocp.StandardCheckpointHandler()
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        """Wait until everything is written."""
        self._manager.close()

    @property
    def last(self) -> int | None:
        """The number of steps of the newest whole state, or None."""
        return self._manager.latest_step()

    def save(self, state: TrainState) -> None:
        """Write a state. It is copied first, so it may be donated at once; see `__exit__`.

        Saving a step that is there already does nothing.

        Raises:
            ValueError: a number of the state is NaN or infinite; nothing is written, and no older
                state goes. Or the folder has a later step: the run was restored from an older one.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        storable = _storable(state)
        record = records.record_of(storable)
        if bad := records.not_finite(record):
            raise ValueError(self._refusal(step, bad))
        # Orbax keeps nothing older than what it has, and says so by its result alone.
        arguments = ocp.args.StandardSave(storable)
        if not self._manager.save(step, args=arguments, custom_metadata=records.sealed(record)):
            raise ValueError(
                f"{self._manager.directory} already has step {self.last}, so that step {step} "
                "would not be kept; save into another folder, or delete the later states"
            )

    def _refusal(self, step: int, bad: list[str]) -> str:
        others = f" and {len(bad) - 1} other leaves have" if len(bad) > 1 else " has"
        last = "there is none" if self.last is None else f"it is of step {self.last}"
        return (
            f"the state of step {step} is not saved: {bad[0]}{others} numbers that are NaN or "
            f"infinite; go on from the last good state ({last} in {self._manager.directory}), with "
            "other settings or TrainOptions(skip_nonfinite=True)"
        )

    def restore(self, like: TrainState, step: int | None = None) -> TrainState:
        """The newest state, or that of a step, where `like` lies, whatever it was saved from.

        Where the newest is damaged, a warning says so, its folder gets a name that ends in
        `.damaged`, and the one before is taken.

        Args:
            like: a state of the same tree, shapes and dtypes: `init_state` makes one, and
                `placement.state_template` one that takes no memory.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it does not fit `like`: another model, optimizer, dtype or choice of
                parameters. Or the state of the step that was asked for is damaged, or every one is.
            OSError: the disk does not answer as it should, which says nothing of the state: try
                again. With several processes, all raise, whichever of them it was.
        """
        self._manager.wait_until_finished()
        folder, steps = self._manager.directory, sorted(self._manager.all_steps(), reverse=True)
        if not steps or step not in (None, *steps):
            found = self._manager.all_steps() or "nothing"
            raise FileNotFoundError(f"{folder} has no state of step {step}, it has {found}")
        template = jax.tree.map(ocp.utils.to_shape_dtype_struct, _storable(like))
        damage: dict[int, str] = {}
        for candidate in steps if step is None else [step]:
            try:
                found = self._read(candidate, template)
            except _Damaged as damaged:
                damage[candidate] = str(damaged)
                continue
            for worse, why in damage.items():
                kept = self._set_aside(worse)
                log.warning(
                    "the state of step %d in %s is damaged, and is now %s: %s; going on from that "
                    "of step %d", worse, folder, kept.name, why, candidate,
                )  # fmt: skip
            return _with_key(found, like)
        problems = (f"the state of step {bad} is damaged: {why}" for bad, why in damage.items())
        raise ValueError(f"{folder}: {'; '.join(problems)}")

    def _read(self, step: int, template: TrainState) -> TrainState:
        """A state, or ValueError if it is of another run, or `_Damaged`."""
        with _damage():
            record = records.opened(self._manager.metadata(step).custom_metadata or {})
            if record is None:  # saved by an earlier version, or without the metadata of the step
                stored = records.leaves_of(self._manager.item_metadata(step))
                record = {path: {"kind": records.describe(leaf)} for path, leaf in stored.items()}
            if not record:
                raise ValueError("it lists no arrays")
        _check(f"the state of step {step}", record, template)
        with _damage():
            found = self._manager.restore(step, args=ocp.args.StandardRestore(template))
        with _damage():  # the checksums are of all processes together
            records.check_same(record, found)
        return found

    def _set_aside(self, step: int) -> Path:
        """Rename a state's folder: orbax would save no step beside it that is not later."""
        folder = Path(self._manager.directory) / str(step)
        with _agreed():  # every process has looked for a free name before it is taken
            free = _name_aside(folder)
        with _agreed():
            if jax.process_index() == 0:
                folder.rename(free)
        self._manager.reload()
        return free


def _name_aside(folder: Path) -> Path:
    """A free name for the folder of a damaged state."""
    names = (f"{folder.name}.damaged{n or ''}" for n in itertools.count())
    return next(path for name in names if not (path := folder.with_name(name)).exists())


def _set_unlisted_aside(folder: Path) -> None:
    """Rename states whose own metadata are damaged: with one of them Orbax opens no folder."""
    for state in ocp.path.step.standard_name_format().find_all(folder):
        try:
            _ = state.commit_timestamp
        except OSError:  # a disk that does not answer damages none
            raise
        except Exception as error:
            path = Path(state.path)
            kept = path.rename(_name_aside(path))
            log.warning(
                "the state of step %d in %s is damaged, and is now %s: %s",
                state.step, folder, kept.name, reason(error),
            )  # fmt: skip


class _Damaged(Exception):
    """A state cannot be read, or is not what was saved."""


def of_all_processes(number: int) -> list[int]:
    """What every process calls it with, in the order of the processes: all call it together."""
    if jax.process_count() == 1:
        return [number]
    return multihost_utils.process_allgather(np.int32(number)).reshape(-1).tolist()


@contextlib.contextmanager
def _agreed() -> Iterator[None]:
    """What one process raises is raised in all: else the others would wait for it for ever, or go
    on from another state. `_Damaged` is, unless another process raised something else.
    """
    raised = None
    try:
        yield
    except Exception as error:
        raised = error
    kinds = of_all_processes(0 if raised is None else 1 if isinstance(raised, _Damaged) else 2)
    worst = max(kinds)
    if raised is not None and (worst == 1 or not isinstance(raised, _Damaged)):
        raise raised
    if worst:
        where = f"process {kinds.index(worst)} cannot read it, or says what is wrong with it"
        raise _Damaged(where) if worst == 1 else OSError(f"a state is not read: {where}")


@contextlib.contextmanager
def _damage() -> Iterator[None]:
    """What is raised while a state is read means that it is damaged, in all processes, but for what
    may be otherwise the next time: no permission, no memory, a disk that does not answer.
    """
    with _agreed():
        try:
            yield
        except Exception as raised:
            if _of_the_system(raised):
                raise
            raise _Damaged(reason(raised)) from raised


# What says that a state is not whole: a file of it is missing, or its index names what cannot be.
_DAMAGE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EINVAL)
_OF_TENSORSTORE = re.compile(r"os_error_code='(\d+)'|PERMISSION_DENIED|RESOURCE_EXHAUSTED")


def _of_the_system(raised: Exception) -> bool:
    """Whether it says something of the machine, and nothing of the state."""
    if isinstance(raised, PermissionError | MemoryError | TimeoutError):
        return True
    if isinstance(raised, OSError) and raised.errno is not None:
        return raised.errno not in _DAMAGE
    found = _OF_TENSORSTORE.search(str(raised))
    return found is not None and (found[1] is None or int(found[1]) not in _DAMAGE)


def _storable(state: TrainState) -> TrainState:
    """With numbers for the key, which orbax does not know."""
    if not isinstance(state.key, jax.ShapeDtypeStruct):
        return state.replace(key=jax.random.key_data(state.key))
    numbers = jax.eval_shape(jax.random.key_data, state.key)
    return state.replace(key=numbers.update(sharding=state.key.sharding))


def _with_key(stored: TrainState, like: TrainState) -> TrainState:
    """With the key again that `_storable` made numbers of, of the kind that `like` has."""
    impls = []
    jax.eval_shape(lambda key: impls.append(jax.random.key_impl(key)), like.key)
    return stored.replace(key=jax.random.wrap_key_data(stored.key, impl=impls[0]))


def _check(title: str, stored: records.Record, template: TrainState) -> None:
    """Raise ValueError, with all that differ, unless a record is that of the template's leaves."""
    wanted = {path: records.describe(leaf) for path, leaf in records.leaves_of(template).items()}
    problems = {
        "only on disk": sorted(set(stored) - set(wanted)),
        "only in the run": sorted(set(wanted) - set(stored)),
        "another shape or dtype": [
            f"{path}: {stored[path]['kind']} on disk, {kind} in the run"
            for path, kind in wanted.items()
            if path in stored and stored[path]["kind"] != kind
        ],
    }
    raise_problems(f"{title} is not one of this run", problems)
