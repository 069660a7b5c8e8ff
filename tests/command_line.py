"""What the tests of the command line share: a small command, and how its results are compared."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from rounding import relative_l2

from cosmos3_jax import Cosmos3
from cosmos3_jax.cli import main as cli
from cosmos3_jax.sampling import stages
from cosmos3_jax.sampling.request import Request

# The smallest video with sound of the random checkpoint that has an odd latent height and width.
RANDOM = ["--checkpoint", "random"]
SHAPE = [*RANDOM, "--num-frames", "9", "--height", "48", "--width", "80"]
PROMPT = "A red ball"
TEXTS = ["--prompt", PROMPT, "--negative-prompt", "blurry"]
BARE = ["generate", *SHAPE, "--steps", "2", "--sound"]
SMALL = [*BARE, *TEXTS]
# Relative L2 distance of latents that another process made; measured in `cli/test_main.py`.
SAME = 1e-5


def generate(out: Path, *arguments: str) -> dict:
    """Run `generate` here; what it wrote beside the video."""
    assert cli.main([*SMALL, "--out", str(out), *map(str, arguments)]) == 0
    return json.loads(out.with_suffix(".json").read_text())


def load(path: Path) -> dict:
    with np.load(path) as arrays:
        return dict(arrays)


def assert_equal(ours, reference):
    """Of one program, which ran in this process twice."""
    assert ours.keys() == reference.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], reference[name])


def assert_same(ours, reference):
    """Of another process, which may run another program."""
    assert ours.keys() == reference.keys()
    for name in ours:
        assert relative_l2(ours[name], reference[name]) <= SAME


def replay(record: dict, model: Cosmos3) -> dict:
    """The latents of a record, through Python."""
    names = (
        "prompt", "negative_prompt", "system_prompt", "prompt_style", "num_frames", "height",
        "width", "fps", "guidance_scale", "sigmas", "seed",
    )  # fmt: skip
    settings = {name: record[name] for name in names} | {"sound": record["sound_frames"] > 0}
    settings |= {name: record[name]["path"] for name in ("image", "video") if record[name]}
    if record["video"]:
        settings |= {name: record[name] for name in ("condition_frames", "keep")}
    return model.generate(**settings, output="latents")


def without_a_model(
    monkeypatch: pytest.MonkeyPatch, meanwhile: Callable[[], object] = lambda: None
) -> None:
    """Let a generation come of no weights: a video whose frames show its request's noise.

    Args:
        monkeypatch: undoes it.
        meanwhile: called while the video is made.
    """

    def run(self: Cosmos3, request: Request, *, after: Callable, **_) -> dict:
        _, loop = stages.up_to_the_loop()
        meanwhile()
        after(loop, {"latents": {"video": request.noise}})
        t, h, w = request.video_shape
        fading = np.linspace(0.2, 0.1, 4 * t - 3)[:, None, None]
        frames = 0.5 + fading * np.clip(request.noise[:, :3, :1], -2, 2)
        result = {"video": frames.repeat(16, -2).repeat(16, -1), "fps": float(request.fps)}
        if request.sound_frames:
            result |= {"sound": np.zeros((1, 2, 1920 * request.sound_frames), np.float32)}
            result |= {"sample_rate": 48_000}
        return result

    monkeypatch.setattr(Cosmos3, "load", lambda self, *_, **__: self)
    monkeypatch.setattr(Cosmos3, "run", run)
