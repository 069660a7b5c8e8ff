"""Clips whose pixels are known, what their files say of them, and profiles of colours."""

import struct
from fractions import Fraction

import av
import numpy as np

from cosmos3_jax.io import media

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


def video_of(picture: np.ndarray, frames: int = 2) -> np.ndarray:
    return np.repeat(picture.transpose(2, 0, 1)[:, None], frames, axis=1) / 255


PICTURE = np.zeros((32, 48, 3), np.uint8)  # no two of its quarters are equal
PICTURE[:16, :24], PICTURE[:16, 24:], PICTURE[16:, :24] = (220, 40, 40), (40, 180, 60), 200


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
