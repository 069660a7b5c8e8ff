"""The command line: what `generate` makes of prompts, images and clips."""

import hashlib
import json

import numpy as np
import pytest
from command_line import PROMPT, SHAPE, SMALL, TEXTS, assert_equal, generate, load, replay
from PIL import Image

from cosmos3_jax.cli import main as cli
from cosmos3_jax.cli.options import DEFAULT_PROMPT
from cosmos3_jax.io import media

pytestmark = pytest.mark.usefixtures("own_cache", "no_compilation_cache")


def test_explicit_sigmas_are_kept_exactly(tmp_path, model):
    """0.9 in float32 is below 0.9: 1000 times that is 899 when truncated."""
    noted = generate(
        tmp_path / "a.mp4", "--sigmas", "0.9,0.4,0", "--save-latents", tmp_path / "a.npz"
    )
    assert (noted["sigmas"], noted["timesteps"]) == ([0.9, 0.4, 0.0], [900, 400])
    assert_equal(replay(noted, model), load(tmp_path / "a.npz"))


def test_prompt_files_are_read_byte_for_byte(tmp_path, model):
    text, negative = "Ein roter  Ball\r\nim Gr\u00fcnen.\t \n", " grau \r\n"
    (tmp_path / "prompt.txt").write_bytes(text.encode())
    (tmp_path / "negative.txt").write_bytes(negative.encode())
    out, arrays = tmp_path / "a.mp4", tmp_path / "a.npz"
    arguments = [
        "generate", *SHAPE, "--steps", "1", "--out", out, "--save-latents", arrays,
        "--prompt-file", tmp_path / "prompt.txt",
        "--negative-prompt-file", tmp_path / "negative.txt",
        "--prompt-style", "diffusers", "--system-prompt", "", "--fps", "29.97",
    ]  # fmt: skip
    assert cli.main([str(x) for x in arguments]) == 0
    noted = json.loads(out.with_suffix(".json").read_text())
    assert (noted["prompt"], noted["negative_prompt"]) == (text, negative)
    assert noted["resolved_prompt"].startswith(text)  # diffusers' style takes off dots alone
    assert (noted["system_prompt"], noted["resolved_system_prompt"]) == ("", None)
    assert noted["fps"] == 29.97
    assert media.probe(out).fps == media.frame_rate(29.97)
    assert_equal(replay(noted, model), load(arrays))


def test_a_silent_video_without_guidance(tmp_path, model):
    out, arrays = tmp_path / "a.mp4", tmp_path / "a.npz"
    arguments = ["--guidance-scale", "1", "--save-latents", str(arrays), "--out", str(out)]
    assert cli.main(["generate", *SHAPE, "--steps", "1", *arguments]) == 0
    info, noted = media.probe(out), json.loads(out.with_suffix(".json").read_text())
    assert (info.frames, info.audio_codec) == (9, None)
    assert noted["sound_frames"] == 0
    assert noted["resolved_negative_prompt"] is noted["negative_prompt_tokens"] is None
    assert noted["prompt"] == DEFAULT_PROMPT
    assert_equal(replay(noted, model), load(arrays))


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_an_image(tmp_path, model, suffix):
    """One frame: the caption speaks of an image, and the file is one."""
    out, arrays = tmp_path / f"a{suffix}", tmp_path / "a.npz"
    command = [
        "generate", *SHAPE, "--num-frames", "1", "--steps", "1", *TEXTS, "--out", str(out),
        "--save-latents", str(arrays),
    ]  # fmt: skip
    assert cli.main(command) == 0
    noted = json.loads(out.with_suffix(".json").read_text())
    assert noted["resolved_prompt"] == f"{PROMPT}. This image is of 48x80 resolution."
    assert noted["num_frames"] == 1 and noted["condition_frames"] == []
    expected = media.to_uint8(np.asarray(model.decode_video(load(arrays)["video"])[0, :, 0]))
    difference = np.abs(media.read_image(out).transpose(2, 0, 1).astype(int) - expected)
    assert difference.max() == 0 if suffix == ".png" else difference.mean() < 10
    with Image.open(out) as image:
        assert image.format == {".png": "PNG", ".jpg": "JPEG"}[suffix]


def test_an_image_is_named_as_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    image = ["generate", *SHAPE, "--num-frames", "1", "--steps", "1"]
    assert cli.main([*image, *TEXTS]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["output.json", "output.png"]
    assert cli.main([*image, "--out", "a.mp4"]) == 2
    assert (
        "a.mp4: one frame is an image, .png, .jpg, .jpeg, .webp; name such"
        in capsys.readouterr().err
    )


def test_image_and_video_to_video(tmp_path, model, capsys):
    """A picture begins a video; the end of that video begins the next one; each with sound."""
    pixels = np.random.RandomState(0).randint(0, 256, (60, 90, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    settings = dict(
        num_frames=9, height=48, width=80, sound=True, num_inference_steps=2, output="latents",
        negative_prompt="blurry", seed=42, fps=12.0,
    )  # fmt: skip
    image, latents = tmp_path / "a.png", tmp_path / "a.npz"
    noted = generate(tmp_path / "b.mp4", "--image", image, "--save-latents", latents, "--fps", "12")
    assert noted["image"]["path"] == str(image) and noted["condition_frames"] == [0]
    assert noted["image"]["sha256"] == hashlib.sha256(image.read_bytes()).hexdigest()
    assert (noted["video"], noted["keep"]) == (None, None)
    assert_equal(load(latents), model.generate(PROMPT, image=pixels, **settings))
    assert_equal(load(latents), replay(noted, model))

    clip, latents = tmp_path / "b.mp4", tmp_path / "b.npz"
    arguments = ["--video", clip, "--condition-frames", "0,1", "--keep", "last"]
    noted = generate(tmp_path / "c.mp4", *arguments, "--save-latents", latents, "--fps", "12")
    assert noted["video"]["path"] == str(clip) and noted["condition_frames"] == [0, 1]
    assert (noted["image"], noted["keep"]) == (None, "last")
    frames = media.read_video(clip)[0][-5:]
    assert_equal(load(latents), model.generate(PROMPT, video=frames, **settings))
    assert_equal(load(latents), replay(noted, model))
    assert media.probe(tmp_path / "c.mp4").audio_codec == "aac"
    assert "warning" not in capsys.readouterr().err

    assert cli.main([*SMALL, "--out", str(tmp_path / "d.mp4"), "--video", str(clip)]) == 0
    said = capsys.readouterr().err.splitlines()  # of which a script can make something
    assert all(line.startswith("cosmos3-jax: ") for line in said)
    warned = [line for line in said if ": warning: the clip has 12 frames per second, the " in line]
    assert len(warned) == 1


def test_overwrite_replaces_all_outputs(tmp_path):
    out, arrays = tmp_path / "a.mp4", tmp_path / "latents.npz"
    for existing in (out, out.with_suffix(".json"), arrays):
        existing.write_bytes(b"mine")
    generate(out, "--overwrite", "--save-latents", arrays)
    assert media.probe(out).frames == 9
    assert load(arrays).keys() == {"video", "sound"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "a.mp4", "latents.npz"]
