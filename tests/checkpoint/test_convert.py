"""Conversion: the same weights in our own layout, whatever interrupts it, in little memory."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoint_files import (
    CONVERTED,
    SHARD_BYTES,
    assert_same_folder,
    assert_same_tree,
    contents,
    link_checkpoint,
    load_tree,
    read_tensors,
    update_json,
    write_tensors,
)
from safetensors import safe_open

from cosmos3_jax import Cosmos3
from cosmos3_jax.checkpoint import convert, load
from cosmos3_jax.checkpoint.convert import convert_checkpoint
from cosmos3_jax.checkpoint.rules import CheckpointError
from cosmos3_jax.cli import main as cli
from cosmos3_jax.models.transformer import unstack_layers

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def public_trees(public_checkpoint):
    return {dtype: load_tree(public_checkpoint, dtype) for dtype in ("bfloat16", "float32")}


def test_the_layouts_load_alike(public_checkpoint, public_trees, converted, tmp_path):
    """Public, converted in either dtype, and converted again: identical trees, bit for bit."""
    assert_same_tree(load_tree(converted, "bfloat16"), public_trees["bfloat16"])
    wide = convert_checkpoint(public_checkpoint, tmp_path / "wide", dtype="float32")
    for dtype, tree in public_trees.items():
        assert_same_tree(load_tree(wide, dtype), tree)
    narrow = convert_checkpoint(wide, tmp_path / "narrow", max_shard_bytes=SHARD_BYTES)
    assert_same_folder(narrow, converted)


def test_twice_gives_the_same_bytes(public_checkpoint, converted, tmp_path):
    again = convert_checkpoint(public_checkpoint, tmp_path / "again", max_shard_bytes=SHARD_BYTES)
    assert_same_folder(again, converted)
    assert_same_folder(
        convert_checkpoint(converted, tmp_path / "third", max_shard_bytes=SHARD_BYTES), converted
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "third"]


def test_what_is_written(public_checkpoint, converted):
    """Shards with an index for each component, the configurations and the tokenizer; no more."""
    others = {name for name in contents(converted) if CONVERTED not in name}
    assert others == {
        "model_index.json", "scheduler/scheduler_config.json", "sound_tokenizer/config.json",
        "text_tokenizer/chat_template.jinja", "text_tokenizer/special_tokens_map.json",
        "text_tokenizer/tokenizer.json", "text_tokenizer/tokenizer_config.json",
        "transformer/config.json", "vae/config.json",
    }  # fmt: skip
    for name in others:
        assert (converted / name).read_bytes() == (public_checkpoint / name).read_bytes(), name


@pytest.mark.parametrize("component", ["transformer", "vae", "sound_tokenizer"])
def test_shards_and_index(converted, component):
    folder = converted / component
    shards = sorted(folder.glob("*.safetensors"))
    count = len(shards)
    assert count > (component != "sound_tokenizer")  # in bfloat16 sound fits into one
    assert [path.name for path in shards] == [
        f"params-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)
    ]
    index = json.loads((folder / "params.safetensors.index.json").read_text())
    held = {}
    for path in shards:
        assert path.stat().st_mode & 0o444 == 0o444  # others may read it, as any file
        with safe_open(path, framework="np") as file:
            assert file.metadata() == {"format": "pt"}
            held |= dict.fromkeys(file.keys(), path.name)
            sizes = [file.get_tensor(key).nbytes for key in file.keys()]  # noqa: SIM118 (no dict)
        assert sum(sizes) <= SHARD_BYTES or len(sizes) == 1
    assert index["weight_map"] == held
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in read_tensors(folder).values())


def test_a_recipe_is_kept(public_checkpoint, tmp_path):
    source = link_checkpoint(public_checkpoint, tmp_path / "source")
    (source / load.RECIPE_FILE).write_text('{"num_frames": 5}')
    target = convert_checkpoint(source, tmp_path / "target")
    assert load.load_config(target).recipe.num_frames == 5


@pytest.mark.parametrize("layout", ["public", "converted"])
def test_no_sound(request, public_trees, tmp_path, layout):
    """Both layouts can lose their sound; what is left says so and loads."""
    source = request.getfixturevalue({"public": "public_checkpoint"}.get(layout, layout))
    target = convert_checkpoint(source, tmp_path / "silent", sound=False)
    assert not (target / "sound_tokenizer").exists()
    assert json.loads((target / "transformer" / "config.json").read_text())["sound_gen"] is False
    assert json.loads((target / "model_index.json").read_text())["sound_tokenizer"] == [None, None]
    assert not [key for key in read_tensors(target / "transformer") if "sound" in key]
    model = Cosmos3.from_pretrained(target, "bfloat16")
    expected = {
        name: tree for name, tree in public_trees["bfloat16"].items() if name != "sound_vae"
    }
    silent = {k: v for k, v in expected["gen"].items() if not k.startswith("sound_")}
    assert_same_tree(model.params, expected | {"gen": unstack_layers(silent)})
    with pytest.raises(CheckpointError, match="has no sound .* load it without"):
        Cosmos3.from_pretrained(target, load_sound=True)
    with pytest.raises(ValueError, match="sound is asked for, but this checkpoint has none"):
        model.prepare("a ball", sound=True)


def test_sound_asked_of_a_source_without_it(silent_checkpoint, tmp_path):
    with pytest.raises(CheckpointError, match="has no sound"):
        convert_checkpoint(silent_checkpoint, tmp_path / "target", sound=True)
    assert list(tmp_path.iterdir()) == []
    target = convert_checkpoint(silent_checkpoint, tmp_path / "target")
    assert_same_tree(load_tree(target, "bfloat16"), load_tree(silent_checkpoint, "bfloat16"))


def test_sound_decoder_alone(public_checkpoint, tmp_path):
    source = link_checkpoint(public_checkpoint, tmp_path / "source")
    tensors = read_tensors(source / "sound_tokenizer")
    decoder = {key: value for key, value in tensors.items() if key.startswith("decoder.")}
    write_tensors(source / "sound_tokenizer", decoder)
    tree = load_tree(convert_checkpoint(source, tmp_path / "target"), "bfloat16")
    assert set(tree["sound_vae"]) == {"decoder"}
    assert_same_tree(tree, load_tree(source, "bfloat16"))


def test_the_command(public_checkpoint, tmp_path, capsys):
    """`python -m convert` is the command `cosmos3-jax convert`, whose errors are one line."""
    target = tmp_path / "target"
    arguments = [str(public_checkpoint), str(target), "--dtype", "float32", "--no-sound"]
    command = [sys.executable, "-m", "convert", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"wrote {target}\n"), done.stderr
    library = tmp_path / "library"
    convert_checkpoint(public_checkpoint, library, dtype="float32", sound=False)
    assert_same_folder(target, library)

    assert cli.main(["convert", *arguments]) == 2
    error = f"cosmos3-jax: error: {target} exists; choose another folder or pass --overwrite\n"
    assert capsys.readouterr().err == error
    assert cli.main(["convert", str(public_checkpoint), str(target), "--overwrite"]) == 0
    assert load.load_config(target).has_sound


def test_an_existing_target_is_kept(public_checkpoint, converted, tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    (target / "thesis.txt").write_text("the only copy")
    with pytest.raises(
        FileExistsError, match="target exists; choose another folder or pass --over"
    ):
        convert_checkpoint(public_checkpoint, target)
    with pytest.raises(FileExistsError, match="target is not a checkpoint and is not replaced"):
        convert_checkpoint(public_checkpoint, target, overwrite=True)
    assert contents(tmp_path) == {"target/thesis.txt": b"the only copy"}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("place", [".", "inside", "vae/inside", ".."])
def test_a_target_that_overlaps_the_source_is_refused(
    public_checkpoint, tmp_path, place, overwrite
):
    source = link_checkpoint(public_checkpoint, tmp_path / "around" / "source")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="overlap; choose a folder beside it"):
        convert_checkpoint(source, source / place, overwrite=overwrite)
    assert contents(tmp_path) == before


def test_impossible_options(public_checkpoint, tmp_path):
    for options, message in (
        ({"dtype": "int8"}, "dtype='int8' is not supported; choose bfloat16 or float32"),
        ({"max_shard_bytes": 5 * 10**9 + 1}, "max_shard_bytes=5000000001 is not between 1 and"),
        ({"max_shard_bytes": 0}, "max_shard_bytes=0 is not between"),
    ):
        with pytest.raises(ValueError, match=message):
            convert_checkpoint(public_checkpoint, tmp_path / "target", **options)
    assert convert.MAX_SHARD_BYTES <= convert.LARGEST_SHARD <= 5 * 10**9
    source = link_checkpoint(public_checkpoint, tmp_path / "source")
    shutil.rmtree(source / "text_tokenizer")
    with pytest.raises(CheckpointError, match="has no text_tokenizer/; download"):
        convert_checkpoint(source, tmp_path / "target")
    update_json(source / "transformer" / "config.json", hidden_act="relu2")
    with pytest.raises(ValueError, match="hidden_act='relu2' is not supported"):
        convert_checkpoint(source, tmp_path / "target")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
