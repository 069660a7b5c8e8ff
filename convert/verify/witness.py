"""Both implementations operation by operation, each of ours on what the reference's read.

The reference runs once, and a `Recording` keeps what every module of it read and made. Then ours
runs, and at each of its modules a `Witness` compares what it is about to read (which blames what
lies between two modules: rotation, attention, residuals, the order of patches), hands it what the
reference's read instead, compares what it makes of that (which blames the module and its weights)
and goes on with what the reference made. No error travels: whatever is off is off by itself, and
the first such place is the first in the order of the computation.

Axes: arrays are channels last with one example in front, [1, T, ..., C].
"""

import contextlib
import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch

from convert.verify.compare import FLOAT32, Place, relative_l2


@dataclasses.dataclass(frozen=True)
class Operation:
    """One of our modules and what it stands for.

    Attributes:
        modules: public names of the reference's modules; more than one where ours computes several
            at once, side by side on its last axis but one.
        before: what lies between the modules before and this one, in words.
    """

    modules: tuple[str, ...]
    before: str = ""


class Recording:
    """What each module of the reference read and made, by public name, calls joined over T."""

    def __init__(self):
        self.read: dict[str, list[np.ndarray]] = defaultdict(list)
        self.made: dict[str, list[np.ndarray]] = defaultdict(list)

    def add(self, name: str, read: torch.Tensor, made: torch.Tensor) -> None:
        """One call's input and output, channels last."""
        self.read[name].append(read.detach().float().cpu().numpy())
        self.made[name].append(made.detach().float().cpu().numpy())

    @contextlib.contextmanager
    def of(self, modules: Mapping[str, torch.nn.Module], arrange: Callable) -> Iterator[None]:
        """Record these modules' calls.

        `arrange(name, module, tensor, made)` brings what a module read or made into our axes.
        """

        def hook(name: str) -> Callable:
            def keep(module, arguments, out):
                read, made = arrange(name, module, arguments[0], False), out
                self.add(name, read, arrange(name, module, made, True))

            return keep

        handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def take(self, name: str, read: bool, shape: tuple[int, ...]) -> np.ndarray:
        """The next `shape[1]` positions along T of what a module read or made, cut to `shape`.

        The reference pads some inputs at their ends first; ours does inside of the module.
        """
        calls = (self.read if read else self.made)[name]
        joined = np.concatenate(calls, axis=1) if len(calls) > 1 else calls[0]
        now, rest = joined[:, : shape[1]], joined[:, shape[1] :]
        calls[:] = [rest]
        if now.ndim == len(shape) and read:
            now = now[tuple(slice(n) for n in shape)]
        return now


class Witness:
    """Compares our modules with a recording, see above.

    Attributes:
        places: what is off, in the order of the computation.
        operations: `(operation, relative L2)` of every comparison.
    """

    def __init__(
        self,
        component: str,
        operations: Callable[[str], Operation | None],
        recording: Recording,
        *,
        leaf: Callable[[str], str],
        tensors: Callable[[str], tuple[str, ...]],
        hint: Callable[[str, str], str] = lambda name, path: "",
        prefix: str = "",
    ):
        """Ready to run.

        Args:
            component: for messages.
            operations: our module's path (`mlp/down`) -> what it stands for, None to pass it by.
            recording: the reference's.
            leaf: our module's path -> the path of its weights in our tree.
            tensors: a public module's name -> its tensors' names.
            hint: (public module's name, our path) -> what our weights look like instead.
            prefix: the public modules' common beginning, for example `layers.3.`.
        """
        self.component, self.find, self.recording = component, operations, recording
        self.leaf, self.tensors, self.hint, self.prefix = leaf, tensors, hint, prefix
        self.places: list[Place] = []
        self.operations: list[tuple[str, float]] = []
        self.passing: Callable[[str, Any], bool] = lambda path, x: False

    def compare(self, operation: str, ours, exact, *, module: str = "", path: str = "") -> None:
        """Note how far two arrays are apart. With `module`, its weights are to blame."""
        ours, bar = np.asarray(ours, np.float32), FLOAT32["operation"]
        exact = np.asarray(exact, np.float32)
        error = relative_l2(ours, exact) if ours.shape == exact.shape else np.inf
        self.operations.append((self.prefix + operation, error))
        if error <= bar:
            return
        tensors = self.tensors(self.prefix + module) if module else ()
        leaf, hint = (self.leaf(path), self.hint(module, path)) if module else ("", "")
        self.places.append(
            Place(self.component, self.prefix + operation, tensors, leaf, error, bar, hint)
        )

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Compare every module that runs meanwhile, outside of `jax.jit`."""
        with nn.intercept_methods(self._intercept):
            yield

    def _intercept(self, call: Callable, arguments: tuple, options: dict, context: Any):
        path = "/".join(context.module.path)
        operation = self.find(path) if context.method_name == "__call__" else None
        if operation is None or self.passing(path, arguments[0]):
            return call(*arguments, **options)
        read, *others = arguments
        first = operation.modules[0]
        exact = self.recording.take(first, True, read.shape).reshape(read.shape)
        for other in operation.modules[1:]:
            self.recording.take(other, True, read.shape)  # the same again
        self.compare(f"{first}, its input{_because(operation.before)}", read, exact)
        made = call(jnp.asarray(exact, read.dtype), *others, **options)
        parts = self._parts(operation, made)
        start = 0
        for module, part in zip(operation.modules, parts, strict=True):
            stop = start + (part.shape[-2] if len(parts) > 1 else 0)
            ours = made[..., start:stop, :] if len(parts) > 1 else made
            self.compare(module, ours, part, module=module, path=path)
            start = stop
        joined = np.concatenate(parts, axis=-2) if len(parts) > 1 else parts[0]
        return jnp.asarray(joined, made.dtype)

    def _parts(self, operation: Operation, made: jax.Array) -> list[np.ndarray]:
        """What the reference's modules made, in the shape of ours."""
        shape = made.shape
        parts = [self.recording.take(name, False, shape) for name in operation.modules]
        if len(parts) == 1:
            return [parts[0].reshape(shape)]
        return [part.reshape(*shape[:-2], -1, shape[-1]) for part in parts]


def _because(before: str) -> str:
    return f" ({before})" if before else ""
