"""The command line: what it refuses before anything is loaded, and how it ends early."""

import jax
import numpy as np
import pytest
from command_line import BARE, SMALL

from cosmos3_jax import Cosmos3
from cosmos3_jax.cli import main as cli
from cosmos3_jax.parallel import device
from cosmos3_jax.runtime import programs

pytestmark = pytest.mark.usefixtures("own_cache", "no_compilation_cache")


def test_outputs_are_replaced_only_if_asked(tmp_path, monkeypatch, capsys, unloaded):
    out, arrays = tmp_path / "a.mp4", tmp_path / "latents.npz"
    arguments = [*SMALL, "--out", str(out), "--save-latents", str(arrays)]
    record, other = out.with_suffix(".json"), tmp_path / "a.mp4.json"
    for existing in ([out], [record, other], [arrays]):  # one name is left for the record
        for path in existing:
            path.write_bytes(b"mine")
        assert cli.main(arguments) == 2
        error = capsys.readouterr().err
        assert f"{existing[-1]} exists" in error and "--overwrite" in error
        for path in existing:
            assert path.read_bytes() == b"mine"
            path.unlink()


def test_inputs_are_never_overwritten(tmp_path, capsys, unloaded):
    """Not the prompt by its record, which `test_habits.py` puts beside it, nor a clip by itself."""
    prompt = tmp_path / "car.mp4.json"
    prompt.write_text('{"subjects": []}', encoding="utf-8")
    (tmp_path / "car.json").write_text("mine", encoding="utf-8")
    arguments = ["--prompt-file", str(prompt), "--out", str(tmp_path / "car.mp4")]
    assert cli.main(["generate", *arguments]) == 2
    assert "would be written and is also read" in capsys.readouterr().err
    assert prompt.read_text(encoding="utf-8") == '{"subjects": []}'
    assert (tmp_path / "car.json").read_text(encoding="utf-8") == "mine"
    clip = tmp_path / "car.mp4"
    clip.write_bytes(b"mine")
    command = ["generate", "--video", str(clip), "--out", str(clip), "--overwrite"]
    assert cli.main(command) == 2
    assert "would be written and is also read" in capsys.readouterr().err
    assert clip.read_bytes() == b"mine"


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
    ("--seed -2", "seed=-2 is outside 0..4294967295"),
    ("--sigmas 0.9,x,0", "--sigmas '0.9,x,0' must be numbers with commas between them"),
    ("--sigmas 0.9,0.4", "sigmas must end in 0, the last is 0.4"),
    ("--noise {tmp}/none.npz", "none.npz cannot be read as an npz file: [Errno 2]"),
    ("--noise {tmp}/text.npz", "text.npz is not an npz file: "),
    ("--noise {tmp}/broken.npz", "broken.npz is not an npz file: "),
    ("--noise {tmp}/one.npy", "one.npy is not an npz file: "),
    ("--noise {tmp}/latents.npz", "latents.npz holds no array named noise"),
    ("--noise {tmp}/shape.npz", "noise has shape (1, 48, 3, 5, 3), this request needs (1, 48"),
    ("--noise {tmp}/sound.npz", "sound_noise has shape (1, 64, 9), this request needs (1, 64, 10)"),
    ("--prompt-file {tmp}/none.txt", "No such file"),
    ("--negative-prompt-file {tmp}/latin.txt", "latin.txt is not UTF-8"),
    ("--checkpoint {tmp}/none", "there is no folder {tmp}/none; a checkpoint is a folder, a Hub"),
    ("--checkpoint {tmp}", "is not a Cosmos3 checkpoint: it has no transformer/config.json"),
    ("--checkpoint {silent}", "has no sound (sound_gen is False"),
    ("--out {tmp}/file/a.mp4", "cannot write files in {tmp}/file"),
    ("--out /proc/cosmos3/a.mp4", "/proc/cosmos3/a.mp4: cannot write files in /proc/cosmos3"),
    ("--out {tmp}/a.avi", "the suffix '.avi' is not supported here; use .mp4"),
    ("--out {tmp}/a.png", "a.png: a video is one of .mp4, .mov, .webm, .gif, .webp; name such"),
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
        (["--filters", "9"], "unrecognized arguments: --filters"),
        (["--image", "a.png", "--video", "b.mp4"], "not allowed with argument --image"),
        (["--keep", "middle"], "invalid choice: 'middle'"),
    ],
)
def test_what_the_parser_refuses(capsys, unloaded, arguments, message):
    with pytest.raises(SystemExit) as stop:
        cli.main(["generate", *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_what_does_not_fit_is_one_line_and_loads_nothing(tmp_path, capsys, monkeypatch, unloaded):
    monkeypatch.setattr(device, "memory_limit", lambda: 2**20)
    assert cli.main([*SMALL, "--out", str(tmp_path / "a.mp4")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "9 frames of 48x80 with sound need" in error


def test_an_exhausted_device_is_one_line(tmp_path, capsys, monkeypatch):
    def exhaust(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating\nmore")

    monkeypatch.setattr(programs.Run, "__call__", exhaust)
    assert cli.main([*SMALL, "--out", str(tmp_path / "a.mp4")]) == 2
    error = capsys.readouterr().err
    assert error.count("cosmos3-jax: error: ") == 1
    assert "the device ran out of memory" in error.splitlines()[-1]


def test_an_interrupt_is_no_traceback(tmp_path, monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Cosmos3, "load", interrupt)
    assert cli.main([*SMALL, "--out", str(tmp_path / "a.mp4")]) == 130
    *stages, last = capsys.readouterr().err.splitlines()
    assert last == "cosmos3-jax: interrupted"
    assert all(line.startswith("cosmos3-jax: random: ") for line in stages)
    assert not list(tmp_path.iterdir())
