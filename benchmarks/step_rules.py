"""The rules of `step_contest.py`: which evaluations they keep of a grid of steps.

A rule makes the sigmas of K evaluations from the exact grid and K, for UniPC to step on; or it says
which rows of the grid to compute, and `sample` extrapolates the velocity of the others.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from benchmarks import quality_clips as clips
from cosmos3_jax import Cosmos3, Request
from cosmos3_jax.models.transformer import Latents
from cosmos3_jax.sampling import denoise, unipc
from cosmos3_jax.sampling.unipc import AnyArray

SEACACHE = (*range(6), 7, 9, 11, 13, 15, 18, 21, 24, 27, 30, 33, 34)  # 18 of 35
SEACACHE_STEPS = 35

Rows = tuple[int, ...]


class Grid(NamedTuple):
    """The exact grid: native, of `steps`."""

    steps: int
    shift: float

    def sigmas(self) -> np.ndarray:
        return unipc.sigmas("native", self.steps, self.shift)


# The rules: (grid, evaluations) -> sigmas, or None where a rule says nothing of so many
# --------------------------------------------------------------------------------------------------


def native(grid: Grid, count: int) -> np.ndarray:
    return unipc.sigmas("native", count, grid.shift)


def uniform(grid: Grid, count: int) -> np.ndarray:
    """Uniform in u, where sigma = s u / (1 + (s - 1) u), from the grid's first to its last."""
    sigmas, s = grid.sigmas()[:-1], grid.shift
    u = sigmas / (s - (s - 1) * sigmas)
    u = np.linspace(u[0], u[-1], count)
    return np.append(s * u / (1 + (s - 1) * u), 0.0)


def eased(grid: Grid, count: int) -> np.ndarray:
    """The spacing of the grid at both ends, and smoothly wider between: the package's rule."""
    return unipc.sigmas("native", grid.steps, grid.shift, evaluations=count)


def seacache(grid: Grid, count: int) -> np.ndarray | None:
    """The full steps that SeaCache takes; known of 18 of 35 alone."""
    if (grid.steps, count) != (SEACACHE_STEPS, len(SEACACHE)):
        return None
    return at_rows(grid, SEACACHE)


def at_rows(grid: Grid, rows: Sequence[int]) -> np.ndarray:
    """Of the grid the sigmas of these rows."""
    return np.append(grid.sigmas()[list(rows)], 0.0)


def even_rows(grid: Grid, count: int) -> Rows:
    """Rows of the grid, as evenly as whole numbers can be; first and last are among them."""
    return tuple(np.linspace(0, grid.steps - 1, count).round().astype(int).tolist())


RULES: dict[str, Callable[[Grid, int], np.ndarray | None]] = {
    "native": native, "uniform": uniform, "eased": eased, "seacache": seacache,
}  # fmt: skip
SIMPLEST = (
    "native",
    "uniform",
    "eased",
    "seacache",
    "searched",
    "order1",
    "order1 seacache",
)  # first, if as good


# Making latents, step by step
# --------------------------------------------------------------------------------------------------


def sample(model: Cosmos3, request: Request, computed: Rows | None = None) -> dict[str, Array]:
    """The final latents of a request. Rows that are not `computed` take a velocity extrapolated in
    the row's number from the last two that were; None computes all.
    """
    start = clips.begin(model, request)
    state, known = start.state, []
    for k, row in enumerate(start.rows):
        if computed is None or k in computed:
            made = clips.velocity(model, start, state.latents, k, row.timestep)
            known = [*known[-1:], (k, made)]
        else:
            made = extrapolate(known, k)
        state = clips.solve(state, made, row)
    return denoise.channels_first(state.latents)


def extrapolate(known: Sequence[tuple[int, Latents]], k: int) -> Latents:
    """The velocity of row k on the line through the last two; the last one if it is alone."""
    if len(known) == 1:
        return known[0][1]
    (first, before), (last, latest) = known
    return _along(before, latest, np.float32((k - last) / (last - first)))


@jax.jit
def _along(before: Latents, latest: Latents, by: AnyArray) -> Latents:
    return jax.tree.map(lambda a, b: b + by * (b - a), before, latest)


class Way(NamedTuple):
    """The cheapest way found to a row of the grid, and the solver's state there."""

    cost: float
    rows: Rows
    state: unipc.State


def search(model: Cosmos3, request: Request, grid: Grid, most: int) -> dict[int, Rows]:
    """Spacing by dynamic programming over trajectories (Pei et al., arXiv 2503.21774): for each
    number of evaluations up to `most`, the rows of the grid to evaluate.

    Of every row and number of evaluations the one way is kept on which the solver comes nearest to
    the exact trajectory there. The paper's student steps by Euler; here it is UniPC, and a way
    keeps its history. The distance is the sum of squares over clips and modalities.
    """
    start, sigmas = clips.begin(model, request), grid.sigmas()
    state, exact = start.state, []
    for k, row in enumerate(start.rows):
        state = clips.solve(
            state, clips.velocity(model, start, state.latents, k, row.timestep), row
        )
        exact.append(state.latents)
    targets = jax.tree.map(lambda *x: jnp.stack(x), *exact)  # after each row: at row 1, 2, ...
    ways, found = {0: Way(0.0, (0,), start.state)}, {}
    for count in range(1, most + 1):
        longer: dict[int, Way] = {}
        for at, way in ways.items():
            made = clips.velocity(model, start, way.state.latents, at, start.rows[at].timestep)
            rows = [_next_row(sigmas, way.rows, to) for to in range(1, grid.steps + 1)]
            stacked = jax.tree.map(lambda *x: np.stack(x), *rows)
            states, costs = _candidates(way.state, made, stacked, targets)
            for to, cost in enumerate(np.asarray(costs).tolist(), 1):
                if to > at and (to not in longer or cost < longer[to].cost):
                    longer[to] = Way(cost, (*way.rows, to), _pick(states, np.int32(to - 1)))
        *rows_found, _ = longer.pop(grid.steps).rows
        found[count], ways = tuple(rows_found), longer
    return found


def _next_row(sigmas: np.ndarray, rows: Rows, to: int) -> unipc.Tableau:
    """The row of the solver's table for the step from the last of `rows` to row `to`."""
    to = max(to, rows[-1] + 1)  # backwards is nowhere: what is there is not looked at
    levels = [*sigmas[list(rows)], *([sigmas[to]] if to < len(sigmas) - 1 else []), 0.0]
    return jax.tree.map(lambda x: x[len(rows) - 1], unipc.tableau(np.asarray(levels)))


@jax.jit
def _pick(states: unipc.State, i: AnyArray) -> unipc.State:
    return jax.tree.map(lambda x: x[i], states)


@jax.jit
def _candidates(
    state: unipc.State, made: Latents, rows: unipc.Tableau, targets: Latents
) -> tuple[unipc.State, Array]:
    """The states after a step to each row of the grid, and how far each is from the exact one."""
    states = jax.vmap(lambda row: clips.solve(state, made, row))(rows)
    squares = jax.tree.map(
        lambda x, y: jnp.sum(jnp.square(x - y), axis=tuple(range(1, x.ndim))),
        states.latents,
        targets,
    )
    return states, sum(jax.tree.leaves(squares))
