"""Pixels, rates and mp4: what is written is decoded again, and compared with what went in."""

from fractions import Fraction

import av
import jax.numpy as jnp
import numpy as np
import pytest
from media_cases import RATE, smooth_video, tones

from cosmos3_jax.io import media

PATCHES = np.array(
    [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0], [0, 255, 255], [255, 0, 255],
     [255, 255, 255], [0, 0, 0], [128, 128, 128], [200, 100, 50]], np.uint8
)  # fmt: skip


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return 10 * np.log10(255**2 / np.mean((a.astype(float) - b.astype(float)) ** 2))


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
    assert [file.name for file in tmp_path.iterdir()] == ["a.mp4"]


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
    assert not list(tmp_path.iterdir())


def test_crf_sets_the_quality(tmp_path):
    noise = np.random.default_rng(0).random((3, 4, 64, 64))
    sizes = [
        media.save_mp4({"video": noise}, tmp_path / f"{c}.mp4", crf=c).stat().st_size
        for c in (10, 18, 40)
    ]
    assert sizes == sorted(sizes, reverse=True)
    with pytest.raises(ValueError, match="crf=60"):
        media.save_mp4({"video": noise}, tmp_path / "a.mp4", crf=60)
