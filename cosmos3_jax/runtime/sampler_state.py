"""The sampler's state on disk: a denoising whose process was ended goes on from there.

The state holds all that one step leaves to the next, in float32. The same programs go on from it,
so the result is the one of an uninterrupted run, bit for bit.
"""

import glob
import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr, tree_flatten_with_path

from cosmos3_jax import guard
from cosmos3_jax.checkpoint import publish
from cosmos3_jax.parallel import distributed, sharding
from cosmos3_jax.sampling import unipc

SUFFIX = ".state.npz"

log = logging.getLogger("cosmos3_jax")


class StateFile:
    """The state of one generation in an npz file beside its output, replaced from time to time.

    Its name has a digest of the identity: generations onto one name have files of their own.

    Attributes:
        path: of the file.
        every: denoising steps after which it is written; it is also written before the last block
            of steps, so that a failure of the decoder costs no more than that.
        identity: what decides the bits of the result.
    """

    def __init__(self, out: Path, every: int, identity: Mapping[str, Any]):
        if every < 1:
            raise ValueError(f"checkpoint_every={every} must be at least 1 step")
        self.identity = {name: json.dumps(value) for name, value in identity.items()}
        digest = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()
        self.path, self.every = out.with_name(f"{out.name}.{digest[:12]}{SUFFIX}"), every
        self.others = [path for path in beside(out) if path != self.path]
        self._kept = 0

    def check(self) -> bool:
        """Whether there is a state to go on from. Says of others beside it what is another there:
        they stay, as they may be gone on from.
        """
        here = self.path.is_file() and self._identity(self.path) == self.identity
        for other in [] if here else self.others:
            recorded = self._identity(other) or {}
            names = sorted(recorded.keys() | self.identity.keys())
            differ = [name for name in names if recorded.get(name) != self.identity.get(name)]
            log.warning(
                "%s is the state of another generation (%s differ): it stays, and this one begins "
                "anew", other, ", ".join(differ),
            )  # fmt: skip
        return here

    def _identity(self, path: Path) -> dict[str, str] | None:
        found = self._read(path, names=("identity",))
        if found is None:
            return None
        try:
            with guard.parsing(path, "a sampler's state"):
                return dict(json.loads(str(found["identity"])))
        except ValueError as error:
            log.warning("%s: the denoising begins anew", error)
            return None

    def restore(self, state: unipc.State) -> tuple[int, unipc.State]:
        """The number of steps that are done, and the state after them.

        Args:
            state: before the first step, which comes back where there is no file.
        """
        paths, tree = tree_flatten_with_path(state)
        done = np.zeros((), np.int32)
        arrays = [np.zeros(leaf.shape, leaf.dtype) for _, leaf in paths]
        if distributed.is_writer() and (found := self._read(self.path)) is not None:
            stored = [found.get(_name(path)) for path, _ in paths]
            fits = [
                x is not None and (x.shape, x.dtype) == (leaf.shape, leaf.dtype)
                for x, (_, leaf) in zip(stored, paths, strict=True)
            ]
            count = found.get("done")
            if all(fits) and count is not None and (count.shape, count.dtype) == ((), np.int32):
                done, arrays = np.maximum(count, 0), stored
        if distributed.are_several():
            from jax.experimental import multihost_utils

            done, arrays = multihost_utils.broadcast_one_to_all((done, arrays))
        self._kept = int(done)
        if self._kept == 0:
            return 0, state
        log.info("going on after step %d, from %s", self._kept, self.path)
        placed = [_place(np.asarray(x), leaf) for x, (_, leaf) in zip(arrays, paths, strict=True)]
        return self._kept, tree.unflatten(placed)

    def keep(self, done: int, total: int, block: int, state: unipc.State) -> None:
        """Write the state if it is time to; the device is waited for only then.

        Args:
            done: steps that the state has behind it, of `total`.
            block: steps of one call to the device.
            state: it may be donated afterwards.

        A disk that does not take it costs no work: that is said, and the denoising goes on.
        """
        due = done // self.every > self._kept // self.every or total - done <= block
        if done >= total or not due:
            return
        self._kept = done
        leaves = tree_flatten_with_path(distributed.to_host(state))[0]
        if not distributed.is_writer():
            return
        try:
            with publish.file(self.path) as temporary, temporary.open("wb") as file:
                np.savez(
                    file, done=np.int32(done), identity=np.str_(json.dumps(self.identity)),
                    **{_name(path): leaf for path, leaf in leaves},
                )  # fmt: skip
        except OSError as error:
            log.warning("going on without a new state: %s", error)

    def remove(self) -> None:
        """When the result is whole, elsewhere."""
        self.path.unlink(missing_ok=True)

    @staticmethod
    def _read(path: Path, names: tuple[str, ...] | None = None) -> dict[str, np.ndarray] | None:
        """The file's arrays; None, and a warning, if it cannot be read."""
        if not path.is_file():
            return None
        try:
            with guard.parsing(path, "a sampler's state"), np.load(path) as arrays:
                return {name: np.asarray(arrays[name]) for name in names or arrays.files}
        except (ValueError, OSError) as error:
            log.warning("%s: the denoising begins anew", error)
            return None


def beside(out: Path) -> list[Path]:
    """The states of generations onto `out`."""
    return sorted(out.parent.glob(f"{glob.escape(out.name)}.*{SUFFIX}"))


def _name(path: tuple) -> str:
    return keystr(path, simple=True, separator=".")


def _place(array: np.ndarray, like: jax.Array) -> jax.Array:
    """Where `like` is: a program that was compiled for that one takes it."""
    if not sharding.mesh_sizes():
        return jnp.asarray(array)
    return jax.make_array_from_callback(array.shape, like.sharding, lambda index: array[index])
