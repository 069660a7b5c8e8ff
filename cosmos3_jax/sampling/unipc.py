"""Sigma schedules, and UniPC as a table of coefficients driven by one scan.

UniPC (Zhao et al., 2023; order 2, B(h) = expm1(-h), data prediction) is linear in the samples and
in the predictions of the clean latents m_i = x_i - sigma_i v_i, with coefficients that depend on
the sigmas alone. So the solver is data, a `Tableau` computed on the host in float64, one row a
step; and a `step` from `State` to `State`, in float32. `advance` scans it over the rows it gets.

Flow convention: x_sigma = (1 - sigma) x_0 + sigma noise; the model predicts v = noise - x_0.

Axes: K steps.
"""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from cosmos3_jax import limits

SCHEDULES = ("native", "diffusers", "karras")
NUM_TRAIN_TIMESTEPS = 1000
KARRAS_RHO = 7.0

AnyArray = Array | np.ndarray
Tree = Any  # a pytree of arrays: latents, velocity


@struct.dataclass
class Tableau:
    """UniPC for one sigma schedule, as arrays: another schedule of as many steps compiles nothing
    anew.

    Attributes:
        timestep: float32 [K], what the model is told: 1000 sigma, which UniPC truncates.
        sigma: float32 [K], what the solver uses.
        correct: float32 [K, 5], the corrected sample as a combination of (x_i, the corrected
            x_{i-1}, m_{i-1}, m_{i-2}, m_i). The first row keeps x_0.
        predict: float32 [K, 3], the next sample as a combination of (corrected x_i, m_i, m_{i-1}).
        noise: float32 [K], the standard deviation of fresh noise in the next sample; 0 in UniPC.
    """

    timestep: AnyArray
    sigma: AnyArray
    correct: AnyArray
    predict: AnyArray
    noise: AnyArray


def sigmas(
    schedule: str,
    num_inference_steps: int,
    flow_shift: float = 10.0,
    *,
    evaluations: int | None = None,
    karras_range: tuple[float, float] = (0.147, 200.0),
) -> np.ndarray:
    """The K + 1 noise levels of a schedule, float64, strictly decreasing to 0.

    K is the number of steps, or of `evaluations` if they are fewer. Then first and last level are
    those of all steps, and in u the steps at both ends are about as small as theirs, if K is half
    of them or more; between, they grow smoothly. See docs/fast.md.

    Args:
        schedule: `native` (linear flow from 0.999, the model's own framework), `diffusers` (linear
            flow from 1) or `karras` (the published scheduler file's; it ignores `flow_shift`).
        num_inference_steps: from 1 to 1000.
        evaluations: of the model, from 1 to `num_inference_steps`; None is as many. Fewer are for
            `native` alone.
        flow_shift: s in sigma = s u / (1 + (s - 1) u), from 1 / 10000 to 10000.
        karras_range: lowest and highest noise-to-signal ratio of the `karras` schedule.

    Raises:
        ValueError: on an unknown schedule, or a number that is not in its range.
    """
    steps = num_inference_steps
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule={schedule!r} is unknown; choose one of {', '.join(SCHEDULES)}")
    if not isinstance(steps, int | np.integer) or steps < 1:
        raise ValueError(f"num_inference_steps={steps} must be at least 1, and whole")
    if steps > NUM_TRAIN_TIMESTEPS:
        raise ValueError(
            f"num_inference_steps={steps} is more than the {NUM_TRAIN_TIMESTEPS} timesteps that "
            "the model knows: take fewer"
        )
    if evaluations is not None:
        _check_evaluations(evaluations, steps, schedule)
        evaluations = None if evaluations == steps else evaluations
    if not 0 < flow_shift < np.inf:
        raise ValueError(f"flow_shift={flow_shift} must be positive and finite")
    most = limits.FLOW_SHIFT
    if not 1 / most <= flow_shift <= most:
        raise ValueError(
            f"flow_shift={flow_shift} is not within {1 / most:g} to {most:g}: the models take 3 to "
            "10, and 1 shifts nothing"
        )
    if schedule == "karras":
        ramp = np.linspace(0, 1, steps)
        low, high = (ratio ** (1 / KARRAS_RHO) for ratio in karras_range)
        u = (high + ramp * (low - high)) ** KARRAS_RHO
        levels = u / (u + 1)
    else:
        ends = (
            (1 - 1 / NUM_TRAIN_TIMESTEPS, 0)
            if schedule == "native"
            else (1, 1 / NUM_TRAIN_TIMESTEPS)
        )
        u = np.linspace(*ends, steps + 1)[:-1]
        if evaluations is not None:
            u = u[0] + (u[-1] - u[0]) * _eased(evaluations, steps)
        levels = flow_shift * u / (1 + (flow_shift - 1) * u)
        if abs(levels[0] - 1) < 1e-6:
            levels[0] -= 1e-6  # log(1 - sigma) must be finite
    return np.append(levels, 0.0)


def fast_evaluations(num_inference_steps: int) -> int:
    """How many evaluations `speed="fast"` takes of a schedule: half, rounded up."""
    return -(-num_inference_steps // 2)


def _eased(count: int, steps: int) -> np.ndarray:
    """From 0 to 1 `count` numbers whose density at both ends is that of `steps` even ones.

    With x even, t(x) = x - a sin(2 pi x) / (2 pi) has the slope 1 - a at the ends and 1 + a in the
    middle; 1 - a = (count - 1) / (steps - 1) makes the spacing at the ends 1 / (steps - 1).
    """
    x = np.linspace(0, 1, count)
    a = 1 - (count - 1) / max(steps - 1, 1)
    return x - a * np.sin(2 * np.pi * x) / (2 * np.pi)


def _check_evaluations(evaluations: int, steps: int, schedule: str) -> None:
    if not isinstance(evaluations, int | np.integer) or not 1 <= evaluations <= steps:
        raise ValueError(
            f"evaluations={evaluations} must be a whole number from 1 to the {steps} steps"
        )
    if schedule != "native" and evaluations < steps:
        raise ValueError(
            f"{evaluations} evaluations of {steps} steps, as of speed=fast, are for the native "
            f"schedule, not for {schedule}: take speed=exact or schedule=native"
        )


def tableau(levels: np.ndarray) -> Tableau:
    """UniPC's coefficients for K + 1 sigmas that fall from at most 1 to 0.

    The sigmas are rounded to float32 before anything is computed from them, in float64, so that
    solver and model agree with an implementation whose state is float32. At the last step the
    formula's h is infinite and its order 1: the sample becomes m_{K-1}, the model's clean
    prediction.

    Raises:
        ValueError: if the sigmas are not strictly decreasing, not in (0, 1), do not end in 0, or
            are more than `limits.STEPS` + 1.
    """
    levels = np.asarray(levels, np.float64)
    _check_sigmas(levels)
    timestep = np.trunc(levels[:-1] * NUM_TRAIN_TIMESTEPS)
    if len(timestep) > 1 and timestep[0] == timestep[1]:
        warnings.warn(
            f"{len(timestep)} steps give the first two steps the same integer timestep "
            f"{timestep[0]:g}; "
            "diffusers' scheduler breaks here, so nothing comparable exists. Use fewer steps.",
            stacklevel=2,
        )
    sigma = levels.astype(np.float32).astype(np.float64)
    # 1 - sigma is taken in float32 too: near sigma = 1 its rounding is the larger part of it.
    alpha = (np.float32(1) - sigma.astype(np.float32)).astype(np.float64)
    with np.errstate(divide="ignore"):
        lam = np.log(alpha) - np.log(sigma)
    steps = len(timestep)
    order = np.minimum(2, np.minimum(steps - np.arange(steps), np.arange(steps) + 1))
    correct, predict = np.zeros((steps, 5)), np.zeros((steps, 3))
    correct[0, 0] = 1
    for i in range(steps):
        if 0 < i < steps - 1:  # what the last corrector does, the last predictor undoes
            correct[i, 1:] = _corrector(lam, alpha, sigma, i, order[i - 1])
        predict[i] = _predictor(lam, alpha, sigma, i, order[i])
    if steps > 1:
        correct[-1, 0] = 1
    columns = (timestep, sigma[:-1], correct, predict, np.zeros(steps))
    return Tableau(*(column.astype(np.float32) for column in columns))


def _predictor(lam, alpha, sigma, i: int, order: int) -> tuple[float, float, float]:
    """Coefficients of (x_i, m_i, m_{i-1}) in x_{i+1}."""
    h = lam[i + 1] - lam[i]
    scaled = alpha[i + 1] * np.expm1(-h)
    ratio = sigma[i + 1] / sigma[i]
    if order == 1:
        return ratio, -scaled, 0.0
    r = (lam[i - 1] - lam[i]) / h
    return ratio, -scaled * (1 - 0.5 / r), -scaled * 0.5 / r


def _corrector(lam, alpha, sigma, i: int, order: int) -> tuple[float, float, float, float]:
    """Coefficients of (corrected x_{i-1}, m_{i-1}, m_{i-2}, m_i) in the corrected x_i."""
    h = lam[i] - lam[i - 1]
    b = np.expm1(-h)
    scaled = alpha[i] * b
    ratio = sigma[i] / sigma[i - 1]
    if order == 1:
        return ratio, -scaled * 0.5, 0.0, -scaled * 0.5
    r = (lam[i - 2] - lam[i - 1]) / h
    g1 = b / -h - 1
    g2 = g1 / -h - 0.5
    b1, b2 = g1 / b, 2 * g2 / b
    rho1 = (b1 - b2) / (1 - r)
    rho2 = b1 - rho1
    return ratio, -scaled * (1 - rho1 / r - rho2), -scaled * rho1 / r, -scaled * rho2


def _check_sigmas(levels: np.ndarray) -> None:
    if levels.ndim != 1 or len(levels) < 2:
        raise ValueError(
            f"sigmas of shape {levels.shape}: expected the K + 1 >= 2 noise levels of K steps"
        )
    limits.check_most("steps", len(levels) - 1)
    if levels[-1] != 0:
        raise ValueError(f"sigmas must end in 0, the last is {levels[-1]}; append it")
    falling = np.diff(levels.astype(np.float32)) < 0
    if not falling.all():
        at = int(np.argmin(falling))
        raise ValueError(
            f"sigmas must fall strictly: number {at} is {levels[at]}, the next {levels[at + 1]}, "
            "in float32"
        )
    if not np.float32(levels[0]) < 1:
        raise ValueError(
            f"sigmas must be below 1 (log(1 - sigma) diverges), the first is {levels[0]}"
        )


@struct.dataclass
class State:
    """What UniPC knows between two steps: trees like the latents, in float32.

    Attributes:
        latents: x_i, which the model sees next.
        corrected: the corrected x_{i-1}.
        clean: m_{i-1}, the last prediction of the clean latents.
        clean_before: m_{i-2}.
    """

    latents: Tree
    corrected: Tree
    clean: Tree
    clean_before: Tree


def initial_state(noise: Tree) -> State:
    """The state before the first step, whose row reads nothing but the noise.

    No two leaves share memory, so that all of them can be donated.
    """
    x = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), noise)
    return State(x, *(jax.tree.map(jnp.zeros_like, x) for _ in range(3)))


def step(
    velocity: Callable[[Tree, AnyArray], Tree],
    state: State,
    row: Tableau,
    noise: Tree | None = None,
) -> State:
    """One step of the solver, by one row of the tableau.

    Args:
        velocity: (latents, timestep) -> predicted velocity, a tree like the latents.
        state: before the step.
        row: of the tableau.
        noise: fresh unit noise like the latents, which `row.noise` scales; None adds none.
    """

    def combine(coefficients: AnyArray, *trees: Tree) -> Tree:
        return jax.tree.map(
            lambda *leaves: sum(c * x for c, x in zip(coefficients, leaves, strict=True)), *trees
        )

    x, last, m1, m2 = state.latents, state.corrected, state.clean, state.clean_before
    v = velocity(x, row.timestep)
    m0 = jax.tree.map(lambda x, v: x - row.sigma * v.astype(jnp.float32), x, v)
    corrected = combine(row.correct, x, last, m1, m2, m0)
    latents = combine(row.predict, corrected, m0, m1)
    if noise is not None:
        latents = jax.tree.map(lambda x, fresh: x + row.noise * fresh, latents, noise)
    return State(latents, corrected, m0, m1)


def advance(
    velocity: Callable[..., Tree],
    state: State,
    rows: Tableau,
    *inputs: Tree,
    noise: Tree | None = None,
    collect: Callable[[State], Tree] | None = None,
) -> tuple[State, Tree | None]:
    """Go on from `state` by these rows of a tableau, one step after the other.

    Args:
        velocity: (latents, timestep, *inputs) -> predicted velocity, a tree like the latents.
        state: `initial_state` before the first row, else what the row before left.
        rows: consecutive rows, as many as there are steps to make.
        inputs: what else the velocity of each step reads, stacked on a leading axis.
        noise: fresh unit noise of each step, stacked likewise; see `step`.
        collect: what to keep of the state after each step.

    Returns:
        The state after the last row, and what was collected, stacked on a leading axis, or None.
    """

    def scanned(state: State, stacked: tuple):
        row, fresh, others = stacked
        state = step(lambda x, timestep: velocity(x, timestep, *others), state, row, fresh)
        return state, None if collect is None else collect(state)

    rows = jax.tree.map(jnp.asarray, rows)
    return jax.lax.scan(scanned, state, (rows, noise, inputs))


def sample(
    velocity: Callable[..., Tree],
    noise: Tree,
    table: Tableau,
    *,
    collect: Callable[[State], Tree] | None = None,
) -> tuple[Tree, Tree | None]:
    """Integrate from noise to clean latents: `advance` over all rows.

    Args:
        velocity, collect: see `advance`.
        noise: the initial latents, a pytree of arrays; each leaf has its own history.
        table: see `tableau`; its length is the number of steps.

    Returns:
        The final latents in float32, and what was collected, stacked on a leading axis K, or None.
    """
    state, collected = advance(velocity, initial_state(noise), table, collect=collect)
    return state.latents, collected


def rows(table: Tableau) -> Iterator[Tableau]:
    """The rows of a tableau, as numpy arrays."""
    table = jax.tree.map(np.asarray, table)
    for i in range(len(table.timestep)):
        yield jax.tree.map(lambda column, i=i: column[i], table)
