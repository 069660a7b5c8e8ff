"""The loop over steps: in blocks, a step at a time, stopped early; one loop in all of them."""

from functools import partial

import jax
import numpy as np
import pytest
from oracle import SETTINGS, prepare
from rounding import check, farthest, relative_l2

from cosmos3_jax import Cosmos3, generate
from cosmos3_jax.sampling import denoise

# Blocks against one scan, in float32: other programs, whose rounding guidance amplifies.
TOLERANCE = 1e-5
# Of a weighted sum of branches: `test_tolerance_of_a_weighted_sum`.
SUM = 5e-6
# What counts as another result.
DIFFERENT = 1e-3


@pytest.fixture(scope="module")
def request_(model):
    return prepare(model, sound=True)


@pytest.fixture(scope="module")
def whole(model, request_):
    """All steps as one scan."""
    run = partial(generate, config=model.config, output="latents", return_trajectory=True)
    return jax.device_get(jax.jit(run)(model.params, request_))


def test_tolerance(record_property, model, request_):
    def latents(params, request):
        return Cosmos3(model.config, params, model.tokenizer).run(request, output="latents")

    check(record_property, TOLERANCE, latents, model.params, request_)


@pytest.mark.parametrize("length", [1, 2, 5, 9])
def test_blocks_agree_with_the_whole_scan(model, request_, whole, length):
    """Whether the five steps are a multiple of a block or not."""
    found = model.run(request_, output="latents", steps_per_program=length)
    assert farthest(found, {name: whole[name] for name in found}) <= TOLERANCE


def test_every_step_is_shown(model, request_, whole):
    steps = list(model.steps(request_))
    assert [step.index for step in steps] == [0, 1, 2, 3, 4]
    np.testing.assert_array_equal([step.sigma for step in steps], request_.sampler.sigma)
    for name in ("latents", "clean"):
        for step, index in zip(steps, range(5), strict=True):
            expected = jax.tree.map(lambda x, i=index: x[i], whole["trajectory"][name])
            assert farthest(getattr(step, name), expected) <= TOLERANCE
    # The last step ends at its clean prediction, and there the generation ends.
    assert relative_l2(steps[-1].latents["video"], steps[-1].clean["video"]) <= TOLERANCE
    assert relative_l2(steps[0].latents["video"], steps[-1].latents["video"]) > DIFFERENT


def test_a_trajectory_is_the_steps(model, request_):
    """The same program on the same inputs."""
    latents, trajectory = model.denoise(request_, return_trajectory=True)
    steps = list(model.steps(request_))
    for kind in ("latents", "clean"):
        for name, states in trajectory[kind].items():
            assert states.shape[0] == 5
            np.testing.assert_array_equal(states, [getattr(step, kind)[name] for step in steps])
    for name in latents:
        np.testing.assert_array_equal(latents[name], trajectory["latents"][name][-1])
    assert farthest(latents, model.run(request_, output="latents")) <= TOLERANCE


@pytest.mark.parametrize("offload", [False, True])
def test_stopping_early_leaves_the_model_usable(public_checkpoint, request_, offload):
    model = Cosmos3.from_pretrained(public_checkpoint, dtype="float32", offload=offload)
    expected = model.run(request_, output="latents")
    for step in model.steps(request_):
        if step.index == 1:
            break
    assert step.index == 1 and np.isfinite(step.clean["video"]).all()
    never_started = model.steps(request_)
    del never_started
    for name, x in model.run(request_, output="latents").items():
        np.testing.assert_array_equal(x, expected[name])
    assert model.weights.resident is not offload


def test_two_generations_may_alternate(model, request_):
    """Each has a state of its own."""
    other = prepare(model, "Rain", sound=True)
    pairs = list(zip(model.steps(request_), model.steps(other), strict=True))
    expected = [model.run(one, output="latents", steps_per_program=1) for one in (request_, other)]
    for found, latents in zip(pairs[-1], expected, strict=True):
        np.testing.assert_array_equal(found.latents["video"], latents["video"])


@pytest.mark.parametrize("branches", [1, 2, 3])
def test_equal_branches_of_weights_that_add_up_to_one_are_one(branches):
    v = np.random.RandomState(0).standard_normal((2, 3, 4)).astype(np.float32)
    weights = np.full(branches, 1 / branches, np.float32)
    assert relative_l2(denoise.weighted_sum(weights, *[v] * branches), v) <= SUM
    more = weights.copy()
    more[0] += 1
    assert relative_l2(denoise.weighted_sum(more, *[v] * branches), 2 * v) <= SUM


def test_tolerance_of_a_weighted_sum(record_property):
    """With the weights of guidance, which are large and of both signs."""
    branches = np.random.RandomState(0).standard_normal((2, 64)).astype(np.float32)
    check(record_property, SUM, denoise.weighted_sum, np.float32([6, -5]), *branches)


def test_branches_are_a_weighted_sum():
    """By example or for all; guidance of scale 6 is 6 and -5."""
    rng = np.random.RandomState(0)
    branches = rng.standard_normal((3, 2, 3, 4)).astype(np.float32)
    weights = np.float32([[6, 2], [-5, 0.5], [0.25, -1]])
    found = denoise.weighted_sum(weights, *branches)
    assert relative_l2(found, np.einsum("gb,gbxy->bxy", weights, branches)) <= SUM
    found = denoise.weighted_sum(weights[:, 0], *branches)
    assert relative_l2(found, np.einsum("g,gbxy->bxy", weights[:, 0], branches)) <= SUM
    with pytest.raises(ValueError, match="for 2 branches"):
        denoise.weighted_sum(weights, *branches[:2])


def test_weights_belong_to_their_steps(model, request_):
    """Guidance in an interval of steps: of the others only the prompt's branch counts."""
    steps = denoise.all_steps(request_)
    assert steps.weights.shape == (5, 2)
    conditions = denoise.encode_conditions(model.params["und"], request_, model.config)
    conditions, state = denoise.start(conditions, request_, model.config)
    advance = jax.jit(partial(denoise.advance, config=model.config))

    def latents(weights):
        changed = steps.replace(weights=np.float32(weights))
        return advance(model.params["gen"], conditions, state, changed)["latents"]["video"]

    plain = model.run(request_.replace(guidance_scale=np.float32(1)), output="latents")["video"]
    assert relative_l2(latents([[1, 0]] * 5), plain) <= TOLERANCE
    first, last = latents([[6, -5]] + [[1, 0]] * 4), latents([[1, 0]] * 4 + [[6, -5]])
    assert relative_l2(first, plain) > DIFFERENT and relative_l2(last, plain) > DIFFERENT
    assert relative_l2(first, last) > DIFFERENT


def test_fresh_noise_reaches_the_latents(model, request_):
    """A table that asks for noise, and what it is given."""
    steps = denoise.all_steps(request_)
    noise = {"video": request_.noise, "sound": request_.sound_noise}
    noise = denoise.channels_last(noise)
    noise = jax.tree.map(lambda x: np.stack([np.asarray(x)] * 5), noise)
    conditions = denoise.encode_conditions(model.params["und"], request_, model.config)
    conditions, state = denoise.start(conditions, request_, model.config)
    advance = jax.jit(partial(denoise.advance, config=model.config))
    silent = steps.replace(noise=noise)  # UniPC's rows scale it by 0
    loud = silent.replace(solver=steps.solver.replace(noise=np.float32([0, 0, 0, 0, 0.5])))
    plain, same, moved = (
        advance(model.params["gen"], conditions, state, x)["latents"] for x in (steps, silent, loud)
    )
    assert farthest(same, plain) <= TOLERANCE
    for name in plain:  # after the last step: the clean latents and half of the noise
        expected = plain[name] + 0.5 * denoise.channels_first({name: noise[name][-1]})[name]
        assert relative_l2(moved[name], expected) <= TOLERANCE


def test_steps_and_load_are_refused_where_they_cannot_be(public_checkpoint, model, request_):
    opened = Cosmos3.open(public_checkpoint)
    assert opened.prepare("A cat", num_frames=5, height=32, width=48).video_shape == (2, 2, 3)
    with pytest.raises(ValueError, match="without weights: call load"):
        next(opened.steps(request_))
    with pytest.raises(ValueError, match="no checkpoint to load"):
        Cosmos3(model.config, model.params, model.tokenizer).load()
    loaded = opened.load("float32")
    assert loaded is opened and loaded.weights.resident
    step = next(loaded.steps(request_))
    assert relative_l2(step.clean["video"], next(model.steps(request_)).clean["video"]) <= TOLERANCE


def test_steps_per_program_has_limits(model, request_):
    for method in (model.run, model.generate, model.warmup):
        with pytest.raises(ValueError, match="steps_per_program=0 must be 1 or more"):
            method(
                request_ if method == model.run else "A cat",
                steps_per_program=0,
                **({} if method == model.run else SETTINGS),
            )
    with pytest.raises(ValueError, match="=5 must be 1, since a trajectory has every step"):
        model.run(request_, return_trajectory=True, steps_per_program=5)
    assert model.steps_per_program(request_) == 5
    assert model.steps_per_program(request_, 2) == 2
