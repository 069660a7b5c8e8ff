"""Checkpoint folders and LoRA files made to be read elsewhere, to hang, or to fill the memory."""

import json
import os
import shutil
import socket
import time

import pytest
from checkpoint_files import INDEX, PUBLIC, open_checkpoint, replace_file
from training_run import CONFIG

from cosmos3_jax.checkpoint import digests, find, lora_files
from cosmos3_jax.checkpoint.convert import convert_checkpoint
from cosmos3_jax.checkpoint.lora_spellings import Settings
from cosmos3_jax.checkpoint.rules import CheckpointError, raise_problems

SHARD = f"{PUBLIC}-00002-of-00005.safetensors"


def one_line(raised) -> str:
    text = str(raised.value)
    assert "\n" not in text and len(text) < 1000
    return text


@pytest.mark.parametrize(
    "name",
    [
        "../vae/diffusion_pytorch_model.safetensors", "/etc/passwd", "sub/x.safetensors", "..", ".",
        "", "a\\b", "a\0b", "a\nb", None, 3, ["x"], {"x": 1}, True,
    ],
)  # fmt: skip
def test_an_index_names_files_beside_it(broken, name):
    index = {"weight_map": {"proj_in.weight": name}}
    replace_file(broken / "transformer" / INDEX, json.dumps(index).encode())
    with pytest.raises(CheckpointError, match="it may name nothing but files beside it") as raised:
        open_checkpoint(broken)
    assert INDEX in one_line(raised)


def test_links_of_a_cache_are_followed(broken, tmp_path):
    """As the Hub's are: names in the snapshot, contents beside it under their digests."""
    (tmp_path / "blobs").mkdir()
    for path in sorted((broken / "transformer").iterdir()):
        blob = tmp_path / "blobs" / digests.of_file(path)
        path.rename(blob)
        path.symlink_to(os.path.relpath(blob, path.parent))
    open_checkpoint(broken)


@pytest.mark.parametrize(
    "name",
    [
        "transformer/config.json", "scheduler/scheduler_config.json", "cosmos3_recipe.json",
        f"transformer/{INDEX}", f"transformer/{SHARD}",
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["pipe", "socket", "folder", "link to a pipe", "link to itself"])
def test_what_is_no_file_is_not_opened(broken, tmp_path, monkeypatch, name, kind):
    path = broken / name
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        monkeypatch.chdir(path.parent)  # its name may have a hundred letters
        socket.socket(socket.AF_UNIX).bind(path.name)
    elif kind == "folder":
        path.mkdir()
    elif kind == "link to a pipe":
        os.mkfifo(tmp_path / "pipe")
        path.symlink_to(tmp_path / "pipe")
    else:
        path.symlink_to(path)
    if kind == "link to itself" and not name.startswith("transformer"):
        return  # it is not there, and need not be
    with pytest.raises((ValueError, OSError)) as raised:
        find.open_folder(broken)
        open_checkpoint(broken)
    assert str(broken) in one_line(raised)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"weight_map": []}', "[]", "{}", "\ufeff{}"])
def test_an_index_that_is_none(broken, text):
    replace_file(broken / "transformer" / INDEX, text.encode())
    with pytest.raises(CheckpointError, match="is not a safetensors index with") as raised:
        open_checkpoint(broken)
    one_line(raised)


@pytest.mark.parametrize("name", ["transformer/config.json", "cosmos3_recipe.json"])
@pytest.mark.parametrize("content", [b"[" * 100_000, b"\xff", b"9" * 5000, b"null", b"\x00"])
def test_configurations_that_are_none(broken, name, content):
    (broken / name).unlink(missing_ok=True)
    (broken / name).write_bytes(content)
    with pytest.raises(ValueError) as raised:
        find.open_folder(broken)
    assert str(broken / name) in one_line(raised)


def test_a_configuration_without_end_is_not_read(broken):
    path = broken / "transformer" / "config.json"
    path.unlink()
    with path.open("wb") as file:
        file.truncate(2**40)  # which takes no room
    with pytest.raises(ValueError, match=r"config.json has 1099511627776 bytes, and at most"):
        find.open_folder(broken)


def test_a_header_without_end_is_not_read(broken):
    replace_file(broken / "transformer" / SHARD, (2**40).to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match="its header has 1099511627776 bytes, more than"):
        open_checkpoint(broken)


def test_names_of_tensors_are_shown_in_one_line():
    with pytest.raises(CheckpointError) as raised:
        raise_problems("they differ", {"unexpected": ["a\nb\x1b[2J" + 1000 * "c"]})
    assert str(raised.value).splitlines()[2][:14] == "    a b?[2Jccc"
    assert len(str(raised.value)) < 300


def settings(**fields) -> str:
    return json.dumps({"r": 3, "lora_alpha": 3} | fields)


@pytest.mark.parametrize(
    "pattern", [r"(\w+)*!", 23 * "(.|l)" + "!", "a.*.*.*.*b", "a?" * 30 + "a" * 30, 2000 * "a"]
)
def test_patterns_that_are_searched_for_without_end(pattern):
    start = time.process_time()
    with pytest.raises(CheckpointError, match="could be searched for without end: give names"):
        Settings.parse("here", settings(rank_pattern={pattern: 2}))
    assert time.process_time() - start < 3


def test_patterns_that_end():
    """The slowest that are read, and more of them than Python keeps compiled."""
    patterns = {f"{i}.*.*.*!": 2 for i in range(1000)}
    found = Settings.parse("here", settings(rank_pattern=patterns))
    start = time.process_time()
    for layer in range(5):
        assert found is not None and found.rank_of(f"layers.{layer}.self_attn.to_add_out") == 3
    assert time.process_time() - start < 3
    with pytest.raises(CheckpointError, match="has 4097 patterns, and 4096 is the limit"):
        Settings.parse("here", settings(rank_pattern={f"{i}": 2 for i in range(4097)}))


@pytest.mark.parametrize("text", ["[" * 100_000, '{"r":' + 900 * "[" + 900 * "]" + "}", b"\xff"])
def test_settings_that_are_none(text):
    with pytest.raises(CheckpointError, match="here") as raised:
        Settings.parse("here", text)
    one_line(raised)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_lora_that_is_a_pipe(tmp_path, name):
    (tmp_path / "adapter_model.safetensors").write_bytes(b"\x02" + bytes(7) + b"{}")
    shutil.rmtree(tmp_path / name, ignore_errors=True)
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    for path in (tmp_path / "adapter_model.safetensors", tmp_path):
        with pytest.raises(CheckpointError, match="is a pipe|is missing") as raised:
            lora_files.load(path, CONFIG)
        assert str(tmp_path) in one_line(raised)


@pytest.mark.parametrize("name", ["text_tokenizer/notes.txt", "vae/my_config.json"])
def test_links_out_of_a_checkpoint_are_not_copied(broken, tmp_path, name):
    """Else a published conversion would hold a file that its maker alone may read."""
    (tmp_path / "secret").write_text("secret")
    (broken / name).symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="is a link out of the checkpoint") as raised:
        convert_checkpoint(broken, tmp_path / "target")
    assert str(broken / name) in one_line(raised)
    assert not [*tmp_path.glob("target*")]


def test_links_of_a_cache_are_copied(broken, tmp_path):
    snapshot, blobs = tmp_path / "cache" / "snapshots" / "1", tmp_path / "cache" / "blobs"
    snapshot.parent.mkdir(parents=True)
    blobs.mkdir()
    broken.rename(snapshot)
    (blobs / "1").write_text("of it")
    (snapshot / "text_tokenizer" / "notes.txt").symlink_to("../../../blobs/1")
    (snapshot / "text_tokenizer" / "id_rsa").write_text("of no use")
    target = convert_checkpoint(snapshot, tmp_path / "target")
    assert (target / "text_tokenizer" / "notes.txt").read_text() == "of it"
    assert not (target / "text_tokenizer" / "id_rsa").exists()
