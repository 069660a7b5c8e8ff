"""Media files in and out: videos, images and sound. How each kind is encoded is in encode.py, the
readers are in media_read.py.

Axes: B batch, T frames, H height, W width, N sound channels, S sound samples. What the model makes
is channels first and float: video [B, 3, T, H, W] in [0, 1], sound [B, N, S] in [-1, 1]; of numpy
or JAX.

A writer fills a temporary file beside its target and renames it when it is complete, so a failure
leaves neither half a file nor a damaged older one. What is there is replaced only with
`overwrite=True`; without it, a free name beside it is taken, with a warning, and returned.
"""

import contextlib
import itertools
import os
import warnings
import wave
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.typing import ArrayLike
from PIL import Image

from cosmos3_jax.checkpoint import publish
from cosmos3_jax.io import encode
from cosmos3_jax.io.encode import CONTAINERS, IMAGE_SUFFIXES, VIDEO_SUFFIXES
from cosmos3_jax.io.media_read import (
    MediaInfo,
    PathLike,
    probe,
    read_image,
    read_sound,
    read_video,
    to_uint8,
)

__all__ = [
    "IMAGE_SUFFIXES", "MediaInfo", "VIDEO_SUFFIXES", "check_writable", "frame_rate", "probe",
    "read_image", "read_sound", "read_video", "save_frames", "save_image", "save_mp4", "save_video",
    "save_wav", "to_uint8", "write_text", "writing",
]  # fmt: skip

MEDIA_SUFFIXES = (*dict.fromkeys((*VIDEO_SUFFIXES, ".wav", *IMAGE_SUFFIXES)),)
DEFAULT_FPS = 24.0


def check_writable(
    path: PathLike, overwrite: bool = False, suffixes: Sequence[str] | None = MEDIA_SUFFIXES
) -> Path:
    """Raise unless `path` can be written, and return it; call this before any long work.

    Makes nothing: missing parent folders are made when there is something to write. `suffixes=None`
    allows any. Raises ValueError for an unsupported suffix, FileExistsError for an existing path
    without `overwrite`, IsADirectoryError for a folder, and another OSError if the parent folder
    cannot be made or written to.
    """
    path = Path(path)
    if suffixes is not None and path.suffix.lower() not in suffixes:
        raise ValueError(
            f"{path}: the suffix {path.suffix!r} is not supported here; use {', '.join(suffixes)}"
        )
    publish.check_parent(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; give the name of a file")
    if os.path.lexists(path) and not overwrite:
        raise FileExistsError(
            f"{path} exists; pass overwrite=True (--overwrite) or choose another name"
        )
    return path


@contextlib.contextmanager
def writing(path: PathLike, overwrite: bool, suffixes: Sequence[str] | None) -> Iterator:
    """A target to write (see `publish.Target`), after `check_writable`'s checks of its folder."""
    path = check_writable(path, True, suffixes)
    if overwrite:
        with publish.file(path) as temporary:
            yield publish.Target(temporary, path)
        return
    with publish.free_file(path) as target:
        yield target
    if target.path != path:
        warnings.warn(
            f"{path} exists: wrote {target.path} (overwrite=True, or --overwrite, replaces it)",
            stacklevel=4,
        )


def write_text(path: PathLike, text: str, overwrite: bool = False) -> Path:
    """Write `text` as UTF-8, whole or not at all. Returns the path. Raises as `check_writable` does
    of a folder; any suffix will do.
    """
    with writing(path, overwrite, None) as target:
        target.temporary.write_text(text, encoding="utf-8")
    return target.path


def frame_rate(fps: float | Fraction) -> Fraction:
    """The exact rate that a rounded number means: 24.0 -> 24, 12.5 -> 25/2, 29.97 -> 30000/1001.

    Raises ValueError outside [0.1, 1000] frames per second.
    """
    if isinstance(fps, str):
        raise TypeError(f"fps={fps!r} is a text; give a number, such as 24")
    if not 0.1 <= fps <= 1000:
        raise ValueError(f"fps={fps} is not between 0.1 and 1000 frames per second")
    exact = fps if isinstance(fps, Fraction) else Fraction(float(fps))
    ntsc = Fraction(round(exact * 1001 / 1000) * 1000, 1001)
    # 23.976, 29.97, 47.952, 59.94 and 119.88 all sit one part in 10^6 below their NTSC rate.
    return ntsc if abs(ntsc - exact) < 2e-6 * exact else exact.limit_denominator(1001)


def save_video(
    output: Mapping[str, Any] | ArrayLike,
    path: PathLike,
    *,
    fps: float | Fraction | None = None,
    overwrite: bool = False,
    example: int = 0,
    crf: int = 18,
    comment: str | None = None,
) -> Path:
    """Write one example of what `generate` returns, as the suffix says: .mp4, .mov, .webm, and
    without sound .gif and .webp (see encode.py).

    Args:
        output: "video" [B, 3, T, H, W] or [3, T, H, W] in [0, 1]; optionally "sound" [B, N, S] or
            [N, S] in [-1, 1], with one or two channels, and then "sample_rate" in Hz; optionally
            "fps"; or the array of "video" alone. The sound is trimmed, or padded with silence, to
            T / fps seconds: the model makes whole 40 ms latent frames, a little too many.
        fps: frames per second, made exact by `frame_rate`. None is the output's own, else 24.
        example: which of the batch.
        crf: the quality of mp4, mov and webm, from 0 (best) to 51 (worst); 63 in webm.
        comment: a text to keep inside of the file, such as the record of how it was made.

    Returns:
        The path that was written: another name if `path` was taken and `overwrite` is not set.

    Raises:
        ValueError: shapes, odd sizes, rates or values that cannot be written, or a suffix that is
            not of these.
        OSError: the folder cannot be made or written to.
    """
    if isinstance(output, np.ndarray | jax.Array):
        output = {"video": output}
    if not isinstance(output, Mapping):
        raise TypeError(
            f"the video is a {type(output).__name__}: give what `generate` returns, or an array "
            "[3, T, H, W] or [B, 3, T, H, W]"
        )
    with writing(path, overwrite, VIDEO_SUFFIXES) as target:
        contained = target.path.suffix.lower() in CONTAINERS
        rate = frame_rate(output.get("fps", DEFAULT_FPS) if fps is None else fps)
        video = _check_video(_example(output, "video", example, "3 T H W"), even=contained)
        sound, sample_rate = None, output.get("sample_rate")
        if output.get("sound") is not None and not contained:
            warnings.warn(f"{target.path} has no sound: files of its kind hold none", stacklevel=3)
        elif output.get("sound") is not None:
            sound = _example(output, "sound", example, "N S")
            sound = _check_sound(sound, sample_rate, max_channels=2)
            sample_rate = int(sample_rate)
            sound = _fit(sound, round(video.shape[1] / rate * sample_rate))
        if contained:
            encode.write_container(target.temporary, video, rate, sound, sample_rate, crf, comment)
        else:
            encode.write_animation(target.temporary, video, rate, comment)
    return target.path


def save_mp4(
    output: Mapping[str, Any] | ArrayLike,
    path: PathLike,
    *,
    fps: float | Fraction | None = None,
    overwrite: bool = False,
    example: int = 0,
    crf: int = 18,
    comment: str | None = None,
) -> Path:
    """`save_video` to a name that ends in .mp4: h264 yuv420p (BT.709, limited range) and AAC."""
    check_writable(path, True, (".mp4",))
    return save_video(
        output, path, fps=fps, overwrite=overwrite, example=example, crf=crf, comment=comment
    )


def save_wav(
    path: PathLike, waveform: ArrayLike, sample_rate: int, overwrite: bool = False
) -> Path:
    """Write `waveform` [N, S] in [-1, 1] as 16-bit PCM, rounded and clipped. Raises as `save_mp4`
    does.
    """
    sound = _check_sound(waveform, sample_rate, max_channels=8)
    samples = np.rint(sound * 32768).clip(max=32767).astype("<i2")  # 32768: what readers divide by
    with (
        writing(path, overwrite, (".wav",)) as target,
        wave.open(str(target.temporary), "wb") as file,
    ):
        file.setnchannels(sound.shape[0])
        file.setsampwidth(2)
        file.setframerate(int(sample_rate))
        file.writeframes(np.ascontiguousarray(samples.T).tobytes())
    return target.path


def save_image(
    image: ArrayLike | Mapping[str, Any],
    path: PathLike,
    overwrite: bool = False,
    *,
    example: int = 0,
    comment: str | None = None,
) -> Path:
    """Write `image` [3, H, W] or [3, 1, H, W] in [0, 1], or one example of what `generate` returns,
    as the suffix says: .png, .jpg, .jpeg or .webp. Raises as `save_video` does.
    """
    if isinstance(image, Mapping):
        image = _example(image, "video", example, "3 T H W")
    shape = np.shape(image)
    video = _check_video(image if len(shape) == 4 else np.asarray(image)[:, None])
    if video.shape[1] != 1:
        raise ValueError(
            f"the image is {list(shape)}: {video.shape[1]} frames; use save_frames or save_video"
        )
    with writing(path, overwrite, IMAGE_SUFFIXES) as target:
        encode.write_image(target.temporary, encode.frame(video, 0), comment)
    return target.path


def save_frames(video: ArrayLike, folder: PathLike, overwrite: bool = False) -> list[Path]:
    """Write `video` [3, T, H, W] in [0, 1] as folder/frame_0000.png and on; returns the paths.

    With `overwrite`, the folder's older frame_*.png are removed; its other files are never touched.
    Without it, a folder with older frames is left alone: folder-1, folder-2 and so on is taken,
    with a warning. Raises as `check_writable` does.
    """
    video, folder = _check_video(video), Path(folder)
    wanted = folder
    for number in itertools.count(1):
        older = sorted(folder.glob("frame_*.png"))
        if overwrite or not older:
            break
        folder = wanted.with_name(f"{wanted.name}-{number}")
    if folder != wanted:
        warnings.warn(f"{wanted} holds frames: writing to {folder}", stacklevel=2)
    check_writable(folder / "frame_0000.png", overwrite)
    paths = [folder / f"frame_{t:04d}.png" for t in range(video.shape[1])]
    with contextlib.ExitStack() as writing:
        for t, path in enumerate(paths):
            Image.fromarray(encode.frame(video, t)).save(writing.enter_context(publish.file(path)))
    for path in {*older} - {*paths}:
        path.unlink()
    return paths


def _example(output: Mapping[str, Any], name: str, example: int, axes: str) -> ArrayLike:
    """Entry `name` of `output`, less its batch axis if it has one."""
    if name not in output:
        raise ValueError(f"the output has no {name!r}, only {sorted(output)}")
    array, shape = output[name], np.shape(output[name])
    if len(shape) == len(axes.split()):
        array, shape = array[None], (1, *shape)
    if len(shape) != len(axes.split()) + 1:
        raise ValueError(f"{name} is {list(shape)}; expected [B {axes}] or [{axes}]")
    if not 0 <= example < shape[0]:  # JAX would clamp the index, and save another example
        raise ValueError(
            f"example={example} is not in the batch; {name} has {shape[0]}, counted from 0"
        )
    return array[example]


def _check_video(video: ArrayLike, even: bool = False) -> np.ndarray:
    """`video` on the host, if it is [3, T, H, W] and not empty."""
    video = np.asarray(video)
    if video.ndim != 4 or video.shape[0] != 3 or 0 in video.shape:
        raise ValueError(
            f"the video is {list(video.shape)}; expected [3, T, H, W], not empty: choose one "
            "example of"
            " a batch, and decode latents to pixels first"
        )
    height, width = video.shape[2:]
    if even and (height % 2 or width % 2):
        raise ValueError(
            f"height={height}, width={width}: yuv420p needs even sizes; use multiples of 16"
        )
    return video


def _check_sound(sound: ArrayLike, sample_rate: int | None, max_channels: int) -> np.ndarray:
    """`sound` on the host as float32, clipped to [-1, 1], if it is [N, S] and its rate is known."""
    sound = np.asarray(sound).astype(np.float32)
    if sound.ndim != 2 or not 1 <= sound.shape[0] <= max_channels:
        raise ValueError(
            f"the sound is {list(sound.shape)}; expected [channels, samples],"
            f" with 1 to {max_channels} channels in this kind of file"
        )
    if not np.isfinite(sound).all():
        raise ValueError("the sound contains NaN or infinity; samples must be finite, in [-1, 1]")
    if sample_rate is None or sample_rate != int(sample_rate) or sample_rate <= 0:
        raise ValueError(
            f"sample_rate={sample_rate}; sound needs a positive whole number of Hz, such as 48000"
        )
    return np.clip(sound, -1, 1)


def _fit(sound: np.ndarray, samples: int) -> np.ndarray:
    return np.pad(sound[:, :samples], ((0, 0), (0, max(0, samples - sound.shape[1]))))
