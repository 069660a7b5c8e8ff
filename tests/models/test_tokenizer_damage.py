"""Damaged and hostile tokenizer folders: one line that names the file, and no waiting."""

import json
import os
import time

import pytest

from cosmos3_jax.checkpoint.tiny_tokenizer import write_tokenizer
from cosmos3_jax.config import ConfigError
from cosmos3_jax.models import tokenizer as tokenizers
from cosmos3_jax.models.tokenizer import Tokenizer


@pytest.fixture
def folder(tmp_path):
    return write_tokenizer(tmp_path)


def change(folder, **fields):
    file = folder / "tokenizer.json"
    values = json.loads(file.read_text())
    values["model"] |= fields.pop("model", {})
    file.write_text(json.dumps(values | fields))


def regex(pattern: str) -> dict:
    split = {"type": "Split", "pattern": {"Regex": pattern}}
    return {"pre_tokenizer": split | {"behavior": "Isolated", "invert": False}}


def refused(folder, match: str) -> None:
    with pytest.raises(ConfigError, match=match) as raised:
        Tokenizer.from_folder(folder).encode_chat("A red ball " + 30 * "a" + " b")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(model={"dropout": 0.1}), "tokenizer.json has dropout 0.1, with which .* each time"),
        (dict(model={"vocab": {}}), "tokenizer.json has no vocabulary"),
        (dict(model={"vocab": []}), "tokenizer.json is not a tokenizer"),
        (dict(added_tokens=[{"id": -1, "content": ""}]), "tokenizer.json is not a tokenizer"),
        (dict(added_tokens=None), "tokenizer.json (has no token|is not a tokenizer)"),
        (
            dict(normalizer={"type": "Replace", "pattern": {"String": "a"}, "content": 99 * "b"}),
            "a normalizer that makes texts up to 99 times longer, and 16 is the limit",
        ),
        (
            dict(
                normalizer={
                    "type": "Sequence",
                    "normalizers": 9
                    * [{"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}],
                }
            ),
            "up to 512 times longer",
        ),
        (regex("(a+)+$"), "tokenizer.json is not a tokenizer for this text: Onig"),
        (regex("("), "tokenizer.json is not a tokenizer"),
    ],
)
def test_tokenizers_that_cannot_be_used(folder, fields, message):
    change(folder, **fields)
    refused(folder, message)


def test_a_tokenizer_that_takes_too_long(folder, monkeypatch):
    monkeypatch.setattr(tokenizers, "MOST_SECONDS", 0.2)
    change(folder, **regex(r"[^\u2603]*[^\u2603]*(?=\d)"))
    start = time.process_time()
    with pytest.raises(ConfigError, match="takes more than 0.2 seconds"):
        Tokenizer.from_folder(folder).encode_chat(700 * "a")
    assert time.process_time() - start < 3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", b"[" * 100_000, "tokenizer.json is not a tokenizer"),
        ("tokenizer.json", b"\xff", "tokenizer.json is not a tokenizer"),
        ("tokenizer_config.json", b"[" * 100_000, "not valid JSON: it is nested too deeply"),
        ("tokenizer_config.json", b'{"eos_token": ["a"]}', r"eos_token=\['a'\] must be a text"),
        ("tokenizer_config.json", b'{"eos_token": {"content": 1}}', "eos_token=1 must be a text"),
        ("tokenizer_config.json", b'{"eos_token": false}', "eos_token=False must be a text"),
        ("chat_template.jinja", b"\xff", "chat_template.jinja is not text in UTF-8"),
        (
            "chat_template.jinja",
            b"{{ messages.content.text }}",
            "is not a chat template for prompts",
        ),
        ("chat_template.jinja", b"{{ 1 / 0 }}", "is not a chat template for prompts: division"),
        (
            "chat_template.jinja",
            b"{{ raise_exception('no such role') }}",
            "for prompts: no such role;",
        ),
    ],
)
def test_damaged_files(folder, name, content, message):
    (folder / name).write_bytes(content)
    refused(folder, message)


def test_several_templates_are_refused(folder):
    (folder / "chat_template.jinja").unlink()
    templates = [{"name": "default", "template": "x"}]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": templates}))
    refused(folder, "tokenizer_config.json: chat_template is a list, and one text is read alone")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_a_pipe_is_not_waited_for(folder, name):
    (folder / name).unlink()
    os.mkfifo(folder / name)
    refused(folder, f"{name} is a pipe, and no file")


def test_files_beyond_their_bounds(folder, monkeypatch):
    monkeypatch.setattr(tokenizers, "MOST_BYTES", 1000)
    refused(folder, "tokenizer.json has [0-9]+ bytes, and at most 1000 are read")
