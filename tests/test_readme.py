"""The README's examples run as they stand, and do what is said of them."""

import json
import re
import shlex
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from rounding import check, relative_l2

from cosmos3_jax import cli, media

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def run(*containing: str, checkpoint: str = "random") -> dict:
    """Run the one example that has each of these words in it, one after the other; its names.

    They say `tiny`; those that are alike for any checkpoint run on the faster one.
    """
    names: dict = {}
    for word in containing:
        [code] = (block for block in PYTHON if word in block)
        assert '"tiny"' in code or names
        code = code.replace('"tiny"', f'"{checkpoint}"')
        exec(compile(code, "README.md", "exec"), names)
    return names


def test_the_pure_function_example():
    names = run("jax.grad")
    assert float(jnp.abs(names["stronger"] - names["latents"]).max()) > 0
    assert jnp.isfinite(names["gradient"]).all() and jnp.abs(names["gradient"]).max() > 0


ENCODED = 1e-5  # relative L2 distance of latents, of two programs that encode


def test_the_examples_of_given_frames_and_autoencoders(record_property):
    names = run("condition_frames=(0, -1)", "encode_sound")
    assert names["video"].shape == names["again"].shape == (1, 3, 9, 96, 160)
    assert names["heard"].shape == names["waveform"].shape
    # A video between two images: both ends are what the encoder makes of the clip.
    model, clip = names["model"], [names["first"], *[names["last"]] * 8]
    settings = dict(num_frames=9, num_inference_steps=1, condition_frames=(0, -1))
    between = model.generate("Dusk.", video=clip, output="latents", **settings)["video"]
    colours = np.asarray([[255, 0, 0], [0, 0, 255]], np.float32) / 255
    pixels = np.repeat(colours, [1, 8], axis=0).T[None, :, :, None, None]
    pixels = np.broadcast_to(pixels, (1, 3, 9, 96, 160))
    given = model.encode_video(pixels)
    for t in (0, 2):
        assert relative_l2(between[:, :, t], given[:, :, t]) <= ENCODED
    check(record_property, ENCODED, model.encode_video, pixels)
    assert np.abs(between[:, :, 1] - given[:, :, 1]).max() > 0.1
    kept, latents = np.asarray(names["kept"]["video"]), np.asarray(names["latents"])
    np.testing.assert_array_equal(kept[:, :, 1], latents[:, :, 1])
    assert (kept[:, :, 2] != latents[:, :, 2]).mean() > 0.99


def test_the_training_example(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run("make_train_step", checkpoint="tiny")
    assert names["state"].step == 3 and np.isfinite(names["metrics"]["loss"])
    ours, base = (
        names[name].params["gen"]["layers"]["0"]["attention"]["qkv"]["kernel"]
        for name in ("tuned", "model")
    )
    assert 0 < float(jnp.abs(ours - base).max()) < 1e-2
    with names["Checkpoints"]("outputs/run") as checkpoints:
        assert checkpoints.last == 3


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Run a command of the README on the random checkpoint, small, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(cli.startup, "use_compilation_cache", lambda *_: None)

    def run(command: str) -> Path:
        arguments = shlex.split(command)[1:]
        at = arguments.index("--checkpoint") + 1
        arguments[at] = "random"
        frames = [] if "--num-frames" in arguments else ["--num-frames", "9"]
        size = ["--height", "48", "--width", "80", "--steps", "1", "--guidance-scale", "1"]
        assert cli.main([*arguments, *frames, *size]) == 0
        return Path(arguments[arguments.index("--out") + 1])

    return run


def test_the_commands_of_each_mode(small):
    commands = re.findall(r"^# (\w+),.*\n(cosmos3-jax generate .*)$", README, re.MULTILINE)
    made = {mode: small(command) for mode, command in commands}
    assert made.keys() == {"T2I", "T2V", "T2AV", "I2V", "V2V"}
    assert media.read_image(made.pop("T2I")).shape == (48, 80, 3)
    for mode, path in made.items():
        info = media.probe(path)
        assert (info.frames, bool(info.audio_codec)) == (9, mode == "T2AV")


def test_what_is_said_of_full_width_is_in_the_report():
    report = json.loads((ROOT / "benchmarks/results/verify_nano_width.json").read_text("utf-8"))
    worst = max(row["relative_l2"] for row in report["rows"] if row["dtype"] == "float32")
    assert report["passed"] and f"float32 at most {worst:.1e}".replace("e-0", "e-") in README
    assert f"{report['peak_memory_gib']:.1f} GiB of host memory at the most" in README
