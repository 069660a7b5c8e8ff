"""Images, clips and sounds of every kind are read, and damaged ones refused."""

import io

import jax.numpy as jnp
import numpy as np
import pytest
from media_cases import RATE, smooth_video, tones
from PIL import Image

from cosmos3_jax.io import media

# Reading images
# ---------------------------------------------------------------------------------------------

RGB = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
GREY = RGB[..., :1]
GREY3 = np.repeat(GREY, 3, 2)
ALPHA = np.full((20, 30, 1), 10, np.uint8)  # nearly transparent


def on_white(image: np.ndarray, alpha: int) -> np.ndarray:
    return np.rint(image * (alpha / 255) + 255 - alpha)


IMAGE_ARRAYS = {
    "last": (RGB, RGB),
    "first": (RGB.transpose(2, 0, 1), RGB),
    "float": (RGB / 255, RGB),
    "float32 first": ((RGB / 255).astype(np.float32).transpose(2, 0, 1), RGB),
    "jax": (jnp.asarray(RGB), RGB),
    "rgba": (np.concatenate([RGB, ALPHA], 2), on_white(RGB, 10)),
    "rgba first": (np.concatenate([RGB, ALPHA], 2).transpose(2, 0, 1), on_white(RGB, 10)),
    "grey": (GREY[..., 0], GREY3),
    "grey last": (GREY, GREY3),
    "grey first": (GREY.transpose(2, 0, 1), GREY3),
    "grey + alpha": (np.concatenate([GREY, ALPHA], 2), on_white(GREY3, 10)),
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
    if "A" in mode:
        expected = on_white(expected, 10)
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
    for dtype, mode in ((np.int32, "I"), (np.float32, "F")):  # Pillow would make it white
        with pytest.raises(ValueError, match=f"mode {mode}, more than 16 bits"):
            media.read_image(Image.fromarray(np.full((4, 4), 9000, dtype)))


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
