"""The command line as people type it: each habit works, or the error names the right spelling.

No weights are read here and nothing is denoised: of a generation these tests see the request, and
the files and messages that come of it.
"""

import json
import os
import re
import shlex
import subprocess
import sys

import av
import jax
import numpy as np
import pytest
from command_line import without_a_model
from PIL import Image

import cosmos3_jax
from cosmos3_jax import Cosmos3
from cosmos3_jax.cli import main as cli
from cosmos3_jax.cli import options
from cosmos3_jax.io import media
from cosmos3_jax.io.prepare import with_seed

pytestmark = pytest.mark.usefixtures("own_cache", "no_compilation_cache")

TINY = ["generate", "--checkpoint", "random", "--height", "32", "--width", "48"]
FIVE = [*TINY, "--num-frames", "5"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """The working directory; and a generation takes no time."""
    monkeypatch.chdir(tmp_path)
    without_a_model(monkeypatch)
    return tmp_path


def run(*arguments: str) -> int:
    """The exit status, also where the parser ends the process."""
    try:
        return cli.main([*arguments])
    except SystemExit as stop:
        return stop.code


# What is typed after `generate --checkpoint random`, the file that is made, and what its record
# says.
BALL = {"prompt": "A red ball"}
WORKS = [
    ("'A red ball' --num-frames 5 -o a.mp4", "a.mp4", BALL),
    ("--num-frames 5 --output a.mp4 'A red ball'", "a.mp4", BALL),
    ("--num-frames 5 --out a.mp4 -p 'A red ball'", "a.mp4", BALL),
    ("--num-frames 5 'A red ball' --sound", "output.mp4", BALL | {"sound_frames": 6}),
    ("--frames 5 --steps 3 -o a.mp4", "a.mp4", {"num_inference_steps": 3, "num_frames": 5}),
    ("--num-frames 5 --num-inference-steps 3", "output.mp4", {"num_inference_steps": 3}),
    ("--num-frames 5 --guidance 2 --shift 4", "output.mp4", {"guidance_scale": 2, "flow_shift": 4}),
    ("--num-frames 5 --size 256p --aspect 9:16", "output.mp4", {"height": 320, "width": 192}),
    ("--num-frames 1 --size 480p --aspect 1:1", "output.png", {"height": 640, "width": 640}),
    ("--num-frames 5 --size 48x32", "output.mp4", {"height": 32, "width": 48}),
    ("--num-frames 5 --seed 4294967295", "output.mp4", {"seed": 2**32 - 1}),
    ("'A red ball' -o pic.png", "pic.png", BALL | {"num_frames": 1}),
    ("'A red ball' -o pic.jpeg", "pic.jpeg", {"num_frames": 1}),
    ("'A red ball' -o pic.JPG", "pic.JPG", {"num_frames": 1}),
    ("--num-frames 1 -o pic.webp", "pic.webp", {"num_frames": 1}),
    ("--num-frames 5 -o a.webp", "a.webp", {"num_frames": 5}),
    ("--num-frames 5 -o a.gif", "a.gif", {"num_frames": 5}),
    ("--num-frames 5 -o a.webm --sound", "a.webm", {"sound_frames": 6}),
    ("--num-frames 5 -o a.mov --sound", "a.mov", {"sound_frames": 6}),
    ("--num-frames 5 --dtype fp32", "output.mp4", {"dtype": "float32"}),
    ("'A red ball' --num-frames 5 --dtype bf16", "output.mp4", {"dtype": "bfloat16"}),
    ("--num-frames 5 --no-sound -o a.mp4", "a.mp4", {"sound_frames": 0}),
    ("--num-frames 5 -o 'new folder/take:2.mp4'", "new folder/take:2.mp4", {}),
]


@pytest.mark.parametrize(("typed", "name", "noted"), WORKS, ids=[typed for typed, *_ in WORKS])
def test_what_works(here, typed, name, noted):
    shape = [] if "--size" in typed else TINY[3:]
    assert run(*TINY[:3], *shape, *shlex.split(typed)) == 0
    record = json.loads((here / name).with_suffix(".json").read_text())
    assert {key: record[key] for key in noted} == noted
    frames, suffix = record["num_frames"], (here / name).suffix.lower()
    if suffix in (".mp4", ".mov", ".webm"):
        info = media.probe(here / name)
        assert (info.frames, info.height, info.width) == (frames, record["height"], record["width"])
        assert bool(info.audio_codec) == bool(record["sound_frames"])
        with av.open(f"file:{here / name}") as container:
            assert {".webm": "webm"}.get(suffix, suffix[1:]) in container.format.name
    else:
        with Image.open(here / name) as image:
            kind = {".png": "PNG", ".webp": "WEBP", ".gif": "GIF"}.get(suffix, "JPEG")
            assert (image.format, image.size) == (kind, (record["width"], record["height"]))
            assert getattr(image, "n_frames", 1) == (frames if suffix in (".gif", ".webp") else 1)


# What is typed after `generate`, and what is said.
REFUSED = [
    ("--step 3", "--step could match --steps"),
    ("--stesp 3", "--stesp (do you mean --steps"),
    ("--guidence-scale 3", "--guidence-scale (do you mean --guidance-scale"),
    ("--sizes 480p", "--sizes (do you mean --size"),
    ("--frame-count=5", "unrecognized arguments: --frame-count"),
    ("--size 490p", "choose one of 256, 480, 704, 720, 768, 1080, or write WIDTHxHEIGHT"),
    ("--size huge", "write a tier such as 480p (256, 480, 704, 720, 768, 1080), or WIDTHxHEIGHT"),
    ("--size 480p --height 480", "size='480p' beside height=480"),
    ("--size 480p --aspect 2:1", "choose one of 1:1, 4:3, 3:4, 16:9, 9:16, or give height and"),
    ("--seed 5000000000", "seed=5000000000 is outside 0..4294967295"),
    ("--seed -2", "seed=-2 is outside 0..4294967295"),
    ("--seed 1 --seeds 2,3", "--seeds: not allowed with argument --seed"),
    ("--seeds 1,2,1", "--seeds 1,2,1 has a seed twice"),
    ("--seeds 1;2", "--seeds '1;2' must be whole numbers with commas between them"),
    ("--seeds 1,2 --count 2", "--count 2 beside --seeds 1,2"),
    ("--count 0", "--count 0 must be at least 1"),
    ("--checkpoint ./missing", "there is no folder ./missing; a checkpoint is a folder"),
    ("--checkpoint random --revision main", "revision 'main' is for a Hub id owner/name"),
    ("--num-frames 5 --sound -o a.gif", "such a file holds no sound; name one of .mp4, .mov, .web"),
    ("--num-frames 5 -o a.png", "a video is one of .mp4, .mov, .webm, .gif, .webp"),
    ("--num-frames 1 -o a.mp4", "one frame is an image, .png, .jpg, .jpeg, .webp"),
    ("-o a.avi", "the suffix '.avi' is not supported here; use .mp4, .mov, .webm, .gif, .webp"),
    ("'A ball' -p 'Another'", "--prompt/-p: not allowed with argument PROMPT"),
    ("a red ball", 'quote the prompt, so that it is one argument: "a red ball"'),
    ("caption.json", "'caption.json' is the name of a file: say --prompt-file caption.json"),
    ("-p notes.TXT", "is the name of a file: say --prompt-file notes.TXT"),
    ("-o outs/", "outs/ is a folder: name a file in it, such as outs/output.mp4"),
    ("--dtype fp16", "fp16 has too small a range for this model's weights: use bfloat16"),
    ("--negative blurry", "there is no --negative: use --negative-prompt"),
    ("--resolution=480p", "there is no --resolution: use --size"),
    ("--cfg 5", "there is no --cfg: use --guidance-scale"),
    ("--duration 5", "there is no --duration: use --num-frames"),
    ("--image https://x.org/a.png --num-frames 5 --size 48x32", "https://x.org/a.png"),
    ("'A ball' --prompt-file a.txt", "--prompt-file: not allowed with argument PROMPT"),
    ("--negative-prompt a --negative-prompt-file b", "not allowed with argument --negative-prompt"),
]  # fmt: skip


@pytest.mark.parametrize(("typed", "message"), REFUSED, ids=[typed for typed, _ in REFUSED])
def test_what_is_refused(here, capsys, unloaded, typed, message):
    checkpoint = [] if "--checkpoint" in typed else TINY[1:3]
    assert run("generate", *checkpoint, *shlex.split(typed)) == 2
    said = capsys.readouterr().err.splitlines()
    assert message in said[-1] and "error: " in said[-1]
    assert not list(here.iterdir())


def test_a_command_is_named(here, capsys):
    assert run("a red ball") == 2
    assert 'do you mean cosmos3-jax generate "a red ball"?' in capsys.readouterr().err
    assert run("generat", "a red ball") == 2
    assert "do you mean cosmos3-jax generate?" in capsys.readouterr().err
    assert run("info", "random", "--checkpoint", "other") == 2
    assert "random beside --checkpoint other: give one" in capsys.readouterr().err


def test_only_the_built_in_models_have_a_prompt_of_their_own(here, capsys, silent_checkpoint):
    """The sentence is one that `tiny` understands."""
    assert run("generate", "--checkpoint", str(silent_checkpoint), "-o", "a.mp4") == 2
    assert 'there is no prompt: give one, as in generate "' in capsys.readouterr().err


def test_sound_weights_are_left_out_without_sound(here, monkeypatch):
    opened = []
    real = Cosmos3.open
    monkeypatch.setattr(
        Cosmos3, "open", lambda *args, **more: opened.append(real(*args, **more)) or opened[-1]
    )
    for more in ([], ["--no-sound"], ["--sound"]):
        assert run(*FIVE, *more, "--overwrite") == 0
    assert [model.config.has_sound for model in opened] == [False, False, True]


def test_a_seed_is_drawn(here, capsys):
    seeds = set()
    for name in ("a", "b"):
        assert run(*FIVE, "--seed", "-1", "-o", f"{name}.mp4") == 0
        seed = json.loads((here / f"{name}.json").read_text())["seed"]
        assert f"cosmos3-jax: seed {seed}\n" in capsys.readouterr().err
        seeds.add(seed)
    assert len(seeds) == 2 and all(0 <= seed < 2**32 for seed in seeds)


@pytest.mark.parametrize(
    ("typed", "seeds"),
    [
        ("--seeds 7,1", [7, 1]),
        ("--seeds 3-4,9", [3, 4, 9]),
        ("--count 2", [42, 43]),
        ("--seed 5 --count 3", [5, 6, 7]),
    ],
)
def test_several_seeds(here, capsys, typed, seeds):
    """A file and a record for each; one that is there already is seen before any is made."""
    (here / f"a-seed{seeds[-1]}.mp4").write_bytes(b"mine")
    command = [*FIVE, *typed.split(), "-o", "a.mp4"]
    assert run(*command) == 2
    assert f"a-seed{seeds[-1]}.mp4 exists" in capsys.readouterr().err
    assert len(list(here.iterdir())) == 1
    assert run(*command, "--overwrite") == 0
    names = [f"a-seed{seed}" for seed in seeds]
    assert sorted(path.stem for path in here.iterdir()) == sorted(2 * names)
    noted = [json.loads((here / f"{name}.json").read_text())["seed"] for name in names]
    assert noted == seeds
    # Noise, and with it the stand-in for a video, is that of the seed.
    first, *others = [media.read_video(here / f"{name}.mp4")[0] for name in names]
    assert all((first != other).any() for other in others)


def test_another_seed_is_as_if_prepared_anew():
    model = Cosmos3.open("random")
    settings = dict(num_frames=5, height=32, width=48, sound=True)
    first = model.resolve("A ball", seed=3, **settings)
    ours, theirs = with_seed(first, 9), model.resolve("A ball", seed=9, **settings)
    assert jax.tree.structure(ours.request) == jax.tree.structure(theirs.request)
    for one, other in zip(*map(jax.tree.leaves, (ours.request, theirs.request)), strict=True):
        np.testing.assert_array_equal(one, other, strict=True)
    assert (first.request.noise != ours.request.noise).any() and ours.settings.seed == 9
    with pytest.raises(ValueError, match="seed=4294967296 is outside"):
        with_seed(first, 2**32)


@pytest.mark.parametrize(
    ("name", "right"),
    [("steps", "num_inference_steps"), ("cfg", "guidance_scale"), ("generator", "seed"),
     ("num_frame", "num_frames")],
)  # fmt: skip
def test_pythons_settings_by_other_names(name, right):
    with pytest.raises(
        TypeError, match=f"unexpected keyword argument '{name}': do you mean {right}"
    ):
        Cosmos3.open("random").prepare("A ball", **{name: 3})


def test_what_was_decided_is_said_once(here, capsys):
    """Though it is decided for each file."""
    Image.new("RGB", (32, 48)).save(here / "tall.png")
    command = ["generate", "--checkpoint", "random", "--num-frames", "5", "--size", "256p"]
    assert run(*command, "--image", "tall.png", "--count", "3", "-o", "a.mp4") == 0
    said = capsys.readouterr().err.splitlines()
    assert [line for line in said if line.startswith("cosmos3-jax: size ")] == [
        "cosmos3-jax: size 256x320: 3:4 is nearest to the input's 32x48"
    ]
    assert len([line for line in said if line.startswith("cosmos3-jax: warning: ")]) <= 1


def test_a_caption_beside_its_picture_does_not_block_a_video(here, capsys):
    caption = '{"comprehensive_t2i_caption": "A red car"}'
    (here / "car.json").write_text(caption)
    Image.new("RGB", (48, 32)).save(here / "car.png")
    command = [*FIVE, "--prompt-file", "car.json", "--image", "car.png", "-o", "car.mp4"]
    for more in ([], ["--overwrite"]):
        assert run(*command, *more) == 0
        assert (here / "car.json").read_text() == caption
        record = json.loads((here / "car.mp4.json").read_text())
        assert (record["prompt"], record["image"]["path"]) == (caption, str(here / "car.png"))
        assert "car.mp4.json" in capsys.readouterr().out
    assert len(list(here.iterdir())) == 4


def test_two_runs_with_one_name(here, monkeypatch, capsys):
    """What another run has written meanwhile stays; the second takes a free name and says so."""
    latents = ["--save-latents", "a.npz"]

    def meanwhile():
        for name in ("a.mp4", "a.json", "a.npz"):
            (here / name).write_bytes(b"theirs")

    without_a_model(monkeypatch, meanwhile)
    assert run(*FIVE, "-o", "a.mp4", *latents) == 0
    said = capsys.readouterr()
    for name in ("a.mp4", "a.json", "a.npz"):
        assert (here / name).read_bytes() == b"theirs"
    assert "warning: a.mp4 exists: wrote a-1.mp4" in said.err
    assert said.out.splitlines()[-1] == "wrote a-1.mp4, a-1.mp4.json, a-1.npz"
    assert media.probe(here / "a-1.mp4").frames == 5
    assert json.loads((here / "a-1.mp4.json").read_text())["num_frames"] == 5


def test_a_folder_named_as_a_checkpoint_that_is_built_in(here):
    """It does not shadow the default; with ./ it is what is meant."""
    (here / "tiny").mkdir()
    assert run("generate", "--num-frames", "5", "--steps", "1", "-o", "a.mp4") == 0
    assert json.loads((here / "a.json").read_text())["checkpoint"] == "tiny"


def test_a_folder_of_that_name_is_meant_with_its_path(here, capsys):
    (here / "tiny").mkdir()
    assert run("generate", "--checkpoint", "./tiny") == 2
    assert "tiny is not a Cosmos3 checkpoint" in capsys.readouterr().err


CHILD = """
import sys
import pytest
from command_line import without_a_model
from cosmos3_jax.cli.main import main
without_a_model(pytest.MonkeyPatch())
sys.exit(main(sys.argv[1:]))
"""


def test_a_terminal_in_ascii(here):
    """All is written, and what cannot be shown is shown as numbers."""
    tests = os.path.dirname(os.path.dirname(__file__))
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    environment["PYTHONPATH"] = os.pathsep.join([tests, *sys.path])
    arguments = [*FIVE, "Ein grüner Ball, 猫", "-o", "grün/猫.mp4", "--image", "grün.png"]
    Image.new("RGB", (48, 32)).save(here / "grün.png")
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *arguments], env=environment, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(rb"wrote gr\xfcn/\u732b.mp4, gr\xfcn/\u732b.json" + b"\n")
    assert media.probe(here / "grün" / "猫.mp4").frames == 5
    record = json.loads((here / "grün" / "猫.json").read_text())
    assert (record["prompt"], record["image"]["path"]) == (
        "Ein grüner Ball, 猫",
        str(here / "grün.png"),
    )


def test_the_version(capsys):
    assert run("--version") == 0
    assert capsys.readouterr().out == f"cosmos3-jax {cosmos3_jax.__version__}\n"


HELP = """
import sys
from cosmos3_jax.cli.main import main
try:
    main(sys.argv[1:])
finally:
    print(*sorted({name.partition(".")[0] for name in sys.modules}), file=sys.stderr)
"""


@pytest.mark.parametrize("arguments", [["--help"], ["generate", "--help"], ["generate", "--seeed"]])
def test_help_and_the_parsers_errors_come_without_jax(arguments):
    done = subprocess.run([sys.executable, "-c", HELP, *arguments], capture_output=True, text=True)
    modules = set(done.stderr.splitlines()[-1].split())
    assert "argparse" in modules and not modules & {"jax", "numpy", "av", "torch", "PIL", "flax"}
    assert done.returncode == (2 if "--seeed" in arguments else 0)


# Options that do something else than nothing where they are left out.
HAVE_DEFAULTS = """
    --prompt --negative-prompt --prompt-style --system-prompt --condition-frames --keep --size
    --aspect --num-frames --fps --sound --steps --guidance-scale --flow-shift --schedule --seed
    --count --out --checkpoint --revision --dtype --offload --steps-per-program --mesh
""".split()


@pytest.mark.parametrize("command", ["generate", "convert", "info", "bench"])
def test_help_has_a_text_and_a_default_for_each_option(capsys, command):
    assert run(command, "--help") == 0
    shown = " ".join(capsys.readouterr().out.split())
    parser = options.parse([command, *["a", "b"] * (command == "convert")]).parser
    for action in parser._actions:
        assert action.help, action.dest
        if action.default not in (None, False, True, "==SUPPRESS=="):
            assert re.search(rf"\(default: {re.escape(str(action.default))}\W", shown), action.dest
    if command == "generate":
        help_of = {
            name: action.help for action in parser._actions for name in action.option_strings
        }
        assert [name for name in HAVE_DEFAULTS if "default: " not in help_of[name]] == []
    for recipe in ("35, of an image 50", "6, of an image 4", "10, of an image 3"):
        assert command != "generate" or f"Nano's: {recipe})" in shown
    for mode in ("text to video", "with sound", "text to image", "image to video", "video to vid"):
        assert command != "generate" or f"{mode}" in shown


@pytest.mark.parametrize("module", ["cosmos3_jax", "cosmos3_jax.cli"])
def test_modules_that_are_the_command_line(module):
    command = [sys.executable, "-m", module, "--version"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"cosmos3-jax {cosmos3_jax.__version__}\n"
