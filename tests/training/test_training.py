"""The loss against PyTorch's on the oracle's modules; the step against itself, in parts, resumed.

The model is the oracle's small one: odd latent sizes, sound, given frames, texts of two lengths.
"""

import dataclasses
import functools
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import mesh_cases
import numpy as np
import optax
import pytest
import torch
import training_mesh_cases
from checkpoint_files import assert_same_folder, assert_same_tree, read_tensors
from diffusers import Cosmos3OmniTransformer
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from oracle import TRANSFORMER, load_pipeline, perturb, tree_from_state_dict
from rounding import MARGIN, check, farthest, relative_l2
from training_oracle import oracle_loss
from training_run import (
    CONFIG,
    OPTIMIZER,
    compiled,
    compiled_step,
    draw,
    make_batch,
    normal,
    run,
    start,
)

from cosmos3_jax import Cosmos3
from cosmos3_jax.checkpoint import load
from cosmos3_jax.checkpoint.export import write_public_checkpoint
from cosmos3_jax.checkpoint.rules import CheckpointError, fold_weight_norm, split_weight_norm
from cosmos3_jax.checkpoint.transformer_layout import transformer_layout
from cosmos3_jax.models import attention
from cosmos3_jax.models.transformer import Latents, param_shapes, unstack_layers
from cosmos3_jax.parallel import mesh
from cosmos3_jax.training import flow, placement
from cosmos3_jax.training.checkpoints import Checkpoints
from cosmos3_jax.training.params import cast_params, join_params, split_params
from cosmos3_jax.training.step import TrainOptions, TrainState, train_step


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


silent_loss = compiled(functools.partial(flow.flow_loss, config=CONFIG, weights=WEIGHTS))


def reference(batch: flow.Batch, noise: Latents, sigma: np.ndarray, model=None):
    """The same by the oracle. Its prompts are lists, so there is no padding to get wrong."""
    examples = []
    for i in range(len(batch.video)):
        sounds = [None if x is None else x[i] for x in (batch.sound, noise.get("sound"))]
        examples.append(
            dict(
                ids=batch.text_ids[i][batch.text_mask[i]].tolist(),
                video=batch.video[i],
                sound=sounds[0],
                noise=noise["video"][i],
                sound_noise=sounds[1],
                sigma=sigma[i],
                timestep=int(np.float32(sigma[i]) * np.float32(1000)),
                fps=float(batch.fps[i]),
                given=np.flatnonzero(batch.frame_mask[i]).tolist(),
                weight=float(batch.weight[i]),
            )
        )
    return oracle_loss(model or oracle(), examples, vars(WEIGHTS))


# Relative distances from the oracle's, of the loss and its parts and of any gradient:
# `test_tolerances`.
LOSS, GRADIENT = 1e-5, 1e-4


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


# ---------------------------------------------------------------- the step


# Relative L2 distance of a step's metrics and gradient from those of another program.
STEP = 1e-5


def gradient(state: TrainState) -> np.ndarray:
    """Of the first step, all in one: Adam's first moment is a tenth of it."""
    moments = jax.tree.leaves(state.opt_state[0].mu)
    return 10 * np.concatenate([np.ravel(x) for x in moments])


def test_in_parts_and_with_remat_it_is_the_same_step(record_property):
    """Microbatches of one example each, one of them with a given frame and half the weight."""
    batch = make_batch()

    def step(*arguments):
        state, metrics = compiled_step()(*arguments)
        return metrics, gradient(state)

    check(record_property, STEP, step, *start(), batch)
    whole, metrics = compiled_step()(*start(), batch)
    parts, again = compiled_step(microbatches=2, remat=True)(*start(), batch)
    for name, value in metrics.items():
        assert relative_l2(again[name], value) <= STEP, name
    assert relative_l2(gradient(parts), gradient(whole)) <= STEP
    assert relative_l2(np.linalg.norm(gradient(whole)), metrics["grad_norm"]) <= STEP
    with pytest.raises(ValueError, match="a batch of 2 cannot go through in 3 equal parts"):
        compiled_step(microbatches=3)(*start(), batch)


def test_attention_is_not_computed_again(monkeypatch):
    """With cuDNN: a layer's other values are, its attention's are kept. Traced, as on a GPU."""

    def obstacle(dtype, *_):  # shapes are traced in float32
        return None if dtype == jnp.bfloat16 else "the dtype"

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91300)
    monkeypatch.setattr(attention, "fused_obstacle", obstacle)
    options = TrainOptions(dtype="bfloat16")
    step = functools.partial(train_step, config=CONFIG, optimizer=OPTIMIZER, options=options)
    state, frozen = start()
    with pytest.raises(ValueError, match="gen/layers/.* in float32, .* in bfloat16; cast it by"):
        step(state, {"gen": {"layers": frozen["gen"]["layers"]}}, make_batch())
    blurred = jax.tree.map(lambda x: x.astype(jnp.bfloat16), frozen)
    with pytest.raises(ValueError, match="gen/time_embedder/.* in bfloat16, and .* in float32"):
        step(state, blurred, make_batch())
    frozen = cast_params(frozen, jnp.bfloat16, CONFIG)
    text = str(jax.make_jaxpr(step)(state, frozen, make_batch()))
    # one of either in each tower's scan over layers
    for kernel in ("dot_product_attention_fwd_wrapper", "dot_product_attention_bwd_wrapper"):
        assert len(re.findall(rf"= {kernel}\[", text)) == 2
    assert attention.keeps_attention(cudnn._dot_product_attention_fwd_p_wrapper)


AVERAGE = 1e-6  # relative L2 distance of averaged weights


def test_the_average(record_property):
    """min(0.9, 1 / 10), then min(0.9, 2 / 11), of the old one; masters are float32 copies."""
    state, frozen = start()
    masters = [jax.tree.map(np.asarray, state.params)]
    for step in range(2):
        state, _ = compiled_step()(state, frozen, make_batch(step))
        masters.append(jax.tree.map(np.asarray, state.params))

    def average(*masters):
        first = jax.tree.map(lambda a, b: a / 10 + 9 * b / 10, *masters[:2])
        return jax.tree.map(lambda a, b: 2 * a / 11 + 9 * b / 11, first, masters[2])

    check(record_property, AVERAGE, average, *masters)
    assert farthest(state.ema, average(*masters)) <= AVERAGE
    assert state.step == 2 and np.abs(jax.tree.leaves(masters[2])[0]).any()


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


# ---------------------------------------------------------------- eight devices


@pytest.fixture(scope="module")
def on_meshes(tmp_path_factory):
    """Of every case, from one process that has eight devices."""
    root = Path(__file__).parents[2]
    flags = {"XLA_FLAGS": mesh_cases.XLA_FLAGS, "PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"}
    program = [sys.executable, "tests/training_mesh_cases.py", str(tmp_path_factory.mktemp("mesh"))]
    ran = subprocess.run(program, cwd=root, env=os.environ | flags, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


# Relative L2 distances from a step of one device: of losses and norms, of Adam's moments, and of
# how far weights and their averages moved. Adam divides a gradient by its size, so that where it is
# all rounding the weight still moves by a whole step.
MESH = {"metrics": 3e-6, "mu": 2e-5, "nu": 2e-5, "params": 2e-3, "ema": 2e-3}


def test_tolerances_of_a_step_on_a_mesh(on_meshes, record_property):
    for kind, moved in on_meshes["sensitivity"].items():
        for part, tolerance in MESH.items():
            record_property("sensitivity", (f"{kind}, {part}", moved[part], tolerance))
            assert 0 < MARGIN * moved[part] <= tolerance, (kind, part)


@pytest.mark.parametrize("name", training_mesh_cases.CASES)
def test_a_step_on_a_mesh_is_that_of_one_device(on_meshes, name):
    """With sound, given frames, texts dropped and weights that differ; two steps."""
    found = on_meshes[name]
    for metrics, expected in zip(found["metrics"], found["expected_metrics"], strict=True):
        assert metrics == pytest.approx(expected, rel=MESH["metrics"])
    for part, error in found["errors"].items():
        assert error <= MESH[part], part
    # and it was another step than the first
    assert abs(metrics["loss"] / found["metrics"][0]["loss"] - 1) > 1e-3


@pytest.mark.parametrize("name", training_mesh_cases.CASES)
def test_what_moves_between_devices_in_training(on_meshes, name):
    found = on_meshes[name]
    mesh_name, _, with_lora = training_mesh_cases.CASES[name]
    sizes = mesh.parse_mesh(mesh_name)
    data, fsdp = sizes["data"], sizes.get("fsdp", 1)
    within = fsdp * sizes.get("seq", 1)  # the devices that share an example
    assert found["batch"] == 1 / data
    for part, held in found["held"].items():
        assert held == pytest.approx(1 if with_lora else 1 / fsdp, rel=1e-4), part
    moves = [x for x in found["collectives"] if x["group"] != 1]  # a sum over nothing is not one
    gathers = [x for x in moves if x["kind"] == "all-gather"]
    # Examples never leave the devices that they were sent to: what is not a sum stays within them.
    # But for the text's embeddings: XLA looks them up in another order of devices.
    model = training_mesh_cases.MODEL
    own_text = training_mesh_cases.TEXT * training_mesh_cases.EXAMPLES // data * model.hidden_size
    for x in moves:
        if x["kind"] != "all-reduce" and x["group"] > within:
            assert x["kind"] == "collective-permute" and "/embed/" in x["origin"], x
            assert x["size"] <= own_text, x
    # Weights are gathered by fsdp, a layer at a time, in both passes of both towers.
    kernels = kernels_of_a_layer(model)
    gathered = [x for x in gathers if x["shapes"][0] in [[1, *shape] for shape in kernels]]
    assert {x["group"] for x in gathered} == ({fsdp} if fsdp > 1 else set())
    passes = 3 if with_lora else 4  # a text tower that does not learn is not differentiated
    assert len(gathered) == passes * len(kernels) * (fsdp > 1)
    stacks = [[model.num_hidden_layers, *shape] for shape in kernels]
    assert not [x for x in gathers if x["shapes"][0] in stacks]
    # Gradients are summed over data, those of layers in the loop over layers.
    sums = [x for x in moves if x["kind"] == "all-reduce" and x["looped"] and x["group"] >= data]
    summed = [sorted(shape) for x in sums for shape in x["shapes"]]  # some lie transposed
    if with_lora:
        assert [6, 80] in summed and not [x for x in kernels if sorted(x) in summed]
    else:
        assert all(sorted(x) in summed for x in kernels)


def kernels_of_a_layer(model) -> list[list[int]]:
    heads, size = model.num_attention_heads, model.head_dim
    width, inner = model.hidden_size, model.intermediate_size
    qkv = [width, heads + 2 * model.num_key_value_heads, size]
    return [qkv, [heads, size, width], [width, 2, inner], [inner, width]]


def test_a_state_is_restored_onto_another_mesh(on_meshes):
    """From data=4,fsdp=2 onto data=2,fsdp=4, where its template has it, and onto one device."""
    found = on_meshes["restored"]
    assert found["equal"] == {"other": True, "one": True}
    assert found["placed"] and found["held"] == 0.25


@pytest.mark.parametrize(
    ("sizes", "count", "parts", "message"),
    [
        ({"data": 4}, 8, 4, "data=4: 2 examples at a time do not divide; give a multiple of 16"),
        ({"cfg": 2}, 8, 1, "cfg=2: training has no branches of guidance"),
        ({}, 6, 4, "a batch of 6 cannot go through in 4 equal parts; choose from 1, 2, 3, 6"),
    ],
)
def test_a_batch_that_does_not_divide(monkeypatch, sizes, count, parts, message):
    monkeypatch.setattr(placement.sharding, "mesh_sizes", lambda: sizes)
    with pytest.raises(ValueError, match=message):
        placement.check_examples(count, parts)


def test_a_batch_on_a_mesh_by_its_fields():
    """On one device; what it would be on more is in the shardings."""
    one = jax.sharding.Mesh(jax.devices()[:1], ("data",))
    batch = make_batch(count=3)  # as many examples as the prompt for none has ids
    placed = placement.place_batch(batch.replace(sound=None), one)
    divided = {name for name in vars(placed) if is_divided(getattr(placed, name))}
    assert divided == {"text_ids", "text_mask", "video", "fps", "frame_mask", "weight"}
    assert placed.sound is None
    rows = batch.replace(fps=24.0, uncond_ids=np.tile(batch.uncond_ids, (3, 1)))
    placed = placement.place_batch(rows, one)
    assert is_divided(placed.uncond_ids) and is_divided(placed.sound) and not is_divided(placed.fps)
    four = jax.sharding.AbstractMesh((4,), ("data",))
    with pytest.raises(ValueError, match="data=4: 3 examples at a time do not divide; give a mul"):
        placement.place_batch(batch, four)


def is_divided(x) -> bool:
    return x is not None and x.sharding.spec == jax.sharding.PartitionSpec(("data",))


# ---------------------------------------------------------------- killed and resumed


def test_a_killed_run_continues_to_the_same_numbers(tmp_path):
    """A process is killed while it saves its third state or a later one; then another goes on."""
    program = [sys.executable, str(Path(__file__).parents[1] / "training_run.py")]
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
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
    (folder / "9.orbax-checkpoint-tmp" / "default").mkdir(parents=True)
    with Checkpoints(folder) as checkpoints:
        last = checkpoints.last
    assert last in (1, 2, 3)  # saving goes on in the background
    assert not list(folder.glob("*tmp*"))
    assert run(folder, 6) == reference[last:]
    with Checkpoints(folder, keep=2) as checkpoints:
        assert checkpoints.last == 6
        template, _ = start()
        state = checkpoints.restore(template, step=5)
        assert state.step == 5 and state.ema is not None
        with pytest.raises(FileNotFoundError, match="no state of step 4"):  # two are kept
            checkpoints.restore(template, step=4)
        with pytest.raises(ValueError, match=r"(?s)only on disk.*opt_state/0/mu"):
            checkpoints.restore(start(optax.sgd(1e-3))[0])
        halved = jax.tree.map(lambda x: x[..., ::2], template.params)
        with pytest.raises(
            ValueError, match=r"(?s)params/gen/layers/mlp/down/kernel: .*96, 64\).*32\)"
        ):
            checkpoints.restore(template.replace(params=halved))


def small_state(step: int, dtype=jnp.float32) -> TrainState:
    return TrainState(jnp.int32(step), {"w": jnp.zeros(2, dtype)}, (), None, jax.random.key(0))


def test_a_state_that_cannot_be_kept_or_restored_as_it_is(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        for step in (2, 4):
            checkpoints.save(small_state(step))
        state = checkpoints.restore(small_state(0), step=2)
        with pytest.raises(ValueError, match="already has step 4, so that step 3 would not be"):
            checkpoints.save(state.replace(step=state.step + 1))
        checkpoints.save(small_state(4))  # is there
        checkpoints.save(small_state(5))
        with pytest.raises(
            ValueError, match=r"params/w: float32 \(2,\) on disk, bfloat16 \(2,\) in"
        ):
            checkpoints.restore(small_state(0, jnp.bfloat16))


# ---------------------------------------------------------------- as a checkpoint for everybody


def test_what_was_trained_is_a_public_checkpoint(public_checkpoint, tmp_path):
    """Ours reads back what was written, bit for bit; diffusers' pipeline computes the same."""
    random = np.random.RandomState(8)
    trained = jax.tree.map(
        lambda x: (np.asarray(x) + 0.02 * normal(random, *x.shape)).astype(jnp.bfloat16),
        read_towers(public_checkpoint),
    )
    folder = write_public_checkpoint(
        tmp_path / "trained", trained, public_checkpoint, max_shard_bytes=200_000
    )
    assert len(list((folder / "transformer").glob("*.safetensors"))) > 1
    assert not list(tmp_path.glob("*partial*"))
    again = read_towers(folder)
    trained["gen"]["time_embedder"] = jax.tree.map(np.float32, trained["gen"]["time_embedder"])
    assert_same_tree(again, trained)
    before, after = (read_tensors(x / "transformer") for x in (public_checkpoint, folder))
    layout = transformer_layout(CONFIG)
    kept = {key for key in before if np.array_equal(before[key], after[key])}
    assert before.keys() == after.keys() and kept == {k for k in before if layout.is_unused(k)}
    for name in ("vae", "sound_tokenizer", "text_tokenizer", "scheduler"):
        assert_same_folder(folder / name, public_checkpoint / name)

    model = load_pipeline(folder).transformer
    batch = make_batch()
    noise, sigma = draw(batch)
    float32 = jax.tree.map(lambda x: x.astype(np.float32), trained)
    (loss, _), _ = loss_and_gradients(float32, batch, noise, sigma)
    expected, _, _ = reference(batch, noise, sigma, model)
    assert abs(loss - expected) <= LOSS * expected


def read_towers(folder) -> dict:
    """Both towers in bfloat16, layers stacked."""
    components = load.open_components(folder, load.load_config(folder))
    return load.load_params(components, jnp.dtype(jnp.bfloat16), parts=("und", "gen"))


FOLD = 2e-6  # relative L2 distance of a kernel that was taken apart and folded


def test_autoencoders_are_written_too(record_property, public_checkpoint, tmp_path):
    """The sound's weight norm is folded as it is read: what is written folds to the same, and to
    zeros, not to 0 / 0, where a filter is zero.
    """
    base = Cosmos3.from_pretrained(public_checkpoint, "float32", offload=False).params
    parts = ("video_vae", "sound_vae", "gen")
    trained = {name: jax.tree.map(lambda x: 1.5 * np.asarray(x), base[name]) for name in parts}
    kernel = trained["sound_vae"]["decoder"]["conv1"]["kernel"]
    kernel[..., 0] = 0
    direction, gain = split_weight_norm(np.moveaxis(kernel[..., 1:], -1, 0))
    check(record_property, FOLD, fold_weight_norm, direction, gain)
    folder = write_public_checkpoint(
        tmp_path / "trained", trained, public_checkpoint, dtype="float32"
    )
    again = Cosmos3.from_pretrained(folder, "float32", offload=False).params
    assert_same_tree(again["und"], base["und"])
    assert_same_tree(again["gen"], trained["gen"])  # its layers are apart
    for name in parts[:2]:
        assert farthest(again[name], trained[name]) <= FOLD


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
    gen = unstack_layers(params()["gen"])
    layer = gen["layers"]["1"]
    down = layer["mlp"]["down"] | {"lora_a": np.ones((96, 2)), "lora_b": np.ones((2, 64))}
    adapted = layer | {"mlp": layer["mlp"] | {"down": down}}
    more = gen["layers"] | {"1": adapted, "3": layer}
    with pytest.raises(CheckpointError, match="do not fit") as caught:
        write({"gen": gen | {"layers": more}})
    assert "missing" not in str(caught.value)
    assert "gen/layers/1/mlp/down/lora_b: merge the LoRA first" in str(caught.value)
    assert "gen/layers/3/mlp/down/kernel" in str(caught.value)
    (tmp_path / "other").mkdir()
    with pytest.raises(FileExistsError):
        write(params(), "other")
    assert [path.name for path in tmp_path.iterdir()] == ["other"]
