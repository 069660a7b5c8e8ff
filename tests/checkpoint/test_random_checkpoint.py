"""`random`, the checkpoint: reproducible, small, and a public one to any strict reader."""

import hashlib
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from checkpoint_files import assert_same_folder, contents, read_tensors
from oracle import load_pipeline
from safetensors import safe_open

from cosmos3_jax import Cosmos3
from cosmos3_jax.checkpoint import find, load, random_checkpoint
from cosmos3_jax.cli import main as cli


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("random") / "checkpoint"
    random_checkpoint.write(folder)
    return folder


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of this test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "cosmos3_jax"


def test_the_same_bytes_each_time(folder, tmp_path):
    random_checkpoint.write(tmp_path / "again")
    assert_same_folder(tmp_path / "again", folder)


def test_the_version_covers_the_content(folder):
    """Users keep the folder in a cache by its version: other content needs another version.

    If this fails, raise `random_checkpoint.VERSION` and write the new digest here. Weights count by
    names and shapes alone, since sums of squares may round differently on another CPU, and the
    tokenizer by its vocabulary, since its library chooses how to write it.
    """
    digest = hashlib.sha256()
    for name, content in contents(folder).items():
        if name.endswith(".safetensors"):
            with safe_open(folder / name, framework="np") as file:
                parts = {key: file.get_slice(key) for key in sorted(file.keys())}
                held = {key: (part.get_dtype(), part.get_shape()) for key, part in parts.items()}
            content = json.dumps(held).encode()
        if name.endswith("/tokenizer.json"):
            written = json.loads(content)
            words = [token["content"] for token in written["added_tokens"]]
            content = json.dumps([written["model"]["vocab"], words], sort_keys=True).encode()
        digest.update(name.encode() + b"\0" + content)
    assert (random_checkpoint.VERSION, digest.hexdigest()[:16]) == (1, "1979fce6201da291")


def test_it_is_small_and_in_shards(folder):
    assert sum(map(len, contents(folder).values())) <= 25e6  # it has 12 MB
    assert len(list((folder / "transformer").glob("*.safetensors"))) > 1


COMPONENTS = {
    "transformer": diffusers.Cosmos3OmniTransformer,
    "vae": diffusers.AutoencoderKLWan,
    "sound_tokenizer": diffusers.Cosmos3AVAEAudioTokenizer,
}


@pytest.mark.parametrize("name", COMPONENTS)
def test_the_oracle_misses_nothing(folder, name):
    """diffusers finds each key that it has, with its shape, and no other; the values are ours."""
    dtype = {"sound_tokenizer": torch.float32}.get(name, torch.bfloat16)
    model, report = COMPONENTS[name].from_pretrained(
        folder / name, output_loading_info=True, dtype=dtype
    )
    assert {kind: list(found) for kind, found in report.items()} == {
        "missing_keys": [],
        "unexpected_keys": [],
        "mismatched_keys": [],
        "error_msgs": [],
    }
    stored = read_tensors(folder / name)
    loaded = model.state_dict()
    assert loaded.keys() == stored.keys()
    for key, value in loaded.items():
        np.testing.assert_array_equal(value.float().numpy(), stored[key].astype(np.float32), key)


def test_the_oracle_loads_the_pipeline(folder):
    pipe = load_pipeline(folder)
    assert pipe.transformer.config.sound_gen
    assert pipe.sound_tokenizer is not None
    # Both tokenizers give the same ids, each of which has an embedding.
    ids = pipe.text_tokenizer("a red ball")["input_ids"]
    tokenizer = Cosmos3.open(folder).tokenizer
    assert tokenizer.backend.encode("a red ball").ids == ids
    assert tokenizer.vocab_size <= pipe.transformer.config.vocab_size


def test_the_cache_is_made_once(cache, monkeypatch):
    """In XDG_CACHE_HOME, found again by name, and nothing else beside it."""
    made = find.find_checkpoint("random")
    assert made == cache / f"random-v{random_checkpoint.VERSION}"
    assert [path.name for path in cache.iterdir()] == [made.name]
    monkeypatch.setattr(random_checkpoint, "write", None)  # it must not be called
    assert find.find_checkpoint("random") == made
    monkeypatch.setattr(random_checkpoint, "VERSION", random_checkpoint.VERSION + 1)
    with pytest.raises(TypeError):
        random_checkpoint.cached()


def test_without_xdg_the_cache_is_in_the_home(tmp_path, monkeypatch):
    for unset in ("", None):
        if unset is None:
            monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        else:
            monkeypatch.setenv("XDG_CACHE_HOME", unset)
        monkeypatch.setenv("HOME", str(tmp_path))
        made = random_checkpoint.cached()
        assert made == tmp_path / ".cache" / "cosmos3_jax" / f"random-v{random_checkpoint.VERSION}"
    assert load.load_config(made).has_sound


def test_a_folder_of_that_name_is_reached_as_one(cache, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.symlink(folder, "random")
    for name in ("./random", Path("random"), tmp_path / "random"):
        assert find.find_checkpoint(name) == Path(name)
    assert not cache.exists()
    assert find.find_checkpoint("random").is_relative_to(cache)


RACE = """
import os, sys, time
from cosmos3_jax import random_checkpoint

write = random_checkpoint.write

def write_together(folder):
    write(folder)
    open(sys.argv[1] + str(os.getpid()), "w").close()
    while len(os.listdir(os.path.dirname(sys.argv[1]))) < 2:  # until the other is here too
        time.sleep(0.01)

random_checkpoint.write = write_together
print(random_checkpoint.cached())
"""


def test_two_processes_leave_one_good_folder(cache, folder, tmp_path):
    """Both have written their own before either gives it its name."""
    (tmp_path / "ready").mkdir()
    command = [sys.executable, "-c", RACE, str(tmp_path / "ready" / "process")]
    racers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    made = cache / f"random-v{random_checkpoint.VERSION}"
    assert [racer.communicate(timeout=60)[0] for racer in racers] == [f"{made}\n"] * 2
    assert [racer.returncode for racer in racers] == [0, 0]
    assert [path.name for path in cache.iterdir()] == [made.name]
    assert_same_folder(made, folder)


def test_a_failed_write_leaves_nothing(cache, monkeypatch):
    def fail(folder):
        (folder / "transformer").mkdir(parents=True)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(random_checkpoint, "write", fail)
    with pytest.raises(OSError, match="cannot be written .*No space left.*; set XDG_CACHE_HOME"):
        random_checkpoint.cached()
    assert not cache.exists()


def test_an_unwritable_cache_names_the_way_out(tmp_path, monkeypatch, capsys):
    """A file stands where the cache should be: the one obstacle that stops root, too."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert cli.main(["info", "--checkpoint", "random"]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("cosmos3-jax: error: the random checkpoint cannot be written into ")
    assert str(tmp_path / "file" / "cosmos3_jax") in printed
    assert printed.endswith("; set XDG_CACHE_HOME to a folder that can be written\n")


def test_others_may_read_the_cache(cache):
    """One cache can serve several users: no file or folder in it is for its maker alone."""
    made = random_checkpoint.cached()
    for path in (made, *made.rglob("*")):
        assert path.stat().st_mode & stat.S_IROTH, path
