"""Every kind of file that a video or an image can become, read back."""

import os
import warnings
from fractions import Fraction

import av
import numpy as np
import pytest
from media_cases import RATE, smooth_video, tones
from PIL import Image

from cosmos3_jax.io import encode, media

COMMENT = '{"prompt": "ein Käse \\u2603", "long": "' + "x" * 20_000 + '"}'


@pytest.mark.parametrize("suffix", encode.VIDEO_SUFFIXES)
def test_a_video_of_each_kind(tmp_path, suffix):
    video = smooth_video(12)
    output = {"video": video, "fps": 12.5}
    path = media.save_video(output, tmp_path / f"take 1{suffix}", comment=COMMENT)
    assert encode.read_comment(path) == COMMENT
    expected = media.to_uint8(video).transpose(1, 2, 3, 0).astype(float)
    if suffix in encode.ANIMATIONS:
        with Image.open(path) as image:
            assert image.n_frames == 12
            frames, total = [], 0
            for t in range(12):
                image.seek(t)
                frames.append(np.asarray(image.convert("RGB")))
                total += image.info["duration"]
        assert total == 960  # milliseconds: 12 frames of 80
    else:
        frames, fps = media.read_video(path)
        assert fps == Fraction(25, 2)
    error = np.sqrt(np.mean((np.stack(frames).astype(float) - expected) ** 2))
    # In levels. Measured: 3.8 at most, and 5.9 of a gif's 256 colours; a frame late adds 7.
    assert error < (8 if suffix == ".gif" else 5.5), error


def test_an_animation_keeps_its_rate_although_its_clock_is_coarse(tmp_path):
    for suffix, ticks in ((".gif", 10), (".webp", 1)):
        path = media.save_video({"video": smooth_video(24), "fps": 24.0}, tmp_path / f"a{suffix}")
        with Image.open(path) as image:
            durations = []
            for t in range(24):
                image.seek(t)
                image.load()
                durations.append(image.info["duration"])
        assert sum(durations) == 1000 and not any(each % ticks for each in durations)


@pytest.mark.parametrize("suffix", encode.CONTAINERS)
def test_sound_in_each_container(tmp_path, suffix):
    output = {
        "video": smooth_video(25), "fps": 25.0, "sound": tones(RATE + 700), "sample_rate": RATE,
    }  # fmt: skip
    path = media.save_video(output, tmp_path / f"a{suffix}")
    sound, rate = media.read_sound(path)
    assert rate == RATE and abs(sound.shape[1] - RATE) <= 960
    count = min(RATE, sound.shape[1])
    error = sound[:, :count] - output["sound"][:, :count]
    # Measured: 0.036 for AAC, 0.006 for Opus.
    assert np.sqrt(np.mean(error[:, 2000:-2000] ** 2)) < 0.1 * np.std(output["sound"])


@pytest.mark.parametrize("suffix", encode.ANIMATIONS)
def test_a_file_that_can_hold_no_sound_says_so(tmp_path, suffix):
    output = {"video": smooth_video(3), "sound": tones(6000), "sample_rate": RATE}
    with pytest.warns(UserWarning, match="has no sound"):
        assert media.save_video(output, tmp_path / f"a{suffix}").exists()


@pytest.mark.parametrize("suffix", encode.IMAGE_SUFFIXES)
def test_an_image_of_each_kind(tmp_path, suffix):
    video = smooth_video(1)
    path = media.save_image({"video": video[None]}, tmp_path / f"a{suffix}", comment=COMMENT)
    assert encode.read_comment(path) == COMMENT
    expected = media.to_uint8(video[:, 0]).transpose(1, 2, 0).astype(int)
    error = np.abs(media.read_image(path).astype(int) - expected)
    assert error.max() <= (12 if suffix in (".jpg", ".jpeg") else 0)  # levels; 5 were measured


@pytest.mark.parametrize("suffix", [*encode.VIDEO_SUFFIXES, ".png", ".jpg", ".jpeg"])
@pytest.mark.parametrize("size", [65_533, 65_535, 5_000_000])
def test_a_long_comment_is_held_or_missed_aloud(tmp_path, suffix, size):
    comment, path = "\u00e9" + "x" * (size - 2), tmp_path / f"a{suffix}"  # of so many bytes
    limits = {".mov": 65_535, ".jpg": 65_533, ".jpeg": 65_533}
    save = media.save_video if suffix in encode.VIDEO_SUFFIXES else media.save_image
    video = {"video": smooth_video(2 if save is media.save_video else 1)}
    with warnings.catch_warnings(record=True) as log:
        warnings.simplefilter("always")
        save(video, path, comment=comment)
    messages = [str(one.message) for one in log]
    if size <= limits.get(suffix, size):
        same = encode.read_comment(path) == comment  # pytest would compare them line by line
        assert messages == [] and same
    else:
        [message] = messages
        assert f"it has {size} bytes, and a {suffix} holds {limits[suffix]}" in message
        assert encode.read_comment(path) is None


@pytest.mark.parametrize("suffix", [*encode.VIDEO_SUFFIXES, ".png", ".jpg"])
def test_a_comment_with_nul_is_whole_or_missed_aloud(tmp_path, suffix):
    path, comment = tmp_path / f"a{suffix}", "one\0two"
    save = media.save_video if suffix in encode.VIDEO_SUFFIXES else media.save_image
    video = {"video": smooth_video(2 if save is media.save_video else 1)}
    if suffix in encode.CONTAINERS:
        with pytest.warns(UserWarning, match="without its comment: it has a character NUL"):
            save(video, path, comment=comment)
        assert encode.read_comment(path) is None
    else:
        save(video, path, comment=comment)
        assert encode.read_comment(path) == comment


def test_without_a_comment_there_is_none(tmp_path):
    for suffix in encode.VIDEO_SUFFIXES:
        path = media.save_video({"video": smooth_video(2)}, tmp_path / f"a{suffix}")
        assert encode.read_comment(path) is None
    for suffix in encode.IMAGE_SUFFIXES:
        path = media.save_image(smooth_video(1), tmp_path / f"b{suffix}")
        assert encode.read_comment(path) is None


def test_the_rate_is_the_outputs_own(tmp_path):
    path = media.save_mp4({"video": smooth_video(3), "fps": np.float32(12.5)}, tmp_path / "a.mp4")
    assert media.probe(path).fps == Fraction(25, 2)
    path = media.save_mp4({"video": smooth_video(3)}, tmp_path / "b.mp4")
    assert media.probe(path).fps == 24


def test_the_same_video_gives_the_same_bytes(tmp_path):
    for suffix in encode.VIDEO_SUFFIXES:
        one, two = (
            media.save_video({"video": smooth_video(3)}, tmp_path / f"{name}{suffix}", comment="x")
            for name in "ab"
        )
        assert one.read_bytes() == two.read_bytes()


def test_a_file_system_without_links(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    path = media.write_text(tmp_path / "a.txt", "one")
    with pytest.warns(UserWarning, match="exists: wrote"):
        other = media.write_text(tmp_path / "a.txt", "two")
    assert (path.read_text(), other.read_text()) == ("one", "two")
    assert sorted(os.listdir(tmp_path)) == ["a-1.txt", "a.txt"]


def test_a_broken_file_has_no_comment_to_read(tmp_path):
    for name in ("a.mp4", "a.png"):
        (tmp_path / name).write_bytes(b"no such file format")
        with pytest.raises(ValueError, match=f"{name} (is not|is no)"):
            encode.read_comment(tmp_path / name)


def test_players_see_the_comment(tmp_path):
    """Under its usual name, not one of ours."""
    path = media.save_video({"video": smooth_video(2)}, tmp_path / "a.mov", comment="hello")
    with av.open(str(path)) as container:
        assert container.metadata["comment"] == "hello"


@pytest.mark.parametrize("suffix, largest", encode.LARGEST.items())
def test_sizes_beyond_the_encoders_are_refused(tmp_path, suffix, largest):
    for width, height in ((largest, 16), (16, largest)):
        encode.check_size(suffix.upper(), width, height)
    with pytest.raises(ValueError, match=f"16x{largest + 2} is too large: a {suffix} holds at mo"):
        encode.check_size(suffix, 16, largest + 2)
    video = np.zeros((3, 1, 2, largest + 2), np.float32)
    save = media.save_video if suffix in encode.VIDEO_SUFFIXES else media.save_image
    with pytest.raises(ValueError, match=f"{largest + 2}x2 is too large"):
        save({"video": video}, tmp_path / f"a{suffix}")
    assert not list(tmp_path.iterdir())
    encode.check_size(".png", 100_000, 100_000)


def test_encoders_errors_are_of_one_kind(tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "LARGEST", {})
    for suffix, width in ((".mp4", 16_400), (".webp", 20_000)):
        with pytest.raises(ValueError, match=rf"the \{suffix} could not be encoded"):
            media.save_video({"video": np.zeros((3, 2, 2, width))}, tmp_path / f"a{suffix}")


def test_comments_of_others(tmp_path):
    exif = Image.Exif()
    exif[encode.IMAGE_DESCRIPTION] = 7
    Image.new("RGB", (4, 4)).save(tmp_path / "a.webp", exif=exif)
    assert encode.read_comment(tmp_path / "a.webp") == "7"
    Image.new("P", (4, 4)).save(tmp_path / "a.gif", comment=b"caf\xe9")
    assert encode.read_comment(tmp_path / "a.gif") == "caf\ufffd"


def test_a_gif_that_players_slow_down(tmp_path):
    with pytest.warns(UserWarning, match="delays under 20 ms.*use fps=50") as log:
        media.save_video({"video": smooth_video(3)}, tmp_path / "a.gif", fps=60)
    assert len(log) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        media.save_video({"video": smooth_video(3)}, tmp_path / "b.gif", fps=50)
        media.save_video({"video": smooth_video(3)}, tmp_path / "b.webp", fps=60)


def test_a_rate_is_a_number(tmp_path):
    with pytest.raises(TypeError, match="fps='24' is a text; give a number"):
        media.save_video({"video": smooth_video(3)}, tmp_path / "a.mp4", fps="24")


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
def test_a_file_has_the_same_bytes_each_time(tmp_path, suffix):
    """On the same machine. Of noise, where an encoder has the most to choose."""
    video = np.random.RandomState(0).random_sample((3, 25, 96, 96)).astype(np.float32)
    files = [
        media.save_video({"video": video}, tmp_path / f"{i}{suffix}", fps=24) for i in range(6)
    ]
    assert len({file.read_bytes() for file in files}) == 1
