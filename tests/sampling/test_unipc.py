"""UniPC and its schedules against diffusers' scheduler, and against the solver's own definition."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler
from rounding import check, relative_l2

from cosmos3_jax.sampling import unipc

# Relative L2 distance of samples. diffusers computes each coefficient in float32 and we in float64;
# the difference grows with the steps. `test_agrees_with_diffusers` measures what rounding does.
TOLERANCE = 1e-5
MANY, TOLERANCE_OF_MANY = 35, 2.5e-5
STEPS = (1, 2, 3, 5, 10, 35, 50)


def oracle_scheduler(schedule: str, steps: int, shift: float = 10.0) -> UniPCMultistepScheduler:
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        use_karras_sigmas=schedule == "karras",
        flow_shift=shift,
        sigma_max=200.0,
        sigma_min=0.147,
        timestep_spacing="linspace",
        final_sigmas_type="zero",
    )
    native = np.linspace(1 - 1 / 1000, 0, steps + 1)[:-1]
    scheduler.set_timesteps(steps, **({"sigmas": native} if schedule == "native" else {}))
    return scheduler


def model(x, timestep, xp):
    """A nonlinear velocity that depends on the sample and on the timestep."""
    return xp.sin(3 * x) + 0.3 * x * (timestep / 1000)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("schedule", unipc.SCHEDULES)
def test_agrees_with_diffusers(record_property, schedule, steps):
    scheduler = oracle_scheduler(schedule, steps)
    table = unipc.tableau(unipc.sigmas(schedule, steps))
    np.testing.assert_array_equal(table.timestep, scheduler.timesteps.numpy())
    # float32 rounding of float64 values: numpy's power and torch's may differ in the last place
    np.testing.assert_array_max_ulp(table.sigma, scheduler.sigmas[:-1].numpy(), maxulp=2)

    noise = np.random.RandomState(0).standard_normal((1, 4, 8, 8)).astype(np.float32)
    x = torch.from_numpy(noise)
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t.item(), torch), t, x, return_dict=False)[0]
    run = jax.jit(lambda noise, table: unipc.sample(lambda x, t: model(x, t, jnp), noise, table)[0])
    tolerance = TOLERANCE if steps < MANY else TOLERANCE_OF_MANY
    assert relative_l2(run(noise, table), x.numpy()) <= tolerance
    check(record_property, tolerance, run, noise, table)


# Known values at shift 10 and four steps; the tests' "pitfalls" are numbered in docs/pitfalls.md
@pytest.mark.parametrize(
    ("schedule", "levels", "timesteps"),
    [
        ("native", (0.9998999, 0.9676170, 0.9089255, 0.7689939), (999, 967, 908, 768)),
        ("diffusers", (0.999999, 0.9677836, 0.9092560, 0.7699394), (999, 967, 909, 769)),
        ("karras", (0.9950249, 0.9736331, 0.7985969, 0.1281604), (995, 973, 798, 128)),
    ],
)
def test_schedule_fixtures(schedule, levels, timesteps):
    found = unipc.sigmas(schedule, 4)
    np.testing.assert_allclose(found, (*levels, 0), atol=1e-7)  # the fixtures have seven digits
    assert found.dtype == np.float64
    np.testing.assert_array_equal(unipc.tableau(found).timestep, timesteps)


def test_flow_shift_does_nothing_under_karras():
    """Pitfall 13: the shift is silently ignored by Karras, and matters everywhere else."""
    np.testing.assert_array_equal(unipc.sigmas("karras", 8, 1.0), unipc.sigmas("karras", 8, 10.0))
    for schedule in ("native", "diffusers"):
        assert np.abs(unipc.sigmas(schedule, 8, 1.0) - unipc.sigmas(schedule, 8, 10.0)).max() > 0.1


def test_model_timestep_is_the_truncated_sigma():
    """Pitfall 2: the model is told an integer, the solver uses sigma; neither is made from the
    other.

    The mistakes, rounding instead of truncating and handing the solver timestep / 1000, are made
    here and lead elsewhere.
    """
    table = unipc.tableau(unipc.sigmas("native", 8))
    assert (table.timestep != np.rint(table.sigma * 1000)).any()
    assert np.abs(table.sigma - table.timestep / 1000).max() > 5e-4
    noise = np.random.RandomState(0).standard_normal(256).astype(np.float32)

    def run(table):
        return unipc.sample(lambda x, t: model(x, t, jnp), noise, table)[0]

    mistaken = unipc.tableau(np.append(table.timestep / 1000.0, 0.0))
    assert relative_l2(run(mistaken), run(table)) > 20 * TOLERANCE
    rounded = table.replace(timestep=np.rint(table.sigma * 1000).astype(np.int32))
    assert relative_l2(run(rounded), run(table)) > 10 * TOLERANCE


def textbook_unipc(velocity, x, levels, corrected_history=False):
    """UniPC-2 written out step by step in float64.

    `corrected_history` makes the mistake of pitfall 3: m_i from the corrected sample.
    """
    sigma = np.asarray(levels)
    lam = np.full(len(sigma), np.inf)
    lam[:-1] = np.log1p(-sigma[:-1]) - np.log(sigma[:-1])
    steps, history, last, order_before = len(sigma) - 1, [], None, None
    for i in range(steps):
        m = x - sigma[i] * velocity(x, i)
        if i:
            h = lam[i] - lam[i - 1]
            a, b, c = 1 - sigma[i], np.expm1(-h), sigma[i] / sigma[i - 1]
            if order_before == 1:
                x = c * last - a * b * (history[-1] + (m - history[-1]) / 2)
            else:
                r = (lam[i - 2] - lam[i - 1]) / h
                g1 = b / -h - 1
                b1, b2 = g1 / b, 2 * (g1 / -h - 0.5) / b
                rho1 = (b1 - b2) / (1 - r)
                slope = rho1 * (history[-2] - history[-1]) / r + (b1 - rho1) * (m - history[-1])
                x = c * last - a * b * (history[-1] + slope)
            if corrected_history:
                m = x - sigma[i] * velocity(x, i)
        last, order_before = x, min(2, steps - i, i + 1)
        h = lam[i + 1] - lam[i]
        a, b, c = 1 - sigma[i + 1], np.expm1(-h), sigma[i + 1] / sigma[i]
        slope = 0 if order_before == 1 else (history[-1] - m) / (2 * (lam[i - 1] - lam[i]) / h)
        x = c * x - a * b * (m + slope)
        history.append(m)
    return x


def test_predictions_come_from_the_uncorrected_sample():
    """Pitfall 3: m_i is made from the sample that the model saw, before its correction."""
    levels = unipc.sigmas("native", 10)
    table = unipc.tableau(levels)
    noise = np.random.RandomState(0).standard_normal(256)
    ours, _ = unipc.sample(lambda x, t: model(x, t, jnp), noise, table)

    def velocity(x, i):
        return model(x, table.timestep[i], np)

    assert relative_l2(ours, textbook_unipc(velocity, noise, levels)) <= TOLERANCE
    mistaken = textbook_unipc(velocity, noise, levels, corrected_history=True)
    assert relative_l2(mistaken, textbook_unipc(velocity, noise, levels)) > 100 * TOLERANCE


def test_modalities_keep_separate_histories():
    """Pitfall 4: video and sound solved together equal each solved alone; a shared history would
    not.
    """
    table = unipc.tableau(unipc.sigmas("native", 6))
    rng = np.random.RandomState(0)
    noise = {"video": rng.standard_normal((3, 5)), "sound": rng.standard_normal((7,))}
    both, _ = unipc.sample(
        lambda x, t: jax.tree.map(lambda leaf: model(leaf, t, jnp), x), noise, table
    )
    alone = jax.jit(lambda x: unipc.sample(lambda x, t: model(x, t, jnp), x, table)[0])
    expected = {name: alone(x) for name, x in noise.items()}
    for name in noise:  # two programs
        assert relative_l2(both[name], expected[name]) <= TOLERANCE
    again = alone(noise["video"])
    np.testing.assert_array_equal(again, expected["video"])  # nothing is left of the run before


def test_state_is_float32_whatever_the_velocity_is(record_property):
    """Pitfall 16: a bfloat16 state drifts; under zero velocity a float32 one stays within
    rounding.
    """
    noise = np.random.RandomState(0).standard_normal(4096).astype(np.float32)
    table = unipc.tableau(unipc.sigmas("native", 35))

    @jax.jit
    def run(noise, table):
        return unipc.sample(lambda x, t: jnp.zeros_like(x, jnp.bfloat16), noise, table)[0]

    still = run(noise, table)
    assert still.dtype == jnp.float32
    assert relative_l2(still, noise) <= TOLERANCE  # a bfloat16 state drifts by 0.01 and more
    check(record_property, TOLERANCE, run, noise, table)


@pytest.mark.parametrize("length", [1, 2, 4])
def test_blocks_of_rows_equal_the_whole(length):
    """`advance` goes on from the state of the rows before; further inputs belong to their rows."""
    noise = np.random.RandomState(0).standard_normal(64).astype(np.float32)
    table = unipc.tableau(unipc.sigmas("native", 5))
    scales = np.linspace(0.5, 1, 5, dtype=np.float32)

    def velocity(x, timestep, scale):
        return scale * model(x, timestep, jnp)

    advance = jax.jit(partial(unipc.advance, velocity))
    expected, _ = advance(unipc.initial_state(noise), table, scales)
    state = unipc.initial_state(noise)
    for first in range(0, 5, length):
        block = slice(first, first + length)
        state, _ = advance(state, jax.tree.map(lambda x, b=block: x[b], table), scales[block])
    assert relative_l2(state.latents, expected.latents) <= TOLERANCE
    unscaled, _ = advance(unipc.initial_state(noise), table, np.ones_like(scales))
    assert relative_l2(unscaled.latents, expected.latents) > 100 * TOLERANCE


def test_a_row_with_noise_equals_the_formula():
    """A stochastic sampler, as of distilled models: x becomes (1 - s) m + s n, with fresh noise n,
    by timesteps that are no whole numbers.
    """
    rng = np.random.RandomState(0)
    x, *fresh = rng.standard_normal((3, 64)).astype(np.float32)
    sigma, following = np.float32([0.9375, 0.8333]), np.float32([0.8333, 0.0])
    zeros = np.zeros_like(sigma)
    table = unipc.Tableau(
        timestep=1000 * sigma, sigma=sigma,
        correct=np.stack([zeros + 1, zeros, zeros, zeros, zeros], axis=1),
        predict=np.stack([zeros, 1 - following, zeros], axis=1), noise=following,
    )  # fmt: skip
    state, _ = unipc.advance(
        lambda x, t: model(x, t, jnp), unipc.initial_state(x), table, noise=np.stack(fresh)
    )
    expected = np.float64(x)
    for s, to, n in zip(sigma, following, fresh, strict=True):
        clean = expected - s * model(expected, 1000 * s, np)
        expected = (1 - to) * clean + to * n
    assert relative_l2(state.latents, expected) <= TOLERANCE
    silent, _ = unipc.advance(lambda x, t: model(x, t, jnp), unipc.initial_state(x), table)
    assert relative_l2(silent.latents, expected) > 100 * TOLERANCE
    assert (unipc.tableau(unipc.sigmas("native", 5)).noise == 0).all()  # UniPC adds none


@pytest.mark.parametrize("steps", [1, 2, 6])
def test_one_program_a_step_equals_the_scan(steps):
    """Its state is donated, and the same program serves every row of every tableau."""
    noise = {
        name: np.random.RandomState(i).standard_normal(size).astype(np.float32)
        for i, (name, size) in enumerate({"video": (3, 5), "sound": (7,)}.items())
    }
    table = unipc.tableau(unipc.sigmas("native", steps))

    def velocity(x, t):
        return jax.tree.map(lambda leaf: model(leaf, t, jnp), x)

    expected, trajectory = unipc.sample(velocity, noise, table, collect=lambda state: state)
    traces = []

    @partial(jax.jit, donate_argnums=0)
    def step(state, row):
        traces.append(row)
        return unipc.step(velocity, state, row)

    state = unipc.initial_state(noise)
    for i, row in enumerate(unipc.rows(table)):
        before, state = state, step(state, row)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))
        for name in noise:  # two programs
            for ours, theirs in (
                (state.latents, trajectory.latents),
                (state.clean, trajectory.clean),
            ):
                assert relative_l2(ours[name], theirs[name][i]) <= TOLERANCE
    assert i == steps - 1 and len(traces) == 1
    for name in noise:
        assert relative_l2(state.latents[name], expected[name]) <= TOLERANCE


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("fast", 4, 1.0), "schedule='fast' is unknown; choose one of native, diffusers, karras"),
        (("native", 0, 1.0), "num_inference_steps=0 must be at least 1"),
        (("native", 4, 0.0), "flow_shift=0.0 must be positive"),
    ],
)
def test_bad_schedules_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        unipc.sigmas(*arguments)


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        ([0.5], "expected the K . 1 >= 2"),
        ([0.9, 0.5], "must end in 0, the last is 0.5"),
        ([0.5, 0.9, 0.0], "must fall strictly: number 0 is 0.5, the next 0.9"),
        ([1.0, 0.5, 0.0], "must be below 1"),
        ([0.9, 0.9 - 1e-9, 0.0], "must fall strictly"),  # equal in float32
        ([0.9, 1e-50, 0.0], "must fall strictly"),  # 0 in float32
    ],
)
def test_bad_sigmas_are_refused(levels, message):
    with pytest.raises(ValueError, match=message):
        unipc.tableau(np.array(levels))


def test_repeated_first_timestep_is_reported():
    with pytest.warns(UserWarning, match="same integer timestep 999"):
        unipc.tableau(unipc.sigmas("diffusers", 101))
