"""The stages of a generation as compiled programs, and three ways to execute them: run, compile
ahead, measure.

Each stage is a program of its own, so that the part of the weights which one has read can leave the
device before the next comes. The loop over steps runs in blocks: one call of its program makes
`BLOCK_STEPS` of them.
"""

import functools
import logging
from collections.abc import Callable, Generator, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from cosmos3_jax.config import Config
from cosmos3_jax.parallel import sharding
from cosmos3_jax.parallel.mesh import ambient, reachable
from cosmos3_jax.runtime.bounded import BoundedJit
from cosmos3_jax.runtime.sampler_state import StateFile
from cosmos3_jax.runtime.weights import Weights
from cosmos3_jax.runtime.words import STAGES
from cosmos3_jax.sampling.stages import Stage, Values

# Steps of one call of the loop's program, at most. Five cost what all of them as one program do,
# and one at a time 1.5% more (benchmarks/NOTES.md).
BLOCK_STEPS = 5

log = logging.getLogger("cosmos3_jax")


@functools.cache
def program(
    function: Callable, donated: int | None = None, static: tuple[str, ...] = ()
) -> BoundedJit:
    """A jitted function of (parameters, *inputs) whose `config` and other options are static."""
    donate = () if donated is None else (donated + 1,)
    return BoundedJit(function, static_argnames=("config", *static), donate_argnums=donate)


def block_length(steps: int, asked: int | None = None, trajectory: bool = False) -> int:
    """Steps of each call, for so many in all.

    Args:
        steps: of the generation.
        asked: if somebody says. None is the largest divisor up to `BLOCK_STEPS`, so that one
            program makes all steps; and 1 with a trajectory, which has every step.
        trajectory: whether every step's latents are kept.

    Raises ValueError on less than one, and on more than one with a trajectory.
    """
    most = 1 if trajectory else BLOCK_STEPS
    length = next(n for n in range(most, 0, -1) if steps % n == 0) if asked is None else asked
    if length < 1 or (trajectory and length > 1):
        allowed = "1, since a trajectory has every step" if trajectory else "1 or more"
        raise ValueError(f"steps_per_program={length} must be {allowed}")
    return length


def calls(stage: Stage, values: Values, block_steps: int | None, done: int = 0) -> Iterator[Values]:
    """What changes in the values from call to call: once nothing, or the steps of each block.

    The steps are numpy arrays, or `jax.ShapeDtypeStruct`s as they come. The first `done` are left
    out.
    """
    if not stage.loop:
        yield {}
        return
    steps, total = values["steps"], count_steps(values)
    length = block_length(total, block_steps)
    for first in range(done, total, length):
        rows = slice(first, min(first + length, total))
        yield {"steps": jax.tree.map(functools.partial(_rows, rows=rows), steps)}


def count_steps(values: Values) -> int:
    """How many denoising steps there are."""
    return values["steps"].solver.timestep.shape[0]


def _rows(x: Any, rows: slice) -> Any:
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct((rows.stop - rows.start, *x.shape[1:]), x.dtype)
    return np.asarray(x)[rows]


class Run:
    """Executes a stage on the device; the weights that it reads are borrowed for as long."""

    def __init__(
        self,
        weights: Weights,
        config: Config,
        *,
        block_steps: int | None = None,
        listen: Callable[[Values], None] | None = None,
        after: Callable[[Stage, Values], None] | None = None,
        begun: Callable[[Stage, int], None] | None = None,
        states: StateFile | None = None,
    ):
        """
        Args:
            block_steps: steps of each call of the loop; None is their `block_length`.
            listen: called with the values that each block of the loop made, when they are ready.
            after: called with all values when a stage has ended.
            begun: called when a stage is compiled and its first call is on its way, with the
                number of steps that were done before.
            states: where the loop's state is kept, and taken from.
        """
        self.weights, self.config, self.block_steps = weights, config, block_steps
        self.listen, self.after, self.begun, self.states = listen, after, begun, states

    def __call__(self, stage: Stage, values: Values) -> Values:
        log.info("%s", STAGES.get(stage.name, stage.name))
        result: Values = {}
        waiting: Values = {}
        for result in self.each_call(stage, values):
            # Waited for only now, when the device has the next call to go on with; the state is
            # that call's by then.
            self._tell(stage, waiting)
            waiting = {name: x for name, x in result.items() if name != "state"}
        self._tell(stage, waiting)
        jax.block_until_ready(result)
        if self.after is not None:
            self.after(stage, values | result)
        return result

    def _tell(self, stage: Stage, made: Values) -> None:
        if stage.loop and made and self.listen is not None:
            self.listen(jax.block_until_ready(made))

    def each_call(self, stage: Stage, values: Values) -> Generator[Values, None, None]:
        """The values that each call makes: for the loop over steps, those after every block.

        The next call is on its way while they are looked at.
        """
        static = stage.static(values)
        run = program(stage.function, stage.donated, tuple(static))
        result: Values = {}
        states = self.states if stage.loop else None
        first = 0
        if states is not None:
            first, state = states.restore(values["state"])
            values = values | {"state": state}
        done = first
        with self.weights.borrow(stage.part) as params:
            for number, change in enumerate(calls(stage, values, self.block_steps, first)):
                inputs = stage.inputs(values | change)
                new = number == 0 and log.isEnabledFor(logging.INFO)
                if new and run.is_new(params, *inputs, config=self.config, **static):
                    log.info("compiling the program for %s", STAGES.get(stage.name, stage.name))
                result = run(params, *inputs, config=self.config, **static)
                if number == 0 and self.begun is not None:
                    self.begun(stage, first)
                values = values | result
                if states is not None:
                    block, total = count_steps(change), count_steps(values)
                    done += block
                    states.keep(done, total, block, result["state"])
                yield result
            jax.block_until_ready(result)  # before its weights leave


def run_alone(
    weights: Weights,
    config: Config,
    mesh: Mesh | None,
    part: str,
    function: Callable,
    array: Array,
    **static,
) -> Any:
    """A stage's function of one part of the weights and an array, on the array's mesh."""
    run = program(function, static=tuple(static))
    with ambient(mesh), weights.borrow(part) as params:
        return jax.block_until_ready(run(params, reachable(mesh, array), config=config, **static))


class Compile:
    """Compiles a stage for values that are `jax.ShapeDtypeStruct`s, and makes such values."""

    def __init__(self, structs: dict, config: Config, block_steps: int | None = None):
        self.structs, self.config, self.block_steps = structs, config, block_steps

    def __call__(self, stage: Stage, values: Values) -> Values:
        static = stage.static(values)
        run = program(stage.function, stage.donated, tuple(static))
        made: Values = {}
        for change in distinct_calls(stage, values, self.block_steps):
            inputs = stage.inputs(values | change | made)
            made = compile_for(run, self.structs[stage.part], *inputs, config=self.config, **static)
        return made


def distinct_calls(stage: Stage, values: Values, block_steps: int | None) -> Iterator[Values]:
    """Of `calls`, those that are programs of their own."""
    seen = set()
    for change in calls(stage, values, block_steps):
        if (shapes := shapes_of(change)) not in seen:
            seen.add(shapes)
            yield change


def shapes_of(values: Values) -> str:
    """What tells apart the programs of one stage."""
    return str(jax.tree.map(np.shape, values))


def compile_for(program: BoundedJit, *arguments, **options) -> Any:
    """Compile a jitted function for arguments of these shapes; what it would return.

    A later call finds it ready.
    """
    compiled = program.lower(*arguments, **options).compile()
    made = program.eval_shape(*arguments, **options)
    if not sharding.mesh_sizes():
        return made
    return jax.tree.map(
        lambda x, placed: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed),
        made, compiled.output_shardings,
    )  # fmt: skip


def structs_of(values: Values) -> Values:
    """The arrays among values -> their shapes; all else stays."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype) if hasattr(x, "dtype") else x, values
    )


@BoundedJit
def stack(trees: list) -> Any:
    """Trees of arrays -> one, stacked on a leading axis."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
