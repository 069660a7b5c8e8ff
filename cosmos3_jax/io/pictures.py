"""A PIL image as a viewer shows it: upright, in sRGB, and on white where it is transparent.

Axes: H rows, W columns.
"""

from collections.abc import Callable, Iterator

import numpy as np
from PIL import ExifTags, Image

from cosmos3_jax.io import color

BAND = 1 << 20  # pixels that are converted at a time
# What makes a picture upright, by EXIF's orientation.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}  # fmt: skip


def rgb(image: Image.Image, name: object) -> np.ndarray:
    """uint8 [H, W, 3]."""
    (height, width), parts = bands(image, name)
    pixels, top = np.empty((height, width, 3), np.uint8), 0
    for band in parts:
        pixels[top : top + len(band)] = band
        top += len(band)
    return pixels


def bands(image: Image.Image, name: object) -> tuple[tuple[int, int], Iterator[np.ndarray]]:
    """Height and width, as it is shown, then uint8 [rows, W, 3], from the top: of a large picture
    only its file's pixels are held whole. What cannot be converted raises here, not when a band is
    made.
    """
    to_rgb = _to_rgb(image, name)
    to_rgb(image.crop((0, 0, 1, 1)))
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    upright = _UPRIGHT.get(orientation)
    height, width = image.size if orientation in (5, 6, 7, 8) else image.size[::-1]
    rows = max(1, BAND // width)

    def made() -> Iterator[np.ndarray]:
        for top in range(0, height, rows):
            bottom = min(top + rows, height)
            # Where it lies in what is stored: from its other end, and as columns.
            ends = (height - bottom, height - top) if orientation in (3, 4, 7, 8) else (top, bottom)
            columns = orientation in (5, 6, 7, 8)
            box = (ends[0], 0, ends[1], width) if columns else (0, ends[0], width, ends[1])
            part = image.crop(box)
            yield to_rgb(part if upright is None else part.transpose(upright))

    return (height, width), made()


def _to_rgb(image: Image.Image, name: object) -> Callable[[Image.Image], np.ndarray]:
    """What makes uint8 [H, W, 3] of parts of an image."""
    convert = color.image_converter(name, image)
    image.load()  # which can change its mode
    deep = image.mode.startswith("I;16")
    if image.mode[0] in "IF" and not deep:
        # Their range is unknown; Pillow's convert clips them to 255.
        raise ValueError(
            f"the image has mode {image.mode}, more than 16 bits a channel; convert it to 8 first"
        )
    grey = deep or image.mode in ("1", "L", "LA", "La")
    mode = "L" if grey else image.mode if image.mode == "CMYK" else "RGB"
    profile = image.info.get("icc_profile")
    by_profile = color.profile_converter(mode, profile, name) if profile and not convert else None
    key = _transparent_colour(image)

    def to_rgb(part: Image.Image) -> np.ndarray:
        alpha = None
        if deep:
            levels = np.asarray(part)
            if key is not None:
                alpha = np.where(levels == key, 0, 255).astype(np.uint8)
            part = Image.fromarray(np.rint(levels / 257).astype(np.uint8))
        else:
            if key is not None:
                part.info["transparency"] = key
            if part.mode in ("La", "RGBa"):  # whose colours are multiplied by alpha
                part = part.convert({"La": "LA", "RGBa": "RGBA"}[part.mode])
            if part.has_transparency_data:
                alpha = part.convert("RGBA").getchannel("A")
        part = part if part.mode == mode else part.convert(mode)
        if convert:
            rgb = convert(np.asarray(part.convert("RGB")).astype(np.uint16) * 257)
        else:
            rgb = np.asarray(by_profile(part) if by_profile else part.convert("RGB"))
        return rgb if alpha is None else on_white(np.dstack([rgb, alpha]))

    return to_rgb


def _transparent_colour(image: Image.Image) -> object:
    """What Pillow says of it. A PNG has it in its own depth: here in the range of the pixels."""
    key, depth = image.info.get("transparency"), color.png_depth(image)
    if depth is not None and depth < 8 and image.mode == "L" and isinstance(key, int):
        return key * 255 // (2**depth - 1)
    if image.mode == "RGB" and isinstance(key, tuple) and (depth == 16 or max(key) > 255):
        return tuple(level >> 8 for level in key)  # as Pillow rounds the pixels
    return key


def on_white(pixels: np.ndarray) -> np.ndarray:
    """uint8 [..., 4], or [..., 3], which is opaque -> uint8 [..., 3]."""
    if pixels.shape[-1] == 3:
        return pixels
    rgb, alpha = pixels[..., :3], pixels[..., 3:].astype(np.uint16)
    return ((rgb * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
