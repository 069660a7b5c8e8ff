"""Which frames of a clip are shown, and how they lie, as a player shows them."""

import io
import math
import struct
import warnings
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.stream import Disposition
from clip_cases import PICTURE, video_of, write_clip
from PIL import Image

from cosmos3_jax.io import media
from cosmos3_jax.io.conditioning import clip_pixels, resize_and_crop

# Orientation and shape of samples
# ----------------------------------------------------------------------------------------------

MATRICES = {
    "as stored": (1, 0, 0, 1), "a quarter": (0, 1, -1, 0), "a half": (-1, 0, 0, -1),
    "three quarters": (0, -1, 1, 0), "mirrored": (-1, 0, 0, 1), "upside down": (1, 0, 0, -1),
    "transposed": (0, 1, 1, 0), "mirrored and turned": (0, -1, -1, 0),
}  # fmt: skip


def with_matrix(path: Path, a, b, c, d) -> Path:
    """In place of the identity in the header of an mp4's first track, in 16.16 fixed point."""

    def matrix(a, b, c, d):
        numbers = [round(65536 * x) for x in (a, b, 0, c, d, 0, 0, 0)]
        return struct.pack(">9i", *numbers, 1 << 30)

    data = path.read_bytes()
    at = data.index(matrix(1, 0, 0, 1), data.index(b"tkhd"))
    path.write_bytes(data[:at] + matrix(a, b, c, d) + data[at + 36 :])
    return path


def moved(picture: np.ndarray, a, b, c, d) -> np.ndarray:
    """Each pixel where the matrix takes it: x = a column + c row, y = b column + d row."""
    rows, columns = np.indices(picture.shape[:2])
    x, y = a * columns + c * rows, b * columns + d * rows
    x, y = x - x.min(), y - y.min()
    result = np.empty((y.max() + 1, x.max() + 1, 3), np.uint8)
    result[y, x] = picture
    return result


@pytest.mark.parametrize("name", MATRICES)
def test_display_matrix(tmp_path, name):
    clip = media.save_mp4({"video": video_of(PICTURE)}, tmp_path / "a.mp4", crf=0)
    stored = media.read_video(clip)[0]
    shown, _ = media.read_video(with_matrix(clip, *MATRICES[name]))
    np.testing.assert_array_equal(shown, [moved(frame, *MATRICES[name]) for frame in stored])
    expected = moved(PICTURE, *MATRICES[name])
    for y, x in np.ndindex(2, 2):  # of each quarter the middle
        at = [(2 * i + 1) * side // 4 for i, side in zip((y, x), expected.shape, strict=False)]
        np.testing.assert_allclose(shown[(0, *at)], expected[tuple(at)], atol=4)


def test_matrices_of_pyav_too(tmp_path):
    """A selfie camera's, by the library's own function."""
    with av.open(tmp_path / "a.mov", "w") as file:
        stream = file.add_stream("png", rate=24)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "rgb24"
        stream.set_display_rotation(0, hflip=True)
        file.mux(stream.encode(av.VideoFrame.from_ndarray(PICTURE)))
        file.mux(stream.encode())
    np.testing.assert_array_equal(media.read_video(tmp_path / "a.mov")[0][0], PICTURE[:, ::-1])


def test_a_slanted_matrix_is_refused(tmp_path):
    clip = media.save_mp4({"video": video_of(PICTURE)}, tmp_path / "a.mp4")
    with pytest.raises(ValueError, match=r"a\.mp4 is turned by -?45 degrees.*turn it upright"):
        media.read_video(with_matrix(clip, 0.7, 0.7, -0.7, 0.7))


@pytest.mark.parametrize("aspect", [Fraction(2), Fraction(1, 2), Fraction(16, 11)], ids=str)
@pytest.mark.parametrize("matrix", ["as stored", "a quarter"])
def test_sample_aspect(tmp_path, aspect, matrix):
    clip = write_clip(
        tmp_path / "a.mp4", [PICTURE] * 5, codec="libx264rgb", sample_aspect_ratio=aspect,
        options={"crf": "0"},
    )  # fmt: skip
    shown, _ = media.read_video(with_matrix(clip, *MATRICES[matrix]))
    wide, high = round(48 * max(aspect, 1)), round(32 / min(aspect, 1))
    stretched = PICTURE[np.arange(high) * 32 // high][:, np.arange(wide) * 48 // wide]
    expected = moved(stretched, *MATRICES[matrix])
    assert shown.shape[1:] == expected.shape
    # Away from the edges, where it is smoothed.
    around = [np.roll(expected, (y, x), (0, 1)) for y in (-2, 2) for x in (-2, 2)]
    away = np.ptp(around, axis=0) == 0
    assert away.mean() > 0.6
    np.testing.assert_array_equal(shown[0][away], expected[away])
    pixels, _ = clip_pixels(clip, 5, 32, 64)
    np.testing.assert_allclose(
        255 * pixels[:, 0].transpose(1, 2, 0), resize_and_crop(shown, 32, 64)[0], atol=1e-3
    )


def test_absurd_samples_are_refused(tmp_path):
    clip = write_clip(tmp_path / "a.mp4", [PICTURE], codec="libx264rgb", sample_aspect_ratio=16)
    with pytest.raises(ValueError, match=r"a\.mp4 has samples of 16:1, beyond 8:1"):
        media.read_video(clip)


def test_clips_with_alpha_stand_on_white(tmp_path):
    frame = np.dstack([PICTURE, np.full((32, 48), 255, np.uint8)])
    frame[:16, :24, 3], frame[16:, :24, 3] = 0, 51
    shown, _ = media.read_video(write_clip(tmp_path / "a.mov", [frame], "rgba", "png"))
    assert [tuple(shown[0, y, x]) for y, x in ((0, 0), (0, 30), (20, 0))] == [
        (255, 255, 255), (40, 180, 60), (244, 244, 244)
    ]  # fmt: skip


# Streams and time stamps
# ----------------------------------------------------------------------------------------------


def with_cover(path: Path, codec: str = "libx264") -> Path:
    """A clip, or a song, and a picture of its cover, which is blue."""
    with av.open(str(path), "w", format="mp4") as file:
        stream = file.add_stream(codec, rate=24 if codec == "libx264" else 48000)
        cover = file.add_stream("png", rate=24)
        cover.width, cover.height, cover.pix_fmt = 16, 16, "rgb24"
        cover.disposition = Disposition.attached_pic
        blue = av.VideoFrame.from_ndarray(np.full((16, 16, 3), (0, 0, 255), np.uint8))
        if codec == "libx264":
            stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
            frames = [av.VideoFrame.from_ndarray(PICTURE)] * 1
        else:
            frames = [av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")]
            frames[0].sample_rate = 48000
        for source, frame in ((stream, frames[0]), (cover, blue)):
            file.mux(source.encode(frame))
            file.mux(source.encode())
    return path


def boxes(data: bytes) -> list[bytes]:
    found = []
    while data:
        size = int.from_bytes(data[:4], "big")
        found.append(data[:size])
        data = data[size:]
    return found


def cover_first(path: Path) -> Path:
    """The box of the cover before the tracks', as some programs write it."""
    whole = boxes(path.read_bytes())
    i = next(i for i, box in enumerate(whole) if box[4:8] == b"moov")
    inner = boxes(whole[i][8:])
    inner.sort(key=lambda box: [b"mvhd", b"udta"].index(box[4:8]) if box[4:8] != b"trak" else 2)
    whole[i] = whole[i][:8] + b"".join(inner)
    path.write_bytes(b"".join(whole))
    return path


@pytest.mark.parametrize("order", [lambda path: path, cover_first], ids=["last", "first"])
def test_a_cover_is_not_the_clip(tmp_path, order):
    path = order(with_cover(tmp_path / "a.mp4"))
    with av.open(path) as file:
        is_cover = [bool(s.disposition & Disposition.attached_pic) for s in file.streams]
    assert is_cover == ([True, False] if order is cover_first else [False, True])
    shown, _ = media.read_video(path)
    assert shown.shape == (1, 32, 48, 3)
    np.testing.assert_allclose(shown[0, 4, 4], (220, 40, 40), atol=12)
    info = media.probe(path)
    assert (info.frames, info.height, info.width, info.video_codec) == (1, 32, 48, "h264")


def test_a_song_with_a_cover_is_no_clip(tmp_path):
    path = with_cover(tmp_path / "a.m4a", "aac")
    info = media.probe(path)
    assert (info.frames, info.video_codec, info.audio_codec) == (0, None, "aac")
    with pytest.raises(ValueError, match=r"a\.m4a has no video stream"):
        media.read_video(path)


def numbered(path: Path, times, base=Fraction(1, 24)) -> Path:
    """Frame t is of grey level 10 t."""
    frames = [np.full((16, 16, 3), 10 * t, np.uint8) for t in range(len(times))]
    return write_clip(path, frames, "rgb24", to="bgr0", times=times, base=base)


def numbers(frames: np.ndarray) -> list[int]:
    return (frames[:, 0, 0, 0] // 10).tolist()


UNEVEN = [0, 1, 2, 6, 7, 8, 12]


def test_uneven_times_are_sampled(tmp_path):
    """A player shows frame 2 until the time of frame 3."""
    path = numbered(tmp_path / "a.mkv", UNEVEN)
    shown = [0, 1, 2, 2, 2, 2, 3, 4, 5, 5, 5, 5, 6]
    frames, rate = media.read_video(path, fps=24)
    assert (numbers(frames)[:13], rate) == (shown, 24)
    assert numbers(media.read_video(path, fps=24, max_frames=5)[0]) == shown[:5]
    last = media.read_video(path, fps=24, max_frames=5, keep="last")[0]
    assert numbers(last) == numbers(frames)[-5:]
    assert numbers(media.read_video(path, fps=12, max_frames=5)[0]) == [0, 2, 2, 3, 5]
    average = media.read_video(path)[1]
    assert len(media.read_video(path)[0]) == pytest.approx(len(frames) * average / 24, abs=1)


def test_uneven_times_are_sampled_for_the_video(tmp_path):
    """At its rate: nothing changes its speed, and nothing is said of it."""
    path = numbered(tmp_path / "a.mkv", UNEVEN)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels, rate = clip_pixels(path, 5, 16, 16, "first", 24.0)
    assert (numbers(255.5 * pixels.transpose(1, 2, 3, 0)), rate) == ([0, 1, 2, 2, 2], 24)


@pytest.mark.parametrize("keep", ["first", "last"])
def test_even_times_are_left_alone(tmp_path, keep):
    """Rounded to milliseconds, or at another rate, frames are taken as they are stored."""
    for rate in (24, 30, 59.94, 240):
        times = [round(1000 * t / rate) for t in range(20)]
        path = numbered(tmp_path / "a.mkv", times, Fraction(1, 1000))
        frames, found = media.read_video(path, fps=24, max_frames=9, keep=keep)
        assert numbers(frames) == list(range(9) if keep == "first" else range(11, 20))
        assert found == pytest.approx(rate, rel=0.02)


def test_only_the_times_of_what_is_taken_count(tmp_path):
    """A pause later in the clip changes neither its beginning nor the rate that is reported."""
    times = [t if t < 10 else t + 40 for t in range(20)]
    path = numbered(tmp_path / "a.mkv", times)
    for keep, expected in (("first", range(5)), ("last", range(15, 20))):
        frames, rate = media.read_video(path, fps=30, max_frames=5, keep=keep)
        assert numbers(frames) == list(expected)
        assert rate == pytest.approx(24, rel=0.02)


def test_the_first_frame_is_shown_however_short(tmp_path):
    path = numbered(tmp_path / "a.mkv", [0, 10, 30, 130], Fraction(1, 1000))
    assert numbers(media.read_video(path, fps=10, max_frames=3)[0])[:2] == [0, 2]


@pytest.mark.parametrize("gap", [10**9, 3 * 10**10])
def test_a_gap_of_time_stamps(tmp_path, gap):
    """Of days, or a year: memory is of what is wanted."""
    path = numbered(tmp_path / "a.mkv", [0, 100, 200, gap], Fraction(1, 1000))
    for keep, expected in (("first", [0, 0, 1, 1, 2]), ("last", [2, 2, 2, 2, 3])):
        frames, _ = media.read_video(path, fps=20, max_frames=5, keep=keep)
        assert numbers(frames) == expected
    with pytest.raises(ValueError, match=r"a\.mkv has 4 frames in \d+ seconds.*more than 100000"):
        media.read_video(path, fps=10)


@pytest.mark.parametrize("orientation, turned", [(1, False), (6, True)])
def test_frames_with_exif(tmp_path, orientation, turned):
    """As cameras write them; PyAV does not know that side data."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = orientation, "maker"
    data = io.BytesIO()
    Image.fromarray(PICTURE).save(data, "JPEG", quality=100, subsampling=0, exif=exif)
    with av.open(tmp_path / "a.mkv", "w") as file:
        stream = file.add_stream("mjpeg", rate=24)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuvj444p"
        for t in range(3):
            packet = av.Packet(data.getvalue())
            packet.stream, packet.pts, packet.dts = stream, t, t
            packet.time_base = Fraction(1, 24)
            file.mux(packet)
    shown, _ = media.read_video(tmp_path / "a.mkv")
    expected = np.rot90(PICTURE, -1) if turned else PICTURE
    np.testing.assert_allclose(shown[0].astype(int), expected, atol=12)


@pytest.mark.parametrize("fps", [math.inf, math.nan, -5, 0])
def test_rates_that_are_none(tmp_path, fps):
    path = numbered(tmp_path / "a.mkv", UNEVEN)
    with pytest.raises(ValueError, match="must be a positive number of frames per second"):
        media.read_video(path, fps=fps)
