"""The pure function: what it promises to jit, grad and vmap, and what it refuses.

Its numbers are compared with the oracle's in test_pipeline.py.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from generate_cases import (
    DIFFERENT,
    OTHER_PROMPT,
    PROMPT,
    SAME,
    SETTINGS,
    assert_equal,
    assert_same,
    with_seed,
)
from rounding import check, relative_l2

from cosmos3_jax import generate
from cosmos3_jax.sampling import denoise, unipc
from cosmos3_jax.sampling.request import initial_noise


@pytest.mark.parametrize("scale", [3, 8])
def test_tolerance(record_property, jitted, model, request_, scale):
    request = request_.replace(guidance_scale=np.float32(scale))
    check(record_property, SAME, jitted, model.params, request)


@pytest.mark.parametrize("noise_from", ["arrays", "seed"])
def test_compiles_once(model, request_, noise_from, compiled):
    """Traces and what XLA compiles are counted. Every change is effective."""
    traces = []

    @jax.jit
    def run(params, request):
        traces.append(request)
        return generate(params, request, config=model.config, output="latents")

    request = request_ if noise_from == "arrays" else with_seed(request_, np.uint32(42))
    first = jax.block_until_ready(run(model.params, request))
    other = model.prepare(OTHER_PROMPT, **SETTINGS | {"negative_prompt": "grey"})
    changes = {
        "prompt": dict(text_ids=other.text_ids, text_mask=other.text_mask),
        "negative": dict(neg_text_ids=other.neg_text_ids, neg_text_mask=other.neg_text_mask),
        "guidance": dict(guidance_scale=np.float32(7)),
        "fps": dict(fps=np.float32(12)),
        "schedule": dict(sampler=unipc.tableau(unipc.sigmas("karras", 3))),
        "sigmas": dict(sampler=unipc.tableau(np.array([0.9, 0.6, 0.2, 0.0]))),
        "noise": (
            dict(noise=request_.noise[..., ::-1])
            if noise_from == "arrays"
            else dict(seed=np.uint32(2**32 - 1))
        ),
    }
    assert other.text_ids.shape == request.text_ids.shape
    assert other.text_mask.sum() != request.text_mask.sum()
    compiled.clear()
    results = {}
    for name, change in changes.items():
        results[name] = jax.block_until_ready(run(model.params, request.replace(**change)))
    assert (len(traces), len(compiled)) == (1, 0)
    for name, result in results.items():
        assert relative_l2(result["video"], first["video"]) > DIFFERENT, name
    # the counters count: another number of steps is another program
    steps = unipc.tableau(unipc.sigmas("native", 2))
    run(model.params, request.replace(num_inference_steps=2, sampler=steps))
    assert len(traces) == 2 and compiled


def test_given_noise_leaves_no_host_call(model, request_):
    """With noise in the request the program is device code only; a seed is numpy's, on the host."""

    def program(request):
        function = partial(generate, config=model.config, output="latents")
        return str(jax.make_jaxpr(function)(model.params, request))

    assert "callback" not in program(request_)
    assert "pure_callback" in program(with_seed(request_, 1))


# Of a difference quotient, relative to the slope along its direction. Measured: errors of at most
# 1e-4; `check` measures what rounding does to the quotient.
SLOPE_TOLERANCE = 2e-3
SLOPE_STEP = 0.01


# One frame of media: the gradient of a video's decoder is compared with the oracle's elsewhere.
@pytest.mark.parametrize(("output", "num_frames"), [("latents", 9), ("media", 1)])
def test_gradient_with_respect_to_the_noise(record_property, model, output, num_frames):
    """Against difference quotients along a random direction, and along the gradient itself.

    Richardson's extrapolation from two steps, h and h / 2, leaves a truncation error of h^4. Pixels
    are clamped, which is no smooth function: those that cross an edge within a step are left out of
    the loss, those that stay clamped are in it.
    """
    settings = SETTINGS | dict(num_frames=num_frames, sound=num_frames > 1)
    request = model.prepare(PROMPT, **settings)
    function = partial(generate, config=model.config, output=output)
    shapes = jax.eval_shape(function, model.params, request)
    weights = {
        name: np.random.RandomState(i).standard_normal(shapes[name].shape).astype(np.float32)
        for i, name in enumerate(sorted(shapes))
    }
    noise = {name: getattr(request, name) for name in ("noise", "sound_noise")}
    noise = {name: value for name, value in noise.items() if value is not None}

    @jax.jit
    def gradient_and_result(params, noise, weights):
        def loss(noise):
            result = function(params, request.replace(**noise))
            return sum(jnp.mean(result[name] * weights[name]) for name in weights), result

        return jax.grad(loss, has_aux=True)(noise)

    def gradient(weights):
        found = jax.tree.map(np.float64, gradient_and_result(model.params, noise, weights)[0])
        return found, np.sqrt(sum(np.square(part).sum() for part in found.values()))

    def results(params, noise, direction):
        """At -h, -h / 2, h / 2 and h, stacked."""

        def at(shift):
            moved = jax.tree.map(lambda x, d: (x + shift * d).astype(np.float32), noise, direction)
            return gradient_and_result(params, moved, weights)[1]

        found = [at(shift) for shift in SLOPE_STEP * np.array([-1, -0.5, 0.5, 1])]
        return jax.tree.map(lambda *x: np.stack(x).astype(np.float64), *found)

    def quotient(found):
        low, half_low, half_high, high = (
            sum(np.mean(found[name][i] * weights[name]) for name in weights) for i in range(4)
        )
        coarse, fine = (high - low) / (2 * SLOPE_STEP), (half_high - half_low) / SLOPE_STEP
        return (4 * fine - coarse) / 3

    steepest, norm = gradient(weights)
    for part in steepest.values():
        assert np.isfinite(part).all()
        assert (part != 0).all()  # every value of the noise matters
    rng = np.random.RandomState(3)
    random = jax.tree.map(lambda part: rng.standard_normal(part.shape), steepest)
    steepest = jax.tree.map(lambda part: part * np.sqrt(part.size) / norm, steepest)
    directions = (random, steepest)

    found = [results(model.params, noise, direction) for direction in directions]
    if output == "media":
        pixels = np.concatenate([x["video"] for x in found])
        inside, still = ((pixels > 0) & (pixels < 1)).all(axis=0), (pixels == pixels[0]).all(axis=0)
        assert 0.9 < inside.mean() < 1 and (inside | still).mean() > 0.99
        weights["video"] = np.where(inside | still, weights["video"], 0)
    expected, norm = gradient(weights)
    slopes = np.array(
        [sum(np.vdot(expected[name], d[name]) for name in expected) for d in directions]
    )
    # Along a random direction a slope is about the gradient's norm, but may happen to be tiny.
    scales = np.maximum(np.abs(slopes), norm)

    def quotients(params, noise):
        return np.array([quotient(results(params, noise, d)) for d in directions]) / scales

    error = np.abs(np.array([quotient(x) for x in found]) - slopes) / scales
    assert error.max() <= SLOPE_TOLERANCE
    check(
        record_property, SLOPE_TOLERANCE, quotients, model.params, noise,
        distance=lambda moved, result: np.abs(moved - result).max(),
    )  # fmt: skip


@pytest.mark.parametrize("over", ["seed", "noise"])
def test_vmap_equals_a_loop(model, request_, run, over):
    seeds = np.array([3, 42, 2**32 - 1], np.uint32)
    if over == "seed":
        requests = [with_seed(request_, seed) for seed in seeds]
        values = seeds
    else:
        requests = [model.prepare(PROMPT, seed=int(seed), **SETTINGS) for seed in seeds]
        requests = [r.replace(sound_noise=request_.sound_noise) for r in requests]
        values = np.stack([r.noise for r in requests])

    @jax.jit
    @jax.vmap
    def mapped(value):
        changed = requests[0].replace(**{over: value})
        return generate(model.params, changed, config=model.config, output="latents")

    results = mapped(values)
    assert results["video"].shape == (3, *request_.noise.shape)
    for i, request in enumerate(requests):
        assert_same({name: x[i] for name, x in results.items()}, run(request))
    assert relative_l2(results["video"][0], results["video"][1]) > DIFFERENT


def test_a_seed_is_numpys_noise(request_, run):
    """float32 of RandomState(seed), the sound's from the start again (pitfall 15: not "fixed")."""
    expected = np.random.RandomState(42).standard_normal(request_.noise.size).astype(np.float32)
    np.testing.assert_array_equal(request_.noise.ravel(), expected)
    np.testing.assert_array_equal(
        request_.sound_noise.ravel(), expected[: request_.sound_noise.size]
    )
    np.testing.assert_array_equal(initial_noise(42, request_.noise.shape), request_.noise)
    explicit = run(request_)
    assert_same(run(with_seed(request_, np.uint32(42))), explicit)
    mistaken = request_.replace(sound_noise=initial_noise(43, request_.sound_noise.shape))
    assert relative_l2(run(mistaken)["sound"], explicit["sound"]) > DIFFERENT


@pytest.mark.parametrize(
    ("seed", "seeds"),
    [(5, (5, 6)), ([5, 9], (5, 9)), (np.array([5, 9]), (5, 9))],
    ids=["one", "list", "array"],
)
def test_a_batch_equals_each_alone(model, run, seed, seeds):
    """Prompts of different lengths, alone in different padding buckets, each with its own seed."""
    prompts = [PROMPT, OTHER_PROMPT + ", drops that run down and join, a street lamp behind it"]
    batch = model.prepare(prompts, seed=seed, **SETTINGS)
    together = run(batch)
    alone = [model.prepare(p, seed=s, **SETTINGS) for p, s in zip(prompts, seeds, strict=True)]
    assert alone[0].text_ids.shape != alone[1].text_ids.shape
    for i, request in enumerate(alone):
        np.testing.assert_array_equal(batch.noise[i : i + 1], request.noise)
        assert_same({name: x[i : i + 1] for name, x in together.items()}, run(request))
    assert_same(run(with_seed(batch, np.array(seed))), together)


def test_each_example_has_its_own_guidance_scale_and_frame_rate(model, request_, run):
    batch = model.prepare([PROMPT, PROMPT], seed=[42, 42], **SETTINGS)
    scales, rates = np.array([3, 8], np.float32), np.array([24, 12], np.float32)
    together = run(batch.replace(guidance_scale=scales, fps=rates))
    for i in range(2):
        alone = run(request_.replace(guidance_scale=scales[i], fps=rates[i]))
        assert_same({name: x[i : i + 1] for name, x in together.items()}, alone)


def test_guidance_scale_one_skips_the_second_branch(model, request_, run, monkeypatch):
    alone = model.prepare(PROMPT, **SETTINGS | {"guidance_scale": 1})
    assert alone.neg_text_ids is None and alone.neg_text_mask is None
    batches = []

    def spy(params, config, condition, latents, timestep):
        batches.append(latents["video"].shape[0])
        return velocity(params, config, condition, latents, timestep)

    velocity = denoise.velocity
    monkeypatch.setattr(denoise, "velocity", spy)
    flops = {}
    for name, request in (("guided", request_), ("alone", alone)):
        function = jax.jit(partial(generate, config=model.config, output="latents"))
        program = function.lower(model.params, request).compile()
        flops[name] = program.cost_analysis()["flops"]
    monkeypatch.undo()
    assert batches == [2, 1]
    # Two text towers and two media towers against one each; what is shared is a few percent.
    assert 1.8 < flops["guided"] / flops["alone"] < 2.1

    result = run(alone)
    # What was skipped is the negative branch: with it, v_u + 1 (v_c - v_u) is v_c.
    assert_same(run(request_.replace(guidance_scale=np.float32(1))), result)
    swapped = request_.replace(text_ids=request_.neg_text_ids, text_mask=request_.neg_text_mask)
    swapped = swapped.replace(neg_text_ids=None, neg_text_mask=None)
    assert relative_l2(run(swapped)["video"], result["video"]) > DIFFERENT
    assert_equal(
        run(model.prepare(PROMPT, **SETTINGS | dict(guidance_scale=1, negative_prompt="x"))), result
    )


def test_guidance_branches_one_after_the_other_equal_one_batch(model, run, monkeypatch):
    """Above a size they run one by one; here, with prompts and negatives in different buckets."""
    negatives = ["blurry", OTHER_PROMPT * 3]
    batch = model.prepare([PROMPT] * 2, **SETTINGS | {"negative_prompt": negatives})
    assert batch.text_ids.shape != batch.neg_text_ids.shape
    together, velocity, batches = run(batch), denoise.velocity, []

    def spy(params, config, condition, latents, timestep):
        batches.append(latents["video"].shape[0])
        return velocity(params, config, condition, latents, timestep)

    monkeypatch.setattr(denoise, "velocity", spy)
    monkeypatch.setattr(denoise, "ONE_BATCH_TOKENS", 0)
    jitted = jax.jit(partial(generate, config=model.config, output="latents"))
    assert_same(jitted(model.params, batch), together)
    assert batches == [2, 2]


def test_nothing_is_left_over_from_the_run_before(model, request_, run):
    """Pitfall 4: history starts anew in every request."""
    first = run(request_)
    run(model.prepare(OTHER_PROMPT, seed=1, **SETTINGS))
    assert_equal(run(request_), first)
