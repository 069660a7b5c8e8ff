"""Loading: values, names and dtypes of the public layout, and what is said of a damaged one."""

import re
import shutil
import subprocess
import sys

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_files import (
    INDEX,
    PUBLIC,
    assert_same_tree,
    load_tree,
    open_checkpoint,
    read_tensors,
    write_tensors,
)
from huggingface_hub.utils import filter_repo_objects
from rounding import check, relative_l2

from cosmos3_jax import Cosmos3
from cosmos3_jax.checkpoint import files, find, load, rules
from cosmos3_jax.checkpoint.find import find_checkpoint
from cosmos3_jax.checkpoint.rules import CheckpointError
from cosmos3_jax.models.transformer import unstack_layers

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16  # of the oracle's small transformer, whose last layer is 2
# What the released checkpoint holds and generation never reads, written out by hand.
UNUSED = {
    "lm_head.weight", "norm.weight", "layers.2.self_attn.to_q.weight",
    "layers.2.self_attn.to_out.weight", "layers.2.self_attn.norm_q.weight",
    "layers.2.mlp.gate_proj.weight", "layers.2.mlp.up_proj.weight", "layers.2.mlp.down_proj.weight",
    "layers.2.post_attention_layernorm.weight", "action_proj_in.fc.weight",
    "action_proj_in.bias.weight", "action_proj_out.fc.weight", "action_proj_out.bias.weight",
    "action_modality_embed",
}  # fmt: skip
SOUND_HEAD = {
    "audio_proj_in.weight", "audio_proj_in.bias", "audio_proj_out.weight", "audio_proj_out.bias",
    "audio_modality_embed",
}  # fmt: skip


@pytest.fixture(scope="module")
def tree(public_checkpoint):
    return load_tree(public_checkpoint)


@pytest.fixture(scope="module")
def tensors(public_checkpoint):
    """The public tensors as stored, read without our code."""
    names = ("transformer", "vae", "sound_tokenizer")
    return {name: read_tensors(public_checkpoint / name) for name in names}


def at(tree: dict, path: str) -> np.ndarray:
    for name in path.split("/"):
        tree = tree[name]
    return np.asarray(tree)


def heads(weight: np.ndarray) -> np.ndarray:
    """PyTorch's [heads * head_dim, width] -> [width, heads, head_dim]."""
    return np.moveaxis(weight.reshape(-1, HEAD_DIM, weight.shape[1]), 2, 0)


# Each leaf (or its part) and the public tensors it must hold, spelled without the rules under test.
TRANSFORMER_LEAVES = {
    "und/embed/embedding": lambda t: t["embed_tokens.weight"],
    "gen/norm/scale": lambda t: t["norm_moe_gen.weight"],
    "gen/proj_in/kernel": lambda t: t["proj_in.weight"].T,
    "gen/proj_out/bias": lambda t: t["proj_out.bias"],
    "gen/time_embedder/linear_1/kernel": lambda t: t["time_embedder.linear_1.weight"].T,
    "gen/time_embedder/linear_2/bias": lambda t: t["time_embedder.linear_2.bias"],
    "gen/sound_proj_in/kernel": lambda t: t["audio_proj_in.weight"].T,
    "gen/sound_proj_out/bias": lambda t: t["audio_proj_out.bias"],
    "gen/sound_modality_embed": lambda t: t["audio_modality_embed"],
    "und/last_layer/input_norm/scale": lambda t: t["layers.2.input_layernorm.weight"],
    "und/last_layer/k_norm/scale": lambda t: t["layers.2.self_attn.norm_k.weight"],
    "und/last_layer/kv/kernel": lambda t: np.concatenate(
        [heads(t[f"layers.2.self_attn.to_{name}.weight"]) for name in "kv"], axis=1
    ),
}


@pytest.mark.parametrize("leaf", TRANSFORMER_LEAVES)
def test_single_leaves_of_the_transformer(tree, tensors, leaf):
    np.testing.assert_array_equal(at(tree, leaf), TRANSFORMER_LEAVES[leaf](tensors["transformer"]))


UND = ("to_q", "to_k", "to_v", "to_out", "norm_q", "norm_k", "")
GEN = (
    "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "norm_added_q", "norm_added_k",
    "_moe_gen",
)  # fmt: skip


@pytest.mark.parametrize(
    ("tower", "layer", "names"), [("und", 1, UND), ("gen", 0, GEN), ("gen", 2, GEN)]
)
def test_stacked_layers(tree, tensors, tower, layer, names):
    """Layer and tower, the order of q, k, v and of gate, up, and the axes of every matrix."""
    q, k, v, out, q_norm, k_norm, suffix = names

    def public(name):
        return tensors["transformer"][f"layers.{layer}.{name}.weight"]

    def ours(name):
        return at(tree, f"{tower}/layers/{name}")[layer]

    qkv = ours("attention/qkv/kernel")
    assert qkv.shape == (64, HEADS + 2 * KV_HEADS, HEAD_DIM)
    np.testing.assert_array_equal(qkv[:, :4], heads(public(f"self_attn.{q}")))
    np.testing.assert_array_equal(qkv[:, 4:6], heads(public(f"self_attn.{k}")))
    np.testing.assert_array_equal(qkv[:, 6:], heads(public(f"self_attn.{v}")))
    attention_out = public(f"self_attn.{out}").T.reshape(HEADS, HEAD_DIM, 64)
    np.testing.assert_array_equal(ours("attention/out/kernel"), attention_out)
    np.testing.assert_array_equal(ours("attention/q_norm/scale"), public(f"self_attn.{q_norm}"))
    np.testing.assert_array_equal(ours("attention/k_norm/scale"), public(f"self_attn.{k_norm}"))
    np.testing.assert_array_equal(ours("input_norm/scale"), public(f"input_layernorm{suffix}"))
    after = public(f"post_attention_layernorm{suffix}")
    np.testing.assert_array_equal(ours("post_attention_norm/scale"), after)
    gate_up = ours("mlp/gate_up/kernel")
    np.testing.assert_array_equal(gate_up[:, 0], public(f"mlp{suffix}.gate_proj").T)
    np.testing.assert_array_equal(gate_up[:, 1], public(f"mlp{suffix}.up_proj").T)
    np.testing.assert_array_equal(ours("mlp/down/kernel"), public(f"mlp{suffix}.down_proj").T)


def test_video_vae_leaves(tree, tensors):
    """Convolutions over space and time [O, I, T, H, W] and over space [O, I, H, W], and a norm."""
    ours, public = tree["video_vae"], tensors["vae"]
    conv = public["encoder.conv_in.weight"].transpose(2, 3, 4, 1, 0)
    np.testing.assert_array_equal(at(ours, "encoder/conv_in/kernel"), conv)
    conv = public["decoder.mid_block.attentions.0.to_qkv.weight"].transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(at(ours, "decoder/mid_block/attentions_0/to_qkv/kernel"), conv)
    norm = public["decoder.up_blocks.1.resnets.1.norm2.gamma"][:, 0, 0, 0]
    np.testing.assert_array_equal(at(ours, "decoder/up_blocks_1/resnets_1/norm2/scale"), norm)
    # Both 1x1x1 convolutions have the same shape where the halves meet: each goes to its own half.
    for half, name in (("encoder", "quant_conv"), ("decoder", "post_quant_conv")):
        np.testing.assert_array_equal(at(ours, f"{half}/{name}/bias"), public[f"{name}.bias"])


def folded(tensors: dict, name: str) -> np.ndarray:
    """g v / |v| in float64; the norm is over all axes but the first."""
    direction, gain = (tensors[f"{name}.weight_{part}"].astype(np.float64) for part in "vg")
    return gain * direction / np.sqrt((direction**2).sum(axis=(1, 2), keepdims=True))


# Relative L2 distance of a folded kernel: float32, a sum of squares over a few hundred values.
FOLD_TOLERANCE = 2e-6


@pytest.mark.parametrize(
    ("name", "leaf", "axes"),
    [
        ("decoder.conv1", "decoder/conv1", (2, 1, 0)),  # [out, in, k] -> [k, in, out]
        ("decoder.block.1.conv_t1", "decoder/block_1/conv_t1", (2, 0, 1)),  # [in, out, k]
        ("encoder.layers.0", "encoder/layers_0", (2, 1, 0)),
    ],
)
def test_weight_norm_is_folded(record_property, tree, tensors, name, leaf, axes):
    expected = folded(tensors["sound_tokenizer"], name).transpose(axes)
    found = at(tree["sound_vae"], f"{leaf}/kernel")
    direction, gain = (tensors["sound_tokenizer"][f"{name}.weight_{part}"] for part in "vg")
    check(record_property, FOLD_TOLERANCE, rules.fold_weight_norm, direction, gain)
    assert relative_l2(found, expected) <= FOLD_TOLERANCE
    alpha = tensors["sound_tokenizer"]["decoder.block.1.snake1.alpha"][0, :, 0]
    np.testing.assert_array_equal(at(tree["sound_vae"], "decoder/block_1/snake1/alpha"), alpha)


def test_weight_norm_is_folded_before_the_cast(public_checkpoint, tensors):
    """Folding what was already rounded to bfloat16 gives other weights."""
    tree = load_tree(public_checkpoint, "bfloat16")
    public, name = tensors["sound_tokenizer"], "decoder.block.0.conv_t1"
    found = at(tree["sound_vae"], "decoder/block_0/conv_t1/kernel")
    direction, gain = (public[f"{name}.weight_{part}"] for part in "vg")

    def fold(direction, gain):
        folded = rules.fold_weight_norm(direction, gain)
        return folded.transpose(2, 0, 1).astype(jnp.bfloat16)

    np.testing.assert_array_equal(found, fold(direction, gain))
    late = fold(direction.astype(jnp.bfloat16), gain.astype(jnp.bfloat16))
    assert (found != late).mean() > 0.1


def test_both_spellings_of_weight_norm(broken, tensors, tree):
    """`parametrizations.weight.original0` is the gain and `original1` the direction."""
    spelling = {
        "weight_g": "parametrizations.weight.original0",
        "weight_v": "parametrizations.weight.original1",
    }
    renamed = {
        re.sub("weight_[gv]", lambda found: spelling[found[0]], key): value
        for key, value in tensors["sound_tokenizer"].items()
    }
    assert renamed.keys() & tensors["sound_tokenizer"].keys() != renamed.keys()
    write_tensors(broken / "sound_tokenizer", renamed)
    assert_same_tree(load_tree(broken), tree)


def test_only_the_timestep_embedding_stays_float32(public_checkpoint, tree):
    low = load_tree(public_checkpoint, "bfloat16")
    for path, leaf in jax.tree.leaves_with_path(low):
        name = jax.tree_util.keystr(path)
        kept = "time_embedder" in name
        assert leaf.dtype == (jnp.float32 if kept else jnp.bfloat16), name
    assert_same_tree(low["gen"]["time_embedder"], tree["gen"]["time_embedder"])
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tree["video_vae"])
    assert_same_tree(low["video_vae"], rounded)


@pytest.mark.parametrize("load_sound", [None, False])
def test_each_tensor_is_read_once_or_never(public_checkpoint, tensors, monkeypatch, load_sound):
    read = []
    original = files.TensorFiles.read

    def spy(self, key):
        read.append((self.folder.name, key))
        return original(self, key)

    monkeypatch.setattr(files.TensorFiles, "read", spy)
    load_tree(public_checkpoint, load_sound=load_sound)
    unused = UNUSED if load_sound is None else UNUSED | SOUND_HEAD
    assert unused < tensors["transformer"].keys()
    expected = [
        (component, key)
        for component, values in tensors.items()
        for key in values
        if not (component == "transformer" and key in unused)
        and not (component == "sound_tokenizer" and load_sound is False)
    ]
    assert sorted(read) == sorted(expected)


def test_every_element_of_a_leaf_is_filled_once(public_checkpoint):
    """Parts that overlap while others stay empty would have the right number of elements."""
    for component in open_checkpoint(public_checkpoint):
        times = {leaf: np.zeros(shape, int) for leaf, shape in component.leaves.items()}
        for rule in component.layout.rules:
            times[rule.leaf][rule.index] += 1
        assert all((count == 1).all() for count in times.values()), component.name


def test_sound_decoder_alone(broken, tensors, tree):
    """Early revisions hold no sound encoder, under the same configuration."""
    decoder = {k: v for k, v in tensors["sound_tokenizer"].items() if not k.startswith("encoder.")}
    assert len(decoder) < len(tensors["sound_tokenizer"])
    write_tensors(broken / "sound_tokenizer", decoder)
    found = load_tree(broken)
    assert set(found["sound_vae"]) == {"decoder"}
    assert_same_tree(found["sound_vae"]["decoder"], tree["sound_vae"]["decoder"])


def test_sound_left_out(public_checkpoint, tree):
    model = Cosmos3.from_pretrained(public_checkpoint, "float32", load_sound=False)
    assert not model.config.has_sound
    assert "sound_vae" not in model.params
    silent = {name: leaf for name, leaf in tree["gen"].items() if not name.startswith("sound_")}
    assert len(silent) == len(tree["gen"]) - 3
    assert_same_tree(model.params["gen"], unstack_layers(silent))
    with pytest.raises(ValueError, match="sound"):
        model.prepare("a ball", sound=True)


def test_sound_asked_of_a_checkpoint_without_it(silent_checkpoint, broken):
    with pytest.raises(
        CheckpointError, match=r"has no sound \(sound_gen is False.* load it without"
    ):
        Cosmos3.from_pretrained(silent_checkpoint, load_sound=True)
    assert "sound_vae" not in load_tree(silent_checkpoint)
    shutil.rmtree(broken / "sound_tokenizer")  # the transformer's half alone makes no sound
    with pytest.raises(CheckpointError, match=r"sound_gen is True.*sound_tokenizer\S* is missing"):
        Cosmos3.from_pretrained(broken, load_sound=True)
    assert not load.load_config(broken).has_sound
    assert "sound_proj_in" not in load_tree(broken)["gen"]


# The files of the released Nano repository (reference: its model page), shards abridged.
NANO_READ = [
    "model_index.json", "scheduler/scheduler_config.json", "sound_tokenizer/config.json",
    f"sound_tokenizer/{PUBLIC}.safetensors", "text_tokenizer/chat_template.jinja",
    "text_tokenizer/merges.txt", "text_tokenizer/tokenizer.json", "text_tokenizer/vocab.json",
    "transformer/config.json", f"transformer/{PUBLIC}-00001-of-00007.safetensors",
    f"transformer/{INDEX}", "vae/config.json", f"vae/{PUBLIC}.safetensors",
]  # fmt: skip
NANO_UNREAD = [
    ".gitattributes", "README.md", "assets/robot.mp4", "model.safetensors.index.json",
    "vision_encoder/config.json", "vision_encoder/model.safetensors", "config.json",
]  # fmt: skip


def test_hub_id(public_checkpoint, monkeypatch, tree):
    """Only what generation reads is downloaded; what was downloaded is read."""
    asked = []

    def snapshot_download(repo_id, **arguments):
        asked.append((repo_id, arguments.pop("revision")))
        chosen = filter_repo_objects(
            NANO_READ + NANO_UNREAD,
            allow_patterns=arguments.pop("allow_patterns"),
            ignore_patterns=arguments.pop("ignore_patterns", None),
        )
        asked[-1] += (sorted(chosen),)
        assert not arguments
        return str(public_checkpoint)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(find, "unreachable_because", lambda _: None)
    model = Cosmos3.from_pretrained("nvidia/Cosmos3-Nano", "float32", revision="v1")
    frontend = [name for name in NANO_READ if not name.endswith(".safetensors")]
    assert asked == [  # weights only once the rest has been read
        ("nvidia/Cosmos3-Nano", "v1", sorted(frontend)),
        ("nvidia/Cosmos3-Nano", "v1", sorted(NANO_READ)),
    ]
    assert_same_tree(model.params, tree | {"gen": unstack_layers(tree["gen"])})


def test_a_request_is_checked_before_weights_are_downloaded(monkeypatch, tmp_path):
    asked = []

    def snapshot_download(repo_id, allow_patterns, revision):
        asked.append(list(filter_repo_objects(NANO_READ, allow_patterns=allow_patterns)))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(find, "unreachable_because", lambda _: None)
    find_checkpoint("nvidia/Cosmos3-Nano", weights=False)
    weights = [name for name in NANO_READ if name.endswith(".safetensors")]
    assert weights and asked == [[name for name in NANO_READ if name not in weights]]


def test_hub_failure(monkeypatch):
    def snapshot_download(*_, **__):
        raise ConnectionError("name resolution failed")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(find, "unreachable_because", lambda _: None)
    with pytest.raises(
        CheckpointError,
        match="nvidia/Nano is no local folder, and downloading it .* failed: name resolution",
    ):
        Cosmos3.from_pretrained("nvidia/Nano")


@pytest.mark.parametrize("name", ["no-such-folder", "/no/such/folder", "a/b/c", "owner/na me"])
def test_neither_folder_nor_hub_id(name, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)  # it must not be called
    message = f"there is no folder {name}; .* Hub id of the form owner/"
    with pytest.raises(CheckpointError, match=message):
        Cosmos3.from_pretrained(name)


def test_needs_no_torch(public_checkpoint, tmp_path):
    """Loading and converting work where torch, diffusers and transformers cannot be imported."""
    script = """
import sys
from pathlib import Path

class Absent:
    @staticmethod
    def find_spec(name, *_):
        if name.partition(".")[0] in ("torch", "diffusers", "transformers"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent)
from cosmos3_jax import Cosmos3
from cosmos3_jax.checkpoint.convert import convert_checkpoint

for folder in (Path(sys.argv[1]), convert_checkpoint(*map(Path, sys.argv[1:]))):
    print(*sorted(Cosmos3.from_pretrained(folder).params))
"""
    command = [sys.executable, "-c", script, public_checkpoint, tmp_path / "converted"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "gen sound_vae und video_vae\n" * 2
