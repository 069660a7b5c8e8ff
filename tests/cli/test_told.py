"""What processes that work together must have in common: every option, file and package."""

import argparse
import copy
import os

import numpy as np
import pytest

from cosmos3_jax import Cosmos3
from cosmos3_jax.cli import told
from cosmos3_jax.cli.options import parse

OPTIONS = parse(["generate", "A red ball."])
RECORD = {"versions": {"numpy": "2"}, "checkpoint_files": {"files": {"a": {"sha256": "1"}}}}


@pytest.fixture(scope="module")
def red_ball():
    return Cosmos3.open("random").prepare("A red ball.")


def changed(options: argparse.Namespace, name: str) -> argparse.Namespace:
    other = copy.copy(options)
    value = getattr(options, name)
    setattr(other, name, not value if isinstance(value, bool) else f"{value} and another")
    return other


def differing(one: dict, other: dict) -> set[str]:
    return {name for name in one.keys() | other.keys() if one.get(name) != other.get(name)}


@pytest.mark.parametrize("name", sorted({*vars(OPTIONS)} - {"process_id", "parser"}))
def test_every_option_is_compared(red_ball, name):
    """A new one, too: the names come from the parser."""
    one, other = (
        told.everything(options, RECORD, red_ball) for options in (OPTIONS, changed(OPTIONS, name))
    )
    assert differing(one, other) == {f"--{name.replace('_', '-')}"}


def test_what_processes_have_of_their_own_is_not_compared(red_ball):
    other = copy.copy(OPTIONS)
    other.process_id = 1
    one, other = (told.everything(options, RECORD, red_ball) for options in (OPTIONS, other))
    assert one == other


@pytest.mark.parametrize("name", ["image", "video", "lora", "noise", "prompt_file", "new_option"])
def test_a_file_is_compared_by_its_content(red_ball, tmp_path, name):
    said = []
    for content in ("one", "two"):
        path = tmp_path / "file.bin"
        path.write_text(content)
        options = copy.copy(OPTIONS)
        setattr(options, name, [f"{path}:1.0"] if name == "lora" else path)
        said.append(told.everything(options, RECORD, red_ball))
    flag = f"--{name.replace('_', '-')}"
    assert differing(*said) == {f"the content of {flag} {tmp_path / 'file.bin'}"}


def test_outputs_are_compared_by_name_alone(red_ball, tmp_path):
    options = copy.copy(OPTIONS)
    options.out = tmp_path / "out.mp4"
    one = told.everything(options, RECORD, red_ball)
    options.out.write_bytes(b"of an earlier run, in one of the processes")
    assert told.everything(options, RECORD, red_ball) == one


@pytest.mark.parametrize(
    "change, name",
    [
        ({"versions": {"numpy": "3"}}, "versions of numpy"),
        ({"checkpoint_files": {"files": {"a": {"sha256": "2"}}}}, "checkpoint_files of a"),
        ({"steps_per_program": 5}, "steps_per_program"),
    ],
)
def test_the_record_is_compared(red_ball, change, name):
    one, other = (
        told.everything(OPTIONS, record, red_ball) for record in (RECORD, RECORD | change)
    )
    assert differing(one, other) == {name}


def test_the_request_is_compared_array_by_array(red_ball):
    other = red_ball.replace(text_ids=np.asarray(red_ball.text_ids) + 1)
    one, other = (told.everything(OPTIONS, RECORD, request) for request in (red_ball, other))
    assert differing(one, other) == {"the request's text_ids"}


@pytest.mark.parametrize("prompt", [".", "/", "folder", "x" * 5000, "a\0b"])
def test_a_text_is_no_folder_to_be_read(red_ball, tmp_path, monkeypatch, prompt):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    assert not [*told.read(prompt)]


def test_what_is_a_processs_own_is_not_compared(red_ball, monkeypatch):
    one = told.everything(OPTIONS, RECORD, red_ball)
    flags = os.environ.get("XLA_FLAGS", "")
    monkeypatch.setenv("XLA_FLAGS", f"{flags} --xla_dump_to=/tmp/rank1")
    assert told.everything(OPTIONS, RECORD, red_ball) == one
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    other = told.everything(OPTIONS, RECORD, red_ball)
    assert differing(one, other) == {"NVIDIA_TF32_OVERRIDE"}


def test_packages_and_settings_of_jax_are_compared(red_ball):
    said = told.everything(OPTIONS, RECORD, red_ball)
    assert {"the package numpy", "the package cosmos3_jax's source", "XLA_FLAGS"} <= said.keys()
    assert "jax_default_matmul_precision" in said and "jax_compilation_cache_dir" not in said
