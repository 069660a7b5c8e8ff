"""Colours that files declare -> sRGB.

A file says what its numbers mean by an ICC profile, by code points of H.273 for its primaries and
its transfer curve, by both as numbers (PNG), or by one word (Adobe RGB, of cameras). Where they are
ordinary (BT.709, BT.601, sRGB, or not stated), pixels are taken as they are, as viewers and
diffusers take them. All else goes through light: the declared curve, a matrix to sRGB's primaries,
sRGB's curve. Colours that sRGB does not have are clipped, each channel by itself.

HDR, which is PQ and HLG (BT.2100), has BT.2020's primaries where none are stated. It is mapped as
BT.2408 maps SDR to HDR, the other way round: a white of 203 cd/m2 becomes 255, darker light keeps
its proportion to it, and brighter is clipped.
"""

import contextlib
import io
import os
import struct
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from typing import IO

import numpy as np
from PIL import ExifTags, Image, ImageCms

WHITE = 203.0  # cd/m2, of graphics in HDR
PQ, HLG = 16, 18  # transfer curves of H.273
BT2020 = 9  # primaries
_PEAK = 1000.0  # cd/m2, of the display that HLG is meant for; its system gamma is then 1.2
_LUMA = np.array([0.2627, 0.6780, 0.0593], np.float32)  # of BT.2020, for HLG's system gamma
_ORDINARY_TRANSFERS = {0, 1, 2, 3, 4, 5, 6, 7, 11, 12, 13, 14, 15}
_ORDINARY_PRIMARIES = {0, 1, 2, 3, 5, 6, 7, 22}
_ORDINARY_MATRICES = {0, 1, 2, 3, 4, 5, 6, 7, 9}  # those that swscale knows
_NAMES = {
    "transfer": {8: "linear light", 9: "a logarithm", 10: "a logarithm", 17: "SMPTE ST 428"},
    "primaries": {4: "NTSC of 1953", 8: "film", 10: "CIE XYZ"},
    "matrix": {8: "YCgCo", 10: "BT.2020 of constant luminance", 14: "ICtCp", 15: "IPT-C2"},
}
# x, y of red, green, blue and white.
_SRGB = (0.64, 0.33, 0.30, 0.60, 0.15, 0.06, 0.3127, 0.3290)
_PRIMARIES = {
    BT2020: (0.708, 0.292, 0.170, 0.797, 0.131, 0.046, 0.3127, 0.3290),  # BT.2020
    11: (0.680, 0.320, 0.265, 0.690, 0.150, 0.060, 0.314, 0.351),  # DCI-P3
    12: (0.680, 0.320, 0.265, 0.690, 0.150, 0.060, 0.3127, 0.3290),  # Display P3
}
_HEAD = 1 << 16  # bytes, in which files say their colours
_ADOBE = (0.64, 0.33, 0.21, 0.71, 0.15, 0.06, 0.3127, 0.3290), 256 / 563
_SRGB_GAMMA = 0.45455
Convert = Callable[[np.ndarray], np.ndarray]


def meant_primaries(primaries: int, transfer: int) -> int:
    """As stated; if not, BT.2020's of PQ and HLG, which BT.2100 defines with no others."""
    return BT2020 if primaries in (0, 2) and transfer in (PQ, HLG) else primaries


def converter(
    name: object, primaries: int, transfer: int, matrix: int = 0, top: int = 65535
) -> Convert | None:
    """What makes sRGB of pictures with these code points of H.273; None if nothing is to be done.

    Args:
        name: of the file, for messages.
        primaries, transfer, matrix: the last is only judged; FFmpeg undoes it.
        top: the number that stands for 1.

    Returns:
        uint16 [H, W, 3] in [0, top] -> uint8 [H, W, 3].

    Raises:
        ValueError: for code points that are not known here.
    """
    primaries = meant_primaries(primaries, transfer)
    for kind, code, known in (
        ("transfer", transfer, _ORDINARY_TRANSFERS | {PQ, HLG}),
        ("primaries", primaries, _ORDINARY_PRIMARIES | _PRIMARIES.keys()),
        ("matrix", matrix, _ORDINARY_MATRICES),
    ):
        if code not in known:
            meaning = f" ({_NAMES[kind][code]})" if code in _NAMES[kind] else ""
            raise ValueError(
                f"{name} has colours of {kind} {code}{meaning}, which are not read here; convert "
                "it to sRGB or BT.709 first"
            )
    if transfer in _ORDINARY_TRANSFERS and primaries in _ORDINARY_PRIMARIES:
        return None
    return _by_code_points(primaries, transfer, top)


def image_converter(name: object, image: Image.Image) -> Convert | None:
    """As `converter`, by all that an image's file says but its ICC profile."""
    code_points = _code_points(image)
    if code_points is not None:
        return converter(name, *code_points)
    if "icc_profile" in image.info or "srgb" in image.info:
        return None
    if image.getexif().get_ifd(ExifTags.IFD.Interop).get(1) == "R03":
        return _by_gamma(*_ADOBE)
    white, *colours = np.reshape(image.info.get("chromaticity", (*_SRGB[6:], *_SRGB[:6])), (4, 2))
    chromaticities = np.concatenate([*colours, white])
    gamma = image.info.get("gamma", _SRGB_GAMMA)
    if not _can_be(chromaticities):
        warnings.warn(f"{name}: its primaries are of no display, and are left out", stacklevel=2)
        chromaticities = np.array(_SRGB)
    if not 0.1 <= gamma <= 10:
        warnings.warn(
            f"{name}: its gamma of {gamma:g} is of no display, and is left out", stacklevel=2
        )
        gamma = _SRGB_GAMMA
    if np.abs(chromaticities - _SRGB).max() < 0.005 and abs(gamma - _SRGB_GAMMA) < 0.005:
        return None
    return _by_gamma(tuple(chromaticities), gamma)


def _can_be(chromaticities: np.ndarray) -> bool:
    """Whether the primaries are the corners of a triangle, and white lies in it."""
    x, y = np.reshape(chromaticities, (4, 2)).T
    if not (np.isfinite(x).all() and (y > 0).all()):
        return False
    corners = np.stack([x, y, np.ones(4)])
    if abs(np.linalg.det(corners[:, :3])) < 1e-3:
        return False
    return bool((np.linalg.solve(corners[:, :3], corners[:, 3]) > 1e-3).all())


def _code_points(image: Image.Image) -> tuple[int, int] | None:
    """Primaries and transfer by an image's file, which Pillow does not read; None if there are
    none, or the file is closed and has no name.
    """
    if image.format == "PNG":
        said = _png_chunk(image, b"cICP")
        return None if said is None or len(said) < 2 else (said[0], said[1])
    if image.format != "AVIF":
        return None
    with _file(image) as file:
        head = file.read(_HEAD)
    at = head.find(b"colrnclx")
    return None if at < 0 else struct.unpack(">HH", head[at + 8 : at + 12])


def png_depth(image: Image.Image) -> int | None:
    """Bits of a channel in a PNG's file; None of others, or as `_code_points`."""
    header = _png_chunk(image, b"IHDR") if image.format == "PNG" else None
    return header[8] if header else None


def _png_chunk(image: Image.Image, wanted: bytes) -> bytes | None:
    """The data of a PNG's first chunk of a name, before its pixels."""
    with _file(image) as file:
        file.seek(8)
        while len(head := file.read(8)) == 8:
            length, name = struct.unpack(">I4s", head)
            if name == wanted:
                return file.read(min(length, _HEAD))
            if name == b"IDAT":
                return None
            file.seek(length + 4, os.SEEK_CUR)
    return None


@contextlib.contextmanager
def _file(image: Image.Image) -> Iterator[IO[bytes]]:
    """The file that an image was opened from, at its beginning; an empty one if it is closed and
    has no name.
    """
    path, file = getattr(image, "filename", ""), getattr(image, "fp", None)
    if os.path.isfile(path):
        with open(path, "rb") as opened:
            yield opened
    elif file is None or getattr(file, "closed", False):
        yield io.BytesIO()
    else:
        at = file.tell()
        file.seek(0)
        try:
            yield file
        finally:
            file.seek(at)


@cache
def _by_code_points(primaries: int, transfer: int, top: int) -> Convert:
    to_light = {PQ: _pq, HLG: _hlg}.get(transfer, _srgb)
    return _through_light(to_light, _PRIMARIES.get(primaries, _SRGB), top)


def _by_gamma(chromaticities: tuple[float, ...], gamma: float) -> Convert:
    return _through_light(lambda signal: signal ** (1 / gamma), chromaticities, 65535)


def _through_light(to_light: Convert, chromaticities: tuple[float, ...], top: int) -> Convert:
    table = to_light(np.minimum(np.arange(65536) / top, 1)).astype(np.float32)
    matrix = np.linalg.inv(_to_xyz(_SRGB)) @ _to_xyz(chromaticities)
    matrix = (matrix / matrix.sum(axis=1, keepdims=True)).astype(np.float32)  # white stays white

    def convert(signal: np.ndarray) -> np.ndarray:
        result = np.empty(signal.shape, np.uint8)
        for row, made in zip(signal, result, strict=True):  # as floats, rows are enough
            light = table[row]
            if to_light is _hlg:  # what the display makes of the scene's light
                light *= (_PEAK / WHITE) * (light @ _LUMA)[:, None] ** 0.2
            made[...] = np.rint(255 * _to_srgb(light @ matrix.T))
        return result

    return convert


def profile_converter(
    mode: str, profile: bytes, name: object
) -> Callable[[Image.Image], Image.Image]:
    """What makes RGB of images of mode L, RGB or CMYK by their ICC profile.

    A profile that means sRGB, but for its rounding, changes nothing. One that is damaged, or made
    for another mode, is left out with a warning.
    """
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if mode == "L" and source.profile.xcolor_space.strip() == "RGB":
            mode = "RGB"
        transform = ImageCms.buildTransform(source, _srgb_profile(), mode, "RGB")
    except (ImageCms.PyCMSError, OSError) as error:
        warnings.warn(f"{name}: its colour profile cannot be used ({error})", stacklevel=2)
        return lambda image: image.convert("RGB")
    probe = _probe().convert(mode)
    change = np.subtract(probe.convert("RGB"), ImageCms.applyTransform(probe, transform), dtype=int)
    if np.abs(change).mean() < 0.1:
        return lambda image: image.convert("RGB")
    return lambda image: ImageCms.applyTransform(image.convert(mode), transform)


@cache
def _srgb_profile() -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))


@cache
def _probe() -> Image.Image:
    """Nine levels of each channel, and all greys."""
    levels = np.linspace(0, 255, 9).astype(np.uint8)
    colours = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(-1, 3)
    greys = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, axis=1)
    return Image.fromarray(np.concatenate([colours, greys])[None])


def _pq(signal: np.ndarray) -> np.ndarray:
    power = signal ** (32 / 2523)
    light = np.maximum(power - 3424 / 4096, 0) / (2413 / 128 - 2392 / 128 * power)
    return 10000 / WHITE * light ** (16384 / 2610)


def _hlg(signal: np.ndarray) -> np.ndarray:
    """To the scene's light in [0, 1]; the system gamma needs all channels."""
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    return np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)


def _srgb(signal: np.ndarray) -> np.ndarray:
    return np.where(signal <= 0.04045, signal / 12.92, ((signal + 0.055) / 1.055) ** 2.4)


def _to_srgb(light: np.ndarray) -> np.ndarray:
    light = np.clip(light, 0, 1)
    return np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


def _to_xyz(chromaticities: tuple[float, ...]) -> np.ndarray:
    """The matrix from RGB to CIE XYZ."""
    x, y = np.reshape(chromaticities, (4, 2)).T
    red_green_blue_white = np.stack([x, y, 1 - x - y]) / y
    colours, white = red_green_blue_white[:, :3], red_green_blue_white[:, 3]
    return colours * np.linalg.solve(colours, white)
