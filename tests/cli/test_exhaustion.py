"""A device whose memory ends while the latents are decoded: what was made is kept."""

import numpy as np
import pytest
from command_line import SMALL, load

from cosmos3_jax import Cosmos3
from cosmos3_jax.cli import main as cli
from cosmos3_jax.runtime.memory import OutOfDeviceMemory
from cosmos3_jax.sampling import stages

pytestmark = pytest.mark.usefixtures("own_cache", "no_compilation_cache")


@pytest.mark.parametrize("asked", [True, False])
def test_denoised_latents_are_kept(tmp_path, monkeypatch, capsys, asked):
    """Where `--save-latents` asks for them, or beside the output."""
    latents = {"video": np.ones((1, 48, 3, 3, 5), np.float32)}

    def run(self, request, *, after, **_):
        after(stages.up_to_the_loop()[1], {"latents": latents})
        raise OutOfDeviceMemory("the device ran out of memory.")

    monkeypatch.setattr(Cosmos3, "load", lambda self, *_, **__: self)
    monkeypatch.setattr(Cosmos3, "run", run)
    path = tmp_path / ("b.npz" if asked else "a.latents.npz")
    arguments = ["--save-latents", str(path)] if asked else []
    assert cli.main([*SMALL, "--out", str(tmp_path / "a.mp4"), *arguments]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    kept = f"The denoised latents are kept in {path}: Cosmos3.decode, in Python, makes the video"
    assert said.startswith("cosmos3-jax: error: the device ran out of memory. ") and kept in said
    np.testing.assert_array_equal(load(path)["video"], latents["video"])
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_nothing_is_kept_where_nothing_was_made(tmp_path, monkeypatch, capsys):
    def run(self, *_, **__):
        raise OutOfDeviceMemory("the device ran out of memory.")

    monkeypatch.setattr(Cosmos3, "load", lambda self, *_, **__: self)
    monkeypatch.setattr(Cosmos3, "run", run)
    assert cli.main([*SMALL, "--out", str(tmp_path / "a.mp4")]) == 2
    assert "kept" not in capsys.readouterr().err and not [*tmp_path.iterdir()]
