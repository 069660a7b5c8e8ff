"""A denoising that was interrupted goes on from the sampler's state, to the same result."""

import json
import re

import numpy as np
import pytest
from command_line import BARE, TEXTS, assert_equal, load

from cosmos3_jax.cli import main as cli
from cosmos3_jax.runtime import programs
from cosmos3_jax.runtime.sampler_state import beside

STEPS = 6
COMMAND = [
    *BARE, *TEXTS, "--steps", str(STEPS), "--steps-per-program", "1", "--checkpoint-every", "2",
]  # fmt: skip


def run(folder, *options: str) -> int:
    paths = ("--out", str(folder / "out.mp4"), "--save-latents", str(folder / "latents.npz"))
    return cli.main([*COMMAND, *paths, *options])


@pytest.fixture
def interrupt(monkeypatch):
    """Let the loop end by Ctrl-C before its call of a number; without one, count its calls."""
    made, original = [], programs.calls

    def arm(at: int | None) -> list:
        made.clear()

        def calls(stage, values, block_steps, done=0):
            for change in original(stage, values, block_steps, done):
                if stage.loop and len(made) == at:
                    raise KeyboardInterrupt
                made.extend([stage.name] * stage.loop)
                yield change

        monkeypatch.setattr(programs, "calls", calls)
        return made

    return arm


@pytest.fixture(scope="module")
def whole(tmp_path_factory, own_cache):
    folder = tmp_path_factory.mktemp("whole")
    assert run(folder) == 0
    return folder


def names(folder) -> list[str]:
    """Of its files; a state's without its digest."""
    found = (path.name for path in folder.iterdir())
    return sorted(re.sub(r"\.[0-9a-f]{12}\.state", ".state", name) for name in found)


def state_of(folder):
    [path] = beside(folder / "out.mp4")
    return path


@pytest.mark.parametrize("at, left", [(3, 4), (5, 1)])
def test_the_same_command_goes_on(whole, tmp_path, interrupt, capsys, at, left):
    """To the same bytes; the last block is always made again, as its latents are not the state."""
    interrupt(at)
    assert run(tmp_path) == 130
    assert names(tmp_path) == ["out.mp4.state.npz"]
    made = interrupt(None)
    assert run(tmp_path) == 0
    assert len(made) == left
    assert f"going on after step {STEPS - left}" in capsys.readouterr().err
    assert names(tmp_path) == ["latents.npz", "out.json", "out.mp4"] == names(whole)
    assert_equal(load(tmp_path / "latents.npz"), load(whole / "latents.npz"))
    assert (tmp_path / "out.mp4").read_bytes() == (whole / "out.mp4").read_bytes()


def test_an_interruption_while_decoding_costs_the_last_block(
    whole, tmp_path, interrupt, monkeypatch
):
    """And the latents, which were written before, are written again."""
    from cosmos3_jax.cli import generate

    with monkeypatch.context() as patch:
        patch.setattr(generate, "write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run(tmp_path) == 130
    assert names(tmp_path) == ["latents.npz", "out.mp4.state.npz"]
    made = interrupt(None)
    assert run(tmp_path) == 0 and len(made) == 1
    assert_equal(load(tmp_path / "latents.npz"), load(whole / "latents.npz"))


def test_the_state_of_another_generation_stays(tmp_path, interrupt, capsys):
    interrupt(3)
    assert run(tmp_path) == 130
    before = state_of(tmp_path).read_bytes()
    made = interrupt(None)
    assert run(tmp_path, "--guidance-scale", "4") == 0 and len(made) == STEPS
    said = capsys.readouterr().err
    assert "is the state of another generation (guidance_scale differ): it stays" in said
    assert state_of(tmp_path).read_bytes() == before


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "no arrays"])
def test_a_damaged_state_is_said_and_left(whole, tmp_path, interrupt, capsys, damage):
    interrupt(3)
    assert run(tmp_path) == 130
    path = state_of(tmp_path)
    content = bytearray(path.read_bytes())
    if damage == "cut":
        content = content[: len(content) // 2]
    elif damage == "flipped":
        content[len(content) // 2] ^= 1
    path.write_bytes(b"" if damage == "empty" else content)
    if damage == "no arrays":
        np.savez(path, something=np.zeros(3))
    made = interrupt(None)
    assert run(tmp_path) == 0 and len(made) == STEPS
    assert "begins anew" in capsys.readouterr().err
    assert_equal(load(tmp_path / "latents.npz"), load(whole / "latents.npz"))


def test_without_it_the_bytes_are_the_same(whole, tmp_path):
    """And the record, which does not mention it."""
    assert COMMAND[-2:] == ["--checkpoint-every", "2"]
    assert cli.main([*COMMAND[:-2], "--out", str(tmp_path / "out.mp4")]) == 0
    assert (tmp_path / "out.mp4").read_bytes() == (whole / "out.mp4").read_bytes()
    assert "checkpoint_every" not in json.loads((tmp_path / "out.json").read_text())


def test_every_step_at_least(tmp_path, capsys):
    assert run(tmp_path, "--checkpoint-every", "0") == 2
    assert "must be at least 1 step" in capsys.readouterr().err
