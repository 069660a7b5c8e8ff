"""The frames of a video file as a player shows them: the right ones, upright, and in sRGB.

Axes: H rows, W columns. Times are in seconds.
"""

import contextlib
import itertools
import math
import os
import re
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Literal, TypeVar

import av
import numpy as np
from av.stream import Disposition
from av.video.reformatter import ColorRange, Colorspace
from PIL import Image

from cosmos3_jax import guard
from cosmos3_jax.io import color
from cosmos3_jax.io.animations import AnimationFrame

PathLike = str | os.PathLike[str]
End = Literal["first", "last"]
Frame = av.VideoFrame | AnimationFrame
FrameT = TypeVar("FrameT", bound=Frame)
_HEIC = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx"}
MAX_ASPECT = 8  # of one sample; television has at most 2
MAX_SAMPLED = 100_000  # frames, of a clip whose time stamps are uneven
_EARLY = 0.25  # of a frame's time, by which the next one may be shown before it is due


def check_file(path: PathLike) -> None:
    """Raise unless `path` is a file that is not empty."""
    name, path = os.fspath(path), Path(path)
    if not os.path.exists(path):  # of a long name too, at which Path raises
        # Of two slashes, a Path has left one; one letter is a drive's.
        if re.match(r"[A-Za-z][\w+.-]+:/|data:", str(name)):
            name = f"{str(name)[:80]}..." if len(str(name)) > 80 else name
            raise ValueError(f"{name} is an address, not a file; download it, and give the file")
        raise FileNotFoundError(f"{path} does not exist")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; give a file")
    guard.check_plain(path)
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty")


@contextlib.contextmanager
def opened(path: PathLike) -> Iterator[av.container.InputContainer]:
    """Open a file to decode it. Whatever FFmpeg cannot read becomes a ValueError that names the
    file.

    FFmpeg gets an open file and no protocol: no name is taken for an address, and a playlist
    opens nothing.
    """
    check_file(path)
    no_protocol = {"protocol_whitelist": "none"}
    with guard.parsing(path, "a media file that can be read", way_out="try another"):
        try:
            with (
                open(path, "rb") as file,
                av.open(file, container_options=no_protocol) as container,
            ):
                streams = container.streams
                if container.format.name == "tty" or not (
                    streams.video or streams.audio
                ):  # ffmpeg films plain text
                    raise ValueError(_no_media(path))
                yield container
        except av.FFmpegError as error:
            raise ValueError(_no_media(path, f", or is damaged ({error.strerror})")) from error


def brands(path: PathLike) -> set[bytes]:
    """The brands in the first box of an mp4 and its kin: `isom`, `avif`, `heic`; else none."""
    with open(path, "rb") as file:
        head = file.read(256)
    size = int.from_bytes(head[:4], "big")
    if head[4:8] != b"ftyp":
        return set()
    return {head[i : i + 4] for i in (8, *range(16, min(size, 256), 4))}


def refuse_heic(path: PathLike) -> None:
    """FFmpeg would take one tile of it for the picture."""
    found = brands(path)
    if found & _HEIC and b"avif" not in found:
        raise ValueError(
            f"{path} is a HEIC picture, which is not read: export it as JPEG or PNG, or open it "
            "with pillow-heif and pass the PIL image"
        )


def is_video(path: PathLike) -> bool:
    """Whether FFmpeg reads a video in it. It reads pictures as videos, which are none."""
    try:
        with opened(path) as container:
            kind = container.format.name
            picture = kind.endswith("_pipe") or kind in ("image2", "gif", "apng")
            return video_stream(container) is not None and not picture
    except ValueError:
        return False


def _no_media(path: PathLike, damage: str = "") -> str:
    with open(path, "rb") as file:
        text = file.read(512).decode("latin-1")
    if not re.search(r"[^\s -~\x80-\xff]", text):
        return f"{path} is not a media file but text, such as a playlist; give the clip itself"
    return f"{path} is not a media file{damage}; try another"


def video_stream(container: av.container.InputContainer) -> av.VideoStream | None:
    """The first that is not an attached picture, which is a cover."""
    streams = container.streams.video
    return next((s for s in streams if not s.disposition & Disposition.attached_pic), None)


def decode(
    path: PathLike, max_frames: int | None, keep: End, fps: float | None
) -> tuple[list[av.VideoFrame], Fraction, float | None]:
    """The frames that are wanted, not yet converted.

    Args:
        path: of the file.
        max_frames, keep: how many at most, and of which end.
        fps: the rate to sample it at if its time stamps are uneven; default: its average.

    Returns:
        The frames, evenly spaced; the aspect of their samples; and their rate, if it is known.
    """
    check_file(path)
    refuse_heic(path)
    with opened(path) as container:
        stream = video_stream(container)
        if stream is None:
            raise ValueError(f"{path} has no video stream")
        stream.thread_type = "AUTO"
        aspect = _sample_aspect(stream, path)
        average = average_rate(stream)
        tick, average = float(stream.time_base), average and float(average)
        frames = container.decode(stream)
        first = next(frames, None)
        if first is None:
            raise ValueError(f"{path} has no frames")
        _converter(first, path), _orientation(first, path)  # refused before the rest is decoded
        frames = itertools.chain([first], frames)
        chosen, rate = choose(frames, max_frames, keep, fps, average, tick, path, stream.frames)
    return chosen, aspect, rate


def choose(
    frames: Iterator[FrameT],
    max_frames: int | None,
    keep: End,
    fps: float | None,
    average: float | None,
    tick: float,
    path: PathLike,
    expected: int,
) -> tuple[list[FrameT], float | None]:
    """Of all frames, one or more, those that are wanted, and their rate.

    Args:
        frames: with `time`, `duration` and `time_base`, as PyAV has them.
        max_frames, keep, fps: as of `decode`.
        average: the file's rate, if it is known.
        tick: of the file's clock, in seconds.
        path, expected: the file, and how many frames it should have, for a warning.
    """
    first = next(frames)
    frames, rate = itertools.chain([first], frames), fps or average
    seconds = (max_frames + 1) / rate if max_frames and rate else 0.0
    if max_frames is None:
        held = list(frames)
    elif keep == "first":
        held = list(itertools.islice(frames, max_frames))
        if not _even(held, tick):
            held += _until(frames, _time(first) + seconds)
    else:
        held = _last(frames, max_frames, seconds, path, expected)
    window = slice(max_frames) if keep == "first" or not max_frames else slice(-max_frames, None)
    if rate is None or _even(held[window], tick):
        return held[window], _rate(held[window], tick, average)
    return _sampled(held, _time(first), rate, tick, window, path), rate


def _until(frames: Iterator[FrameT], end: float) -> Iterator[FrameT]:
    """To the first after `end`: until then, the one before it is shown."""
    for frame in frames:
        yield frame
        if _time(frame) > end:
            return


def _last(
    frames: Iterator[FrameT], number: int, seconds: float, path: PathLike, expected: int
) -> list[FrameT]:
    """The last `number` frames, and more if they fill fewer seconds."""
    held, count = deque(), 0
    for frame in frames:
        held.append(frame)
        count += 1
        while len(held) > number and not _time(held[1]) > _time(frame) - seconds:
            held.popleft()
    # What the file says may be more than it shows (an edit list hides frames): no error.
    if count < 0.95 * expected:
        warnings.warn(
            f"{path} should have {expected} frames and {count} can be read: if it "
            "is cut off, this is not its end",
            stacklevel=2,
        )
    return list(held)


# Time stamps
# ----------------------------------------------------------------------------------------------


def _time(frame: Frame) -> float:
    return math.nan if frame.time is None else frame.time


def _even(frames: Sequence[Frame], tick: float) -> bool:
    """Whether all are a tenth of their distance, and a tick, from equal distances; true too if the
    times are not known.
    """
    distances = np.diff([_time(frame) for frame in frames])
    if not distances.size or np.isnan(distances).any():
        return True
    usual = np.median(distances)
    return bool((np.abs(distances - usual) <= 0.1 * usual + min(tick, usual / 2)).all())


def _rate(frames: Sequence[Frame], tick: float, average: float | None) -> float | None:
    """Of evenly spaced frames: the file's average, unless theirs is another."""
    seconds = _time(frames[-1]) - _time(frames[0]) if frames else math.nan
    count = len(frames) - 1
    if count < 1 or not seconds > 0:
        return average
    if average and abs(seconds - count / average) <= 0.01 * seconds + tick:
        return average
    return count / seconds


def _sampled(
    frames: Sequence[FrameT], start: float, rate: float, tick: float, window: slice, path: PathLike
) -> list[FrameT]:
    """What is shown at those in `window` of each 1 / rate seconds from `start` until the end of the
    last frame.
    """
    times = np.maximum.accumulate([_time(frame) for frame in frames]) - start
    last = frames[-1]
    shown = float(last.duration * last.time_base) if last.duration else 1 / rate
    instants = range(max(1, round((times[-1] + shown) * rate)))[window]
    if len(instants) > MAX_SAMPLED:
        raise ValueError(
            f"{path} has {len(frames)} frames in {times[-1] + shown:.0f} seconds, uneven: sampled "
            f"at {rate:g} per second they would be {len(instants)}, more than {MAX_SAMPLED}; a "
            "time stamp may be wrong, or give max_frames"
        )
    due = np.arange(instants.start, instants.stop) / rate
    early = max(tick / 2, _EARLY / rate)
    found = np.searchsorted(times, due + early, side="right") - 1
    if instants.start == 0:  # the first is shown, however short
        found[0] = 0
    return [frames[i] for i in np.maximum(found, 0)]


# Pixels
# ----------------------------------------------------------------------------------------------


def pixels(frame: av.VideoFrame, aspect: Fraction, path: PathLike) -> np.ndarray:
    """A decoded frame as uint8 [H, W, 3] or, if it has alpha, [H, W, 4].

    Its tags choose the matrix from YUV; BT.601 if there are none, as in ffmpeg.
    """
    convert = _converter(frame, path)
    if convert is not None:
        primaries = color.meant_primaries(frame.color_primaries, frame.color_trc)
        untagged = frame.colorspace == 2 and primaries == color.BT2020
        rgb = convert(
            frame.to_ndarray(
                format="rgb48le",
                src_colorspace=Colorspace.BT2020 if untagged else None,
                dst_color_range=ColorRange.JPEG,
            )
        )
    else:
        alpha = any(component.is_alpha for component in frame.format.components)
        rgb = frame.to_ndarray(format="rgba" if alpha else "rgb24", dst_color_range=ColorRange.JPEG)
    if aspect != 1:  # the longer side of a sample is kept, and nothing is lost
        height, width = rgb.shape[:2]
        size = round(width * max(aspect, 1)), round(height / min(aspect, 1))
        rgb = np.asarray(Image.fromarray(rgb).resize(size, Image.Resampling.BILINEAR))
    transposed, turned, mirrored = _orientation(frame, path)
    if transposed:
        rgb = rgb.swapaxes(0, 1)
    return rgb[:: -1 if turned else 1, :: -1 if mirrored else 1]


def average_rate(stream: av.VideoStream) -> Fraction | None:
    """Frames a second, where a file says. Where not, PyAV 18 has None, and 19 a false fraction."""
    rate = stream.average_rate
    return Fraction(rate.numerator, rate.denominator) if rate else None


def _sample_aspect(stream: av.VideoStream, path: PathLike) -> Fraction:
    aspect = stream.sample_aspect_ratio or Fraction(1)
    if not 1 / MAX_ASPECT <= aspect <= MAX_ASPECT:
        raise ValueError(
            f"{path} has samples of {aspect.numerator}:{aspect.denominator}, beyond "
            f"{MAX_ASPECT}:1; store it with square ones"
        )
    return aspect


def _converter(frame: av.VideoFrame, path: PathLike) -> color.Convert | None:
    # White in 16 bits, which swscale makes of YUV as 255 * 256.
    top = 65535 if frame.format.is_rgb else 65280
    return color.converter(path, frame.color_primaries, frame.color_trc, frame.colorspace, top)


def _orientation(frame: av.VideoFrame, path: PathLike) -> tuple[bool, bool, bool]:
    """Of the display matrix: whether to swap rows and columns, then to reverse each of them."""
    matrix = _display_matrix(frame)
    if matrix is None:
        return False, False, False
    # A pixel goes to x = a column + c row, y = b column + d row.
    (a, b), (c, d) = matrix / max(np.abs(matrix).max(), 1)
    transposed = abs(b) > abs(a)
    if max(abs(a), abs(d)) > 0.1 and max(abs(b), abs(c)) > 0.1:
        raise ValueError(
            f"{path} is turned by {frame.rotation} degrees, and only quarter turns and mirrors "
            "are read; turn it upright first"
        )
    return (True, b < 0, c < 0) if transposed else (False, d < 0, a < 0)


def _display_matrix(frame: av.VideoFrame) -> np.ndarray | None:
    try:
        data = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # side data that PyAV does not know, such as EXIF, hides all others
        angle = math.radians(frame.rotation)  # counterclockwise; a mirror is not in it
        return None if not angle else np.array(
            [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
        )  # fmt: skip
    return None if data is None else np.frombuffer(data, np.int32).reshape(3, 3)[:2, :2]
