"""What is said of a damaged checkpoint: every difference by name, before a weight is read."""

import json
import re
import shutil

import numpy as np
import pytest
from checkpoint_files import (
    INDEX,
    PUBLIC,
    open_checkpoint,
    read_tensors,
    replace_file,
    update_json,
    write_tensors,
)
from safetensors.numpy import load_file, save_file

from cosmos3_jax import Cosmos3
from cosmos3_jax.checkpoint import rules
from cosmos3_jax.checkpoint.rules import CheckpointError, Layout, Rule
from cosmos3_jax.config import ConfigError

SHARD = f"{PUBLIC}-00002-of-00005.safetensors"  # of the transformer


def test_a_layout_that_does_not_fill_the_tree_is_refused():
    leaves = {"a": (2, 3), "b": (3,), "d": (1,)}
    layout = Layout(
        "toy",
        (
            Rule("x", "a", "n -> n", (0,)),  # a[1] stays empty
            Rule("y", "b", "n -> n"),
            Rule("y", "b", "n -> n"),
            Rule("z", "c", "n -> n"),
        ),
    )
    with pytest.raises(CheckpointError) as error:
        rules.check(layout, {"x": (3,), "y": (3,), "z": (3,)}, leaves)
    kinds = re.findall(r"^  (\w.*):\n((?:    .*\n?)+)", str(error.value), re.MULTILINE)
    assert {kind: items.split() for kind, items in kinds} == {
        "duplicate (1)": ["y"],
        "leaf unknown (1)": ["c"],
        "leaf not filled exactly once (3)": ["a", "b", "d"],
        "unexpected (1)": ["z"],
    }


def change_transformer(change):
    """Damage: the transformer's tensors after `change`, which edits the dict in place."""

    def damage(folder):
        tensors = read_tensors(folder / "transformer")
        change(tensors)
        write_tensors(folder / "transformer", tensors)

    return damage


def rename(tensors):
    tensors["proj_in.wieght"] = tensors.pop("proj_in.weight")


def transpose(tensors):
    tensors["layers.1.mlp.down_proj.weight"] = tensors["layers.1.mlp.down_proj.weight"].T


def drop_a_layer(tensors):
    for key in [key for key in tensors if key.startswith("layers.1.")]:
        del tensors[key]


def quantise(tensors):
    tensors["proj_in.weight"] = tensors["proj_in.weight"].astype(np.int8)
    tensors["proj_in.weight_scale"] = np.ones(1, np.float32)


def truncate(size):
    def damage(folder):
        path = folder / "transformer" / SHARD
        replace_file(path, path.read_bytes()[:size])

    return damage


def edit_index(change):
    def damage(folder):
        path = folder / "transformer" / INDEX
        weight_map = json.loads(path.read_text())["weight_map"]
        change(weight_map)
        update_json(path, weight_map=weight_map)

    return damage


def store_twice(folder):
    """A shard gets a tensor that another has; the index names it once, as it should."""
    path = folder / "transformer" / SHARD
    tensors = load_file(path)
    others = read_tensors(folder / "transformer").items()
    key, value = next((key, value) for key, value in others if key not in tensors)
    path.unlink()
    save_file(tensors | {key: value}, path)


DAMAGE = {
    "shard missing": (
        lambda folder: (folder / "transformer" / SHARD).unlink(),
        rf"{SHARD} is missing; download",
    ),
    "shard cut in half": (truncate(100_000), rf"{SHARD} is not a complete safetensors file"),
    "shard cut by a byte": (truncate(-1), rf"{SHARD} is not a complete safetensors file"),
    "shard empty": (truncate(0), rf"{SHARD} is not a complete safetensors file"),
    "shard not listed": (
        edit_index(lambda weight_map: weight_map.pop("proj_in.weight")),
        r"disagree:\n  in a shard, not in the index \(1\):\n    proj_in\.weight$",
    ),
    "tensor in two shards": (
        store_twice,
        rf"tensor \S+ is stored twice, in {PUBLIC}-00001\S+ and in {SHARD}; download",
    ),
    "index of a tensor that is nowhere": (
        edit_index(lambda weight_map: weight_map.update(ghost=SHARD)),
        r"disagree:\n  in the index, not in a shard \(1\):\n    ghost$",
    ),
    "index of a shard that is nowhere": (
        edit_index(lambda weight_map: weight_map.update(ghost="other.safetensors")),
        r"other\.safetensors is missing",
    ),
    "index without a map": (
        lambda folder: replace_file(folder / "transformer" / INDEX, b'{"metadata": {}}'),
        r"is not a safetensors index with a weight_map: KeyError",
    ),
    "index not JSON": (
        lambda folder: replace_file(folder / "transformer" / INDEX, b"<html>404</html>"),
        r"is not a safetensors index with a weight_map: Expecting value",
    ),
    "no weights": (
        lambda folder: [path.unlink() for path in (folder / "transformer").glob("*model*")],
        rf"{PUBLIC}\.safetensors is missing; download",
    ),
    "a key misspelled": (
        change_transformer(rename),
        r"/transformer: the transformer checkpoint does not fit the model:\n  missing \(1\):\n"
        r"    proj_in\.weight\n"
        r"  unexpected \(1\):\n    proj_in\.wieght$",
    ),
    "a matrix transposed": (
        change_transformer(transpose),
        r"wrong shape \(1\):\n    layers\.1\.mlp\.down_proj\.weight: \(96, 64\) in the checkpoint, "
        r"\(64, 96\) in the model$",
    ),
    "a layer left out": (
        change_transformer(drop_a_layer),
        r"missing \(22\):\n(    .+\n){12}    \.\.\. and 10 more$",
    ),
    "quantised": (
        change_transformer(quantise),
        r"quantised or damaged.*\n.*\n    proj_in\.weight: I8$",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named(broken, name):
    damage, message = DAMAGE[name]
    damage(broken)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(broken)


@pytest.mark.parametrize("sizes", [[1, 2, 16, 4], [1, 3, 5, 4]])
def test_sizes_of_which_no_model_can_be_made(broken, sizes):
    """What is raised while its shapes are computed, of any kind, is one line with the folder."""
    update_json(broken / "vae" / "config.json", dim_mult=sizes)
    with pytest.raises(ConfigError, match=rf"^{broken} is not a checkpoint of shapes that .*$"):
        open_checkpoint(broken)


def test_damage_of_the_other_components_is_named(broken):
    video, sound = (read_tensors(broken / name) for name in ("vae", "sound_tokenizer"))
    video["extra"] = video.pop("quant_conv.bias")
    write_tensors(broken / "vae", video)
    with pytest.raises(
        CheckpointError,
        match=r"video VAE checkpoint(.*\n)+.*missing.*\n    quant_conv\.bias\n.*unexp.*\n    extra",
    ):
        open_checkpoint(broken)
    video["quant_conv.bias"] = video.pop("extra")
    write_tensors(broken / "vae", video)
    del sound["encoder.layers.0.weight_g"]  # half of a weight-norm pair
    write_tensors(broken / "sound_tokenizer", sound)
    with pytest.raises(
        CheckpointError,
        match=r"sound VAE(.*\n)+.*missing \(1\):\n    encoder\.layers\.0\.weight_g$",
    ):
        open_checkpoint(broken)


def test_a_shard_cut_while_it_is_open_is_named(broken):
    shutil.copytree(broken, broken.parent / "copy")  # its own bytes, which may be changed in place
    [component, *_] = open_checkpoint(broken.parent / "copy")
    path = component.files.folder / SHARD
    *_, key = load_file(path)
    with path.open("r+b") as file:
        file.truncate(5000)
    with pytest.raises(CheckpointError, match=rf"{SHARD}: {re.escape(key)} cannot be read"):
        component.files.read(key)


def test_not_a_checkpoint(tmp_path, broken):
    with pytest.raises(CheckpointError, match="is not a Cosmos3 checkpoint: it has no transformer"):
        Cosmos3.from_pretrained(tmp_path / "broken" / "vae")
    with pytest.raises(
        ValueError, match="dtype='int8' is not supported; choose bfloat16 or float32"
    ):
        Cosmos3.from_pretrained(broken, dtype="int8")
