"""Kinds of files that people have: depths, transparency, shapes, names, and what is no media."""

import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from clip_cases import DISPLAY_P3, PICTURE, video_of
from PIL import Image, ImageOps

from cosmos3_jax.io import conditioning, media, media_read, pictures
from cosmos3_jax.io.conditioning import clip_pixels, image_pixels, input_shape


def test_sixteen_bits(tmp_path):
    levels = np.array([[0, 128, 257, 9000, 32768, 65535]], np.uint16)
    expected = np.repeat(np.rint(levels / 257)[..., None], 3, -1)
    for name, order in (("a.png", "="), ("a.tiff", "<"), ("b.tiff", ">")):
        Image.fromarray(levels.astype(f"{order}u2")).save(tmp_path / name)
        np.testing.assert_array_equal(media.read_image(tmp_path / name), expected)


def png(path: Path, depth: int, kind: int, row: bytes, key: bytes) -> Path:
    """Of two pixels, and a colour that is transparent."""
    header = struct.pack(">IIBBBBB", 2, 1, depth, kind, 0, 0, 0)
    data = zlib.compress(b"\0" + row)
    whole = b"\x89PNG\r\n\x1a\n"
    for chunk in (b"IHDR" + header, b"tRNS" + key, b"IDAT" + data, b"IEND"):
        whole += struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    path.write_bytes(whole)
    return path


@pytest.mark.parametrize(
    "depth, kind, row, key",
    [
        (16, 0, b"\xab\xcd\x33\x33", b"\xab\xcd"),
        (16, 2, b"\xab\xcd" * 3 + b"\x33\x33" * 3, b"\xab\xcd" * 3),
        (4, 0, b"\x83", b"\x00\x08"),
        (1, 0, b"\x40", b"\x00\x00"),
    ],
    ids=["16 grey", "16 colour", "4 grey", "1"],
)
def test_a_transparent_colour_of_any_depth(tmp_path, depth, kind, row, key):
    """PNG has it in its own depth, and Pillow leaves it there."""
    shown = media.read_image(png(tmp_path / "a.png", depth, kind, row, key))
    assert (shown[0] == [[255], [255 if depth == 1 else 0x33]]).all()


@pytest.mark.parametrize(
    "said", [{"transparency": "x"}, {"exif": b"x"}, {"icc_profile": "x"}, {"gamma": "x"}], ids=str
)
def test_images_with_odd_words_are_refused(said):
    for read in (media.read_image, lambda image: image_pixels(image, 16, 16)):
        image = Image.fromarray(PICTURE)
        image.info |= said
        with pytest.raises(ValueError, match="the image is not an image that can be read"):
            read(image)


def test_empty_and_premultiplied_images():
    for size in ((0, 5), (5, 0)):
        for read in (media.read_image, media_read.image_shape):
            with pytest.raises(ValueError, match="the image is empty"):
                read(Image.new("RGB", size))
    for mode, multiplied in (("LA", "La"), ("RGBA", "RGBa")):
        image = Image.new(mode, (4, 4), (80, 128) if mode == "LA" else (80, 80, 80, 128))
        shown = media.read_image(image.convert(multiplied)).astype(int)
        assert np.abs(shown - media.read_image(image)).max() <= 1


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


# Animations, and pictures for videos
# ----------------------------------------------------------------------------------------------


def shades(path: Path, durations: list[int]) -> Path:
    """Frame t is of grey level 20 t, and shown for so many milliseconds."""
    images = [Image.new("RGB", (32, 16), (20 * t,) * 3) for t in range(len(durations))]
    options = dict(quality=100) if path.suffix != ".gif" else {}
    durations = durations if len(durations) > 1 else durations[0]
    images[0].save(path, save_all=True, append_images=images[1:], duration=durations, **options)
    return path


def levels(frames: np.ndarray) -> list[int]:
    return np.rint(frames[:, 8, 8, 0] / 20).astype(int).tolist()


KINDS = [".gif", ".webp", ".avif"]


@pytest.mark.parametrize("suffix", KINDS)
def test_animations_are_videos(tmp_path, suffix):
    path = shades(tmp_path / f"a{suffix}", [50] * 10)
    frames, rate = media.read_video(path)
    assert (frames.shape, frames.dtype, rate) == ((10, 16, 32, 3), np.uint8, 20)
    assert levels(frames) == list(range(10))
    for keep, expected in (("first", [0, 1, 2]), ("last", [7, 8, 9])):
        assert levels(media.read_video(path, max_frames=3, keep=keep)[0]) == expected
    assert clip_pixels(path, 5, 16, 32, "last", 20.0)[1] == 20


@pytest.mark.parametrize("suffix", KINDS)
def test_uneven_animations_are_sampled(tmp_path, suffix):
    path = shades(tmp_path / f"a{suffix}", [50, 50, 200, 50, 100])
    frames, rate = media.read_video(path, fps=20)
    assert (levels(frames), rate) == ([0, 1, 2, 2, 2, 2, 3, 4, 4], 20)
    assert levels(media.read_video(path, fps=20, max_frames=4, keep="last")[0]) == [2, 3, 4, 4]


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
@pytest.mark.parametrize("fps", [12.5, 16, 24, 29.97])
def test_our_own_animations_keep_their_rate(tmp_path, suffix, fps):
    """Its clock is coarse: each frame ends at the nearest tick."""
    video = np.linspace(0, 1, 13, dtype=np.float32)[None, :, None, None] * np.ones((3, 1, 16, 32))
    path = media.save_video({"video": video, "fps": fps}, tmp_path / f"a{suffix}")
    frames, rate = media.read_video(path, fps=fps, max_frames=9)
    assert rate == fps
    np.testing.assert_allclose(frames[:, 8, 8, 0], 255 * np.arange(9) / 12, atol=3)


def test_damaged_animations(tmp_path):
    for suffix in KINDS:
        data = shades(tmp_path / f"a{suffix}", [50] * 10).read_bytes()
        (tmp_path / f"b{suffix}").write_bytes(data[: len(data) // 2])
        with pytest.raises(ValueError, match=rf"b\{suffix} (is not|has no frames)"):
            media.read_video(tmp_path / f"b{suffix}")


@pytest.mark.parametrize("suffix", [*KINDS, ".png", ".jpg"])
def test_a_picture_for_a_video_is_named(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    Image.fromarray(PICTURE).save(path)
    with pytest.raises(ValueError, match=rf"a\{suffix} is a picture.*use image= \(--image\)"):
        clip_pixels(path, 5, 16, 32)
    assert clip_pixels(path, 1, 16, 32)[0].shape == (3, 1, 16, 32)
    short = media.save_mp4({"video": video_of(PICTURE, 1)}, tmp_path / "b.mp4")
    with pytest.raises(ValueError, match=r"b\.mp4 has 1 frames and 5 are needed"):
        clip_pixels(short, 5, 16, 32)


@pytest.mark.parametrize("name", ["a.mp4", "a.mov", "a.webm", "a.png"])
def test_a_video_for_an_image_is_named(tmp_path, name):
    made = media.save_video({"video": video_of(PICTURE)}, (tmp_path / name).with_suffix(".webm"))
    if name != "a.webm":
        suffix = ".mp4" if name == "a.png" else Path(name).suffix
        made = media.save_video({"video": video_of(PICTURE)}, tmp_path / f"b{suffix}")
        made = made.rename(tmp_path / name)
    for read in (media.read_image, media_read.image_shape, lambda path: input_shape([path], None)):
        with pytest.raises(ValueError, match=rf"{name} is a video: use video= \(--video\)"):
            read(made)


@pytest.mark.parametrize("brand", [b"heic", b"mif1", b"hevc"])
def test_heic_is_named(tmp_path, brand):
    box = b"ftyp" + brand + bytes(4) + b"mif1heic"
    (tmp_path / "a.heic").write_bytes(struct.pack(">I", len(box) + 4) + box + bytes(500))
    for read in (media.read_image, media.read_video, lambda path: input_shape(path, None)):
        with pytest.raises(
            ValueError, match=r"a\.heic is a HEIC picture.*JPEG or PNG.*pillow-heif"
        ):
            read(tmp_path / "a.heic")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tiff"])
def test_the_shape_of_a_picture_is_read_alone(tmp_path, monkeypatch, suffix, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a{suffix}"
    Image.fromarray(PICTURE).save(path, exif=exif)
    expected = media.read_image(path).shape[:2]
    assert expected == ((32, 48) if orientation < 5 else (48, 32))
    monkeypatch.setattr(pictures, "bands", None)  # no picture is made
    with Image.open(path) as image:
        for source in (path, str(path), image, [path, "missing.png"]):
            assert input_shape(source, None) == expected
    assert input_shape(None, path) == expected


def test_the_shape_of_a_clip_takes_its_first_frame(tmp_path, monkeypatch):
    clip = media.save_mp4({"video": video_of(PICTURE, 40)}, tmp_path / "a.mp4")
    asked = []
    read = conditioning.read_video
    monkeypatch.setattr(
        conditioning,
        "read_video",
        lambda video, **options: asked.append(options) or read(video, **options),
    )
    assert input_shape(None, clip) == input_shape(None, [PICTURE] * 3) == (32, 48)
    assert asked == [{"max_frames": 1}] * 2


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
MEMORY_OF_LARGE = (
    MEMORY.replace("720, 1280", "64, 64").split("    assert")[0] + "print(peak() - before)"
)


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


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux counts the peak")
@pytest.mark.parametrize("mode, size", [("1", 1), ("RGBA", 4)])
def test_memory_of_a_large_picture_is_its_own(tmp_path, mode, size):
    """Made RGB as a whole, these take 12 and 33 bytes a pixel."""
    side = 6000
    Image.new(mode, (side, side)).save(tmp_path / "a.png", compress_level=1)
    child = [sys.executable, "-c", MEMORY_OF_LARGE, str(tmp_path / "a.png")]
    done = subprocess.run(child, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < size * side**2 / 2**20 + 100  # MiB


@pytest.mark.parametrize("orientation", range(1, 9))
def test_bands_make_the_whole_picture(monkeypatch, orientation):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (23, 17, 4), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.info["exif"] = exif.tobytes()
    whole, made = media.read_image(image), image_pixels(image, 12, 16)
    expected = media.read_image(np.asarray(ImageOps.exif_transpose(image)))
    np.testing.assert_array_equal(whole, expected)
    monkeypatch.setattr(pictures, "BAND", 60)
    _, bands = media_read.image_bands(image)
    bands = list(bands)
    assert len(bands) > 5
    np.testing.assert_array_equal(np.concatenate(bands), whole)
    np.testing.assert_array_equal(image_pixels(image, 12, 16), made)


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
    refused(source, r"https:/+example\.org/a\.\w+")


@pytest.mark.parametrize(
    "source",
    ["HTTP://x/y.png", "s3://b/k", "rtsp+tcp://x/y", "data:image/png;base64," + "A" * 5000],
)
def test_addresses_of_any_scheme(source):
    refused(source, re.escape(source[:60]))


def refused(source, name: str) -> None:
    for read in (media.read_image, media.read_video, media.probe):
        with pytest.raises(ValueError, match=rf"{name}.*is an address.*downl"):
            read(source)
