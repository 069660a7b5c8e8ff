"""The command line's `info`, and the memory that it tells."""

import functools
import re
import subprocess
import sys

import jax
import pytest
from command_line import PROMPT, SHAPE

from cosmos3_jax import Cosmos3
from cosmos3_jax.cli import commands
from cosmos3_jax.cli import main as cli
from cosmos3_jax.config import Config, Recipes
from cosmos3_jax.parallel import device
from cosmos3_jax.runtime import memory
from cosmos3_jax.runtime.job import Job
from cosmos3_jax.sampling import stages

pytestmark = pytest.mark.usefixtures("own_cache", "no_compilation_cache")


def number_after(text: str, name: str) -> float:
    [line] = [line for line in text.splitlines() if line.strip().startswith(name + " ")]
    return float(line.strip().removeprefix(name).split()[0].replace(",", ""))


def test_info_says_what_is_there(capsys, monkeypatch, unloaded, silent_checkpoint, model):
    assert cli.main(["info", "--sound", "--dtype", "float32", *SHAPE]) == 0
    text = capsys.readouterr().out
    assert text.startswith("random: public layout\n")
    for component in ("transformer", "vae", "sound_tokenizer"):
        assert number_after(text, component) > 10  # tensors
    assert "sound: yes" in text
    assert re.search(r"text2image, if nothing else is said .*\n  1 frame, .* 8 steps, ", text)
    assert re.search(r"text2video, if nothing else is said .*\n  .* frames at .* 8 steps, ", text)
    assert "9 frames of 80x48 (width x height) with sound in float32" in text
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
    assert "189 frames of 1280x720 (width x height) in bfloat16" in text
    assert "attention without a fast kernel" not in text


@pytest.mark.parametrize(
    "options, message",
    [
        (["--checkpoint", "nowhere"], "there is no folder nowhere"),
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

    def find(path_or_hub_id, weights=True, revision=None):
        asked.append((weights, revision))
        return silent_checkpoint

    monkeypatch.setattr(commands, "find_checkpoint", find)
    assert cli.main(["info", "--checkpoint", "owner/name", "--revision", "v2"]) == 0
    text = capsys.readouterr().out
    assert asked == [(False, "v2")] and "weights not looked at" in text
    assert number_after(text, "peak") > 0 and number_after(text, "text tower") > 0


@pytest.mark.parametrize("name", ["nvidia/Cosmos3-Super", "cosmos3-nano"])
def test_info_of_published_models_needs_no_network(capsys, monkeypatch, name):
    monkeypatch.setattr(commands, "find_checkpoint", lambda *_, **__: pytest.fail("looked for"))
    assert cli.main(["info", name]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"{name}: sizes as published")
    steps, shift = (50, 5) if name.endswith("Super") else (50, 3)
    assert f"  1 frame, 960x960, {steps} steps, guidance 4, shift {shift}, native schedule" in text
    billions = number_after(text, "media tower") / 1000
    assert 25 < billions < 35 if name.endswith("Super") else 6 < billions < 9


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
    needed = memory.generation_bytes(model.config, model.job(request))
    for part, arrays in leaves.items():
        assert needed[part] == sum(x.nbytes for x in arrays)
    assert needed["latents"] == request.noise.nbytes + request.sound_noise.nbytes
    assert needed["pixels"] == 3 * 9 * 48 * 80 * 4
    encode = functools.partial(stages.encode_text, config=model.config)
    conditions = jax.eval_shape(encode, model.params["und"], request)["conditions"]
    exact = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(conditions))
    masks = exact - needed["condition"]  # lengths and masks, and the unused clean latents' padding
    assert abs(masks) <= 0.01 * exact
    silent = Job(**shape, dtype="float32")
    alone = memory.generation_bytes(model.config, silent.replace(negative_tokens=0))
    both = memory.generation_bytes(model.config, silent)
    assert 2 * alone["condition"] == both["condition"]


@pytest.mark.parametrize(
    "more", [["someone/Cosmos3-Nano"], ["nvidia/Cosmos3-Nano", "--revision=v2"]]
)
def test_only_the_published_models_are_taken_as_published(
    capsys, monkeypatch, silent_checkpoint, more
):
    monkeypatch.setattr(commands, "find_checkpoint", lambda *_, **__: silent_checkpoint)
    assert cli.main(["info", *more]) == 0
    assert "sizes as published" not in capsys.readouterr().out


def test_where_settings_come_from(capsys, monkeypatch):
    recipes = Recipes(file={"fps": 12}, recognised=False)
    monkeypatch.setitem(commands.PUBLISHED, "cosmos3-nano", Config(recipes=recipes))
    assert cli.main(["info", "cosmos3-nano"]) == 0
    text = capsys.readouterr().out
    assert "its sizes are of no model that is known here: the settings are Nano's" in text
    assert text.count("  from the checkpoint's recipe: fps\n") == 4
    assert text.count("negative prompt: empty") == 1
    assert text.count("negative prompt: the prompt style's") == 3
    assert " 0.000 GiB      0.000 GiB" not in text


def test_a_reader_that_stops_is_no_error():
    command = [sys.executable, "-m", "cosmos3_jax.cli", "info", "cosmos3-nano"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 1


@pytest.mark.parametrize("sound", [False, True])
def test_info_and_generate_need_the_same(capsys, model, sound):
    """The parts that are loaded, and the peak."""
    opened = Cosmos3.open("random", load_sound=sound)
    assert ("sound VAE" in memory.parameter_counts(opened.config)) == sound
    shape = dict(num_frames=9, height=48, width=80)
    job = Job.of_recipe(opened.config, sound=sound, dtype="float32", **shape)
    peak = memory.generation_bytes(opened.config, job.replace(device=device.PlannedGPU()))["peak"]
    assert cli.main(["info", *SHAPE, "--dtype", "float32", *["--sound"] * sound]) == 0
    assert number_after(capsys.readouterr().out, "peak") == pytest.approx(peak / 2**30, abs=6e-4)
