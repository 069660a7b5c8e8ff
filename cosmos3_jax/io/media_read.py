"""Images, videos and sounds as arrays, from files and from what callers hold.

Axes: T frames, H height, W width, C colour channels, N sound channels, S sound samples. Pixels are
uint8, RGB and channels last, as image libraries have them; sound is float32 in [-1, 1]. PyAV and
Pillow do the decoding.
"""

import contextlib
import dataclasses
import itertools
import os
import warnings
from collections import deque
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Literal

import av
import numpy as np
from av.video.reformatter import ColorRange
from jax.typing import ArrayLike
from PIL import Image, ImageOps

PathLike = str | os.PathLike[str]
ImageSource = PathLike | Image.Image | ArrayLike
VideoSource = PathLike | ArrayLike | list[ImageSource] | tuple[ImageSource, ...]
_CHANNELS = (1, 2, 3, 4)  # grey, grey and alpha, RGB, RGBA


@dataclasses.dataclass(frozen=True)
class MediaInfo:
    """What decoding a whole file finds; times in seconds. A missing stream gives zeros, None."""

    frames: int = 0
    height: int = 0
    width: int = 0
    fps: Fraction | None = None
    duration: float = 0.0
    video_codec: str | None = None
    audio_codec: str | None = None
    sample_rate: int | None = None
    channels: int = 0
    audio_samples: int = 0
    audio_duration: float = 0.0


def to_uint8(video: ArrayLike) -> np.ndarray:
    """Floats in [0, 1], any shape -> uint8, clamped and rounded to nearest. uint8 passes through
    unchanged.

    Raises TypeError for other integers, and ValueError for NaN or infinity, which has no pixel
    value.
    """
    pixels = np.asarray(video)
    if pixels.dtype == np.uint8:
        return pixels
    if pixels.dtype.kind in "biuc":
        raise TypeError(f"pixels are {pixels.dtype}; give uint8, or floats in [0, 1]")
    pixels = pixels.astype(np.float32)  # half precision would round x * 255 + 0.5
    if not np.isfinite(pixels).all():
        raise ValueError("pixels contain NaN or infinity; floats must be finite, in [0, 1]")
    return np.floor(np.clip(pixels, 0, 1) * 255 + 0.5).astype(np.uint8)


def read_image(source: ImageSource) -> np.ndarray:
    """An image as uint8 [H, W, 3].

    `source` is a path, a PIL image, or an array [H, W], [H, W, C] or [C, H, W] of uint8 or floats
    in [0, 1], C from 1 to 4. An EXIF orientation is applied, grey is repeated, alpha is dropped
    (not blended). Raises FileNotFoundError, IsADirectoryError, or ValueError for what is not an
    image.
    """
    if isinstance(source, Image.Image):
        return _rgb_from_pil(source)
    if not isinstance(source, str | os.PathLike):
        return _rgb_from_array(source, "the image", ndims=(2, 3))
    _check_file(source)
    try:
        with Image.open(source) as image:
            return _rgb_from_pil(image)
    # Pillow raises SyntaxError for some broken png files, and an error of its own for sizes that
    # would fill the memory, be they real or damage.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{source} is not an image that can be read ({error})") from error


def read_video(
    source: VideoSource, *, max_frames: int | None = None, keep: Literal["first", "last"] = "first"
) -> tuple[np.ndarray, float | None]:
    """A video as uint8 [T, H, W, 3], and its frames per second (None unless it is a file).

    `source` is a path, an array [T, H, W, C] or [T, C, H, W] as in `read_image`, or a list of
    sources that `read_image` takes, of one size. At most `max_frames` are kept: the first, or the
    last. The rotation that a phone writes into its files is applied.
    Raises FileNotFoundError, IsADirectoryError, or ValueError for what is not a video.
    """
    if max_frames is not None and max_frames < 1:
        raise ValueError(f"max_frames={max_frames} must be at least 1, or None for all")
    if keep not in ("first", "last"):
        raise ValueError(f'keep={keep!r} must be "first" or "last"')
    wanted = (
        slice(max_frames) if keep == "first" or max_frames is None else slice(-max_frames, None)
    )
    if isinstance(source, str | os.PathLike):
        return _read_video_file(source, max_frames, keep)
    if not isinstance(source, list | tuple):
        return _rgb_from_array(source, "the video", ndims=(4,), wanted=wanted), None
    return _stack([read_image(image) for image in source[wanted]], "the list of images"), None


def read_sound(path: PathLike) -> tuple[np.ndarray, int]:
    """The first sound track of a wav or mp4 file: float32 [N, S] in [-1, 1], and its sample rate in
    Hz.

    Raises FileNotFoundError, IsADirectoryError, or ValueError for a file without sound.
    """
    with _opened(path) as container:
        if not container.streams.audio:
            raise ValueError(f"{path} has no sound track")
        stream = container.streams.audio[0]
        to_planes = av.AudioResampler(format="fltp")
        frames = [
            planes for frame in container.decode(stream) for planes in to_planes.resample(frame)
        ]
        if not frames:
            raise ValueError(f"{path} has a sound track without samples")
        sound = np.concatenate([frame.to_ndarray() for frame in frames], axis=1)
        # Codecs fill up their last block; the container knows where the sound ends. Its duration
        # can be a guess, so no more than part of a block is ever cut.
        end = round((stream.duration or 0) * stream.time_base * stream.rate)
        if 0 < sound.shape[1] - end < frames[-1].samples:
            sound = sound[:, :end]
        return sound, stream.rate


def probe(path: PathLike) -> MediaInfo:
    """Decode the whole file, and report what is really in it. Raises as `read_video` does."""
    info = {}
    with _opened(path) as container:
        has_sound = bool(container.streams.audio)
        if container.streams.video:
            stream = container.streams.video[0]
            frames, codec = sum(1 for _ in container.decode(stream)), stream.codec_context
            info |= dict(
                frames=frames, height=codec.height, width=codec.width, fps=stream.average_rate
            )
            info |= dict(
                duration=float(frames / stream.average_rate), video_codec=codec.codec.canonical_name
            )
        if has_sound:
            info |= dict(audio_codec=container.streams.audio[0].codec_context.codec.canonical_name)
    if has_sound:
        sound, rate = read_sound(path)
        channels, samples = sound.shape
        info |= dict(
            sample_rate=rate,
            channels=channels,
            audio_samples=samples,
            audio_duration=samples / rate,
        )
    return MediaInfo(**info)


def _check_file(path: PathLike) -> None:
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; give a file")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty")


@contextlib.contextmanager
def _opened(path: PathLike) -> Iterator[av.container.InputContainer]:
    """Open a file to decode it. Whatever FFmpeg cannot read becomes a ValueError that names the
    file.
    """
    _check_file(path)
    try:
        with av.open(path) as container:
            streams = container.streams
            if container.format.name == "tty" or not (
                streams.video or streams.audio
            ):  # ffmpeg films plain text
                raise ValueError(f"{path} is not a media file; try another")
            yield container
    except av.FFmpegError as error:
        raise ValueError(
            f"{path} is not a media file, or is damaged ({error.strerror}); try another"
        ) from error


def _read_video_file(
    path: PathLike, max_frames: int | None, keep: Literal["first", "last"]
) -> tuple[np.ndarray, float | None]:
    with _opened(path) as container:
        if not container.streams.video:
            raise ValueError(f"{path} has no video stream")
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        decoded = enumerate(container.decode(stream), 1)
        frames = (
            itertools.islice(decoded, max_frames) if keep == "first" else deque(decoded, max_frames)
        )
        frames = list(frames)
        video = _stack([_rgb_from_frame(frame) for _, frame in frames], path)
        # What the file says may be more than it shows (an edit list hides frames): no error.
        if keep == "last" and frames[-1][0] < 0.95 * stream.frames:
            warnings.warn(
                f"{path} should have {stream.frames} frames and {frames[-1][0]} can be read: if it "
                "is cut off, this is not its end",
                stacklevel=2,
            )
        return video, float(stream.average_rate) if stream.average_rate else None


def _stack(frames: list[np.ndarray], name: PathLike) -> np.ndarray:
    if not frames:
        raise ValueError(f"{name} has no frames")
    for t, frame in enumerate(frames):
        if frame.shape != frames[0].shape:
            (height, width), (first_height, first_width) = frame.shape[:2], frames[0].shape[:2]
            raise ValueError(
                f"{name}: frame {t} is {height}x{width} but frame 0 is "
                f"{first_height}x{first_width};"
                " all must have one size, so resize them first"
            )
    return np.stack(frames)


def _rgb_from_frame(frame: av.VideoFrame) -> np.ndarray:
    """A decoded frame as uint8 [H, W, 3], upright. Its tags choose the matrix; BT.601 if none, as
    ffmpeg.
    """
    pixels = frame.to_ndarray(format="rgb24", dst_color_range=ColorRange.JPEG)
    return np.rot90(pixels, round(frame.rotation / 90))


def _rgb_from_pil(image: Image.Image) -> np.ndarray:
    if image.mode[0] in "IF":  # Pillow's convert would clip these to 255, and give a white image
        raise ValueError(
            f"the image has mode {image.mode}, more than 8 bits a channel; convert it to 8 first"
        )
    return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


def _rgb_from_array(
    source: ArrayLike, name: str, ndims: tuple[int, ...], wanted: slice | None = None
) -> np.ndarray:
    """Grey or colour, channels first or last, uint8 or floats in [0, 1] -> uint8 [..., H, W, 3]."""
    array = np.asarray(source)
    if wanted is not None and array.ndim:
        array = array[wanted]
    shape = list(array.shape)
    if array.ndim not in ndims or 0 in shape:
        raise ValueError(
            f"{name} has shape {shape}; expected {' or '.join(map(str, ndims))} axes, none empty"
        )
    if array.ndim == 2:
        array = array[..., None]
    elif shape[-1] not in _CHANNELS and shape[-3] in _CHANNELS:
        array = np.moveaxis(array, -3, -1)
    if array.shape[-1] not in _CHANNELS:
        raise ValueError(
            f"{name} has shape {shape}; its first or last image axis must be channels, 1 to 4 of "
            "them"
        )
    if array.dtype.kind not in "biu" and (array.min() < 0 or array.max() > 1):
        raise ValueError(
            f"{name} has values from {array.min()} to {array.max()};"
            " floats must be in [0, 1], so divide by 255 or give uint8"
        )
    colour = array[..., :3] if array.shape[-1] >= 3 else np.repeat(array[..., :1], 3, axis=-1)
    return to_uint8(colour)
