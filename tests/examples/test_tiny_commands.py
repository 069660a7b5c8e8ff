"""Commands of `examples/tiny` that no other test runs."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cosmos3_jax.checkpoint import load
from cosmos3_jax.io import media
from examples.tiny import curves, grammar, world

TINY = Path(load.__file__).parents[1] / "data" / "tiny"


@pytest.fixture
def command(monkeypatch):
    """(module, *arguments) -> its `main`, as `python -m` runs it."""

    def run(name: str, *arguments) -> None:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        importlib.import_module(f"examples.tiny.{name}").main()

    return run


def test_the_judge_checks_true_clips(command, capsys):
    command("judge_check", "--count", "2", "--damage", "noise")
    assert "| direction | 100.0% (2/2)" in capsys.readouterr().out


def test_sheets_of_new_and_of_stored_clips(command, tmp_path, capsys):
    sheet, video = tmp_path / "sheet.png", tmp_path / "clip.mp4"
    command("sheets", "--rows", "1", "--out", sheet)
    [(scene, _)] = grammar.held_out_sentences(1)
    pixels, sound = world.render(scene)
    clip = {"video": np.moveaxis(pixels, -1, 0), "sound": sound, "sample_rate": 48_000}
    media.save_mp4(clip, video)
    video.with_suffix(".json").write_text('{"prompt": "A circle."}')
    command("contact_sheet", video, "--out", tmp_path / "contact.png")
    assert capsys.readouterr().out.count(": 1 clips") == 2
    for path in (sheet, tmp_path / "contact.png"):
        assert Image.open(path).size[0] > 500


def test_assemble_a_base_and_change_its_recipe(command, tmp_path, capsys):
    base = tmp_path / "base"
    vaes = ("--video", TINY / "vae", "--sound", TINY / "sound_tokenizer")
    command("assemble", "base", *vaes, "--out", base)
    command("assemble", "recipe", "--steps", "3", "--shift", "5", "--out", base)
    assert capsys.readouterr().out.count(f"{base}: ") == 2
    recipe = json.loads((base / load.RECIPE_FILE).read_text("utf-8"))
    assert recipe["num_inference_steps"] == 3 and recipe["flow_shift"] == 5


def test_curves_of_the_logs_that_are_there(command, tmp_path):
    with pytest.raises(FileNotFoundError, match="no log of sound, video or towers"):
        curves.read(tmp_path)
    lines = {
        "sound": [{"step": 50 * i, "snr": 0.1 * i} for i in range(5)],
        "towers": [{"device": "a GPU"}, {"step": 9, "shares": {"pitch": 0.5}}]
        + [{"step": i, "loss": 2.0, "video": 1.0, "sound": 1.0} for i in range(12)],
    }
    for name, log in lines.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.jsonl").write_text("\n".join(map(json.dumps, log)))
    assert curves.read(tmp_path) == lines
    command("curves", "--runs", tmp_path, "--out", tmp_path / "curves.png")
    image = np.asarray(Image.open(tmp_path / "curves.png").convert("RGB"), int)
    for part in np.array_split(image, 3, axis=1):  # a panel each, with a coloured line
        assert (part.max(axis=2) - part.min(axis=2)).max() > 50
