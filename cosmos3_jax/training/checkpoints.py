"""The training state on disk, by orbax: written whole or not at all, the last few kept.

A run that resumes continues to the same numbers, if its batches are a function of the step: the
randomness of a step is (see `step.TrainState`).
"""

import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.tree_util import keystr

from cosmos3_jax.checkpoint.rules import raise_problems
from cosmos3_jax.training.step import TrainState


class Checkpoints:
    """The states of one run, by step, in a folder of their own."""

    def __init__(self, folder: str | Path, *, keep: int = 3):
        """Open or make a folder. What a killed run left unfinished in it is removed.

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
            ValueError: the folder has a later step: the run was restored from an older one.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        # Orbax keeps nothing older than what it has, and says so by its result alone.
        if not self._manager.save(step, args=ocp.args.StandardSave(_storable(state))):
            raise ValueError(
                f"{self._manager.directory} already has step {self.last}, so that step {step} "
                "would not be kept; save into another folder, or delete the later states"
            )

    def restore(self, like: TrainState, step: int | None = None) -> TrainState:
        """The newest state, or that of a step, where `like` lies, whatever it was saved from.

        Args:
            like: a state of the same tree, shapes and dtypes: `init_state` makes one, and
                `placement.state_template` one that takes no memory.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it does not fit `like`: another model, optimizer, dtype or choice of
                parameters.
        """
        self._manager.wait_until_finished()
        step = self.last if step is None else step
        if step not in self._manager.all_steps():
            found = self._manager.all_steps() or "nothing"
            raise FileNotFoundError(
                f"{self._manager.directory} has no state of step {step}, it has {found}"
            )
        template = jax.tree.map(ocp.utils.to_shape_dtype_struct, _storable(like))
        _check(f"the state of step {step}", self._manager.item_metadata(step), template)
        found = self._manager.restore(step, args=ocp.args.StandardRestore(template))
        impls = []
        jax.eval_shape(lambda key: impls.append(jax.random.key_impl(key)), like.key)
        return found.replace(key=jax.random.wrap_key_data(found.key, impl=impls[0]))


def _storable(state: TrainState) -> TrainState:
    """With numbers for the key, which orbax does not know."""
    if not isinstance(state.key, jax.ShapeDtypeStruct):
        return state.replace(key=jax.random.key_data(state.key))
    numbers = jax.eval_shape(jax.random.key_data, state.key)
    return state.replace(key=numbers.update(sharding=state.key.sharding))


def _check(title: str, stored, wanted) -> None:
    """Raise ValueError, with all that differ, unless two trees have the same leaves."""
    stored, wanted = _leaves(stored), _leaves(wanted)
    problems = {
        "only on disk": sorted(set(stored) - set(wanted)),
        "only in the run": sorted(set(wanted) - set(stored)),
        "another shape or dtype": [
            f"{path}: {_describe(stored[path])} on disk, {_describe(leaf)} in the run"
            for path, leaf in wanted.items()
            if path in stored and _describe(stored[path]) != _describe(leaf)
        ],
    }
    raise_problems(f"{title} is not one of this run", problems)


def _describe(leaf) -> str:
    # Orbax would cast to the run's dtype without a word.
    return f"{jnp.dtype(leaf.dtype).name} {tuple(leaf.shape)}"


def _leaves(tree) -> dict[str, Any]:
    """Path -> what has a shape and a dtype.

    Orbax has numbers where a tuple is, and names where a dataclass is.
    """
    leaves = jax.tree.leaves_with_path(tree)
    return {keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
