"""Colours that files declare, written here by formulas of the standards, and read as sRGB."""

import io
import struct
import zlib
from pathlib import Path

import av
import numpy as np
import pytest
from clip_cases import (
    BLUE,
    BT601,
    BT709,
    BT2020,
    DISPLAY_P3,
    PICTURE,
    RED,
    WHITE,
    colour_of,
    flat,
    icc_profile,
    video_of,
)
from PIL import Image, ImageCms

from cosmos3_jax.io import color, media

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


@pytest.mark.parametrize("curve", HDR)
@pytest.mark.parametrize("name", ["red", "blue", "skin"])
@pytest.mark.parametrize("matrix", [2, 9], ids=["no matrix", "matrix"])
def test_hdr_whose_primaries_are_not_stated(tmp_path, curve, name, matrix):
    """As sRGB's, skin would be 35 levels too pale."""
    signal = hdr_signal(curve, np.array(LIGHTS[name]))
    tags = dict(colorspace=matrix, color_primaries=2, color_trc=HDR[curve])
    clip = flat(tmp_path / "a.mkv", signal, BT2020, bits=10, **tags)
    np.testing.assert_allclose(colour_of(clip), srgb(np.array(LIGHTS[name])), atol=4)


def test_only_hdr_has_primaries_that_nobody_states(tmp_path):
    assert color.converter("a", 2, 2) is None and color.converter("a", 0, 1) is None
    light = np.array(LIGHTS["skin"])
    clip = flat(tmp_path / "a.mkv", srgb(light) / 255, BT601, colorspace=2, color_primaries=2)
    np.testing.assert_allclose(colour_of(clip), srgb(light), atol=3)
    # BT.709's, if it is stated, with the curve of PQ.
    signal = hdr_signal("PQ", np.linalg.inv(TO_BT2020) @ light)
    tags = dict(colorspace=1, color_primaries=1, color_trc=16)
    clip = flat(tmp_path / "b.mkv", signal, BT709, bits=10, **tags)
    np.testing.assert_allclose(colour_of(clip), srgb(light), atol=4)


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


# Pictures
# ----------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    "chunk, what",
    [
        (chroma(*[0] * 8), "primaries"),
        (chroma(0.3127, 0.329, 0.64, 0, 0.3, 0.6, 0.15, 0.06), "primaries"),
        (chroma(*[0.3, 0.3] * 4), "primaries"),
        (chroma(0.7, 0.1, *REC709[2:]), "primaries"),
        *((b"gAMA" + struct.pack(">I", gamma), "gamma") for gamma in (0, 1, 2**32 - 1)),
    ],
    ids=["zero", "y=0", "a point", "white outside", "0", "1", "2**32-1"],
)
def test_numbers_of_no_display_are_left_out(tmp_path, chunk, what):
    Image.fromarray(PICTURE).save(tmp_path / "a.png")
    path = with_chunks(tmp_path / "a.png", chunk)
    with pytest.warns(UserWarning, match=rf"a\.png: its {what} .*of no display"):
        np.testing.assert_array_equal(media.read_image(path), PICTURE)


def test_code_points_are_a_chunk(tmp_path):
    """Not a text that looks like one; and behind other chunks of any length."""
    Image.fromarray(PICTURE).save(tmp_path / "a.png")
    said = b"tEXtx\0\0\0\0\4cICP" + bytes([9, 16, 0, 1])
    np.testing.assert_array_equal(media.read_image(with_chunks(tmp_path / "a.png", said)), PICTURE)
    path = with_chunks(tmp_path / "a.png", b"teSt" + bytes(200_000), b"cICP" + bytes([9, 16, 0, 1]))
    expected = color.converter("a", 9, 16)(PICTURE.astype(np.uint16) * 257)
    assert np.abs(expected.astype(int) - PICTURE).max() > 20
    np.testing.assert_array_equal(media.read_image(path), expected)


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


def hdr_picture(kind: str, primaries: int, light) -> bytes:
    """A PNG or an AVIF in PQ, of one colour."""
    level = np.rint(255 * hdr_signal("PQ", light)).astype(np.uint8)
    data = io.BytesIO()
    options = dict(quality=100, subsampling="4:4:4") if kind == "avif" else {}
    Image.fromarray(np.broadcast_to(level, (16, 16, 3))).save(data, kind, **options)
    whole = data.getvalue()
    if kind == "avif":
        at = whole.index(b"colrnclx") + 8
        return whole[:at] + struct.pack(">HH", primaries, 16) + whole[at + 4 :]
    chunk = b"cICP" + bytes([primaries, 16, 0, 1])
    chunk = struct.pack(">I", 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    at = whole.index(b"IDAT") - 4
    return whole[:at] + chunk + whole[at:]


@pytest.mark.parametrize("primaries", [2, 9])
@pytest.mark.parametrize("kind", ["png", "avif"])
def test_hdr_of_images_that_are_open(tmp_path, kind, primaries):
    light = np.array(LIGHTS["skin"])
    data = hdr_picture(kind, primaries, light)
    (tmp_path / "a").write_bytes(data)
    with Image.open(tmp_path / "a") as named, Image.open(tmp_path / "a") as read:
        read.load()
        with open(tmp_path / "a", "rb") as file:
            sources = [tmp_path / "a", named, read, Image.open(io.BytesIO(data)), Image.open(file)]
            for source in sources:
                found = media.read_image(source)[3, 3]
                np.testing.assert_allclose(found, srgb(light), atol=10 if kind == "avif" else 4)
    plain = Image.open(io.BytesIO(data)).convert("RGB")  # of which nobody knows what it was
    np.testing.assert_array_equal(media.read_image(plain), np.asarray(plain))
