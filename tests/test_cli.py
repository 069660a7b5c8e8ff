"""The command line: what it writes, what it says, and what it refuses before anything is loaded."""

import contextlib
import functools
import hashlib
import json
import os
import pty
import re
import subprocess
import sys
import termios
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from rounding import check, relative_l2

import cosmos3_jax
from cosmos3_jax import Cosmos3, cli, device, media, memory, pipeline, unipc
from cosmos3_jax.generate import encode_conditions

# The smallest video with sound of the random checkpoint that has an odd latent height and width.
RANDOM = ["--checkpoint", "random"]
SHAPE = [*RANDOM, "--num-frames", "9", "--height", "48", "--width", "80"]
PROMPT = "A red ball"
TEXTS = ["--prompt", PROMPT, "--negative-prompt", "blurry"]
BARE = ["generate", *SHAPE, "--steps", "2", "--sound"]
SMALL = [*BARE, *TEXTS]
# Relative L2 distance of latents that another process made.
SAME = 1.5e-5
STAGES = {"preprocess", "model_load", "denoise", "decode", "to_cpu", "encode", "total"}

# Runs one command in a process of its own and says what was imported.
CHILD = """
import json, sys
from cosmos3_jax.cli import main
status = main(sys.argv[2:])
json.dump(sorted({name.partition(".")[0] for name in sys.modules}), open(sys.argv[1], "w"))
sys.exit(status)
"""


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """The random checkpoint is written anew, not found in the home folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def no_compilation_cache(monkeypatch):
    """Commands run in this process leave its settings alone; what they do is seen in others."""
    monkeypatch.setattr(cli.startup, "use_compilation_cache", lambda *_: None)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder, output and imports of one whole run in a process of its own."""
    folder = tmp_path_factory.mktemp("made")
    arguments = [
        *SMALL, "--seed", "7", "--out", str(folder / "deep" / "ball.mp4"),
        "--save-latents", str(folder / "ball.npz"),
    ]  # fmt: skip
    command = [sys.executable, "-c", CHILD, str(folder / "modules.json"), *arguments]
    # Programs of these sizes are made in less than the half second from which they are kept.
    environment = os.environ | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return folder, done


@pytest.fixture(scope="module")
def record(made):
    return json.loads((made[0] / "deep" / "ball.json").read_text())


@pytest.fixture(scope="module")
def latents(made):
    with np.load(made[0] / "ball.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def model(cache):
    return Cosmos3.from_pretrained("random", dtype="float32")


@pytest.fixture
def unloaded(monkeypatch):
    """Whoever asks for weights fails the test."""

    def fail(*_, **__):
        pytest.fail("weights were loaded")

    monkeypatch.setattr(Cosmos3, "from_pretrained", fail)
    monkeypatch.setattr(pipeline.load, "load_params", fail)


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


def test_a_whole_run_imports_no_torch(made):
    modules = set(json.loads((made[0] / "modules.json").read_text()))
    assert {"cosmos3_jax", "jax", "av"} <= modules  # the list is one
    assert not modules & {"torch", "diffusers", "transformers", "accelerate"}


def test_the_package_imports_no_torch():
    code = (
        "import sys, cosmos3_jax; print({'torch', 'diffusers', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr


def test_the_video_opens_again(made, model, latents):
    path = made[0] / "deep" / "ball.mp4"
    info = media.probe(path)
    assert (info.frames, info.height, info.width, info.fps) == (9, 48, 80, 24)
    assert (info.video_codec, info.audio_codec, info.channels) == ("h264", "aac", 2)
    assert info.sample_rate == model.config.sound_vae.sampling_rate == 48000
    assert info.duration == pytest.approx(9 / 24)
    assert abs(info.audio_duration - info.duration) <= 1 / 24  # within one frame
    # What is in it is what the latents decode to. h264 and AAC are lossy, and random weights make
    # noise, the worst there is for both, in colour above all: so brightness is compared. Measured:
    # 0.99, where the next frame has 0.2; and 0.90 in sound.
    decoded, luma = model.decode(latents), np.array([0.2126, 0.7152, 0.0722])
    frames, _ = media.read_video(path)
    expected = np.asarray(decoded["video"])[0].transpose(1, 2, 3, 0)
    for ours, frame in zip(frames @ luma, expected @ luma, strict=True):
        assert np.corrcoef(ours.ravel(), frame.ravel())[0, 1] > 0.95
    sound, _ = media.read_sound(path)
    expected = np.asarray(decoded["sound"])[0, :, : sound.shape[1]]
    assert np.corrcoef(sound.ravel(), expected.ravel())[0, 1] > 0.8
    assert sorted(p.name for p in path.parent.iterdir()) == [
        "ball.json",
        "ball.mp4",
    ]  # nothing else


def test_the_record_has_everything(made, record, model):
    request = model.prepare(
        PROMPT, num_frames=9, height=48, width=80, negative_prompt="blurry", sound=True
    )
    expected = {
        "checkpoint": "random", "prompt": PROMPT, "negative_prompt": "blurry",
        "system_prompt": None, "prompt_style": "native", "num_frames": 9, "height": 48,
        "width": 80, "fps": 24.0,
        "seed": 7, "noise": None, "num_inference_steps": 2,
        "guidance_scale": model.config.recipe.guidance_scale,
        "sigmas": unipc.sigmas("native", 2, model.config.recipe.flow_shift).tolist(),
        "timesteps": [999, 908], "dtype": "float32", "resolved_system_prompt": None,
        "prompt_tokens": request.text_mask.sum(),
        "negative_prompt_tokens": request.neg_text_mask.sum(),
        "sound_frames": request.sound_frames, "device": jax.devices()[0].device_kind,
    }  # fmt: skip
    assert {name: record[name] for name in expected} == expected
    assert record["versions"]["cosmos3_jax"] == cosmos3_jax.__version__
    assert record["versions"]["jax"] == jax.__version__
    # the resolved texts are what was tokenised
    for name, ids, mask in (
        ("resolved_prompt", request.text_ids, request.text_mask),
        ("resolved_negative_prompt", request.neg_text_ids, request.neg_text_mask),
    ):
        assert model.tokenizer.encode_chat(record[name]) == ids[mask].tolist()
    seconds = record["seconds"]
    assert seconds.keys() == STAGES
    stages = [value for stage, value in seconds.items() if stage != "total"]
    assert min(stages) >= 0 and max(stages) > 0
    assert seconds["total"] == pytest.approx(sum(stages), abs=0.004)  # each is rounded to 1 ms
    output = made[1].stdout
    assert all(stage in output for stage in STAGES)
    assert "ball.mp4" in output and "ball.json" in output and "ball.npz" in output


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


def test_the_record_makes_the_same_latents(record, latents, model):
    assert latents["video"].shape == (1, 48, 3, 3, 5)
    assert latents["sound"].shape == (1, 64, record["sound_frames"])
    assert_same(replay(record, model), latents)


def test_tolerance(record_property, record, model):
    def run(params):
        return replay(record, Cosmos3(model.config, params, model.tokenizer))

    check(record_property, SAME, run, model.params)


def test_saved_noise_makes_the_same_latents(tmp_path, latents, model):
    request = model.prepare(PROMPT, num_frames=9, height=48, width=80, sound=True, seed=7)
    np.savez(tmp_path / "noise.npz", noise=request.noise, sound_noise=request.sound_noise)
    for seed, saved in (("1", ["--noise", tmp_path / "noise.npz"]), ("7", [])):
        out = tmp_path / f"{seed}.npz"
        arguments = ["--seed", seed, "--save-latents", out]
        noted = generate(tmp_path / f"{seed}.mp4", *arguments, *saved)
        assert_same(load(out), latents)
        assert noted["noise"] == (str(tmp_path / "noise.npz") if saved else None)
    other = model.generate(
        PROMPT, num_frames=9, height=48, width=80, sound=True, seed=1, num_inference_steps=2,
        negative_prompt="blurry", output="latents",
    )  # fmt: skip
    assert np.abs(np.asarray(other["video"]) - latents["video"]).max() > 0.1


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
    assert noted["prompt"] == cli.DEFAULT_PROMPT
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
    assert "a.mp4: one frame is an image: .png or .jpg; name such" in capsys.readouterr().err


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
    said = capsys.readouterr().err  # one line, of which a script can make something
    assert said.startswith("cosmos3-jax: warning: the clip has 12 frames per second, the video 24")
    assert said.count("\n") == 1


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_gets_a_progress_bar(tmp_path, monkeypatch, terminal):
    """The bar itself is tested in test_pipeline.py."""
    asked = []

    def denoise(self, request, *, progress):
        asked.append(progress)
        raise KeyboardInterrupt

    monkeypatch.setattr(Cosmos3, "denoise", denoise)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    assert cli.main([*SMALL, "--out", str(tmp_path / "a.mp4")]) == 130
    assert asked == [terminal]


def test_outputs_are_replaced_only_if_asked(tmp_path, monkeypatch, capsys, unloaded):
    out, arrays = tmp_path / "a.mp4", tmp_path / "latents.npz"
    arguments = [*SMALL, "--out", str(out), "--save-latents", str(arrays)]
    for existing in (out, out.with_suffix(".json"), arrays):
        existing.write_bytes(b"mine")
        assert cli.main(arguments) == 2
        error = capsys.readouterr().err
        assert f"{existing} exists" in error and "--overwrite" in error
        assert existing.read_bytes() == b"mine"
        existing.unlink()


def test_overwrite_replaces_all_outputs(tmp_path):
    out, arrays = tmp_path / "a.mp4", tmp_path / "latents.npz"
    for existing in (out, out.with_suffix(".json"), arrays):
        existing.write_bytes(b"mine")
    generate(out, "--overwrite", "--save-latents", arrays)
    assert media.probe(out).frames == 9
    assert load(arrays).keys() == {"video", "sound"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "a.mp4", "latents.npz"]


@pytest.fixture
def files(tmp_path, silent_checkpoint):
    """Paths that a bad command line can name, as {name}."""
    (tmp_path / "file").write_text("no folder")
    (tmp_path / "latin.txt").write_bytes("Gr\u00fcn".encode("latin-1"))
    (tmp_path / "text.npz").write_text("no arrays")
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 and no more")
    np.save(tmp_path / "one.npy", np.zeros(3))
    np.savez(tmp_path / "latents.npz", video=np.zeros(3))
    np.savez(tmp_path / "shape.npz", noise=np.zeros((1, 48, 3, 5, 3)))
    np.savez(
        tmp_path / "sound.npz", noise=np.zeros((1, 48, 3, 3, 5)), sound_noise=np.zeros((1, 64, 9))
    )
    return {"tmp": str(tmp_path), "silent": str(silent_checkpoint)}


# A command line that cannot work, and what is said: the value, the limit and the way out.
BAD_ARGUMENTS = [
    ("--num-frames 190", "num_frames=190 is not 4k+1; nearest are 189 and 193"),
    ("--height 50", "height=50 is not a multiple of 16; nearest are 48 and 64"),
    ("--width 8", "width=8 is not a multiple of 16; nearest are 16 and 32"),
    ("--fps 0", "fps=0.0 must be positive and finite"),
    ("--num-frames 1", "num_frames=1 makes an image, which has no sound"),
    ("--steps 0", "num_inference_steps=0 must be at least 1"),
    ("--flow-shift 0", "flow_shift=0.0 must be positive"),
    ("--fps 2000", "fps=2000.0 is not between 0.1 and 1000"),
    ("--sigmas 0.9,0.5,1e-50,0", "sigmas must fall strictly"),
    ("--guidance-scale nan", "guidance_scale=nan must be a finite number"),
    ("--seed -1", "seed=-1 is outside 0..4294967295"),
    ("--sigmas 0.9,x,0", "--sigmas '0.9,x,0' must be numbers with commas between them"),
    ("--sigmas 0.9,0.4", "sigmas must end in 0, the last is 0.4"),
    ("--noise {tmp}/none.npz", "none.npz cannot be read as an npz file: [Errno 2]"),
    ("--noise {tmp}/text.npz", "text.npz cannot be read as an npz file"),
    ("--noise {tmp}/broken.npz", "broken.npz cannot be read as an npz file"),
    ("--noise {tmp}/one.npy", "one.npy cannot be read as an npz file"),
    ("--noise {tmp}/latents.npz", "latents.npz holds no array named noise"),
    ("--noise {tmp}/shape.npz", "noise has shape (1, 48, 3, 5, 3), this request needs (1, 48"),
    ("--noise {tmp}/sound.npz", "sound_noise has shape (1, 64, 9), this request needs (1, 64, 10)"),
    ("--prompt-file {tmp}/none.txt", "No such file"),
    ("--negative-prompt-file {tmp}/latin.txt", "latin.txt is not UTF-8"),
    ("--checkpoint {tmp}/none", "none is not a folder, nor a Hub id of the form owner/name"),
    ("--checkpoint {tmp}", "is not a Cosmos3 checkpoint: it has no transformer/config.json"),
    ("--checkpoint {silent}", "has no sound (sound_gen is False"),
    ("--out {tmp}/file/a.mp4", "cannot write files in {tmp}/file"),
    ("--out /proc/cosmos3/a.mp4", "/proc/cosmos3/a.mp4: cannot write files in /proc/cosmos3"),
    ("--out {tmp}/a.avi", "the suffix '.avi' is not supported here; use .mp4"),
    ("--out {tmp}/a.png", "a.png: a video is an .mp4; name such a file, or change --num-frames"),
    ("--image {tmp}/none.png", "none.png does not exist"),
    ("--image {tmp}/file", "file is not an image that can be read"),
    ("--video {tmp}/file", "file is not a media file"),
    ("--video {tmp}", "is a folder; give a file"),
    ("--condition-frames 0,1", "condition_frames belongs to video"),
    ("--condition-frames=", "--condition-frames '' must be whole numbers"),
    ("--condition-frames 0,x", "--condition-frames '0,x' must be whole numbers with commas"),
    ("--keep last", "keep belongs to video"),
    ("--save-latents {tmp}/file/a.npz", "cannot write files in {tmp}/file"),
    ("--save-latents {tmp}/a.txt", "the suffix '.txt' is not supported here; use .npz"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), BAD_ARGUMENTS, ids=[a for a, _ in BAD_ARGUMENTS])
def test_bad_arguments_are_one_line_and_load_nothing(
    tmp_path, files, capsys, unloaded, arguments, message
):
    command = [*BARE, "--out", str(tmp_path / "a.mp4"), *arguments.format(**files).split()]
    assert cli.main(command) == 2
    said = capsys.readouterr()
    assert message.format(**files) in said.err
    assert said.err.startswith("cosmos3-jax: error: ") and said.err.count("\n") == 1
    assert not said.out
    assert not (tmp_path / "a.mp4").exists() and not (tmp_path / "a.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--schedule", "fast"], "invalid choice: 'fast'"),
        (["--prompt-style", "x"], "invalid choice: 'x'"),
        (["--steps", "2.5"], "invalid int value: '2.5'"),
        (["--prompt", "a", "--prompt-file", "b"], "not allowed with argument --prompt"),
        (["--frames", "9"], "unrecognized arguments: --frames"),
        (["--image", "a.png", "--video", "b.mp4"], "not allowed with argument --image"),
        (["--keep", "middle"], "invalid choice: 'middle'"),
    ],
)
def test_what_the_parser_refuses(capsys, unloaded, arguments, message):
    with pytest.raises(SystemExit) as stop:
        cli.main(["generate", *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_an_interrupt_is_no_traceback(tmp_path, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Cosmos3, "from_pretrained", interrupt)
    assert cli.main([*SMALL, "--out", str(tmp_path / "a.mp4")]) == 130
    assert capsys.readouterr().err == "cosmos3-jax: interrupted\n"
    assert not list(tmp_path.iterdir())


def number_after(text: str, name: str) -> float:
    [line] = [line for line in text.splitlines() if line.strip().startswith(name + " ")]
    return float(line.strip().removeprefix(name).split()[0].replace(",", ""))


def test_info_says_what_is_there(capsys, monkeypatch, unloaded, silent_checkpoint, model):
    assert cli.main(["info", "--sound", "--dtype", "float32", *SHAPE]) == 0
    text = capsys.readouterr().out
    assert text.startswith("random: public layout\n")
    for component in ("transformer", "vae", "sound_tokenizer"):
        assert number_after(text, component) > 10  # tensors
    assert "sound: yes" in text and "num_inference_steps=8" in text
    assert "9 frames of 48x80 in float32" in text
    stages = [number_after(text, stage) for stage in memory.STAGES.values()]
    assert number_after(text, "peak") == max(stages) > 0
    assert "GiB here" not in text  # a CPU has no limit
    monkeypatch.setattr(device, "memory_limit", lambda: 2**40)
    assert cli.main(["info", "--sound", *SHAPE]) == 0
    assert re.search(r"of 1024.000 GiB here +fits +fits\n", capsys.readouterr().out)
    monkeypatch.setattr(device, "memory_limit", lambda: 2**20)
    assert cli.main(["info", "--sound", *SHAPE]) == 0
    assert re.search(r"of 0.001 GiB here +too large +too large\n", capsys.readouterr().out)

    assert cli.main(["info", "--checkpoint", str(silent_checkpoint)]) == 0
    text = capsys.readouterr().out
    assert "sound: no" in text and "sound_tokenizer" not in text
    # For a GPU, though there is none here: its kernels need no logits.
    assert "189 frames of 720x1280 in bfloat16" in text and number_after(text, "logits") == 0


@pytest.mark.parametrize(
    "options, message",
    [
        (["--checkpoint", "nowhere"], "nowhere is not a folder"),
        (["--checkpoint", "{silent}", "--sound"], "has no sound"),
        (["--num-frames", "190"], "num_frames=190"),
        (["--sound", "--fps", "nan"], "fps=nan"),
        (["--fps", "0"], "fps=0"),
    ],
    ids=str,
)
def test_info_refuses_before_it_says_anything(capsys, silent_checkpoint, options, message):
    given = [option.format(silent=silent_checkpoint) for option in options]
    assert cli.main(["info", *given]) == 2
    said = capsys.readouterr()
    assert message in said.err and not said.out


def test_info_downloads_no_weights(capsys, monkeypatch, silent_checkpoint):
    """Of a checkpoint on the Hub: what a shape needs can be known before 30 GB are fetched."""
    asked = []

    def find(path_or_hub_id, weights=True):
        asked.append(weights)
        return silent_checkpoint

    monkeypatch.setattr(cli, "find_checkpoint", find)
    assert cli.main(["info", "--checkpoint", "owner/name"]) == 0
    text = capsys.readouterr().out
    assert asked == [False] and "weights not looked at" in text
    assert number_after(text, "peak") > 0 and number_after(text, "text tower") > 0


def test_memory_is_what_the_arrays_take(model):
    """Weights, conditions, latents and pixels are exact: they are compared with the arrays."""
    leaves = {part: jax.tree.leaves(tree) for part, tree in model.params.items()}
    counts = memory.parameter_counts(model.config)
    names = {
        "und": "text tower",
        "gen": "media tower",
        "video_vae": "video VAE",
        "sound_vae": "sound VAE",
    }
    assert counts == {names[part]: sum(x.size for x in arrays) for part, arrays in leaves.items()}

    shape = dict(num_frames=9, height=48, width=80)
    request = model.prepare(PROMPT, sound=True, negative_prompt="blurry", **shape)
    needed = memory.generation_bytes(
        model.config, **shape, sound=True, dtype="float32", text_tokens=request.text_ids.shape[1]
    )
    for part, arrays in leaves.items():
        assert needed[part] == sum(x.nbytes for x in arrays)
    assert needed["latents"] == request.noise.nbytes + request.sound_noise.nbytes
    assert needed["pixels"] == 3 * 9 * 48 * 80 * 4
    conditions = jax.eval_shape(
        functools.partial(encode_conditions, config=model.config), model.params["und"], request
    )
    exact = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(conditions))
    masks = exact - needed["condition"]  # lengths and masks, and the unused clean latents' padding
    assert abs(masks) <= 0.01 * exact
    alone = memory.generation_bytes(model.config, **shape, guidance=False, dtype="float32")
    both = memory.generation_bytes(model.config, **shape, dtype="float32")
    assert 2 * alone["condition"] == both["condition"]


def test_what_does_not_fit_is_one_line_and_loads_nothing(tmp_path, capsys, monkeypatch, unloaded):
    monkeypatch.setattr(device, "memory_limit", lambda: 2**20)
    assert cli.main([*SMALL, "--out", str(tmp_path / "a.mp4")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "9 frames of 48x80 with sound need" in error


@pytest.mark.parametrize(("option", "limit"), [("yes", None), ("auto", "resident"), ("no", None)])
def test_offload(tmp_path, monkeypatch, model, latents, option, limit):
    """With offload each part is read once, and the latents are the same."""
    read = []
    original = pipeline.load.load_params

    def spy(components, dtype, parts=None, **options):
        read.append(parts)
        return original(components, dtype, parts=parts, **options)

    if limit:
        request = model.prepare(
            PROMPT, num_frames=9, height=48, width=80, sound=True, negative_prompt="blurry"
        )
        sizes = memory.request_sizes(model.config, request)
        needed = memory.generation_bytes(model.config, dtype="float32", **sizes)["peak"]
        monkeypatch.setattr(device, "memory_limit", lambda: needed - 1)
    monkeypatch.setattr(pipeline.load, "load_params", spy)
    arrays = tmp_path / "a.npz"
    noted = generate(
        tmp_path / "a.mp4", "--offload", option, "--seed", "7", "--save-latents", arrays
    )
    offloads = option != "no"
    assert noted["offload"] is offloads
    if offloads:
        assert read == [["und"], ["gen"], ["video_vae"], ["sound_vae"]]
    else:
        assert [sorted(parts) for parts in read] == [["gen", "sound_vae", "und", "video_vae"]]
    assert_equal(load(arrays), latents)


def test_an_exhausted_device_is_one_line(tmp_path, capsys, monkeypatch):
    def exhaust(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating\nmore")

    monkeypatch.setattr(Cosmos3, "denoise", exhaust)
    assert cli.main([*SMALL, "--out", str(tmp_path / "a.mp4")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "the device ran out of memory" in error


def test_compiled_programs_are_kept(made, tmp_path):
    """By the run in `made`; the folder that cannot be made costs the cache alone."""
    folder = Path(os.environ["XDG_CACHE_HOME"]) / "cosmos3_jax" / "xla"
    names = " ".join(path.name for path in folder.iterdir())
    assert "sample_latents" in names and "decode_video" in names
    other = tmp_path / "other"
    arguments = [*SMALL, "--out", str(tmp_path / "a.mp4"), "--overwrite"]
    command = [sys.executable, "-m", "cosmos3_jax.cli", *arguments]
    environment = dict(os.environ, JAX_COMPILATION_CACHE_DIR=str(other))
    off = [*command, "--no-compilation-cache"]
    done = subprocess.run(off, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and not other.exists(), done.stderr
    environment["JAX_COMPILATION_CACHE_DIR"] = "/proc/cosmos3"
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "no compilation cache in /proc/cosmos3" in done.stderr
    assert "set JAX_COMPILATION_CACHE_DIR to one that can be written" in done.stderr


@pytest.mark.parametrize(
    "given, expected",
    [
        ({}, "True {home}/cosmos3_jax/xla 0.5"),
        ({"JAX_ENABLE_COMPILATION_CACHE": "0"}, "False None 1.0"),
        ({"JAX_COMPILATION_CACHE_DIR": "gs://bucket/x"}, "True gs://bucket/x 0.5"),
        ({"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "7"}, "True {home}/cosmos3_jax/xla 7.0"),
    ],
    ids=str,
)
def test_what_jax_is_told_goes_before_our_cache_settings(tmp_path, given, expected):
    script = (
        "import jax; from cosmos3_jax import startup; startup.use_compilation_cache(); "
        "config = jax.config; print(config.jax_enable_compilation_cache, "
        "config.jax_compilation_cache_dir, config.jax_persistent_cache_min_compile_time_secs)"
    )
    environment = {k: v for k, v in os.environ.items() if "CACHE" not in k}
    environment |= {"XDG_CACHE_HOME": str(tmp_path / "home")} | given
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == expected.format(home=tmp_path / "home")
    assert not done.stderr and not (tmp_path / "gs:").exists()


def test_a_terminals_programs_are_kept_too(tmp_path):
    """The loop under a progress bar, as the command line runs it in a terminal."""
    arguments = [*SMALL, "--out", str(tmp_path / "a.mp4")]
    command = [sys.executable, "-m", "cosmos3_jax.cli", *arguments]
    environment = dict(os.environ, JAX_COMPILATION_CACHE_DIR=str(tmp_path / "xla"))
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"  # a step compiles fast
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))  # a bar in no columns is not drawn
    with open(ours, "rb", buffering=0) as terminal:
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=theirs, env=environment
        )
        os.close(theirs)
        said = b""
        with contextlib.suppress(OSError):  # the end of a terminal, on Linux
            while chunk := terminal.read(4096):
                said += chunk
    assert process.wait() == 0, said
    assert b"denoise" in said and b"2/2" in said
    names = " ".join(path.name for path in (tmp_path / "xla").iterdir())
    assert "sample_step" in names and "sample_latents" not in names


def test_inputs_are_never_overwritten(tmp_path, capsys, unloaded):
    """`--prompt-file car.json --out car.mp4` would write its record over the prompt."""
    prompt = tmp_path / "car.json"
    prompt.write_text('{"subjects": []}', encoding="utf-8")
    arguments = ["--prompt-file", str(prompt), "--out", str(tmp_path / "car.mp4"), "--overwrite"]
    assert cli.main(["generate", *arguments]) == 2
    assert "would be written and is also read" in capsys.readouterr().err
    assert prompt.read_text(encoding="utf-8") == '{"subjects": []}'
    clip = tmp_path / "car.mp4"
    clip.write_bytes(b"mine")
    command = ["generate", "--video", str(clip), "--out", str(clip), "--overwrite"]
    assert cli.main(command) == 2
    assert "would be written and is also read" in capsys.readouterr().err
    assert clip.read_bytes() == b"mine"
