"""Kinds of files that people have: depths, transparency, shapes, names, and what is no media."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from clip_cases import DISPLAY_P3, PICTURE, video_of
from PIL import Image

from cosmos3_jax.io import media
from cosmos3_jax.io.conditioning import image_pixels


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
