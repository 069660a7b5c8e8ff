"""Paths of what is written: overwriting and failures; wav and png."""

import os
import wave
from fractions import Fraction
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from disks import full_disk
from media_cases import RATE, smooth_video, tones

from cosmos3_jax.io import clips, media


def everything_in(folder) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# Paths: overwriting, failures
# -------------------------------------------------------------------------------

WRITERS = {
    "a.mp4": lambda path, **options: media.save_mp4({"video": smooth_video(2)}, path, **options),
    "a.wav": lambda path, **options: media.save_wav(path, tones(100), RATE, **options),
    "a.png": lambda path, **options: media.save_image(smooth_video(1), path, **options),
    "a.jpg": lambda path, **options: media.save_image(smooth_video(1)[:, 0], path, **options),
    "a.txt": lambda path, **options: media.write_text(path, "text", **options),
}


@pytest.mark.parametrize("name", WRITERS)
def test_an_existing_file_is_replaced_only_on_request(tmp_path, name):
    path = tmp_path / "made" / "on the way" / name
    assert WRITERS[name](path) == path
    written = path.read_bytes()
    path.write_bytes(b"precious")
    for number in (1, 2):  # what is finished is never refused
        with pytest.warns(UserWarning, match=f"{name} exists: wrote .*-{number}{path.suffix}"):
            free = WRITERS[name](path)
        assert free == path.with_stem(f"{path.stem}-{number}") and free.read_bytes() == written
    assert path.read_bytes() == b"precious"
    WRITERS[name](str(path), overwrite=True)
    assert path.read_bytes() == written
    assert len(everything_in(path.parent)) == 3
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()  # not the 0600 of a temporary file


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("name", WRITERS)
def test_a_failure_leaves_no_trace(tmp_path, name, monkeypatch):
    """Even one at the very last step, with everything already written."""

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    monkeypatch.setattr(os, "link", fail)
    path = tmp_path / name
    with pytest.raises(OSError, match="disk full"):
        WRITERS[name](path)
    assert everything_in(tmp_path) == []
    path.write_bytes(b"precious")
    with pytest.raises(OSError, match="disk full"):
        WRITERS[name](path, overwrite=True)
    assert path.read_bytes() == b"precious"
    assert everything_in(tmp_path) == [name]


MOVING = {
    name: lambda path: media.save_video(smooth_video(3), path, comment="x" * 2000)
    for name in ("a.mov", "a.webm", "a.gif", "a.webp")
}


@pytest.mark.parametrize("name", [*WRITERS, *MOVING])
def test_a_disk_that_fills_at_any_byte(tmp_path, name):
    """Each writer notices, whatever its library makes of it; none leaves a short file."""
    write = (WRITERS | MOVING)[name]
    path = write(tmp_path / "whole" / name)
    size = path.stat().st_size
    for room in sorted({0, 1, size // 3, size - 1}):
        with full_disk(room), pytest.raises(OSError, match=f"{name} could not be written: File"):
            write(tmp_path / "full" / name)
    assert everything_in(tmp_path) == ["whole", f"whole/{name}"]


def test_a_failure_while_encoding_leaves_no_trace(tmp_path):
    video = smooth_video(30)
    video[:, 20] = np.nan
    path = tmp_path / "a.mp4"
    path.write_bytes(b"precious")
    with pytest.raises(ValueError, match="NaN"):
        media.save_mp4(
            {"video": video, "sound": tones(99), "sample_rate": RATE}, path, overwrite=True
        )
    assert (path.read_bytes(), everything_in(tmp_path)) == (b"precious", ["a.mp4"])


def test_check_writable(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    assert media.check_writable(tmp_path / "new" / "a.MP4") == tmp_path / "new" / "a.MP4"
    with pytest.raises(ValueError, match="'.avi' is not supported here; use .mp4, .mov, .webm"):
        media.check_writable(tmp_path / "a.avi")
    with pytest.raises(ValueError, match="'.png' is not supported here; use .mp4"):
        media.check_writable(tmp_path / "a.png", suffixes=(".mp4",))
    with pytest.raises(NotADirectoryError, match="choose another folder"):
        media.check_writable(tmp_path / "file" / "a.mp4")
    with pytest.raises(NotADirectoryError, match="choose another folder"):
        media.check_writable(tmp_path / "file" / "deeper" / "a.mp4")
    with pytest.raises(OSError, match="cannot write files in /proc"):
        media.check_writable("/proc/a.mp4")
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(IsADirectoryError, match="folder.mp4 is a folder"):
        media.check_writable(tmp_path / "folder.mp4", overwrite=True)
    (tmp_path / "a.mp4").touch()
    with pytest.raises(FileExistsError, match="--overwrite"):
        media.check_writable(tmp_path / "a.mp4")
    media.check_writable(tmp_path / "a.mp4", overwrite=True)
    assert everything_in(tmp_path) == ["a.mp4", "file", "folder.mp4"]


def test_a_writer_refuses_other_suffixes(tmp_path):
    for write in (WRITERS["a.mp4"], WRITERS["a.wav"], WRITERS["a.png"]):
        with pytest.raises(ValueError, match="not supported here"):
            write(tmp_path / "new" / "a.avi")
    assert everything_in(tmp_path) == []


# wav
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 2])
def test_wav_round_trip(tmp_path, channels):
    sound = np.random.default_rng(0).uniform(-1, 1, (channels, 5000)).astype(np.float32)
    sound[:, :4] = [-1, 1, 0, 1.7]
    path = media.save_wav(tmp_path / "a.wav", jnp.asarray(sound), RATE)
    with wave.open(str(path)) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (
            channels,
            2,
            RATE,
        )
    decoded, rate = media.read_sound(path)
    assert (decoded.shape, decoded.dtype, rate) == (sound.shape, np.float32, RATE)
    # Half a step of rounding, and a whole one at +1, which 16 bits do not have.
    np.testing.assert_allclose(decoded, np.clip(sound, -1, 1), atol=1 / 32768)
    np.testing.assert_allclose(
        decoded[:, 4:], sound[:, 4:].clip(max=32767 / 32768), atol=0.5001 / 32768
    )
    again, _ = media.read_sound(media.save_wav(tmp_path / "b.wav", decoded, RATE))
    np.testing.assert_array_equal(again, decoded)
    assert media.probe(path) == media.MediaInfo(
        audio_codec="pcm_s16le",
        sample_rate=RATE,
        channels=channels,
        audio_samples=5000,
        audio_duration=5000 / RATE,
    )


def test_unwritable_sounds(tmp_path):
    for waveform, rate, message in [
        (np.zeros(100), RATE, "expected .channels, samples."),
        (np.zeros((100, 2)), RATE, "100, 2"),
        (tones(10), 0, "sample_rate=0"),
        (tones(10), 44.1, "sample_rate=44.1"),
        (np.full((2, 9), np.nan), RATE, "NaN"),
    ]:
        with pytest.raises(ValueError, match=message):
            media.save_wav(tmp_path / "a.wav", waveform, rate)
    assert everything_in(tmp_path) == []


# png
# ------------------------------------------------------------------------------------------------


def test_png_is_exact(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (3, 17, 31), np.uint8)
    for name, source in {
        "u8": image,
        "float": image / 255,
        "frame": image[:, None],
        "jax": jnp.asarray(image),
    }.items():
        path = media.save_image(source, tmp_path / f"{name}.png")
        np.testing.assert_array_equal(media.read_image(path), image.transpose(1, 2, 0))
    with pytest.raises(ValueError, match="2 frames; use save_frames"):
        media.save_image(smooth_video(2), tmp_path / "a.png")
    with pytest.raises(ValueError, match="expected"):
        media.save_image(image[:2], tmp_path / "a.png")


def test_frames(tmp_path):
    video, folder = smooth_video(5), tmp_path / "clip"
    paths = media.save_frames(video, folder)
    assert (
        [path.name for path in paths]
        == everything_in(folder)
        == [f"frame_000{t}.png" for t in range(5)]
    )
    frames, fps = media.read_video(paths)
    np.testing.assert_array_equal(frames, media.to_uint8(video).transpose(1, 2, 3, 0))
    assert fps is None
    (folder / "notes.txt").touch()
    with pytest.warns(UserWarning, match="clip holds frames: writing to .*clip-1"):
        again = media.save_frames(video, folder)
    assert again[0] == tmp_path / "clip-1" / "frame_0000.png" and len(again) == 5
    with pytest.raises(ValueError, match="NaN"):
        media.save_frames(video * np.nan, folder, overwrite=True)
    assert len(everything_in(folder)) == 6
    media.save_frames(video[:, :2], folder, overwrite=True)
    assert everything_in(folder) == ["frame_0000.png", "frame_0001.png", "notes.txt"]


class Rational:
    """As PyAV 19 has fractions: 0/0 and 0/1 are what is not known."""

    def __init__(self, numerator: int, denominator: int):
        self.numerator, self.denominator = numerator, denominator

    def __bool__(self) -> bool:
        return self.numerator != 0


@pytest.mark.parametrize(
    "rate, expected",
    [
        (None, None),
        (Rational(0, 0), None),
        (Rational(0, 1), None),
        (Rational(24000, 1001), Fraction(24000, 1001)),
        (Fraction(24), Fraction(24)),
    ],
)
def test_rates_of_all_versions_of_pyav(rate, expected):
    found = clips.average_rate(SimpleNamespace(average_rate=rate))
    assert found == expected and isinstance(found, Fraction | None)
