"""Media files in and out: mp4 (h264 and AAC), wav, png and jpg. The readers are in media_read.py.

Axes: B batch, T frames, H height, W width, N sound channels, S sound samples. What the model makes
is channels first and float: video [B, 3, T, H, W] in [0, 1], sound [B, N, S] in [-1, 1]; of numpy
or JAX.

A writer fills a temporary file beside its target and renames it when it is complete, so a failure
leaves neither half a file nor a damaged older one. An existing path is refused unless
`overwrite=True`.
"""

import contextlib
import os
import tempfile
import wave
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace
from jax.typing import ArrayLike
from PIL import Image

from cosmos3_jax.checkpoint import publish
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
    "MediaInfo", "check_writable", "frame_rate", "probe", "read_image", "read_sound", "read_video",
    "save_frames", "save_image", "save_mp4", "save_wav", "to_uint8", "write_text",
]  # fmt: skip

IMAGE_SUFFIXES = (".png", ".jpg")
MEDIA_SUFFIXES = (".mp4", ".wav", *IMAGE_SUFFIXES)
SOUND_BITS_PER_SECOND = 256_000
AAC_FRAME = 1024  # samples
# ffmpeg's default coder garbles the first 20 ms of a sound that starts at once. Noise substitution
# and intensity stereo save bits that 256 kb/s has to spare.
AAC_OPTIONS = {"aac_coder": "fast", "aac_pns": "0", "aac_is": "0"}
BT709 = 1  # H.273 gives its matrix, its primaries and its transfer curve the same number


def check_writable(
    path: PathLike, overwrite: bool = False, suffixes: Sequence[str] | None = MEDIA_SUFFIXES
) -> Path:
    """Raise unless `path` can be written, and return it; call this before any long work.

    Makes missing parent folders. `suffixes=None` allows any. Raises ValueError for an unsupported
    suffix, FileExistsError for an existing path without `overwrite`, IsADirectoryError for a
    folder, and another OSError if the parent folder cannot be made or written to.
    """
    path = Path(path)
    if suffixes is not None and path.suffix.lower() not in suffixes:
        raise ValueError(
            f"{path}: the suffix {path.suffix!r} is not supported here; use {', '.join(suffixes)}"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        # mkdir says "file exists" of a parent that is a regular file; that must not read as "pass
        # overwrite".
        kind = NotADirectoryError if isinstance(error, FileExistsError) else type(error)
        reason = error.strerror or error
        raise kind(
            f"{path}: cannot write files in {path.parent} ({reason}); choose another folder"
        ) from error
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; give the name of a file")
    if os.path.lexists(path) and not overwrite:
        raise FileExistsError(
            f"{path} exists; pass overwrite=True (--overwrite) or choose another name"
        )
    return path


def write_text(path: PathLike, text: str, overwrite: bool = False) -> Path:
    """Write `text` as UTF-8, whole or not at all. Raises as `check_writable` does; any suffix will
    do.
    """
    with publish.file(check_writable(path, overwrite, None)) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(path)


def frame_rate(fps: float | Fraction) -> Fraction:
    """The exact rate that a rounded number means: 24.0 -> 24, 12.5 -> 25/2, 29.97 -> 30000/1001.

    Raises ValueError outside [0.1, 1000] frames per second.
    """
    if not 0.1 <= fps <= 1000:
        raise ValueError(f"fps={fps} is not between 0.1 and 1000 frames per second")
    exact = fps if isinstance(fps, Fraction) else Fraction(float(fps))
    ntsc = Fraction(round(exact * 1001 / 1000) * 1000, 1001)
    # 23.976, 29.97, 47.952, 59.94 and 119.88 all sit one part in 10^6 below their NTSC rate.
    return ntsc if abs(ntsc - exact) < 2e-6 * exact else exact.limit_denominator(1001)


def save_mp4(
    output: Mapping[str, Any],
    path: PathLike,
    *,
    fps: float | Fraction = 24.0,
    overwrite: bool = False,
    example: int = 0,
    crf: int = 18,
) -> Path:
    """Write one example of what `generate` returns as an mp4: h264 yuv420p (BT.709, limited range)
    and AAC.

    Args:
        output: "video" [B, 3, T, H, W] or [3, T, H, W] in [0, 1]; optionally "sound" [B, N, S] or
            [N, S] in [-1, 1], with one or two channels, and then "sample_rate" in Hz. The sound is
            trimmed, or padded with silence, to T / fps seconds: the model makes whole 40 ms latent
            frames, a little too many.
        fps: frames per second, made exact by `frame_rate`.
        example: which of the batch.
        crf: x264's quality, from 0 (lossless) to 51 (worst).

    Raises ValueError for shapes, odd sizes, rates or values that cannot be written, and as
    `check_writable`.
    """
    rate = frame_rate(fps)
    video = _check_video(_example(output, "video", example, "3 T H W"), even=True)
    sound, sample_rate = None, output.get("sample_rate")
    if output.get("sound") is not None:
        sound = _check_sound(_example(output, "sound", example, "N S"), sample_rate, max_channels=2)
        sample_rate = int(sample_rate)
        sound = _fit(sound, round(video.shape[1] / rate * sample_rate))
    # Edit lists count in the movie's time scale: the default, 1 ms, would round the sound to 48
    # samples.
    options = {
        "movflags": "faststart",
        "movie_timescale": str(sample_rate if sound is not None else 90_000),
    }
    with publish.file(check_writable(path, overwrite, (".mp4",))) as temporary:
        with av.open(temporary, "w", format="mp4", options=options) as container:
            packets = _encode_video(container, video, rate, crf)
            if sound is not None:
                packets += _encode_sound(container, sound, sample_rate)
            # In order of time, so that a player can start before it has the whole file.
            for packet in sorted(packets, key=lambda packet: packet.dts * packet.time_base):
                container.mux(packet)
    return Path(path)


def _encode_video(
    container: av.container.OutputContainer, video: np.ndarray, rate: Fraction, crf: int
) -> list[av.Packet]:
    if not 0 <= crf <= 51:
        raise ValueError(f"crf={crf} is not between 0 (lossless) and 51 (worst)")
    stream = container.add_stream("libx264", rate=rate, options={"crf": str(crf)})
    stream.height, stream.width = video.shape[2:]
    stream.pix_fmt = "yuv420p"
    codec = stream.codec_context  # untagged files are read as BT.601, which shifts reds and greens
    codec.colorspace = codec.color_primaries = codec.color_trc = BT709
    codec.color_range = ColorRange.MPEG
    packets = []
    for t in range(video.shape[1]):
        frame = av.VideoFrame.from_ndarray(_frame(video, t), format="rgb24").reformat(
            format="yuv420p",
            src_color_range=ColorRange.JPEG,
            dst_color_range=ColorRange.MPEG,
            dst_colorspace=Colorspace.ITU709,
        )
        frame.pts, frame.time_base = t, 1 / rate
        packets += stream.encode(frame)
    return packets + stream.encode()


def _encode_sound(
    container: av.container.OutputContainer, sound: np.ndarray, sample_rate: int
) -> list[av.Packet]:
    layout = "mono" if sound.shape[0] == 1 else "stereo"
    stream = container.add_stream("aac", rate=sample_rate, layout=layout, options=AAC_OPTIONS)
    rates = stream.codec_context.codec.audio_rates
    if sample_rate not in rates:
        raise ValueError(
            f"sample_rate={sample_rate} is not one of AAC's: {rates}; resample, or use save_wav"
        )
    stream.bit_rate = SOUND_BITS_PER_SECOND
    packets = []
    for start in range(0, sound.shape[1], AAC_FRAME):
        chunk = np.ascontiguousarray(sound[:, start : start + AAC_FRAME])
        frame = av.AudioFrame.from_ndarray(chunk, format="fltp", layout=layout)
        frame.sample_rate, frame.pts, frame.time_base = sample_rate, start, Fraction(1, sample_rate)
        packets += stream.encode(frame)
    return packets + stream.encode()


def save_wav(
    path: PathLike, waveform: ArrayLike, sample_rate: int, overwrite: bool = False
) -> Path:
    """Write `waveform` [N, S] in [-1, 1] as 16-bit PCM, rounded and clipped. Raises as `save_mp4`
    does.
    """
    sound = _check_sound(waveform, sample_rate, max_channels=8)
    samples = np.rint(sound * 32768).clip(max=32767).astype("<i2")  # 32768: what readers divide by
    with (
        publish.file(check_writable(path, overwrite, (".wav",))) as temporary,
        wave.open(str(temporary), "wb") as file,
    ):
        file.setnchannels(sound.shape[0])
        file.setsampwidth(2)
        file.setframerate(int(sample_rate))
        file.writeframes(np.ascontiguousarray(samples.T).tobytes())
    return Path(path)


def save_image(image: ArrayLike, path: PathLike, overwrite: bool = False) -> Path:
    """Write `image` [3, H, W] or [3, 1, H, W] in [0, 1] as png, or as jpg if the suffix says so."""
    shape = np.shape(image)
    video = _check_video(image if len(shape) == 4 else np.asarray(image)[:, None])
    if video.shape[1] != 1:
        raise ValueError(
            f"the image is {list(shape)}: {video.shape[1]} frames; use save_frames or save_mp4"
        )
    with publish.file(check_writable(path, overwrite, IMAGE_SUFFIXES)) as temporary:
        # Both are jpg's: full resolution of colours too.
        Image.fromarray(_frame(video, 0)).save(temporary, quality=95, subsampling=0)
    return Path(path)


def save_frames(video: ArrayLike, folder: PathLike, overwrite: bool = False) -> list[Path]:
    """Write `video` [3, T, H, W] in [0, 1] as folder/frame_0000.png and on; returns the paths.

    With `overwrite`, the folder's older frame_*.png are removed; its other files are never touched.
    Raises FileExistsError if there are older frames and no `overwrite`, and as `check_writable`
    does.
    """
    video, folder = _check_video(video), Path(folder)
    older = sorted(folder.glob("frame_*.png"))
    if older and not overwrite:
        raise FileExistsError(
            f"{folder} has {older[0].name}; pass overwrite=True (--overwrite) or another folder"
        )
    check_writable(folder / "frame_0000.png", overwrite)
    paths = [folder / f"frame_{t:04d}.png" for t in range(video.shape[1])]
    with contextlib.ExitStack() as writing:
        for t, path in enumerate(paths):
            Image.fromarray(_frame(video, t)).save(writing.enter_context(publish.file(path)))
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


def _frame(video: np.ndarray, t: int) -> np.ndarray:
    """Frame `t` of [3, T, H, W] as uint8 [H, W, 3]: one at a time, so a long video is never copied
    whole.
    """
    return np.ascontiguousarray(to_uint8(video[:, t]).transpose(1, 2, 0))
