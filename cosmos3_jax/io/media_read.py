"""Images, videos and sounds as arrays, from files and from what callers hold.

A picture comes out as a viewer shows it: upright and not mirrored, with square pixels, in sRGB
(see `color`), and on white where it is transparent.

Axes: T frames, H height, W width, C colour channels, N sound channels, S sound samples. Pixels are
uint8, RGB and channels last, as image libraries have them; sound is float32 in [-1, 1]. PyAV and
Pillow do the decoding.
"""

import contextlib
import dataclasses
import math
import operator
import os
from collections.abc import Iterable, Iterator
from fractions import Fraction

import av
import numpy as np
from jax.typing import ArrayLike
from PIL import ExifTags, Image, UnidentifiedImageError

from cosmos3_jax import guard, limits
from cosmos3_jax.io import animations, clips, pictures
from cosmos3_jax.io.clips import End, PathLike

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
    in [0, 1], C from 1 to 4. Grey is repeated, alpha is blended with white, 16 bits are rounded to
    8. The EXIF orientation and the colour profile of files and of PIL images are applied. What a
    PNG or an AVIF says of HDR is read from its file, so a PIL image has it if its file has a name
    or is still open: one that was made by `convert` or opened from bytes and loaded has not. Raises
    FileNotFoundError, IsADirectoryError, or ValueError for what is not an image.
    """
    if not isinstance(source, str | os.PathLike | Image.Image):
        return _rgb_from_array(source, "the image", ndims=(2, 3))
    with _opened(source) as (image, name):
        return pictures.rgb(image, name)


def image_bands(source: ImageSource) -> tuple[tuple[int, int], Iterator[np.ndarray]]:
    """What `read_image` returns, made band by band: height and width, then uint8 [rows, W, 3], from
    the top. Of a large picture only its file's pixels are held whole.
    """
    if not isinstance(source, str | os.PathLike | Image.Image):
        pixels = read_image(source)
        return pixels.shape[:2], iter([pixels])
    with _opened(source) as (image, name):
        return pictures.bands(image, name)


def image_shape(source: ImageSource) -> tuple[int, int]:
    """Height and width of what `read_image` returns, without its pixels. Raises as it does."""
    if not isinstance(source, str | os.PathLike | Image.Image):
        height, width, _ = read_image(source).shape
        return height, width
    with _opened(source) as (image, _):
        return _shape(image)


def is_picture(source: object) -> bool:
    """Whether it is a file of a picture, not of a video."""
    try:
        return isinstance(source, str | os.PathLike) and all(image_shape(source))
    except ValueError:
        return False


@contextlib.contextmanager
def _opened(source: PathLike | Image.Image) -> Iterator[tuple[Image.Image, PathLike]]:
    """An image, of a file or as it is, and its name. Whatever Pillow cannot read becomes a
    ValueError that names it.
    """
    if isinstance(source, Image.Image):
        path, name = None, "the image"
        if 0 in source.size:
            raise ValueError(f"{name} is empty: its size is {source.width}x{source.height}")
    else:
        path = name = source
        clips.check_file(path)
    # Pillow raises SyntaxError for some broken png files, and an error of its own for sizes that
    # would fill the memory, be they real or damage.
    with guard.parsing(name, "an image that can be read"):
        try:
            with contextlib.ExitStack() as stack:
                image = stack.enter_context(Image.open(path)) if path is not None else source
                yield image, name
        except UnidentifiedImageError as error:
            if path is not None:
                clips.refuse_heic(path)
                if b"avif" not in clips.brands(path) and clips.is_video(path):
                    raise ValueError(f"{path} is a video: use video= (--video)") from error
            raise


def _shape(image: Image.Image) -> tuple[int, int]:
    """As it is shown: the last four of EXIF's eight orientations swap the sides."""
    width, height = image.size
    turned = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
    lying = turned and image.format != "TIFF"  # whose size Pillow has swapped
    return (width, height) if lying else (height, width)


def read_video(
    source: VideoSource,
    *,
    max_frames: int | None = None,
    keep: End = "first",
    fps: float | None = None,
) -> tuple[np.ndarray, float | None]:
    """A video as uint8 [T, H, W, 3], and its frames per second (None unless it is a file).

    Args:
        source: a path, also of an animated GIF, WebP or AVIF; an array [T, H, W, C] or
            [T, C, H, W] as in `read_image`; or a list of sources that `read_image` takes, of one
            size.
        max_frames: how many are kept at most.
        keep: `first` or `last`, the end to take them from.
        fps: the rate to sample a file at whose time stamps are uneven; default: its average.
            Evenly spaced frames are kept as they are stored.

    Raises:
        FileNotFoundError, IsADirectoryError, ValueError: for what is not a video.
    """
    _, frames, rate = video_frames(source, max_frames, keep, fps)
    return np.stack(list(frames)), rate


def video_frames(
    source: VideoSource, max_frames: int | None, keep: End, fps: float | None = None
) -> tuple[int, Iterator[np.ndarray], float | None]:
    """What `read_video` stacks: how many frames, each [H, W, 3] made when it is its turn, and their
    rate.
    """
    if max_frames is not None and max_frames < 1:
        raise ValueError(f"max_frames={max_frames} must be at least 1, or None for all")
    if fps is not None and not 0 < fps < math.inf:
        raise ValueError(f"fps={fps} must be a positive number of frames per second")
    if keep not in ("first", "last"):
        raise ValueError(f'keep={keep!r} must be "first" or "last"')
    if isinstance(source, str | os.PathLike):
        clips.check_file(source)
        if animations.is_animation(source):
            return _animation(source, max_frames, keep, fps)
        decoded, aspect, rate = clips.decode(source, max_frames, keep, fps)
        frames = (pictures.on_white(clips.pixels(frame, aspect, source)) for frame in decoded)
        return len(decoded), _of_one_size(frames, source), rate
    wanted = (
        slice(max_frames) if keep == "first" or max_frames is None else slice(-max_frames, None)
    )
    if not isinstance(source, list | tuple):
        video = _rgb_from_array(source, "the video", ndims=(4,), wanted=wanted)
        return len(video), iter(video), None
    if not source:
        raise ValueError("the list of images has no frames")
    images = source[wanted]
    return len(images), _of_one_size(map(read_image, images), "the list of images"), None


def _animation(
    path: PathLike, max_frames: int | None, keep: End, fps: float | None
) -> tuple[int, Iterator[np.ndarray], float | None]:
    timeline, average, tick = animations.timeline(path, fps)
    expected = len(timeline)
    chosen, rate = clips.choose(
        iter(timeline), max_frames, keep, fps, average, tick, path, expected
    )

    def frames() -> Iterator[np.ndarray]:
        with _opened(path) as (image, _):
            for frame in chosen:
                image.seek(frame.index)
                yield pictures.rgb(image, path)

    return len(chosen), frames(), rate if expected > 1 else None


def read_sound(path: PathLike) -> tuple[np.ndarray, int]:
    """The first sound track of a wav or mp4 file: float32 [N, S] in [-1, 1], and its sample rate in
    Hz.

    Raises FileNotFoundError, IsADirectoryError, or ValueError for a file without sound.
    """
    with clips.opened(path) as container:
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
    with clips.opened(path) as container:
        has_sound = bool(container.streams.audio)
        stream = clips.video_stream(container)
        if stream is not None:
            frames, codec = sum(1 for _ in container.decode(stream)), stream.codec_context
            rate = clips.average_rate(stream)
            info |= dict(frames=frames, height=codec.height, width=codec.width, fps=rate)
            info |= dict(
                duration=float(frames / rate) if rate else 0.0,
                video_codec=codec.codec.canonical_name,
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


def _of_one_size(frames: Iterable[np.ndarray], name: PathLike) -> Iterator[np.ndarray]:
    size = None
    for t, frame in enumerate(frames):
        size = size or frame.shape[:2]
        if frame.shape[:2] != size:
            (height, width), (first_height, first_width) = frame.shape[:2], size
            raise ValueError(
                f"{name}: frame {t} is {height}x{width} but frame 0 is "
                f"{first_height}x{first_width};"
                " all must have one size, so resize them first"
            )
        yield frame


def _rgb_from_array(
    source: ArrayLike, name: str, ndims: tuple[int, ...], wanted: slice | None = None
) -> np.ndarray:
    """Grey or colour, channels first or last, uint8 or floats in [0, 1] -> uint8 [..., H, W, 3]."""
    if not hasattr(source, "dtype") and operator.length_hint(source) > limits.FRAMES:
        raise ValueError(f"{name} is a {type(source).__name__} of more entries than frames or rows")
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
    pixels = to_uint8(array)
    if pixels.shape[-1] < 3:
        pixels = np.concatenate([pixels[..., :1]] * 3 + [pixels[..., 1:]], axis=-1)
    return pictures.on_white(pixels)
