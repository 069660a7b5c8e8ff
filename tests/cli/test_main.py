"""The command line: a whole run in a process of its own, its record, and what repeats it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from command_line import PROMPT, SAME, SMALL, assert_equal, assert_same, generate, load, replay
from rounding import check

import cosmos3_jax
from cosmos3_jax import Cosmos3
from cosmos3_jax.checkpoint import load as checkpoint_load
from cosmos3_jax.io import media
from cosmos3_jax.parallel import device
from cosmos3_jax.runtime import memory
from cosmos3_jax.sampling import unipc

pytestmark = pytest.mark.usefixtures("own_cache", "no_compilation_cache")

STAGES = {"preprocess", "model_load", "denoise", "decode", "to_cpu", "encode", "total"}

# Runs one command in a process of its own and says what was imported.
CHILD = """
import json, sys
from cosmos3_jax.cli.main import main
status = main(sys.argv[2:])
json.dump(sorted({name.partition(".")[0] for name in sys.modules}), open(sys.argv[1], "w"))
sys.exit(status)
"""


@pytest.fixture(scope="module")
def made(own_cache, tmp_path_factory):
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


def test_a_whole_run_imports_no_torch(made):
    modules = set(json.loads((made[0] / "modules.json").read_text()))
    assert {"cosmos3_jax", "jax", "av"} <= modules  # the list is one
    assert not modules & {"torch", "diffusers", "transformers", "accelerate"}


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
        "timesteps": [999, 908], "steps_per_program": 2, "dtype": "float32",
        "resolved_system_prompt": None,
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


@pytest.mark.parametrize(("option", "limit"), [("yes", None), ("auto", "resident"), ("no", None)])
def test_offload(tmp_path, monkeypatch, model, latents, option, limit):
    """With offload each part is read once, and the latents are the same."""
    read = []
    original = checkpoint_load.load_params

    def spy(components, dtype, parts=None, **options):
        read.append(parts)
        return original(components, dtype, parts=parts, **options)

    if limit:
        request = model.prepare(
            PROMPT, num_frames=9, height=48, width=80, sound=True, negative_prompt="blurry"
        )
        needed = memory.generation_bytes(model.config, model.job(request))["peak"]
        monkeypatch.setattr(device, "memory_limit", lambda: needed - 1)
    monkeypatch.setattr(checkpoint_load, "load_params", spy)
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
    assert_equal(load(arrays), replay(noted, model))  # whose weights stay
    assert_same(load(arrays), latents)


def test_compiled_programs_are_kept(made, tmp_path):
    """By the run in `made`; the folder that cannot be made costs the cache alone."""
    folder = Path(os.environ["XDG_CACHE_HOME"]) / "cosmos3_jax" / "xla"
    names = " ".join(path.name for path in folder.iterdir())
    assert "advance" in names and "decode_video" in names
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
