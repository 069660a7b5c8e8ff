"""What is given as a prompt, a picture or a clip, and is a pipe, a device, or too large."""

import os
import threading
from pathlib import Path

import pytest

from cosmos3_jax import guard, limits
from cosmos3_jax.io import conditioning, media_read, prompt
from cosmos3_jax.io.encode import read_comment

READERS = {
    "image": media_read.read_image,
    "shape": media_read.image_shape,
    "bands": media_read.image_bands,
    "video": media_read.read_video,
    "sound": media_read.read_sound,
    "probe": media_read.probe,
    "comment": read_comment,
    "given image": lambda path: conditioning.image_pixels(path, 32, 48),
    "given clip": lambda path: conditioning.clip_pixels(path, 5, 32, 48),
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("suffix", [".png", ".mp4"])
def test_no_reader_of_media_waits_for_a_pipe(tmp_path, name, suffix):
    path = tmp_path / f"pipe{suffix}"
    os.mkfifo(path)
    with pytest.raises(ValueError, match=f"pipe{suffix} is a pipe, and no file that can be read"):
        READERS[name](path)


@pytest.mark.parametrize("device", ["/dev/zero", "/dev/null"])
def test_devices_are_no_media(device):
    with pytest.raises(ValueError, match=f"{device} is a device, and no file that can be read"):
        media_read.read_image(device)


def test_a_prompt_may_come_from_a_pipe(tmp_path):
    """As `--prompt-file <(command)` gives one."""
    os.mkfifo(tmp_path / "pipe")
    text = 10_000 * "A red ball.\r\n"
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=[text.encode()])
    writer.start()
    assert prompt.read_prompt(tmp_path / "pipe") == text
    writer.join()
    reading, writing = os.pipe()
    os.write(writing, b"A red ball")
    os.close(writing)
    assert prompt.read_prompt(f"/dev/fd/{reading}") == "A red ball"
    os.close(reading)


def test_a_prompt_without_end_is_not_read(tmp_path):
    with pytest.raises(ValueError, match="/dev/zero has more bytes, and at most 4194304 are read"):
        prompt.read_prompt("/dev/zero")
    with (tmp_path / "prompt.txt").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(ValueError, match="prompt.txt has 1099511627776 bytes, and at most"):
        prompt.read_prompt(tmp_path / "prompt.txt")
    (tmp_path / "prompt.txt").write_text((limits.LETTERS + 1) * "a")
    with pytest.raises(ValueError, match="letters of prompt file .*prompt.txt=1048577 is beyond"):
        prompt.read_prompt(tmp_path / "prompt.txt")


@pytest.mark.parametrize(
    "text",
    [100_000 * "[", 990 * '{"a":' + "1" + 990 * "}", 500 * "[" + 500 * "]", "{" + 9**5 * "9"],
)
def test_a_prompt_that_begins_as_json_and_is_none(tmp_path, text):
    (tmp_path / "prompt.json").write_text(text)
    with pytest.raises(ValueError, match="prompt file .*prompt.json") as raised:
        prompt.read_prompt(tmp_path / "prompt.json")
    assert "\n" not in str(raised.value)


class Panic(BaseException):
    """As of a parser in Rust."""


@pytest.mark.parametrize(
    "raised",
    [
        RecursionError("maximum"), MemoryError(), Panic("unwrap()\non None"), KeyError("a"),
        ValueError("odd\x1b[2J" + 1000 * "x"), AttributeError("no .x"), OSError(22, "Invalid"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), StopIteration(),
    ],
    ids=lambda x: type(x).__name__,
)  # fmt: skip
def test_whatever_a_parser_raises_is_one_line(raised):
    with pytest.raises(ValueError, match="a.json is not a list: .*; try another$") as found:
        with guard.parsing("a.json", "a list", way_out="try another"):
            raise raised
    text = str(found.value)
    assert text.isprintable() and len(text) < 300


@pytest.mark.parametrize(
    "raised",
    [KeyboardInterrupt(), SystemExit(3), FileNotFoundError(2, "No such file", "a.json")],
    ids=lambda x: type(x).__name__,
)
def test_what_the_guard_lets_through(raised):
    with pytest.raises(type(raised)) as found:
        with guard.parsing("a.json", "a list"):
            raise raised
    assert found.value is raised


def test_what_names_its_file_is_not_named_twice():
    with pytest.raises(ValueError, match="^a.json: b is missing$"):
        with guard.parsing(Path("a.json"), "a list"):
            raise ValueError("a.json: b is missing")
