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
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import Array

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


@dataclasses.dataclass
class Found:
    """What witnesses of one input found.

    Attributes:
        places: what is off, in the order of the computation.
        operations: `(operation, relative L2)` of every comparison.
    """

    places: list[Place] = dataclasses.field(default_factory=list)
    operations: list[tuple[str, float]] = dataclasses.field(default_factory=list)


def merge(found: Mapping[str, Found]) -> list[Place]:
    """Every place once, in the order of the computation; inputs, by name, go through the same one.

    What is off with some of them alone says with which.
    """
    first: dict[str, tuple[int, Place]] = {}
    names: dict[str, list[str]] = defaultdict(list)
    for name, one in found.items():
        order = [operation for operation, _ in one.operations]
        for place in one.places:
            at = order.index(place.operation)
            first[place.operation] = min(
                (at, place), first.get(place.operation, (at, place)), key=lambda pair: pair[0]
            )
            if name not in names[place.operation]:
                names[place.operation].append(name)
    places = []
    for _, place in sorted(first.values(), key=lambda pair: pair[0]):
        if len(names[place.operation]) < len(found):
            only = f"only with: {'; '.join(names[place.operation])}"
            place = dataclasses.replace(place, hint=f"{place.hint}; {only}".removeprefix("; "))
        places.append(place)
    return places


class Recording:
    """What each module of the reference read and made, by public name, calls joined over T."""

    def __init__(self, arrays: Mapping[str, Mapping[str, list]] | None = None):
        """Empty, or with what `arrays` of another returned."""
        empty: dict[str, Mapping] = {"read": {}, "made": {}}
        self._calls = {way: defaultdict(list, names) for way, names in (arrays or empty).items()}
        self._taken: dict[tuple[str, str], int] = defaultdict(int)

    def arrays(self) -> dict[str, dict[str, list]]:
        """Everything, as a tree of arrays."""
        return {way: dict(names) for way, names in self._calls.items()}

    def names(self) -> list[str]:
        """The modules that were called."""
        return list(self._calls["made"])

    def add(self, name: str, read: torch.Tensor, made: torch.Tensor) -> None:
        """One call's input and output, channels last."""
        for way, x in (("read", read), ("made", made)):
            self._calls[way][name].append(x.detach().float().cpu().numpy())

    @contextlib.contextmanager
    def of(self, modules: Mapping[str, torch.nn.Module], arrange: Callable) -> Iterator[None]:
        """Record these modules' calls.

        `arrange(name, module, tensor, made)` brings what a module read or made into our axes.
        """

        def hook(name: str) -> Callable:
            def keep(module, arguments, out):
                read = arrange(name, module, arguments[0], False)
                self.add(name, read, arrange(name, module, out, True))

            return keep

        handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def take(self, name: str, way: str, shape: tuple[int, ...]) -> Array:
        """The next `shape[1]` positions along T of what a module read or made, cut to `shape`.

        The reference pads some inputs at their ends first; ours does inside of the module.
        """
        calls, start = self._calls[way][name], self._taken[name, way]
        joined = calls[0] if len(calls) == 1 else jnp.concatenate(calls, axis=1)
        self._taken[name, way] = start + shape[1]
        now = joined[:, start : start + shape[1]]
        if now.ndim == len(shape) and way == "read":
            now = now[tuple(slice(n) for n in shape)]
        return now


class Witness:
    """Compares our modules with a recording, see above.

    Attributes:
        places, operations: see `Found`.
        seen: the public modules that were compared.
        passing: our module's path -> whether it is not to be compared just now.
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
        found: Found | None = None,
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
            found: what is found is added to it, if given.
        """
        self.component, self.find, self.recording = component, operations, recording
        self._running: str | None = None
        self.leaf, self.tensors, self.hint, self.prefix = leaf, tensors, hint, prefix
        self.tell(found or Found())
        self.seen: set[str] = set()
        self._tracing = False
        self._pending: list[tuple[dict, Array]] = []
        self.passing: Callable[[str], bool] = lambda path: False

    def tell(self, found: Found) -> None:
        """From now on add what is found to this."""
        self.places, self.operations = found.places, found.operations

    def run(self, function: Callable, *arguments: Any) -> Any:
        """What `function` returns, compared on the way, as one compiled program."""
        labels: list[dict] = []

        def traced(arrays: dict, arguments: tuple) -> tuple[Any, list]:
            self.recording, self._pending, self._tracing = Recording(arrays), [], True
            with self.watching():
                made = function(*arguments)
            labels[:] = [label for label, _ in self._pending]
            return made, [error for _, error in self._pending]

        try:
            made, errors = jax.jit(traced)(self.recording.arrays(), arguments)
        except Exception:  # of what is known by now, another shape may be the reason
            for label, error in self._pending:
                if not isinstance(error, jax.core.Tracer):
                    self._settle(error, **label)
            raise
        finally:
            self._tracing = False
        for label, error in zip(labels, errors, strict=True):
            self._settle(float(error), **label)
        return made

    def note(self, operation: str, error: float, *, module: str, path: str) -> None:
        """A comparison that was made elsewhere."""
        self._settle(error, operation, module, path)

    def check_coverage(self, seen: Iterable[str] = ()) -> None:
        """Every module that the reference called has been compared, here or in `seen`."""
        for name in self.recording.names():
            if name not in self.seen | set(seen):
                self._settle(np.inf, f"{name}: no module of ours computes it", "", "")

    def compare(self, operation: str, ours, exact, *, module: str = "", path: str = "") -> None:
        """Note how far two arrays are apart. With `module`, its weights are to blame."""
        label = {"operation": operation, "module": module, "path": path}
        self.seen.add(module)
        if np.shape(ours) != np.shape(exact):
            label["operation"] += f": {np.shape(ours)} is {np.shape(exact)} in the reference"
            if self._tracing:  # in the order of the others
                self._pending.append((label, np.inf))
            else:
                self._settle(np.inf, **label)
        elif isinstance(ours, jax.core.Tracer):
            error, norm = jnp.linalg.norm(ours - exact), jnp.linalg.norm(exact)
            relative = jnp.where(norm > 0, error / norm, jnp.where(error > 0, jnp.inf, error))
            self._pending.append((label, relative))
        else:
            self._settle(relative_l2(ours, exact), **label)

    def _settle(self, error: float, operation: str, module: str, path: str) -> None:
        bar, name = FLOAT32["operation"], self.prefix + operation
        self.operations.append((name, error))
        if error <= bar:
            return
        tensors = self.tensors(self.prefix + module) if module else ()
        leaf, hint = (self.leaf(path), self.hint(module, path)) if module else ("", "")
        self.places.append(Place(self.component, name, tensors, leaf, error, bar, hint))

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Compare every module that runs meanwhile."""
        with nn.intercept_methods(self._intercept):
            yield

    def _intercept(self, call: Callable, arguments: tuple, options: dict, context: Any):
        path = "/".join(context.module.path)
        operation = self.find(path) if context.method_name == "__call__" else None
        # What a module calls of the class that it extends is still the same operation.
        if operation is None or self.passing(path) or path == self._running:
            return call(*arguments, **options)
        self._running = path
        try:
            return self._compare_call(operation, path, call, *arguments, **options)
        finally:
            self._running = None

    def _compare_call(
        self, operation: Operation, path: str, call: Callable, read: Any, *others: Any, **options
    ) -> Any:
        first = operation.modules[0]
        exact = self.recording.take(first, "read", read.shape)
        exact = exact.reshape(read.shape) if exact.size == read.size else exact
        self.compare(f"{first}, its input{_because(operation.before)}", read, exact)
        if exact.shape != read.shape:
            return call(read, *others, **options)
        made = call(jnp.asarray(exact, read.dtype), *others, **options)
        parts = [
            self._in_our_shape(self.recording.take(name, "made", made.shape), made)
            for name in operation.modules
        ]
        if len(parts) == 1:
            self.compare(first, made, parts[0], module=first, path=path)
            return jnp.asarray(parts[0], made.dtype)
        ends = np.cumsum([part.shape[-2] for part in parts])
        for name, part, end in zip(operation.modules, parts, ends, strict=True):
            ours = made[..., end - part.shape[-2] : end, :]
            self.compare(name, ours, part, module=name, path=path)
        return jnp.concatenate(parts, axis=-2).astype(made.dtype)

    @staticmethod
    def _in_our_shape(part: Array, made: Array) -> Array:
        """What one of the reference's modules made, heads apart where ours has them."""
        if part.shape == made.shape or part.size % made.shape[-1]:
            return part
        return part.reshape(*made.shape[:-2], -1, made.shape[-1])


def _because(before: str) -> str:
    return f" ({before})" if before else ""
