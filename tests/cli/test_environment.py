"""What surrounds a command: no home, other platforms, JAX's own settings, closed streams."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from command_line import RANDOM

from cosmos3_jax.checkpoint import digests, random_checkpoint
from cosmos3_jax.checkpoint.find import find_checkpoint
from cosmos3_jax.checkpoint.rules import CheckpointError
from cosmos3_jax.cli import main as cli
from cosmos3_jax.parallel import device
from cosmos3_jax.runtime import programs
from cosmos3_jax.sampling import stages

pytestmark = pytest.mark.usefixtures("own_cache")
IMAGE = ["--num-frames", "1", "--height", "32", "--width", "32", "--steps", "1"]


@pytest.fixture
def homeless(monkeypatch):
    """A user without a HOME and without an entry in the list of users, as in some containers."""

    def fail(*_):
        raise RuntimeError("Could not determine home directory.")

    for name in ("HOME", "XDG_CACHE_HOME", "JAX_COMPILATION_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", fail)
    monkeypatch.setattr(Path, "expanduser", fail)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)


def test_without_a_home_there_is_no_compilation_cache(homeless, capsys):
    before = jax.config.jax_enable_compilation_cache
    folder = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_enable_compilation_cache", True)
    try:
        device.use_compilation_cache()
        assert not jax.config.jax_enable_compilation_cache
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        jax.config.update("jax_compilation_cache_dir", folder)
    said = capsys.readouterr().err
    assert said.startswith("cosmos3-jax: no compilation cache (there is no home folder: set HOME")
    assert said.count("\n") == 1


def test_without_a_home_other_caches_are_one_line(homeless, tmp_path):
    with pytest.raises(OSError, match="no home folder: set HOME or XDG_CACHE_HOME"):
        random_checkpoint.cached()
    with pytest.raises(CheckpointError, match="there is no folder ~/checkpoint"):
        find_checkpoint("~/checkpoint")
    (tmp_path / "config.json").write_text("{}")
    assert digests.of_folder(tmp_path, whole=True)["files"]["config.json"]["sha256"]


@pytest.mark.parametrize("error", [AssertionError(), RuntimeError("Unable to initialize backend")])
def test_a_platform_that_is_not_there_is_one_line(monkeypatch, capsys, unloaded, error):
    """JAX's error for a plugin that is missing has no text at all."""

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(jax, "local_devices", fail)
    platforms = jax.config.jax_platforms
    jax.config.update("jax_platforms", "cuda")
    try:
        assert cli.main(["info", "random"]) == 2
    finally:
        jax.config.update("jax_platforms", platforms)
    said = capsys.readouterr().err
    reason = str(error) or "AssertionError"
    assert f"error: JAX cannot start with JAX_PLATFORMS=cuda: {reason}. Installed are cpu" in said
    assert said.count("\n") == 1


def test_promotion_of_ranks_may_be_forbidden(model):
    """`JAX_NUMPY_RANK_PROMOTION=raise`: every stage is traced so, of an image to a video with
    sound, and of a video from text.
    """

    def trace(stage, values):
        static = stage.static(values)
        change = next(programs.calls(stage, values, None))
        inputs = stage.inputs(values | change)
        made = jax.eval_shape(
            lambda params, inputs: stage.function(params, *inputs, config=model.config, **static),
            model.weights.structs[stage.part], inputs,
        )  # fmt: skip
        traced.append(stage.name)
        return made

    settings = {"height": 48, "width": 80, "num_inference_steps": 2, "sound": True}
    image = np.zeros((48, 80, 3), np.uint8)
    with jax.numpy_rank_promotion("raise"):
        for given in ({"image": image}, {}):
            traced = []
            request = model.prepare("a red ball", num_frames=9, **settings, **given)
            values = stages.initial_values(request, output="media", decode_chunk_size=None)
            stages.walk(programs.structs_of(values), trace)
            assert len(traced) >= 4
        with pytest.raises(ValueError, match="rank_promotion"):  # it is on
            jax.numpy.ones(3) * jax.numpy.ones((2, 3))


# Several settings at once: each has made something fail elsewhere.
SETTINGS = {
    "JAX_NUMPY_RANK_PROMOTION": "raise", "JAX_ENABLE_X64": "1", "JAX_DEBUG_NANS": "1",
    "JAX_DEFAULT_MATMUL_PRECISION": "highest", "JAX_DEFAULT_DTYPE_BITS": "32",
    "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii",
}  # fmt: skip


def test_jaxs_settings_an_ascii_terminal_and_closed_streams(tmp_path):
    """A command works with all of them: its files hold the image, and nothing else."""
    command = [
        sys.executable, "-m", "cosmos3_jax.cli", "generate", "x", *RANDOM, *IMAGE, "--out",
        str(tmp_path / "a.png"), "--no-compilation-cache",
    ]  # fmt: skip
    shell = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh"]
    done = subprocess.run(shell + command, env=os.environ | SETTINGS)
    assert done.returncode == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.png"]
    assert b"cosmos3-jax:" not in (tmp_path / "a.png").read_bytes()


def test_a_hub_that_is_out_of_reach_is_said_soon(monkeypatch, tmp_path):
    """It took 38 s, of a client that tries again; what is cached works without a network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # the port is not in use
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    asked = "downloading it from the Hub failed: 127.0.0.1:9 cannot be reached .*refused"
    with pytest.raises(CheckpointError, match=asked):
        find_checkpoint("somebody/model", weights=False)
    commit = "0" * 40
    snapshot = tmp_path / "models--somebody--model" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "model_index.json").write_text("{}")
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(commit)
    assert find_checkpoint("somebody/model", weights=False) == snapshot
    monkeypatch.setenv("http_proxy", "http://name:password@127.0.0.1:11")
    monkeypatch.setenv("no_proxy", "")
    with pytest.raises(CheckpointError, match=r"failed: 127.0.0.1:11 cannot") as raised:
        find_checkpoint("somebody/other", weights=False)
    assert "password" not in str(raised.value)
