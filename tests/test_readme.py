"""What README and the pages under docs/ tell a user to run is run, or at least exists."""

import contextlib
import functools
import io
import json
import re
import shlex
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from rounding import check, relative_l2

from cosmos3_jax import Cosmos3
from cosmos3_jax.cli import main as cli
from cosmos3_jax.io import media
from cosmos3_jax.parallel import device
from cosmos3_jax.pipeline import Step

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
LINKED = [*PAGES, *(ROOT / name for name in ("CONTRIBUTING.md", "examples/tiny/README.md"))]
LINKED += sorted((ROOT / "benchmarks").glob("*.md"))
TEXTS = {page: page.read_text("utf-8") for page in LINKED}


def blocks(page: Path, language: str = r"\w*") -> list[str]:
    """The fenced code blocks of a page."""
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXTS[page], re.DOTALL | re.MULTILINE)


PYTHON = [block for page in PAGES for block in blocks(page, "python")]
# Of each block, words that it alone has: what is not named here is run by no test.
EXAMPLES = (
    "save_mp4(out, \"crossing.mp4\"", "save_mp4(out, \"car.mp4\"", "model.steps(request)",
    "condition_frames=(0, -1)", "encode_sound", "jax.grad", "make_train_step",
)  # fmt: skip


def example(word: str) -> str:
    """The one example that has this word in it."""
    [code] = (block for block in PYTHON if word in block)
    return code


def run(*containing: str, checkpoint: str = "random") -> dict:
    """Run the examples that have these words in them, one after the other; their names.

    They say `tiny`; those that are alike for any checkpoint run on the faster one.
    """
    names: dict = {}
    for word in containing:
        code = example(word)
        assert '"tiny"' in code or names
        code = code.replace('"tiny"', f'"{checkpoint}"')
        exec(compile(code, word, "exec"), names)
    return names


def test_each_example_is_run():
    assert sorted(map(PYTHON.index, map(example, EXAMPLES))) == list(range(len(PYTHON)))


@pytest.mark.parametrize("word", EXAMPLES[:2])
def test_the_examples_of_a_whole_generation(word, tmp_path, monkeypatch):
    """Their requests are prepared as they stand; a small video stands for what would be made."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    asked = []

    def made(self, request, **options):
        asked.append(request)
        sound = np.zeros((1, 2, 10_000), np.float32)
        return {"video": np.zeros((1, 3, 5, 48, 80)), "sound": sound, "sample_rate": 48_000}

    monkeypatch.setattr(Cosmos3, "load", lambda self, *_, **__: self)
    monkeypatch.setattr(Cosmos3, "run", made)
    code = example(word)
    assert "nvidia/Cosmos3-Nano" in code
    exec(compile(code.replace("nvidia/Cosmos3-Nano", "random"), word, "exec"), {})
    assert [request.sound_frames > 0 for request in asked] == [True]
    [file] = tmp_path.glob("*.mp4")
    assert media.probe(file).frames == 5


@pytest.mark.dry
def test_the_pure_function_example():
    names = run("jax.grad")
    assert float(jnp.abs(names["stronger"] - names["latents"]).max()) > 0
    assert jnp.isfinite(names["gradient"]).all() and jnp.abs(names["gradient"]).max() > 0


def test_the_example_of_steps(capsys, monkeypatch):
    """Its request is prepared as it stands; other steps are given out (`test_steps` makes them)."""
    latents = {"video": np.zeros((1, 48, 2, 6, 6))}

    def steps(self, request):
        for index in range(request.num_inference_steps):
            yield Step(index, 0.5, latents, latents)

    monkeypatch.setattr(Cosmos3, "load", lambda self, *_: self)
    monkeypatch.setattr(Cosmos3, "steps", steps)
    names = run("model.steps(request)")
    assert names["step"].index == 2 < names["request"].num_inference_steps - 1
    assert capsys.readouterr().out.splitlines() == ["0 0.5 0.0", "1 0.5 0.0", "2 0.5 0.0"]


ENCODED = 1e-5  # relative L2 distance of latents, of two programs that encode


@pytest.mark.dry
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


@pytest.mark.dry
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
    """Run a command of the README on the random checkpoint, small, in a folder with the docs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(device, "use_compilation_cache", lambda *_: None)
    (tmp_path / "docs").symlink_to(ROOT / "docs")

    def run(command: str) -> Path:
        arguments = shlex.split(command)[1:]
        at = arguments.index("--checkpoint") + 1
        arguments[at] = "random"
        if "--aspect" in arguments:  # of Nano's sizes; the random checkpoint has one
            at = arguments.index("--aspect")
            del arguments[at : at + 2]
        still = arguments[arguments.index("--out") + 1].endswith(".png")
        frames = [] if still else ["--num-frames", "9"]
        size = ["--height", "48", "--width", "80", "--steps", "1", "--guidance-scale", "1"]
        assert cli.main([*arguments, *frames, *size]) == 0
        return Path(arguments[arguments.index("--out") + 1])

    return run


def lines(page: Path) -> list[str]:
    """The lines of a page's code blocks, those that go on after a backslash as one."""
    return "\n".join(blocks(page)).replace("\\\n", " ").splitlines()


@pytest.mark.dry
def test_the_commands_of_each_mode(small):
    commands = re.findall(
        r"^# (\w+),.*\n(cosmos3-jax generate .*)$", "\n".join(lines(README)), re.M
    )
    made = {mode: small(command) for mode, command in commands}
    assert made.keys() == {"T2I", "T2V", "T2AV", "I2V", "V2V"}
    assert media.read_image(made.pop("T2I")).shape == (48, 80, 3)
    for mode, path in made.items():
        info = media.probe(path)
        assert (info.frames, bool(info.audio_codec)) == (9, mode == "T2AV")


@functools.cache
def help_of(command: str) -> str:
    """What `cosmos3-jax command --help` prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit):
        cli.main([command, "--help"])
    return out.getvalue()


def options(page: Path) -> set[tuple[str, str]]:
    """Each command of ours in a page's code blocks, with each of its options."""
    text = re.sub(r"\n +", " ", "\n".join(lines(page)))  # an indented line goes on
    commands = re.findall(r"\bcosmos3-jax +([a-z]+)([^\n#]*)", text)
    return {(name, x) for name, rest in commands for x in re.findall(r"(?<=\W)--[a-z-]+", rest)}


def test_options_of_the_commands_exist():
    found = set().union(*map(options, PAGES))
    assert {name for name, _ in found} == {"generate", "convert", "info", "bench"}
    for name, option in found:
        assert re.search(rf"{option}(?![\w-])", help_of(name)), (name, option)


def test_scripts_of_the_commands_exist():
    text = "\n".join(line for page in PAGES for line in lines(page))
    modules = set(re.findall(r"python -m ([\w.]+)", text)) - {"pip"}
    scripts = set(re.findall(r"python ([\w/]+\.py)", text))
    assert modules and scripts
    for name in modules:  # some lines begin with `cd tests`
        paths = [folder / name.replace(".", "/") for folder in (ROOT, ROOT / "tests")]
        found = [path.with_suffix(".py").is_file() for path in paths]
        assert any(found) or any((path / "__main__.py").is_file() for path in paths), name
    assert all((ROOT / name).is_file() for name in scripts), scripts


CAPTION = [
    "temporal_caption", "audio_description", "subjects", "background_setting", "lighting",
    "aesthetics", "cinematography", "style_medium", "artistic_style", "context", "actions",
    "segments", "text_renders",
]  # fmt: skip
OVER_TIME = ("temporal_caption", "audio_description", "actions", "segments")


def test_the_captions():
    """Keys in the order of training; the README shows the one of a video as it is."""
    folder = ROOT / "docs/captions"
    captions = {path.stem: json.loads(path.read_text("utf-8")) for path in folder.iterdir()}
    still = [key for key in CAPTION if key not in OVER_TIME]
    assert list(captions.pop("image")) == still
    assert captions.keys() == {"video", "image-to-video", "video-to-video"}
    for caption in captions.values():
        assert list(caption) == CAPTION
        last = caption["actions"][-1]["time"]
        assert last.endswith("-0:07") and caption["segments"][0]["time_range"] == "0:00-0:07"
    assert blocks(README, "json") == [(folder / "video.json").read_text("utf-8")]


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", TEXTS[page], re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", LINKED, ids=lambda page: str(page.relative_to(ROOT)))
def test_results_that_a_page_names_are_there(page):
    for name in re.findall(r"results/[\w.]+\.(?:json|log)", TEXTS[page]):
        assert (ROOT / "benchmarks" / name).is_file(), name


@pytest.mark.parametrize("page", LINKED, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", TEXTS[page]):
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target


def test_the_readme_is_short_and_leads_to_every_page():
    assert len(TEXTS[README].splitlines()) <= 200
    for page in PAGES[1:]:
        assert f"](docs/{page.name})" in TEXTS[README], page.name


def test_what_is_said_of_full_width_is_in_the_report():
    report = json.loads((ROOT / "benchmarks/results/verify_nano_width.json").read_text("utf-8"))
    text = TEXTS[ROOT / "docs/verification.md"]
    worst = max(row["relative_l2"] for row in report["rows"] if row["dtype"] == "float32")
    assert report["passed"] and f"float32 at most {worst:.1e}".replace("e-0", "e-") in text
    assert f"{report['peak_memory_gib']:.1f} GiB of host memory at the most" in text
