"""The loss of training against PyTorch's on the oracle's modules.

The model is the oracle's small one: odd latent sizes, sound, given frames, texts of two lengths.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rounding import check, relative_l2
from training_cases import GRADIENT, LOSS, WEIGHTS, loss_and_gradients, params, reference
from training_run import CONFIG, compiled, draw, make_batch

from cosmos3_jax.checkpoint.layouts import transformer_layout
from cosmos3_jax.training import flow


def leaf(tree: dict, path: str):
    return functools.reduce(lambda node, name: node[name], path.split("/"), tree)


silent_loss = compiled(functools.partial(flow.flow_loss, config=CONFIG, weights=WEIGHTS))


def test_tolerances(record_property):
    batch = make_batch()
    arguments = params(), batch, *draw(batch)
    check(record_property, LOSS, lambda *x: loss_and_gradients(*x)[0], *arguments, name="loss")
    check(record_property, GRADIENT, lambda *x: loss_and_gradients(*x)[1], *arguments, name="grad")


def test_loss_and_gradients_are_the_oracles():
    batch = make_batch()
    noise, sigma = draw(batch)
    # the second example has lost its prompt
    batch = jax.tree.map(np.asarray, flow.drop_text(batch, np.array([False, True])))
    assert batch.text_mask.sum(axis=1).tolist() == [5, 3]
    (loss, metrics), gradients = loss_and_gradients(params(), batch, noise, sigma)
    expected, means, expected_gradients = reference(batch, noise, sigma)
    assert abs(loss - expected) <= LOSS * expected
    assert metrics.keys() == means.keys()
    for name, mean in means.items():
        assert abs(metrics[name] - mean) <= LOSS * mean
    rules = transformer_layout(CONFIG).rules
    assert {rule.key for rule in rules} <= set(expected_gradients)
    for rule in rules:
        found = rule.to_public(np.asarray(leaf(gradients, rule.leaf)))
        assert relative_l2(found, expected_gradients[rule.key]) <= GRADIENT, rule.key
    # and the bars can be missed: by another timestep, or by a given frame that counts
    other, _ = loss_and_gradients(params(), batch, noise, sigma + np.float32(0.002))
    assert abs(other[0] - expected) > 1e-4 * expected
    free = batch.replace(frame_mask=np.zeros_like(batch.frame_mask))
    other, _ = loss_and_gradients(params(), free, noise, sigma)
    assert abs(other[0] - expected) > 1e-2 * expected


def test_loss_of_silent_examples_is_the_oracles():
    batch = make_batch(sound=False)
    noise, sigma = draw(batch)
    loss, metrics = silent_loss(params(), batch, noise, sigma)
    expected, means, _ = reference(batch, noise, sigma)
    assert abs(loss - expected) <= LOSS * expected and metrics.keys() == means.keys() == {"video"}


def test_noise_levels():
    """The shift moves the median as it moves u = 1/2; both ends stay inside [0, 1]."""
    key = jax.random.key(0)
    for kind in ("logit_normal", "uniform"):
        for shift in (1.0, 5.0):
            sigma = flow.NoiseLevels(kind, shift).sample(key, 20_000)
            assert 0 <= sigma.min() and sigma.max() <= 1
            # the standard error of a median of 20,000 is below 0.007 for either
            np.testing.assert_allclose(np.median(sigma), shift / (1 + shift), atol=0.02)
    spread = [float(flow.NoiseLevels(std=std).sample(key, 999).std()) for std in (0.1, 1.0)]
    assert spread[0] < 0.05 < 0.15 < spread[1]
    found = flow.timestep(jnp.array([0.0, 0.9676, 0.9999, 1.0]))
    assert found.tolist() == [0, 967, 999, 999]  # truncated, as at inference
    for mistake in (dict(kind="normal"), dict(shift=0.0), dict(std=-1.0)):
        [name] = mistake
        with pytest.raises(ValueError, match=name):
            flow.NoiseLevels(**mistake)


def test_dropped_texts_follow_the_probability():
    batch = make_batch(count=1000)
    dropped = flow.sample_dropout(jax.random.key(3), batch, 0.25)
    share = np.mean(np.asarray(dropped.text_mask.sum(axis=1)) == 3)
    assert abs(share - 0.25) < 0.05  # three standard errors are 0.041
    assert flow.sample_dropout(jax.random.key(3), batch, 0.0) is batch
    # a prompt for no prompt that is longer than the prompts
    long = batch.replace(uncond_ids=np.ones(20, np.int32), uncond_mask=np.ones(20, bool))
    lengths = flow.sample_dropout(jax.random.key(3), long, 0.25).text_mask.sum(axis=1)
    assert set(lengths.tolist()) == {5, 11, 20}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(video=np.zeros((2, 6, 3, 3, 5))), "video.*channels last"),
        (dict(frame_mask=np.zeros((2, 4), bool)), r"frame_mask of shape \(2, 4\)"),
        (dict(sound=np.zeros((2, 4, 6))), "sound of shape"),
        (dict(uncond_ids=None), "needs uncond_ids"),
        (dict(weight=np.ones(3)), "weight of shape"),
    ],
)
def test_a_batch_that_does_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        flow.check_batch(make_batch().replace(**change), CONFIG, text_dropout=0.1)
    with pytest.raises(ValueError, match="the model has none"):
        flow.check_batch(make_batch(), dataclasses.replace(CONFIG, sound_gen=False))
