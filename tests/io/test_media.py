"""Media in and out: what is written is decoded again, and compared with what went in."""

import io
import os
import wave
from fractions import Fraction

import av
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from cosmos3_jax.io import media

RATE = 48_000
PATCHES = np.array(
    [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0], [0, 255, 255], [255, 0, 255],
     [255, 255, 255], [0, 0, 0], [128, 128, 128], [200, 100, 50]], np.uint8
)  # fmt: skip


def smooth_video(frames: int, height: int = 64, width: int = 96) -> np.ndarray:
    """Slowly moving colour waves, float32 [3, T, H, W] in [0, 1]."""
    t, y, x = np.meshgrid(np.arange(frames), np.arange(height), np.arange(width), indexing="ij")
    channels = [0.5 + 0.4 * np.sin((x + c * y) / 20 + t / 10 + c) for c in range(3)]
    return np.stack(channels).astype(np.float32)


def tones(samples: int, left: float = 440.0, right: float = 1000.0) -> np.ndarray:
    """A different sine in each channel, float32 [2, S]."""
    t = np.arange(samples) / RATE
    return np.stack([0.5 * np.sin(2 * np.pi * f * t) for f in (left, right)]).astype(np.float32)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return 10 * np.log10(255**2 / np.mean((a.astype(float) - b.astype(float)) ** 2))


def everything_in(folder) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# Pixels and rates
# -------------------------------------------------------------------------------------------


def test_pixels_are_rounded_and_clamped():
    levels = np.arange(256) / 255
    np.testing.assert_array_equal(media.to_uint8(levels), np.arange(256))
    np.testing.assert_array_equal(
        media.to_uint8(np.array([-0.5, 1.5, 0.499 / 255, 0.501 / 255])), [0, 255, 0, 1]
    )
    np.testing.assert_array_equal(media.to_uint8(jnp.array([0.0, 1.0], jnp.bfloat16)), [0, 255])
    halves = ((np.arange(255) + 0.45) / 255).astype(
        np.float16
    )  # computing in float16 gets some of these wrong
    np.testing.assert_array_equal(
        media.to_uint8(halves), np.floor(halves.astype(float) * 255 + 0.5)
    )
    np.testing.assert_array_equal(media.to_uint8(PATCHES), PATCHES)


def test_pixels_without_a_value_are_refused():
    with pytest.raises(ValueError, match="NaN"):
        media.to_uint8(np.array([0.5, np.nan]))
    with pytest.raises(TypeError, match="int64"):
        media.to_uint8(np.array([3, 4]))


RATES = [
    (24, Fraction(24)), (24.0, Fraction(24)), (30.0, Fraction(30)),
    (16.0, Fraction(16)), (12.5, Fraction(25, 2)),
    (29.97, Fraction(30000, 1001)), (23.976, Fraction(24000, 1001)), (59.94, Fraction(60000, 1001)),
    (119.88, Fraction(120000, 1001)), (30000 / 1001, Fraction(30000, 1001)),
    (np.float32(29.97), Fraction(30000, 1001)),
    (Fraction(24000, 1001), Fraction(24000, 1001)), (7.3, Fraction(73, 10)),
    (50 / 3, Fraction(50, 3)),
]  # fmt: skip


@pytest.mark.parametrize(("fps", "exact"), RATES)
def test_rates_are_exact(fps, exact):
    assert media.frame_rate(fps) == exact


@pytest.mark.parametrize("fps", [0, -24.0, float("nan"), float("inf"), 5000])
def test_impossible_rates(fps):
    with pytest.raises(ValueError, match="fps="):
        media.frame_rate(fps)


# mp4
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fps", [24.0, 30, 29.97, 23.976, 12.5, 16.0])
def test_mp4_round_trip(tmp_path, fps):
    video = smooth_video(25)
    path = media.save_mp4(
        {"video": video[None], "sound": tones(3 * RATE)[None], "sample_rate": RATE},
        tmp_path / "a.mp4",
        fps=fps,
    )
    info = media.probe(path)
    assert (info.frames, info.height, info.width) == (25, 64, 96)
    assert info.fps == media.frame_rate(fps)
    assert (info.video_codec, info.audio_codec, info.sample_rate, info.channels) == (
        "h264",
        "aac",
        RATE,
        2,
    )
    decoded, rate = media.read_video(path)
    assert rate == pytest.approx(float(info.fps))
    # crf 18 gives this clip 36.5 dB; 30 dB is where a viewer starts to see damage.
    assert psnr(decoded, media.to_uint8(video).transpose(1, 2, 3, 0)) > 33
    assert everything_in(tmp_path) == ["a.mp4"]


@pytest.mark.parametrize("samples", [378_240 // 9, 10_000, 42_000, 1])
def test_sound_is_fitted_to_the_video(tmp_path, samples):
    """Longer (as the model's is), shorter, equal, and next to nothing: the tracks end together."""
    output = {"video": smooth_video(21), "sound": tones(samples), "sample_rate": RATE}
    info = media.probe(media.save_mp4(output, tmp_path / "a.mp4", fps=24.0))
    assert info.duration == 21 / 24
    # One video frame is the contract. The edit list counts in samples, so it is in fact exact.
    assert abs(info.audio_duration - info.duration) < 1 / 24
    assert info.audio_samples == 42_000
    with av.open(tmp_path / "a.mp4") as container:
        video, sound = container.streams
        assert (
            video.duration * video.time_base == sound.duration * sound.time_base == Fraction(21, 24)
        )
        assert video.start_time == sound.start_time == 0


def test_tones_survive_in_place(tmp_path):
    sound = tones(2 * RATE)
    output = {"video": smooth_video(48, 32, 32), "sound": sound, "sample_rate": RATE}
    decoded, rate = media.read_sound(media.save_mp4(output, tmp_path / "a.mp4"))
    assert (decoded.shape, decoded.dtype, rate) == (sound.shape, np.float32, RATE)
    peaks = np.abs(np.fft.rfft(decoded)).argmax(axis=1) / 2  # two seconds: bins of 0.5 Hz
    np.testing.assert_array_equal(peaks, [440, 1000])
    # AAC leaves an error of 0.013 RMS on these tones. One sample late would be 0.036; swapped
    # channels 0.5.
    assert np.sqrt(np.mean((decoded - sound) ** 2)) < 0.025


def test_the_onset_survives(tmp_path):
    """ffmpeg's default AAC coder garbles the first 20 ms of a tone that starts at once."""
    sound = tones(RATE)
    output = {"video": smooth_video(24, 32, 32), "sound": sound, "sample_rate": RATE}
    decoded, _ = media.read_sound(media.save_mp4(output, tmp_path / "a.mp4"))
    assert (
        np.abs(decoded - sound)[:, :1024].max() < 0.05
    )  # 0.02 as written; 0.39 with the default coder


def test_mono_and_other_rates(tmp_path):
    output = {"video": smooth_video(24, 32, 32), "sound": tones(44_100)[:1], "sample_rate": 44_100}
    info = media.probe(media.save_mp4(output, tmp_path / "a.mp4"))
    assert (info.channels, info.sample_rate, info.audio_samples) == (1, 44_100, 44_100)


@pytest.mark.parametrize("output", [{}, {"sound": None}, {"sound": None, "sample_rate": RATE}])
def test_video_without_sound(tmp_path, output):
    info = media.probe(media.save_mp4({"video": smooth_video(5)} | output, tmp_path / "a.mp4"))
    assert (info.frames, info.audio_codec, info.channels) == (5, None, 0)
    with av.open(tmp_path / "a.mp4") as container:
        assert len(container.streams) == 1
    with pytest.raises(ValueError, match="a.mp4 has no sound"):
        media.read_sound(tmp_path / "a.mp4")


@pytest.mark.parametrize("sound", [None, tones(2000)])
def test_single_frame(tmp_path, sound):
    output = {"video": smooth_video(1), "sound": sound, "sample_rate": RATE}
    info = media.probe(media.save_mp4(output, tmp_path / "a.mp4", fps=24))
    assert (info.frames, info.fps, info.audio_samples) == (1, 24, 0 if sound is None else 2000)


def test_colours_survive(tmp_path):
    """A wrong matrix moves saturated colours by 10 to 40 levels; a wrong range, black and white by
    16.
    """
    image = np.repeat(np.repeat(PATCHES[None], 64, 0), 32, 1).reshape(64, 320, 3)
    video = np.repeat(image.transpose(2, 0, 1)[:, None] / 255, 4, 1)
    path = media.save_mp4({"video": video}, tmp_path / "a.mp4")
    with av.open(path) as container:
        codec = container.streams.video[0].codec_context
        assert (codec.pix_fmt, codec.colorspace, codec.color_range) == (
            "yuv420p",
            1,
            1,
        )  # BT.709, limited
        assert (codec.color_primaries, codec.color_trc) == (1, 1)
        planes = next(container.decode(video=0)).to_ndarray()
    # The bytes themselves, against the standard's formula: a mistake made both ways cancels in a
    # round trip.
    red, green, blue = PATCHES.T / 255
    luma = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    expected = [
        16 + 219 * luma,
        128 + 224 * (blue - luma) / 1.8556,
        128 + 224 * (red - luma) / 1.5748,
    ]
    coded = [
        planes[32, 16::32],
        planes[64:80].reshape(32, 160)[16, 8::16],
        planes[80:].reshape(32, 160)[16, 8::16],
    ]
    np.testing.assert_allclose(
        coded, expected, atol=2
    )  # half a level of rounding, and x264's quantiser
    decoded = media.read_video(path)[0].astype(float)
    centres = decoded.reshape(4, 64, 10, 32, 3)[:, 16:48, :, 8:24].mean(axis=(0, 1, 3))
    np.testing.assert_allclose(centres, PATCHES, atol=4)  # 8-bit YCbCr alone costs up to 2


def test_the_example_is_chosen(tmp_path):
    video = jnp.stack([jnp.full((3, 2, 32, 32), level, jnp.bfloat16) for level in (0.0, 1.0)])
    for example, level in enumerate((0, 255)):
        path = media.save_mp4({"video": video}, tmp_path / f"{example}.mp4", example=example)
        # A flat image at the ends of the range is coded exactly, but for x264's rounding.
        np.testing.assert_allclose(media.read_video(path)[0], level, atol=1)
    with pytest.raises(ValueError, match="example=2 .* 2, counted from 0"):
        media.save_mp4({"video": video}, tmp_path / "2.mp4", example=2)


BAD_OUTPUTS = [
    ({"video": smooth_video(2, 63, 96)}, "height=63"),
    ({"video": smooth_video(2, 64, 95)}, "width=95"),
    ({"video": np.zeros((1, 48, 3, 4, 6))}, "48, 3, 4, 6"),
    ({"video": np.zeros((3, 0, 32, 32))}, "3, 0, 32, 32"),
    ({"video": np.zeros((3, 32, 32))}, "expected"),
    ({"latents": np.zeros((3, 32, 32))}, "no 'video'"),
    ({"video": np.full((3, 2, 32, 32), np.nan)}, "NaN"),
    ({"video": smooth_video(2), "sound": tones(99)}, "sample_rate=None"),
    (
        {"video": smooth_video(2), "sound": tones(99), "sample_rate": 47_999},
        "47999 is not one of AAC's",
    ),
    ({"video": smooth_video(2), "sound": np.zeros((64, 99)), "sample_rate": RATE}, "64, 99"),
    ({"video": smooth_video(2), "sound": np.full((2, 99), np.inf), "sample_rate": RATE}, "NaN"),
]


@pytest.mark.parametrize(("output", "message"), BAD_OUTPUTS)
def test_unwritable_outputs(tmp_path, output, message):
    with pytest.raises(ValueError, match=message):
        media.save_mp4(output, tmp_path / "a.mp4")
    assert everything_in(tmp_path) == []


def test_crf_sets_the_quality(tmp_path):
    noise = np.random.default_rng(0).random((3, 4, 64, 64))
    sizes = [
        media.save_mp4({"video": noise}, tmp_path / f"{c}.mp4", crf=c).stat().st_size
        for c in (10, 18, 40)
    ]
    assert sizes == sorted(sizes, reverse=True)
    with pytest.raises(ValueError, match="crf=60"):
        media.save_mp4({"video": noise}, tmp_path / "a.mp4", crf=60)


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
    with pytest.raises(FileExistsError, match=f"{name} exists; pass overwrite=True .--overwrite."):
        WRITERS[name](path)
    assert path.read_bytes() == b"precious"
    WRITERS[name](str(path), overwrite=True)
    assert path.read_bytes() == written
    assert everything_in(path.parent) == [name]
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

    monkeypatch.setattr(media.os, "replace", fail)
    path = tmp_path / name
    with pytest.raises(OSError, match="disk full"):
        WRITERS[name](path)
    assert everything_in(tmp_path) == []
    path.write_bytes(b"precious")
    with pytest.raises(OSError, match="disk full"):
        WRITERS[name](path, overwrite=True)
    assert path.read_bytes() == b"precious"
    assert everything_in(tmp_path) == [name]


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
    with pytest.raises(ValueError, match="'.avi' is not supported here; use .mp4, .wav"):
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
    assert everything_in(tmp_path) == ["a.mp4", "file", "folder.mp4", "new"]


def test_a_writer_refuses_other_suffixes(tmp_path):
    for write in (WRITERS["a.mp4"], WRITERS["a.wav"], WRITERS["a.png"]):
        with pytest.raises(ValueError, match="not supported here"):
            write(tmp_path / "a.webm")


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
    with pytest.raises(FileExistsError, match="frame_0000.png; pass overwrite"):
        media.save_frames(video, folder)
    with pytest.raises(ValueError, match="NaN"):
        media.save_frames(video * np.nan, folder, overwrite=True)
    assert len(everything_in(folder)) == 6
    media.save_frames(video[:, :2], folder, overwrite=True)
    assert everything_in(folder) == ["frame_0000.png", "frame_0001.png", "notes.txt"]


# Reading images
# ---------------------------------------------------------------------------------------------

RGB = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
GREY = RGB[..., :1]
ALPHA = np.full((20, 30, 1), 10, np.uint8)  # nearly transparent: blending would be plain to see
GREY3 = np.repeat(GREY, 3, 2)
IMAGE_ARRAYS = {
    "last": (RGB, RGB),
    "first": (RGB.transpose(2, 0, 1), RGB),
    "float": (RGB / 255, RGB),
    "float32 first": ((RGB / 255).astype(np.float32).transpose(2, 0, 1), RGB),
    "jax": (jnp.asarray(RGB), RGB),
    "rgba": (np.concatenate([RGB, ALPHA], 2), RGB),
    "rgba first": (np.concatenate([RGB, ALPHA], 2).transpose(2, 0, 1), RGB),
    "grey": (GREY[..., 0], GREY3),
    "grey last": (GREY, GREY3),
    "grey first": (GREY.transpose(2, 0, 1), GREY3),
    "grey + alpha": (np.concatenate([GREY, ALPHA], 2), GREY3),
}


@pytest.mark.parametrize("name", IMAGE_ARRAYS)
def test_image_arrays(name):
    source, expected = IMAGE_ARRAYS[name]
    image = media.read_image(source)
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image, expected)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK"])
def test_image_files_and_pil(tmp_path, mode):
    image = Image.fromarray(RGB).convert(mode)
    if "A" in mode:
        image.putalpha(10)
    path = tmp_path / ("a.tiff" if mode == "CMYK" else "a.png")
    image.save(path)
    expected = np.asarray(image.convert("RGB"))
    for source in (image, path, str(path)):
        np.testing.assert_array_equal(media.read_image(source), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation):
    upright = {
        1: RGB, 2: RGB[:, ::-1], 3: RGB[::-1, ::-1], 4: RGB[::-1], 5: RGB.transpose(1, 0, 2),
        6: np.rot90(RGB, -1), 7: np.rot90(RGB, 2).transpose(1, 0, 2), 8: np.rot90(RGB),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(RGB).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(media.read_image(tmp_path / "a.png"), upright)


def test_bad_image_arrays():
    for array, message in [
        (RGB.astype(np.float32), "divide by 255"),
        (RGB / 127.5 - 1, "values from -"),
        (np.zeros((0, 4, 3)), "none empty"),
        (np.zeros((5, 6, 7)), "channels, 1 to 4"),
        (np.zeros((1, 3, 6, 7)), "expected 2 or 3 axes"),
        (np.full((4, 4, 3), np.nan), "NaN"),
    ]:
        with pytest.raises(ValueError, match=message):
            media.read_image(array)
    with pytest.raises(TypeError, match="int64"):
        media.read_image(RGB.astype(np.int64))
    with pytest.raises(ValueError, match="mode I;16"):  # Pillow would make it white
        media.read_image(Image.fromarray(np.full((4, 4), 9000, np.uint16)))


# Reading videos
# ---------------------------------------------------------------------------------------------

CLIP = np.random.default_rng(1).integers(0, 256, (6, 20, 30, 3), np.uint8)
VIDEO_SOURCES = {
    "last": CLIP,
    "first": CLIP.transpose(0, 3, 1, 2),
    "float": CLIP / 255,
    "jax": jnp.asarray(CLIP),
    "list of arrays": list(CLIP),
    "tuple of PIL": tuple(Image.fromarray(frame) for frame in CLIP),
}


@pytest.mark.parametrize("name", VIDEO_SOURCES)
def test_video_sources(name):
    source = VIDEO_SOURCES[name]
    frames, fps = media.read_video(source)
    assert (frames.dtype, fps) == (np.uint8, None)
    np.testing.assert_array_equal(frames, CLIP)
    np.testing.assert_array_equal(media.read_video(source, max_frames=2)[0], CLIP[:2])
    np.testing.assert_array_equal(media.read_video(source, max_frames=2, keep="last")[0], CLIP[-2:])
    np.testing.assert_array_equal(media.read_video(source, max_frames=9, keep="last")[0], CLIP)


def test_video_file_parts(tmp_path):
    path = media.save_mp4({"video": smooth_video(12)}, tmp_path / "a.mp4", fps=12.5)
    frames, fps = media.read_video(str(path))
    assert (frames.shape, frames.dtype, fps) == ((12, 64, 96, 3), np.uint8, 12.5)
    np.testing.assert_array_equal(media.read_video(path, max_frames=5)[0], frames[:5])
    np.testing.assert_array_equal(media.read_video(path, max_frames=5, keep="last")[0], frames[-5:])
    np.testing.assert_array_equal(media.read_video(path, keep="last")[0], frames)
    with pytest.raises(ValueError, match="max_frames=0"):
        media.read_video(path, max_frames=0)
    with pytest.raises(ValueError, match="keep='middle'"):
        media.read_video(path, keep="middle")


def test_video_rotation(tmp_path):
    """An upright phone writes frames on their side, and a matrix that turns them clockwise by 90
    degrees.
    """
    path = media.save_mp4({"video": smooth_video(2)}, tmp_path / "a.mp4")
    lying, _ = media.read_video(path)
    data, one = path.read_bytes(), 0x10000

    def matrix(*rows):
        return b"".join((int(value) & 0xFFFFFFFF).to_bytes(4, "big") for value in rows)

    identity = matrix(one, 0, 0, 0, one, 0, 0, 0, 1 << 30)
    at = data.index(identity, data.index(b"tkhd"))
    clockwise = matrix(0, one, 0, -one, 0, 0, 0, 0, 1 << 30)
    path.write_bytes(data[:at] + clockwise + data[at + len(clockwise) :])
    np.testing.assert_array_equal(media.read_video(path)[0], np.rot90(lying, -1, axes=(1, 2)))


def test_bad_video_sources():
    with pytest.raises(ValueError, match="frame 1 is 20x29 but frame 0 is 20x30"):
        media.read_video([CLIP[0], CLIP[0][:, 1:]])
    with pytest.raises(ValueError, match="list of images has no frames"):
        media.read_video([])
    with pytest.raises(ValueError, match="expected 4 axes"):
        media.read_video(CLIP[0])
    with pytest.raises(ValueError, match="expected 4 axes, none empty"):
        media.read_video(CLIP[:0])
    with pytest.raises(ValueError, match="channels, 1 to 4"):
        media.read_video(CLIP.transpose(3, 0, 1, 2))  # [3, T, H, W], as generate returns it


# Damaged files
# ----------------------------------------------------------------------------------------------

READERS = {
    "read_image": media.read_image, "read_video": media.read_video,
    "read_sound": media.read_sound, "probe": media.probe,
}  # fmt: skip


@pytest.mark.parametrize("reader", READERS)
def test_damaged_files(tmp_path, reader):
    read = READERS[reader]
    with pytest.raises(FileNotFoundError, match="missing.mp4 does not exist"):
        read(tmp_path / "missing.mp4")
    with pytest.raises(IsADirectoryError, match="is a folder"):
        read(tmp_path)
    (tmp_path / "empty.mp4").touch()
    with pytest.raises(ValueError, match="empty.mp4 is empty"):
        read(tmp_path / "empty.mp4")
    (tmp_path / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(5000))
    with pytest.raises(ValueError, match="noise.mp4 is not"):
        read(tmp_path / "noise.mp4")
    (tmp_path / "words.txt").write_text(
        "hello, world\n" * 50
    )  # which ffmpeg would film, as a terminal
    with pytest.raises(ValueError, match="words.txt is not"):
        read(tmp_path / "words.txt")


def test_cut_files(tmp_path):
    whole = io.BytesIO()
    Image.fromarray(np.repeat(RGB, 20, 0)).save(whole, format="png")
    (tmp_path / "cut.png").write_bytes(whole.getvalue()[:2000])
    with pytest.raises(ValueError, match="cut.png is not"):
        media.read_image(tmp_path / "cut.png")
    path = media.save_mp4({"video": smooth_video(5)}, tmp_path / "a.mp4")
    for part in (0.1, 0.5):
        (tmp_path / "cut.mp4").write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])
        with pytest.raises(ValueError, match="cut.mp4 is not"):
            media.read_video(tmp_path / "cut.mp4")
    with pytest.raises(ValueError, match="a.wav has no video"):
        media.read_video(media.save_wav(tmp_path / "a.wav", tones(100), RATE))
    with pytest.raises(ValueError, match="b.wav has a sound track without samples"):
        media.read_sound(media.save_wav(tmp_path / "b.wav", tones(0), RATE))
