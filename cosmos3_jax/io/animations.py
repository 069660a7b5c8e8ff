"""Animated pictures: GIF, WebP and AVIF, which FFmpeg reads in part or not at all.

Times are in seconds.
"""

import dataclasses
import os
from fractions import Fraction

from PIL import Image

from cosmos3_jax import guard

FORMATS = ("GIF", "WEBP", "AVIF")
_UNSAID = 100  # milliseconds that a frame is shown which does not say it, as browsers have it
_TICKS = {"GIF": 0.01}  # of the clock; others count milliseconds


@dataclasses.dataclass(frozen=True)
class AnimationFrame:
    """When a frame is shown: from `time`, for `duration` units of `time_base`."""

    index: int
    time: float
    duration: int
    time_base: Fraction = Fraction(1, 1000)


def is_animation(path: str | os.PathLike[str]) -> bool:
    """Whether it is of a kind that can be one; it may have one frame."""
    try:
        with Image.open(path) as image:
            return image.format in FORMATS
    except Exception:  # of a dozen kinds; whoever reads it says what is wrong
        return False


def timeline(
    path: str | os.PathLike[str], fps: float | None
) -> tuple[list[AnimationFrame], float, float]:
    """All frames of an animation, their average rate, and the tick of its clock.

    `fps` is the rate where the clock, which is coarse, cannot tell it from the average. Raises
    ValueError for a damaged file.
    """
    frames, milliseconds = [], 0
    with guard.parsing(path, "an animation that can be read"):
        with Image.open(path) as image:
            tick = _TICKS.get(str(image.format), 0.001)
            for index in range(getattr(image, "n_frames", 1)):
                image.seek(index)
                image.load()  # for its duration
                duration = round(image.info.get("duration") or _UNSAID)
                frames.append(AnimationFrame(index, milliseconds / 1000, duration))
                milliseconds += duration
        seconds = milliseconds / 1000
        if fps and abs(seconds - len(frames) / fps) <= tick:
            return frames, fps, tick
        return frames, len(frames) / seconds, tick
