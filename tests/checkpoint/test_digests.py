"""Digests of a checkpoint's files: what is another file is named, and nothing else is."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from cosmos3_jax.checkpoint import digests

WEIGHTS = "transformer/model.safetensors"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "checkpoint"
    (folder / "transformer").mkdir(parents=True)
    values = np.random.default_rng(0).standard_normal(2**21).astype(np.float32)
    save_file({"a": values[: 2**20], "b": values[2**20 :]}, folder / WEIGHTS)
    (folder / "model_index.json").write_text("{}")
    (folder / "notes.md").write_text("not the model's")
    return folder


def change(path, offset):
    with path.open("r+b") as file:
        file.seek(offset)
        old = file.read(1)
        file.seek(offset)
        file.write(bytes([old[0] ^ 1]))


def test_what_changed_is_named(folder):
    before = digests.of_folder(folder)
    assert set(before["files"]) == {WEIGHTS, "model_index.json"} and before["revision"] is None
    assert digests.differences(before, digests.of_folder(folder)) == []
    change(folder / WEIGHTS, 5_000_000)
    (folder / "model_index.json").unlink()
    (folder / "cosmos3_recipe.json").write_text("{}")
    assert digests.differences(before, digests.of_folder(folder)) == [
        "model_index.json is missing",
        "cosmos3_recipe.json was not there",
        f"{WEIGHTS} holds something else",
    ]


@pytest.mark.parametrize("offset", [0, 20, 1_000_000, -1])
def test_large_files_by_header_and_blocks(folder, monkeypatch, offset):
    """Every block is within 8 KiB of the next here, so any change is in one."""
    monkeypatch.setattr(digests, "WHOLE_BYTES", 1000)
    before = digests.of_folder(folder)
    assert set(before["files"][WEIGHTS]) == {"bytes", "sampled"}
    path = folder / WEIGHTS
    change(path, offset % path.stat().st_size)
    words = digests.differences(before, digests.of_folder(folder))
    assert words == [f"{WEIGHTS} holds something else"]


def test_a_change_between_the_blocks_needs_the_whole_digest(folder, monkeypatch):
    monkeypatch.setattr(digests, "WHOLE_BYTES", 1000)
    monkeypatch.setattr(digests, "BLOCK_BYTES", 512)
    before = digests.of_folder(folder, whole=True)
    change(folder / WEIGHTS, 3 * 2**20 + 700)
    sampled, whole = digests.of_folder(folder), digests.of_folder(folder, whole=True)
    assert digests.differences(before, sampled) == []
    assert digests.differences(before, whole) == [f"{WEIGHTS} holds something else"]


def test_a_whole_digest_is_kept(folder, monkeypatch):
    monkeypatch.setattr(digests, "WHOLE_BYTES", 1000)
    first = digests.of_folder(folder, whole=True)
    read = []
    of_file = digests.of_file
    monkeypatch.setattr(digests, "of_file", lambda path: read.append(path.name) or of_file(path))
    assert digests.of_folder(folder, whole=True) == first
    assert read == ["model_index.json"]


@pytest.mark.parametrize("kept", ["[]", "null", "5", "[" * 100_000, "no json"])
def test_kept_digests_that_are_damaged_are_made_again(folder, monkeypatch, kept):
    monkeypatch.setattr(digests, "WHOLE_BYTES", 1000)
    first = digests.of_folder(folder, whole=True)
    (folder.parent / "cache" / "cosmos3_jax" / "digests.json").write_text(kept)
    assert digests.of_folder(folder, whole=True) == first


def test_a_snapshot_of_the_hubs_has_its_commit_and_blobs(folder):
    snapshot = folder.parent / "models--owner--name" / "snapshots" / "0123abcd"
    blobs = snapshot.parent.parent / "blobs"
    (snapshot / "transformer").mkdir(parents=True)
    blobs.mkdir()
    (folder / WEIGHTS).rename(blobs / "9f86d081")
    (snapshot / WEIGHTS).symlink_to(blobs / "9f86d081")
    found = digests.of_folder(snapshot)
    assert found["revision"] == "0123abcd"
    assert found["files"][WEIGHTS]["blob"] == "9f86d081"
    assert json.loads(json.dumps(found)) == found


def test_a_loras_settings_belong_to_its_file(tmp_path):
    file, settings = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    save_file({"a": np.ones(3, np.float32)}, file)
    assert digests.of_lora(file) == digests.of_path(file) == digests.of_file(file)
    found = set()
    for alpha in (8, 16):
        settings.write_text(json.dumps({"lora_alpha": alpha}))
        found |= {digests.of_lora(file)}
        assert digests.of_lora(tmp_path) == digests.of_path(tmp_path)
        assert digests.of_lora(file) == digests.of_lora(tmp_path)  # it holds nothing else
    assert len(found) == 2 and digests.of_file(file) not in found
