"""Kinds of pictures and clips that people have, each written here and read as a viewer shows it."""

import io
import struct
import subprocess
import sys
import warnings
import zlib
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.stream import Disposition
from PIL import Image, ImageCms

from cosmos3_jax.io import media
from cosmos3_jax.io.conditioning import clip_pixels, image_pixels, resize_and_crop

WHITE, RED, BLUE = (1, 1, 1), (1, 0, 0), (0, 0, 1)
BT601, BT709, BT2020 = (0.299, 0.114), (0.2126, 0.0722), (0.2627, 0.0593)  # red's and blue's luma


def coded(rgb, matrix=BT709, bits: int = 8, full: bool = False) -> list[int]:
    """R'G'B' in [0, 1] as Y'CbCr, by the formulas of H.273."""
    (red, green, blue), (kr, kb) = rgb, matrix
    luma = kr * red + (1 - kr - kb) * green + kb * blue
    chroma = (blue - luma) / (2 - 2 * kb), (red - luma) / (2 - 2 * kr)
    unit, top = 2 ** (bits - 8), 2**bits - 1
    if full:
        return [round(top * luma), *(round(top * c + 128 * unit) for c in chroma)]
    return [round(unit * (16 + 219 * luma)), *(round(unit * (128 + 224 * c)) for c in chroma)]


def write_clip(
    path, frames, pix_fmt="rgb24", codec="ffv1", to=None, times=None, base=Fraction(1, 24), **fields
):
    """Lossless, unless another codec is asked for. `fields`: of the stream's codec context."""
    with av.open(str(path), "w", format={".mp4": "mp4", ".mov": "mov"}.get(path.suffix)) as file:
        stream = file.add_stream(codec, rate=Fraction(24))
        first = av.VideoFrame.from_ndarray(frames[0], format=pix_fmt)
        stream.width, stream.height, stream.pix_fmt = first.width, first.height, to or pix_fmt
        stream.codec_context.time_base = base
        for name, value in fields.items():
            setattr(stream.codec_context, name, value)
        for t, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format=pix_fmt)
            frame.pts, frame.time_base = t if times is None else times[t], base
            for name in fields.keys() & {
                "colorspace", "color_range", "color_primaries", "color_trc"
            }:  # fmt: skip
                setattr(frame, name, fields[name])
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


def flat(path, rgb, matrix=BT709, bits=8, full=False, **tags):
    """Two frames of one colour."""
    luma, *chroma = coded(rgb, matrix, bits, full)
    planes = np.concatenate([np.full((32, 32), luma), *(np.full((8, 32), c) for c in chroma)])
    planes = planes.astype(np.uint8 if bits == 8 else np.uint16)
    pix_fmt = "yuv420p" if bits == 8 else f"yuv420p{bits}le"
    return write_clip(path, [planes, planes], pix_fmt, color_range=2 if full else 1, **tags)


def colour_of(path) -> np.ndarray:
    frames, _ = media.read_video(path)
    assert frames.dtype == np.uint8 and np.ptp(frames, axis=(0, 1, 2)).max() == 0
    return frames[0, 0, 0].astype(int)


PICTURE = np.zeros((32, 48, 3), np.uint8)  # no two of its quarters are equal
PICTURE[:16, :24], PICTURE[:16, 24:], PICTURE[16:, :24] = (220, 40, 40), (40, 180, 60), 200


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


def video_of(picture: np.ndarray, frames: int = 2) -> np.ndarray:
    return np.repeat(picture.transpose(2, 0, 1)[:, None], frames, axis=1) / 255


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


# Colours of clips
# ----------------------------------------------------------------------------------------------

HDR = {"PQ": 16, "HLG": 18}
TO_BT2020 = np.array(
    [[0.627404, 0.329283, 0.043313], [0.069097, 0.919540, 0.011362], [0.016391, 0.088013, 0.895595]]
)  # from BT.709, light; BT.2087


def hdr_signal(curve: str, light) -> np.ndarray:
    """BT.2100's signal of a colour of BT.709; 1 is 203 cd/m2."""
    nits = 203 * (TO_BT2020 @ light)
    if curve == "PQ":
        power = (nits / 10000) ** 0.1593017578125
        return ((0.8359375 + 18.8515625 * power) / (1 + 18.6875 * power)) ** 78.84375
    scene = nits / 1000 * (max(nits @ [0.2627, 0.678, 0.0593], 1e-9) / 1000) ** (-0.2 / 1.2)
    log = 0.17883277 * np.log(np.maximum(12 * scene - 0.28466892, 1e-9)) + 0.55991073
    return np.where(scene <= 1 / 12, np.sqrt(3 * scene), log)


def srgb(light) -> np.ndarray:
    light = np.clip(light, 0, 1)
    return 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


LIGHTS = {
    "white": WHITE, "red": RED, "blue": BLUE, "black": (0, 0, 0), "grey": (0.18,) * 3,
    "skin": (0.45, 0.25, 0.17), "dark": (0.01, 0.02, 0.005), "a lamp": (4, 4, 4),
}  # fmt: skip


@pytest.mark.parametrize("curve", HDR)
@pytest.mark.parametrize("name", LIGHTS)
def test_hdr(tmp_path, curve, name):
    """Within the quantisation of ten bits; read as BT.709, white would be 146 or 189."""
    clip = flat(
        tmp_path / "a.mkv", hdr_signal(curve, LIGHTS[name]), BT2020, bits=10, colorspace=9,
        color_primaries=9, color_trc=HDR[curve],
    )  # fmt: skip
    np.testing.assert_allclose(colour_of(clip), srgb(np.array(LIGHTS[name])), atol=3)


def test_hdr_in_words(tmp_path):
    """Numbers that need no formula: reference white of both curves, and what is above it."""
    for curve, signal, expected in (("PQ", 0.5807, 255), ("HLG", 0.75, 255), ("HLG", 1.0, 255)):
        tags = dict(colorspace=9, color_primaries=9, color_trc=HDR[curve])
        clip = flat(tmp_path / "a.mkv", [signal] * 3, BT2020, bits=10, **tags)
        np.testing.assert_allclose(colour_of(clip), expected, atol=1)


def test_hdr_as_phones_write_it(tmp_path):
    """Compressed, in a mov."""
    light = np.array(LIGHTS["skin"])
    tags = dict(colorspace=9, color_primaries=9, color_trc=18, codec="libx264")
    clip = flat(tmp_path / "a.mov", hdr_signal("HLG", light), BT2020, bits=10, **tags)
    np.testing.assert_allclose(colour_of(clip), srgb(light), atol=6)


def test_hdr_whose_matrix_is_not_stated(tmp_path):
    """The primaries say BT.2020: so is the matrix."""
    signal = hdr_signal("PQ", np.array(RED))
    tags = dict(colorspace=2, color_primaries=9, color_trc=16)
    clip = flat(tmp_path / "a.mkv", signal, BT2020, bits=10, **tags)
    np.testing.assert_allclose(colour_of(clip), (255, 0, 0), atol=4)


@pytest.mark.parametrize("name", ["white", "red", "skin"])
@pytest.mark.parametrize("primaries", [9, 12])
def test_wide_primaries_without_hdr(tmp_path, name, primaries):
    to_p3 = np.array([[0.82246, 0.17754, 0], [0.03319, 0.96681, 0], [0.01708, 0.07240, 0.91052]])
    light = {9: TO_BT2020, 12: to_p3}[primaries] @ LIGHTS[name]
    matrix, number = (BT2020, 9) if primaries == 9 else (BT709, 1)
    clip = flat(
        tmp_path / "a.mkv", srgb(light) / 255, matrix, bits=10, colorspace=number,
        color_primaries=primaries, color_trc=1,
    )  # fmt: skip
    np.testing.assert_allclose(colour_of(clip), srgb(np.array(LIGHTS[name])), atol=3)


@pytest.mark.parametrize(
    "tags, message",
    [
        (dict(color_trc=8), r"a\.mkv has colours of transfer 8 \(linear light\).*sRGB or BT\.709"),
        (dict(color_primaries=10), r"primaries 10 \(CIE XYZ\)"),
        (dict(colorspace=14, color_trc=16, color_primaries=9), r"matrix 14 \(ICtCp\)"),
    ],
    ids=["linear", "XYZ", "ICtCp"],
)
def test_colours_that_are_not_known_are_refused(tmp_path, tags, message):
    clip = flat(tmp_path / "a.mkv", WHITE, bits=10, **tags)
    with pytest.raises(ValueError, match=message):
        media.read_video(clip)


@pytest.mark.parametrize("full", [False, True], ids=["limited", "full"])
@pytest.mark.parametrize("matrix", [BT601, BT709], ids=["BT.601", "BT.709"])
def test_matrix_and_range(tmp_path, matrix, full):
    """A wrong matrix moves these by 20 levels and more, a wrong range black and white by 16."""
    for rgb in ((0, 0, 0), WHITE, (0.8, 0.2, 0.1), (0.1, 0.7, 0.3)):
        tags = dict(colorspace=6 if matrix == BT601 else 1)
        clip = flat(tmp_path / "a.mkv", rgb, matrix, full=full, **tags)
        np.testing.assert_allclose(colour_of(clip), np.multiply(255, rgb), atol=3)


def test_ordinary_clips_are_taken_as_ffmpeg_has_them(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)
    clip = media.save_mp4({"video": video_of(picture)}, tmp_path / "a.mp4")
    with av.open(clip) as file:
        expected = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
    np.testing.assert_array_equal(media.read_video(clip)[0], expected)


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


# Pictures
# ----------------------------------------------------------------------------------------------


def icc_profile(primaries, gamma: float | None = 2.2) -> bytes:
    """Version 2: three primaries adapted to D50, as XYZ; a gamma, or None for sRGB's curve."""
    tags = {name: b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(65536 * x) for x in xyz))
            for name, xyz in zip((b"rXYZ", b"gXYZ", b"bXYZ"), primaries, strict=True)}  # fmt: skip
    tags[b"wtpt"] = b"XYZ \0\0\0\0" + struct.pack(">3i", 63190, 65536, 54061)
    if gamma is None:
        levels = np.linspace(0, 1, 1024)
        light = np.where(levels <= 0.04045, levels / 12.92, ((levels + 0.055) / 1.055) ** 2.4)
        table = np.rint(65535 * light).astype(">u2").tobytes()
        curve = b"curv\0\0\0\0" + struct.pack(">I", 1024) + table
    else:
        curve = b"curv\0\0\0\0" + struct.pack(">IHxx", 1, round(256 * gamma))
    tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)
    tags[b"desc"] = b"desc\0\0\0\0" + struct.pack(">I", 2) + b"x\0" + bytes(78)
    table, body, start = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for name, data in tags.items():
        data += bytes(-len(data) % 4)
        table += name + struct.pack(">II", start + len(body), len(data))
        body += data
    head = struct.pack(">I4xI", start + len(body), 0x02100000) + b"mntrRGB XYZ "
    head += bytes(12) + b"acsp" + bytes(28) + struct.pack(">3i", 63190, 65536, 54061) + bytes(48)
    return head + table + body


DISPLAY_P3 = icc_profile(
    [(0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407)]
)
SRGB_AT_D50 = [(0.436, 0.222, 0.014), (0.385, 0.717, 0.097), (0.143, 0.061, 0.714)]
P3_TO_SRGB = np.array([[1.2249, -0.2247, 0], [-0.0420, 1.0419, 0], [-0.0197, -0.0786, 1.0979]])


@pytest.mark.parametrize("suffix", ["png", "tiff", "jpg"])
def test_display_p3(tmp_path, suffix):
    colours = np.array([(200, 100, 50), (120, 130, 110), (255, 0, 0), (90, 40, 160)], np.uint8)
    picture = np.repeat(np.repeat(colours[None], 16, 0), 16, 1)
    options = dict(quality=100, subsampling=0) if suffix == "jpg" else {}
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(picture).save(path, icc_profile=DISPLAY_P3, **options)
    expected = srgb((colours / 255) ** 2.2 @ P3_TO_SRGB.T)
    assert np.abs(expected - colours).max() > 15
    np.testing.assert_allclose(media.read_image(path)[8, 8::16], expected, atol=3)
    with Image.open(path) as image:
        np.testing.assert_array_equal(media.read_image(image), media.read_image(path))


def test_a_profile_that_means_srgb_changes_nothing(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    ours = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for profile in (ours, icc_profile(SRGB_AT_D50, None)):  # of three digits, as many have it
        Image.fromarray(picture).save(tmp_path / "a.png", icc_profile=profile)
        np.testing.assert_array_equal(media.read_image(tmp_path / "a.png"), picture)


def test_a_profile_that_cannot_be_used_is_spoken_of(tmp_path):
    Image.fromarray(PICTURE).save(tmp_path / "a.png", icc_profile=b"not a profile" * 20)
    with pytest.warns(UserWarning, match=r"a\.png: its colour profile cannot be used"):
        np.testing.assert_array_equal(media.read_image(tmp_path / "a.png"), PICTURE)
    cmyk = Image.fromarray(PICTURE).convert("CMYK")
    cmyk.save(tmp_path / "b.tiff", icc_profile=DISPLAY_P3)
    with pytest.warns(UserWarning, match=r"b\.tiff: its colour profile cannot be used"):
        shown = media.read_image(tmp_path / "b.tiff")
    np.testing.assert_array_equal(shown, cmyk.convert("RGB"))


def test_grey_with_a_profile(tmp_path):
    """Of colour, as some programs leave it: linear light is shown brighter than its numbers."""
    linear = icc_profile(SRGB_AT_D50, gamma=1.0)
    levels = np.arange(0, 256, 17, dtype=np.uint8)[None]
    Image.fromarray(levels).save(tmp_path / "a.png", icc_profile=linear)
    expected = np.repeat(srgb(levels / 255)[..., None], 3, -1)
    np.testing.assert_allclose(media.read_image(tmp_path / "a.png"), expected, atol=2)


def with_chunks(path: Path, *chunks: bytes) -> Path:
    """A PNG with more chunks, name and data, before its pixels."""
    data = path.read_bytes()
    at = data.index(b"IDAT") - 4
    for chunk in chunks:
        whole = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        data, at = data[:at] + whole + data[at:], at + len(whole)
    path.write_bytes(data)
    return path


def chroma(*numbers: float) -> bytes:
    return b"cHRM" + struct.pack(">8I", *(round(100_000 * x) for x in numbers))


P3 = (0.3127, 0.3290, 0.680, 0.320, 0.265, 0.690, 0.150, 0.060)
REC709 = (0.3127, 0.3290, 0.64, 0.33, 0.30, 0.60, 0.15, 0.06)
NUMBERS = {
    "linear": ([b"gAMA" + struct.pack(">I", 100_000)], 1, np.eye(3)),
    "P3": ([b"gAMA" + struct.pack(">I", 45455), chroma(*P3)], 2.2, P3_TO_SRGB),
    "sRGB": ([b"gAMA" + struct.pack(">I", 45455), chroma(*REC709)], None, None),
    "sRGB by name": ([b"sRGB\0", b"gAMA" + struct.pack(">I", 100_000)], None, None),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_curve_and_primaries_as_numbers(tmp_path, name):
    chunks, gamma, matrix = NUMBERS[name]
    Image.fromarray(PICTURE).save(tmp_path / "a.png")
    shown = media.read_image(with_chunks(tmp_path / "a.png", *chunks))
    if gamma is None:
        np.testing.assert_array_equal(shown, PICTURE)
    else:
        assert np.abs(shown.astype(int) - PICTURE).max() > 10
        np.testing.assert_allclose(shown, srgb((PICTURE / 255) ** gamma @ matrix.T), atol=2)


def test_adobe_rgb_of_cameras(tmp_path):
    """They write no profile, but two words in the EXIF."""
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0xA005] = {1: "R03", 2: b"0100"}
    Image.new("RGB", (16, 16), (100, 160, 90)).save(tmp_path / "a.jpg", exif=exif, quality=100)
    to_srgb = np.array([[1.39836, -0.39836, 0], [0, 1, 0], [0, -0.04293, 1.04293]])
    expected = srgb(to_srgb @ (np.array([100, 160, 90]) / 255) ** (563 / 256))
    np.testing.assert_allclose(media.read_image(tmp_path / "a.jpg")[3, 3], expected, atol=4)


@pytest.mark.parametrize("curve", HDR)
def test_hdr_pictures(tmp_path, curve):
    """A PNG says it in a chunk that Pillow skips; an AVIF in a box."""
    light = np.array(LIGHTS["skin"])
    level = np.rint(255 * hdr_signal(curve, light)).astype(np.uint8)
    image = Image.fromarray(np.broadcast_to(level, (16, 16, 3)))
    png, data = tmp_path / "a.png", io.BytesIO()
    image.save(png)
    np.testing.assert_array_equal(media.read_image(png)[3, 3], level)
    with_chunks(png, b"cICP" + bytes([9, HDR[curve], 0, 1]))
    np.testing.assert_allclose(media.read_image(png)[3, 3], srgb(light), atol=4)
    image.save(data, "avif", quality=100, subsampling="4:4:4")
    whole = data.getvalue()
    at = whole.index(b"colrnclx") + 8
    (tmp_path / "a.avif").write_bytes(
        whole[:at] + struct.pack(">HH", 9, HDR[curve]) + whole[at + 4 :]
    )
    np.testing.assert_allclose(media.read_image(tmp_path / "a.avif")[3, 3], srgb(light), atol=10)


def test_sixteen_bits(tmp_path):
    levels = np.array([[0, 128, 257, 9000, 32768, 65535]], np.uint16)
    expected = np.repeat(np.rint(levels / 257)[..., None], 3, -1)
    for name, order in (("a.png", "="), ("a.tiff", "<"), ("b.tiff", ">")):
        Image.fromarray(levels.astype(f"{order}u2")).save(tmp_path / name)
        np.testing.assert_array_equal(media.read_image(tmp_path / name), expected)


def test_transparent_pictures_stand_on_white(tmp_path):
    """Whatever an editor left under what is transparent."""
    image = Image.fromarray(PICTURE).convert("P")
    transparent = image.getpixel((0, 0))
    image.save(tmp_path / "palette.png", transparency=transparent)
    shown = media.read_image(tmp_path / "palette.png")
    assert (shown[0, 0] == 255).all()
    np.testing.assert_array_equal(shown[0, 30], np.asarray(image.convert("RGB"))[0, 30])
    Image.fromarray(PICTURE).save(tmp_path / "colour.png", transparency=(220, 40, 40))
    shown = media.read_image(tmp_path / "colour.png")
    assert (shown[0, 0] == 255).all() and (shown[0, 30] == (40, 180, 60)).all()
    half = np.dstack([PICTURE, np.full((32, 48), 51, np.uint8)])
    for source in (half, Image.fromarray(half)):
        assert tuple(media.read_image(source)[0, 0]) == (248, 212, 212)
    black = np.zeros((4, 4, 4), np.uint8)
    Image.fromarray(black).save(tmp_path / "profile.png", icc_profile=DISPLAY_P3)
    assert (media.read_image(tmp_path / "profile.png") == 255).all()


# Shapes and memory
# ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(20, 2000), (2000, 20), (1, 9000)], ids=str)
def test_lopsided_pictures_are_cropped_first(size):
    """Against both steps in float64, of the few pixels that are kept."""
    picture = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    with pytest.warns(UserWarning, match=f"is {size[1]}x{size[0]}: filling 64x48 keeps"):
        found = 255 * image_pixels(picture, 48, 64)[:, 0].transpose(1, 2, 0)
    scale = max(48 / size[0], 64 / size[1])
    weights = []
    for side, target in zip(size, (48, 64), strict=True):
        resized = int(np.ceil(scale * side))
        at = (np.arange(target) + round((resized - target) / 2) + 0.5) * side / resized
        reach = max(side / resized, 1)
        tent = np.maximum(1 - np.abs(np.arange(side) + 0.5 - at[:, None]) / reach, 0)
        weights.append(tent / tent.sum(1, keepdims=True))
    expected = np.moveaxis(weights[0] @ np.moveaxis(picture, -1, 0) @ weights[1].T, 0, -1)
    np.testing.assert_allclose(found, expected, atol=0.6)  # half a level is rounding
    assert np.abs(found - np.roll(expected, 2, 1)).max() > 5


MEMORY = """
import sys
import warnings
from pathlib import Path
from cosmos3_jax.io.conditioning import image_pixels

def peak():
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x)
    return int(line.split()[1]) / 1024

warnings.simplefilter("ignore")
before = peak()
for path in sys.argv[1:]:
    pixels = image_pixels(path, 720, 1280)
    assert abs(pixels - 200 / 255).max() < 1e-6
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux counts the peak")
def test_memory_follows_the_picture_that_is_made(tmp_path):
    """Resized before they are cropped, these take 1.8 and 3 GiB."""
    child = [sys.executable, "-c", MEMORY]
    for columns, rows in ((2000, 20), (100_000, 1), (20, 2000)):
        child.append(str(tmp_path / f"{columns}x{rows}.png"))
        Image.new("RGB", (columns, rows), (200,) * 3).save(child[-1])
    done = subprocess.run(child, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 150  # MiB; the picture itself has 11


# Names, playlists, addresses
# ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["12:30.mp4", "take:2/x.mp4", "http:x.mp4", "a%03d.mp4", "*.mp4", "-.mp4", "ü ?.mp4"]
)
def test_any_name_is_a_files(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Path(name).parent.mkdir(exist_ok=True)
    made = media.save_mp4({"video": video_of(PICTURE)}, tmp_path / "plain.mp4")
    Path(name).write_bytes(made.read_bytes())
    for path in (name, Path(name), tmp_path / name):
        assert len(media.read_video(path)[0]) == media.probe(path).frames == 2
    picture = Path(name).with_suffix(".png")
    Image.fromarray(PICTURE).save(picture)
    np.testing.assert_array_equal(media.read_image(str(picture)), PICTURE)


@pytest.mark.parametrize("name", ["12:30.mp4", "take:2/x.mp4", "take:2/a%03d.mp4"])
def test_any_name_can_be_written(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert len(media.read_video(media.save_mp4({"video": video_of(PICTURE)}, name))[0]) == 2
    assert [str(x) for x in Path().rglob("*.mp4")] == [name]


PLAYLISTS = {
    "a.m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:1,\nclip.mp4\n#EXT-X-ENDLIST\n",
    "a.ffconcat": "ffconcat version 1.0\nfile clip.mp4\n",
    "a.mp4": "ffconcat version 1.0\nfile 'clip.mp4'\n",
    "a.txt": "file clip.mp4\n",
    "a.sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nt=0 0\nm=video 5004 RTP/AVP 26\n",
    "a.pls": "[playlist]\nFile1=clip.mp4\n",
}


@pytest.mark.parametrize("name", PLAYLISTS)
def test_playlists_are_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    media.save_mp4({"video": video_of(PICTURE)}, tmp_path / "clip.mp4")
    Path(name).write_text(PLAYLISTS[name])
    for read in (media.read_video, media.read_sound, media.probe):
        with pytest.raises(ValueError, match=f"{name} is not a media file but text, such as a pla"):
            read(name)


@pytest.mark.parametrize("source", ["https://example.org/a.png", Path("https://example.org/a.mp4")])
def test_addresses_are_named_so(source):
    for read in (media.read_image, media.read_video, media.probe):
        with pytest.raises(ValueError, match=r"https:/+example\.org/a\.\w+ is an address.*downl"):
            read(source)
