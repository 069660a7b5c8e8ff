"""What a generation starts from: an image, a clip, or latents, at given latent frames.

Nothing is encoded here. Because the video VAE is causal, latent frame i depends on pixel frames
0 to 4i alone, so only the pixels up to the last given frame go on to it.

Axes: B batch, C channels, T pixel frames, H rows, W columns; latents t frames, h rows, w columns.
"""

import itertools
import math
import os
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np
from jax.typing import ArrayLike
from PIL import Image

from cosmos3_jax import limits
from cosmos3_jax.config import Config
from cosmos3_jax.io.media_read import (
    End,
    ImageSource,
    VideoSource,
    image_bands,
    image_shape,
    is_picture,
    read_video,
    video_frames,
)

CONDITION_FRAMES = (0, 1)  # of a clip, as in the model's training: five pixel frames
TRAINED_RATES = (10, 30)  # frames per second
_LITTLE_WASTE = 4  # times the picture that is made: up to it, all is resized and then cropped
_LITTLE_KEPT = 0.1  # of a picture, which is worth a warning


def resize_and_crop(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """Fill `height` x `width` with the middle of each frame, its aspect ratio kept.

    Antialiased bilinear; sizes are rounded up and the crop's offset to even, as diffusers'
    `Cosmos3OmniPipeline` and cosmos-framework have it. PhyAI leaves it to its callers.

    Args:
        frames: [T, H, W, 3], uint8.

    Returns:
        float32 [T, height, width, 3] in [0, 255], not rounded.
    """
    result = np.empty((len(frames), height, width, 3), np.float32)
    for frame, made in zip(frames, result, strict=True):
        _fill(made, frame.shape[:2], [frame])
    return result


def _fill(made: np.ndarray, shape: tuple[int, ...], bands: Iterable[np.ndarray]) -> None:
    """Write the middle of a picture into `made` [height, width, 3], float32.

    Args:
        shape: of the picture, rows and columns.
        bands: uint8 [some rows, columns, 3], from the top. Each is made as narrow as `made` before
            the next: Pillow's two passes, without a float32 copy of the picture.
    """
    (rows, columns), (height, width) = shape, made.shape[:2]
    scale = max(width / columns, height / rows)
    resized = math.ceil(scale * rows), math.ceil(scale * columns)
    top, left = round((resized[0] - height) / 2), round((resized[1] - width) / 2)
    first, last = 0, rows  # that are needed
    if resized[0] * resized[1] <= _LITTLE_WASTE * height * width:
        x, y, size, crop = (0, columns), (0, rows), resized, np.s_[top : top + height]
        kept = np.s_[:, left : left + width]
    else:  # Pillow rounds the box to float32, by which the pixels differ in the fifth digit
        tall, wide = rows / resized[0], columns / resized[1]
        x = left * wide, min((left + width) * wide, columns)
        y = float(np.float32(top * tall)), float(np.float32(min((top + height) * tall, rows)))
        size, crop, kept = (height, width), np.s_[:], np.s_[:, :]
        reach = math.ceil(max(tall, 1)) + 1  # of the filter
        first, last = max(0, math.floor(y[0]) - reach), min(rows, math.ceil(y[1]) + reach)
    narrow = np.empty((3, last - first, width), np.float32)
    start = 0
    for band in bands:
        begin, end = max(first, start), min(last, start + len(band))
        for channel in range(3) if begin < end else ():
            part = band[begin - start : end - start, :, channel]
            part = _resized(part, (end - begin, size[1]), x, (0, end - begin))
            narrow[channel, begin - first : end - first] = part[kept]
        start += len(band)
    y = y[0] - first, y[1] - first
    for channel in range(3):
        made[..., channel] = _resized(narrow[channel], (size[0], width), (0, width), y)[crop]


def _resized(
    plane: np.ndarray, size: tuple[int, int], x: tuple[float, float], y: tuple[float, float]
) -> np.ndarray:
    """In float32: Pillow would round 8-bit pixels twice."""
    image = Image.fromarray(plane.astype(np.float32, copy=False))
    return np.asarray(image.resize(size[::-1], Image.Resampling.BILINEAR, (x[0], y[0], x[1], y[1])))


def image_pixels(image: ImageSource, height: int, width: int) -> np.ndarray:
    """An image as the pixels of one frame: float32 [3, 1, height, width] in [0, 1].

    Resized by `resize_and_crop`, then rounded to 8 bits, as in diffusers and cosmos-framework.
    Orientation and colour profile are applied, and alpha is blended with white, none of which
    diffusers does.

    Args:
        image: see `media.read_image`.
        height, width: in pixels.

    Raises:
        FileNotFoundError, ValueError: see `media.read_image`.
    """
    shape, bands = image_bands(image)
    _warn_of_shape(image, shape, height, width)
    pixels = np.empty((1, height, width, 3), np.float32)
    _fill(pixels[0], shape, bands)
    return np.rint(pixels).transpose(3, 0, 1, 2) / 255


def clip_pixels(
    video: VideoSource,
    num_frames: int,
    height: int,
    width: int,
    keep: End = "first",
    fps: float | None = None,
) -> tuple[np.ndarray, float | None]:
    """One end of a clip as pixels: float32 [3, num_frames, height, width] in [0, 1], and its fps.

    Resized by `resize_and_crop` and, as in cosmos-framework, not rounded to 8 bits. diffusers
    stretches a clip to the size instead, by another filter for arrays than for images.

    Args:
        video: see `media.read_video`.
        num_frames: taken from the clip.
        height, width: in pixels.
        keep: `first` or `last`, the end to take them from.
        fps: the rate to sample a file at whose time stamps are uneven; default: its average.

    Returns:
        The pixels, and their frames per second, or None if it is no file.

    Raises:
        FileNotFoundError, ValueError: see `media.read_video`; or the clip is too short, where
            diffusers would repeat its last frame.
    """
    count, frames, rate = video_frames(video, num_frames, keep, fps)
    name = video if isinstance(video, str | os.PathLike) else "the video"
    if count == 1 < num_frames and is_picture(video):
        raise ValueError(f"{name} is a picture, not a video: use image= (--image)")
    if count < num_frames:
        raise ValueError(
            f"{name} has {count} frames and {num_frames} are needed: give a longer one, "
            "or fewer condition_frames (latent frame i needs 4i + 1)"
        )
    pixels = np.empty((num_frames, height, width, 3), np.float32)
    for t, frame in enumerate(frames):  # one at a time, and small when it is kept
        if t == 0:
            _warn_of_shape(name, frame.shape[:2], height, width)
        _fill(pixels[t], frame.shape[:2], [frame])
    return pixels.transpose(3, 0, 1, 2) / 255, rate


def _warn_of_shape(name: object, shape: tuple[int, ...], height: int, width: int) -> None:
    rows, columns = shape
    kept = min(rows * width / (columns * height), columns * height / (rows * width))
    if kept < _LITTLE_KEPT:
        name = name if isinstance(name, str | os.PathLike) else "the picture"
        warnings.warn(
            f"{name} is {columns}x{rows}: filling {width}x{height} keeps {kept:.1%} of it, the "
            "middle; crop it to what should be seen",
            stacklevel=4,
        )


def resolve_given(
    config: Config,
    batch: int,
    video_shape: tuple[int, int, int],
    fps: float,
    *,
    image: ImageSource | Sequence[ImageSource] | None = None,
    video: VideoSource | None = None,
    condition_frames: Iterable[int] | None = None,
    keep: Literal["first", "last"] | None = None,
    clean_latents: ArrayLike | None = None,
    frame_mask: ArrayLike | None = None,
) -> dict[str, np.ndarray]:
    """The fields of a request that say what is given: pixels or latents, and at which frames.

    Args:
        config: the checkpoint's.
        batch: B.
        video_shape: latent (t, h, w).
        fps: of the video to be made.
        image, video, condition_frames, keep, clean_latents, frame_mask: see
            `prepare.prepare_request`.

    Returns:
        `clean_video` [B, 3, T, H, W] or `clean_latents` [B, C, t, h, w], and `frame_mask` [B, t];
        empty if nothing is given.

    Raises:
        ValueError: on more than one of image, video and clean_latents, on what belongs to another
            of them, on frames that there are not, and on media that cannot be read.
    """
    sources = {"image": image, "video": video, "clean_latents": clean_latents}
    named = [name for name, source in sources.items() if source is not None]
    if len(named) > 1:
        raise ValueError(f"{' and '.join(named)} are given: start from one of them")
    for name, value, owner in (
        ("condition_frames", condition_frames, "video"),
        ("keep", keep, "video"),
        ("frame_mask", frame_mask, "clean_latents"),
    ):
        if value is not None and named != [owner]:
            instead = f" instead of {named[0]}" if named else " too"
            raise ValueError(
                f"{name} belongs to {owner}, which is not given: leave it out, or give "
                f"{owner}{instead}"
            )
    if not named:
        return {}
    frames, *latent_size = video_shape
    if frames == 1 and clean_latents is None:
        raise ValueError(
            f"num_frames=1 makes an image, from text alone: leave {named[0]} out, or ask for "
            "5 frames or more"
        )
    if clean_latents is not None:
        return _given_latents(clean_latents, frame_mask)
    height, width = (config.video_vae.scale_factor_spatial * size for size in latent_size)
    if image is not None:
        return {
            "clean_video": _images(image, batch, height, width),
            "frame_mask": _mask([0], batch, frames),
        }
    given = resolve_condition_frames(condition_frames, frames)
    needed = config.video_vae.scale_factor_temporal * max(given) + 1
    pixels, source_fps = _clips(video, batch, needed, height, width, keep or "first", fps)
    if source_fps is not None and abs(source_fps - fps) > 0.01 * fps:
        least, most = TRAINED_RATES
        advice = f"pass fps={source_fps:g} (--fps) to keep it"
        if not least <= source_fps <= most:
            advice = (
                f"convert it to {fps:g} first (ffmpeg -i CLIP -r {fps:g} NEW.mp4), because the "
                f"model was trained with {least} to {most}"
            )
        warnings.warn(
            f"the clip has {source_fps:g} frames per second, the video {fps:g}: what moves in it "
            f"will change its speed; {advice}",
            stacklevel=3,
        )
    return {"clean_video": pixels, "frame_mask": _mask(given, batch, frames)}


def input_shape(image: Any, video: VideoSource | None) -> tuple[int, int] | None:
    """Height and width of the picture that is given, as it is shown: the first of several. Of a
    clip only its first frame is decoded.
    """
    if video is not None:
        if getattr(video, "ndim", 0) == 5:  # of a generation, [B, 3, T, H, W]
            return video.shape[-2], video.shape[-1]
        if isinstance(video, str | os.PathLike) and is_picture(video):  # an animation
            return image_shape(video)
        return read_video(video, max_frames=1)[0].shape[1:3]
    if image is None:
        return None
    return image_shape(image[0] if isinstance(image, list | tuple) else image)


def resolve_condition_frames(condition_frames: Iterable[int] | None, frames: int) -> list[int]:
    """The given latent frames, counted from 0. Negative ones count from the end.

    Args:
        condition_frames: None means `CONDITION_FRAMES`.
        frames: latent frames of the video.

    Raises:
        ValueError: if there is none, or one that the video does not have.
    """
    if condition_frames is None:
        condition_frames = CONDITION_FRAMES
    if not isinstance(condition_frames, str):
        try:
            condition_frames = [*itertools.islice(condition_frames, limits.FRAMES)]
        except TypeError:  # one number
            condition_frames = [condition_frames]
    numbers = np.asarray(condition_frames)
    if numbers.ndim != 1 or not numbers.size or numbers.dtype.kind not in "iu":
        raise ValueError(
            f"condition_frames={limits.shown(condition_frames, 80)} must be whole numbers, at "
            f"least one, such as {CONDITION_FRAMES}"
        )
    for i in numbers:
        if not -frames <= i < frames:
            raise ValueError(
                f"condition_frames has {i}, but this video has latent frames 0 to {frames - 1}: "
                "choose among these, or ask for more num_frames"
            )
    return sorted({int(i) % frames for i in numbers})


def _clips(
    video: VideoSource,
    batch: int,
    num_frames: int,
    height: int,
    width: int,
    keep: End,
    fps: float,
) -> tuple[np.ndarray, float | None]:
    """[B, 3, num_frames, height, width] of one clip for all or, of a generation's result
    [B, 3, T, H, W], of one for each; and the fps of a file.
    """
    clips = [video]
    if getattr(video, "ndim", 0) == 5:
        clips = np.moveaxis(np.asarray(video), 1, -1)
    if len(clips) not in (1, batch):
        raise ValueError(
            f"{len(clips)} clips for {batch} prompts: give one for all, or one for each"
        )
    read = [clip_pixels(clip, num_frames, height, width, keep, fps) for clip in clips]
    pixels = np.stack([pixels for pixels, _ in read])
    return np.repeat(pixels, batch // len(clips), axis=0), read[0][1]


def _images(
    image: ImageSource | Sequence[ImageSource], batch: int, height: int, width: int
) -> np.ndarray:
    """[B, 3, 1, height, width] of one image for all, or of one for each."""
    images = list(image) if isinstance(image, list | tuple) else [image]
    if len(images) not in (1, batch):
        raise ValueError(
            f"{len(images)} images for {batch} prompts: give one for all, or one for each"
        )
    pixels = np.stack([image_pixels(one, height, width) for one in images])
    return np.repeat(pixels, batch // len(images), axis=0)


def _given_latents(clean_latents: ArrayLike, frame_mask: ArrayLike | None) -> dict[str, Any]:
    if frame_mask is None:
        raise ValueError("clean_latents is given without frame_mask [B, t]: say which frames")
    latents = np.asarray(clean_latents, np.float32)
    if not np.isfinite(latents).all():
        raise ValueError("clean_latents holds NaN or infinity; encode_video makes finite latents")
    return {"clean_latents": latents, "frame_mask": np.asarray(frame_mask)}


def _mask(given: Sequence[int], batch: int, frames: int) -> np.ndarray:
    return np.tile(np.isin(np.arange(frames), given), (batch, 1))
