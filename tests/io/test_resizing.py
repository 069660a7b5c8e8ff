"""An image or a clip is resized and cropped to the video's size as the oracle does it."""

import numpy as np
import pytest
import torch
from conditioning_cases import HEIGHT, WIDTH, picture, save
from diffusers.pipelines.cosmos import pipeline_cosmos3_omni as oracle_module
from PIL import Image
from rounding import check, relative_l2

from cosmos3_jax.io.conditioning import clip_pixels, image_pixels, resize_and_crop

# Of pixels of a resized clip, from 0 to 255.
RESIZED = 2e-6


@pytest.mark.parametrize("size", [(96, 160), (31, 200)], ids=str)
def test_tolerance_of_resizing(record_property, size):
    frames = np.stack([picture(*size, seed) for seed in range(2)]).astype(np.float32)
    check(record_property, RESIZED, lambda x: resize_and_crop(x, HEIGHT, WIDTH), frames)


# Larger and smaller, wide and upright, one side exact, exact, odd remainders to crop, one pixel.
SIZES = [(96, 160), (480, 300), (31, 200), (200, 31), (48, 101), (48, 80), (47, 79), (1, 1)]
FITTED = [(size, (HEIGHT, WIDTH)) for size in SIZES] + [((1080, 1620), (720, 1280))]


@pytest.mark.parametrize("size, target", FITTED, ids=str)
def test_an_image_is_resized_as_the_oracle_does(size, target):
    """Within one of 255 levels: where the oracle is at half a level, so are we, give or take."""
    image = picture(*size)
    theirs = oracle_module._preprocess_conditioning_image(Image.fromarray(image), *target)
    theirs = np.rint((theirs[0].numpy() + 1) * 127.5)
    ours = image_pixels(Image.fromarray(image), *target) * 255
    assert ours.shape == (3, 1, *target)
    np.testing.assert_allclose(ours, np.rint(ours), atol=1e-4)  # 8 bits
    difference = np.abs(ours[:, 0] - theirs)
    assert difference.max() <= 1.001
    assert (difference > 0.5).mean() <= 1e-3  # measured: none


def test_another_crop_or_filter_would_be_seen():
    image = picture(96, 200)
    right = 255 * image_pixels(image, HEIGHT, WIDTH)
    for wrong in (
        255 * image_pixels(image[:, 2:], HEIGHT, WIDTH),
        np.asarray(Image.fromarray(image).resize((WIDTH, HEIGHT))).transpose(2, 0, 1)[:, None],
    ):
        assert np.abs(right - wrong).max() > 20


@pytest.mark.parametrize(
    "source",
    [
        lambda image, folder: image,
        lambda image, folder: np.moveaxis(image, -1, 0),
        lambda image, folder: image.astype(np.float32) / 255,
        lambda image, folder: np.dstack([image, np.full_like(image[..., :1], 255)]),
        lambda image, folder: Image.fromarray(image).convert("RGBA"),
        lambda image, folder: save(image, folder / "a.png"),
        lambda image, folder: str(save(image, folder / "a.png")),
    ],
    ids=["array", "channels first", "float", "RGBA", "RGBA image", "path", "name"],
)
def test_an_image_may_come_in_any_form(source, tmp_path):
    image = picture(90, 200)
    np.testing.assert_array_equal(
        image_pixels(source(image, tmp_path), 32, 64), image_pixels(image, 32, 64)
    )


def test_a_grey_and_a_rotated_image(tmp_path):
    grey = picture(90, 200, channels=1)[..., 0]
    np.testing.assert_array_equal(
        image_pixels(grey, 32, 64), image_pixels(np.dstack([grey] * 3), 32, 64)
    )
    image = picture(90, 200)
    exif = Image.Exif()
    exif[0x0112] = 6  # taken with the camera on its side
    Image.fromarray(image).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(
        image_pixels(tmp_path / "a.png", 32, 64), image_pixels(np.rot90(image, -1), 32, 64)
    )


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_clip_is_resized_by_the_antialiased_filter(size):
    """Against PyTorch's, which cosmos-framework uses: float32 weights in another order. Nothing is
    rounded to 8 bits.
    """
    frames = np.stack([picture(*size, seed) for seed in range(2)])
    scale = max(WIDTH / size[1], HEIGHT / size[0])
    resized = [int(np.ceil(scale * side)) for side in size]
    planes = torch.from_numpy(frames).movedim(-1, 1).float()
    theirs = torch.nn.functional.interpolate(
        planes, size=resized, mode="bilinear", antialias=True, align_corners=False
    )
    top, left = round((resized[0] - HEIGHT) / 2), round((resized[1] - WIDTH) / 2)
    theirs = theirs[..., top : top + HEIGHT, left : left + WIDTH].movedim(1, -1).numpy()
    ours = resize_and_crop(frames, HEIGHT, WIDTH)
    assert relative_l2(ours, theirs) <= RESIZED
    pixels, fps = clip_pixels(frames, 2, HEIGHT, WIDTH)
    assert relative_l2(pixels * 255, ours.transpose(3, 0, 1, 2)) <= RESIZED
    assert fps is None
    if resized != list(size) and size != (1, 1):
        assert (np.abs(ours - np.rint(ours)) > 0.1).mean() > 0.3
