"""The loss against PyTorch's on the oracle's modules; the step against itself, in parts, resumed.

The model is the oracle's small one: odd latent sizes, sound, given frames, texts of two lengths.
"""

import dataclasses
import functools
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from checkpoint_files import assert_same_folder, assert_same_tree, read_tensors
from diffusers import Cosmos3OmniTransformer
from oracle import TRANSFORMER, load_pipeline, perturb, relative_l2, tree_from_state_dict
from training_oracle import oracle_loss
from training_run import (
    CONFIG,
    compiled,
    compiled_step,
    draw,
    make_batch,
    random_params,
    run,
)

from cosmos3_jax import Cosmos3
from cosmos3_jax.checkpoint.rules import CheckpointError
from cosmos3_jax.checkpoint.transformer_layout import transformer_layout
from cosmos3_jax.training import flow
from cosmos3_jax.training.checkpoints import Checkpoints
from cosmos3_jax.training.export import write_public_checkpoint
from cosmos3_jax.training.params import join_params, split_params
from cosmos3_jax.training.step import init_state
from cosmos3_jax.transformer import Latents, param_shapes

VAES = ("video_vae", "sound_vae")
pytestmark = pytest.mark.usefixtures("one_torch_thread")


@functools.cache
def oracle() -> Cosmos3OmniTransformer:
    torch.manual_seed(0)
    return perturb(Cosmos3OmniTransformer(**TRANSFORMER), 1)


@functools.cache
def params() -> dict:
    state_dict = oracle().state_dict()
    return tree_from_state_dict(transformer_layout(CONFIG), state_dict, param_shapes(CONFIG))


def leaf(tree: dict, path: str):
    return functools.reduce(lambda node, name: node[name], path.split("/"), tree)


# ---------------------------------------------------------------- the loss


WEIGHTS = flow.LossWeights(video=1.0, sound=0.3)
loss_and_gradients = compiled(
    jax.value_and_grad(
        functools.partial(flow.flow_loss, config=CONFIG, weights=WEIGHTS), has_aux=True
    )
)


def reference(batch: flow.Batch, noise: Latents, sigma: np.ndarray, model=None):
    """The same by the oracle. Its prompts are lists, so there is no padding to get wrong."""
    examples = []
    for i in range(len(batch.video)):
        sounds = [None if x is None else x[i] for x in (batch.sound, noise.sound)]
        examples.append(
            dict(
                ids=batch.text_ids[i][batch.text_mask[i]].tolist(),
                video=batch.video[i],
                sound=sounds[0],
                noise=noise.video[i],
                sound_noise=sounds[1],
                sigma=sigma[i],
                timestep=int(np.float32(sigma[i]) * np.float32(1000)),
                fps=float(batch.fps[i]),
                given=np.flatnonzero(batch.frame_mask[i]).tolist(),
                weight=float(batch.weight[i]),
            )
        )
    return oracle_loss(model or oracle(), examples, vars(WEIGHTS))


@pytest.mark.parametrize("sound", [True, False], ids=["sound", "silent"])
def test_loss_and_gradients_are_the_oracles(sound):
    """Two float32 programs that sum in different orders: measured 1e-7 and 2.1e-6 at most."""
    batch = make_batch(sound=sound)
    noise, sigma = draw(batch)
    if sound:  # the second example has lost its prompt
        batch = jax.tree.map(np.asarray, flow.drop_text(batch, np.array([False, True])))
        assert batch.text_mask.sum(axis=1).tolist() == [5, 3]
    (loss, metrics), gradients = loss_and_gradients(params(), batch, noise, sigma)
    expected, means, expected_gradients = reference(batch, noise, sigma)
    assert abs(loss - expected) <= 1e-5 * expected
    assert metrics.keys() == means.keys()
    for name, mean in means.items():
        assert abs(metrics[name] - mean) <= 1e-5 * mean
    for rule in transformer_layout(CONFIG).rules:
        found = rule.to_public(np.asarray(leaf(gradients, rule.leaf)))
        if not sound and rule.key.startswith("audio_"):
            assert not found.any() and rule.key not in expected_gradients
        else:
            assert relative_l2(found, expected_gradients[rule.key]) <= 1e-4, rule.key
    # and the bars can be missed: another noise level, timestep alone
    if sound:
        other, _ = loss_and_gradients(params(), batch, noise, sigma + np.float32(0.002))
        assert abs(other[0] - expected) > 1e-4 * expected


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(video=np.zeros((2, 6, 3, 3, 5))), "video.*channels last"),
        (dict(frame_mask=np.zeros((2, 4), bool)), r"frame_mask of shape \(2, 4\)"),
        (dict(sound=np.zeros((2, 4, 6))), "sound of shape"),
        (dict(uncond_ids=None), "needs uncond_ids"),
        (dict(uncond_ids=np.zeros(20, int)), "20 tokens, text_ids room for 12"),
        (dict(weight=np.ones(3)), "weight of shape"),
    ],
)
def test_a_batch_that_does_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        flow.check_batch(make_batch().replace(**change), CONFIG, text_dropout=0.1)
    with pytest.raises(ValueError, match="the model has none"):
        flow.check_batch(make_batch(), dataclasses.replace(CONFIG, sound_gen=False))


# ---------------------------------------------------------------- the step


def start(optimizer=None, tree=None, **options):
    optimizer = optax.sgd(0.1) if optimizer is None else optimizer
    return init_state(params() if tree is None else tree, optimizer, jax.random.key(3), **options)


def difference(ours: dict, theirs: dict, before: dict) -> float:
    """The relative L2 error of what changed, over all leaves."""
    ours, theirs, before = (
        np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])
        for tree in (ours, theirs, before)
    )
    return relative_l2(ours - before, theirs - before)


SGD = optax.sgd(0.1)


def test_in_parts_and_with_remat_it_is_the_same_step():
    """Microbatches of one example each, one of them with a given frame and half the weight."""
    batch = make_batch()
    whole, metrics = compiled_step(optimizer=SGD)(start(), {}, batch)
    parts, again = compiled_step(optimizer=SGD, microbatches=2, remat=True)(start(), {}, batch)
    # a step of 0.1 times the gradient, read back as a difference of float32 parameters
    assert difference(parts.params, whole.params, params()) <= 1e-5
    for name, value in metrics.items():
        np.testing.assert_allclose(again[name], value, rtol=1e-5, err_msg=name)
    moved = jax.tree.map(lambda new, old: (old - new) / 0.1, whole.params, params())
    np.testing.assert_allclose(optax.tree.norm(moved), metrics["grad_norm"], rtol=1e-3)
    with pytest.raises(ValueError, match="a batch of 2 cannot go through in 3 equal parts"):
        compiled_step(microbatches=3)(start(), {}, batch)


def test_frozen_parameters_half_precision_and_the_average():
    """Adam on the media tower's MLPs alone, in bfloat16, with float32 masters and an average."""
    optimizer, step = optax.adam(1e-6), compiled_step(optimizer=optax.adam(1e-6), dtype="bfloat16")
    learns, frozen = split_params(params(), ["gen/layers/mlp"])
    frozen = jax.tree.map(lambda x: x.astype(jnp.bfloat16), frozen)
    state = start(optimizer, learns, ema=True)
    assert len(jax.tree.leaves(state.params)) == 2
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(state.params))
    masters = [state.params]
    for _ in range(2):
        state, metrics = step(state, frozen, make_batch())
        masters.append(state.params)
    # Adam's steps of 1e-6 are far below what bfloat16 can tell apart; the masters hold them.
    moved = np.abs(jax.tree.leaves(masters[2])[0] - jax.tree.leaves(masters[0])[0])
    assert 1e-6 < np.median(moved) < 3e-6
    # min(0.9, 1 / 10), then min(0.9, 2 / 11), of the old average
    first = jax.tree.map(lambda a, b: a / 10 + 9 * b / 10, *masters[:2])
    average = jax.tree.map(lambda a, b: 2 * a / 11 + 9 * b / 11, first, masters[2])
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), state.ema, average)
    assert state.step == 2 and metrics["loss"] > 0


def test_taking_a_tree_apart():
    learns, frozen = split_params(params() | {"video_vae": {}}, ["gen/.*qkv", "^und/embed"])
    assert jax.tree.structure(join_params(learns, frozen)) == jax.tree.structure(params())
    assert set(learns) == {"und", "gen"} and len(jax.tree.leaves(learns)) == 2
    with pytest.raises(ValueError, match="'gen/layer/mlp' matches nothing; near: .*layers/mlp"):
        split_params(params(), ["gen/.*", "gen/layer/mlp"])
    with pytest.raises(ValueError, match="must be a list"):
        split_params(params(), "gen")
    with pytest.raises(ValueError, match="nothing would change"):
        split_params(params(), [])


# ---------------------------------------------------------------- killed and resumed


def test_a_killed_run_continues_to_the_same_numbers(tmp_path):
    """A process is killed while it saves its third state or a later one; then another goes on."""
    program = [sys.executable, str(Path(__file__).with_name("training_run.py"))]
    paths = [str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "JAX_PLATFORMS": "cpu"}
    reference = run(tmp_path / "whole", 6)
    folder, lines = tmp_path / "killed", []
    with subprocess.Popen(
        [*program, folder, "100000"], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        for line in process.stdout:
            lines.append(line.split())
            if line.startswith("saving 3"):
                os.kill(process.pid, signal.SIGKILL)
                break
    assert process.returncode == -signal.SIGKILL
    assert [float(loss) for _, _, loss in lines] == reference[:3]
    with Checkpoints(folder) as checkpoints:
        last = checkpoints.last
    assert last in (1, 2, 3)  # saving goes on in the background
    assert run(folder, 6) == reference[last:]
    with Checkpoints(folder, keep=2) as checkpoints:
        assert checkpoints.last == 6
        template = init_state(random_params(), optax.adam(1e-3), jax.random.key(0), ema=True)
        state = checkpoints.restore(template, step=5)
        assert state.step == 5 and state.ema is not None
        with pytest.raises(FileNotFoundError, match="no state of step 4"):  # two are kept
            checkpoints.restore(template, step=4)
        smaller, _ = split_params(random_params(), ["gen/layers/mlp"])
        with pytest.raises(ValueError):
            checkpoints.restore(init_state(smaller, optax.adam(1e-3), jax.random.key(0), ema=True))


# ---------------------------------------------------------------- as a checkpoint for everybody


def test_what_was_trained_is_a_public_checkpoint(public_checkpoint, tmp_path):
    """Ours reads back what was written, bit for bit; diffusers' pipeline computes the same."""
    base = Cosmos3.from_pretrained(public_checkpoint, "bfloat16", offload=False).params
    random = np.random.RandomState(8)
    towers = {"und": base["und"], "gen": base["gen"]}
    trained = jax.tree.map(
        lambda x: (x + 0.02 * random.standard_normal(x.shape)).astype(x.dtype), towers
    )
    folder = write_public_checkpoint(
        tmp_path / "trained", trained, public_checkpoint, max_shard_bytes=200_000
    )
    assert len(list((folder / "transformer").glob("*.safetensors"))) > 1
    assert not list(tmp_path.glob("*partial*"))
    again = Cosmos3.from_pretrained(folder, "bfloat16", offload=False).params
    assert_same_tree(again, base | trained)
    before, after = (read_tensors(x / "transformer") for x in (public_checkpoint, folder))
    layout = transformer_layout(CONFIG)
    kept = {key for key in before if np.array_equal(before[key], after[key])}
    assert before.keys() == after.keys() and kept == {k for k in before if layout.is_unused(k)}
    for name in ("vae", "sound_tokenizer", "text_tokenizer", "scheduler"):
        assert_same_folder(folder / name, public_checkpoint / name)

    together = Cosmos3.from_pretrained(folder, "float32", offload=False).params["gen"]
    count = CONFIG.num_hidden_layers
    layers = [together["layers"][str(i)] for i in range(count)]
    together = together | {"layers": jax.tree.map(lambda *x: jnp.stack(x), *layers)}
    other = write_public_checkpoint(
        tmp_path / "apart", {"gen": together}, folder, dtype="float32", max_shard_bytes=10**9
    )
    gen = Cosmos3.from_pretrained(other, "bfloat16", offload=False).params["gen"]
    assert_same_tree(gen, trained["gen"])

    model = load_pipeline(folder).transformer
    batch = make_batch()
    noise, sigma = draw(batch)
    float32 = jax.tree.map(lambda x: x.astype(jnp.float32), trained)
    float32["gen"]["layers"] = jax.tree.map(
        lambda *x: jnp.stack(x), *(float32["gen"]["layers"][str(i)] for i in range(count))
    )
    (loss, _), _ = loss_and_gradients(float32, batch, noise, sigma)
    expected, _, _ = reference(batch, noise, sigma, model)
    assert abs(loss - expected) <= 1e-5 * expected


def test_a_sound_autoencoder_is_written_too(public_checkpoint, tmp_path):
    """Its weight norm is folded when it is read: what is written folds to the same weights."""
    base = Cosmos3.from_pretrained(public_checkpoint, "float32", offload=False).params
    trained = {name: jax.tree.map(lambda x: 1.5 * x, base[name]) for name in VAES}
    folder = write_public_checkpoint(
        tmp_path / "trained", trained, public_checkpoint, dtype="float32"
    )
    again = Cosmos3.from_pretrained(folder, "float32", offload=False).params
    assert_same_tree(again["gen"], base["gen"])
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6)
    for name in VAES:
        jax.tree.map(close, again[name], trained[name])


def test_what_cannot_be_written(public_checkpoint, tmp_path):
    def write(params, target="new", base=public_checkpoint, **options):
        return write_public_checkpoint(tmp_path / target, params, base, **options)

    with pytest.raises(ValueError, match=r"params has \['lora'\]"):
        write({"lora": {}})
    with pytest.raises(ValueError, match="int8"):
        write(params(), dtype="int8")
    with pytest.raises(ValueError, match="overlap"):
        write_public_checkpoint(public_checkpoint / "inside", params(), public_checkpoint)
    with pytest.raises(CheckpointError, match="do not fit") as caught:
        norm = {"scale": np.ones(3, np.float32)}
        write(
            {"gen": {k: v for k, v in params()["gen"].items() if k != "proj_in"} | {"norm": norm}}
        )
    assert "gen/proj_in/kernel" in str(caught.value)
    assert "gen/norm/scale: (3,), expected (64,)" in str(caught.value)
    (tmp_path / "other").mkdir()
    with pytest.raises(FileExistsError):
        write(params(), "other")
    assert [path.name for path in tmp_path.iterdir()] == ["other"]
