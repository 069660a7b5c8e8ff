"""What was trained is written as a checkpoint that everybody reads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_files import assert_same_folder, assert_same_tree, read_tensors
from oracle import load_pipeline
from rounding import check, farthest
from training_cases import LOSS, loss_and_gradients, params, reference
from training_run import CONFIG, draw, make_batch, normal

from cosmos3_jax import Cosmos3
from cosmos3_jax.checkpoint import load
from cosmos3_jax.checkpoint.export import write_public_checkpoint
from cosmos3_jax.checkpoint.layouts import transformer_layout
from cosmos3_jax.checkpoint.rules import CheckpointError, fold_weight_norm, split_weight_norm
from cosmos3_jax.models.transformer import unstack_layers


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
