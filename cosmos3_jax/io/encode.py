"""Videos as files, by the suffix of their name, and a comment inside of them.

| suffix | video | sound | comment in |
|---|---|---|---|
| .mp4, .mov | h264, yuv420p | AAC | the comment tag |
| .webm | VP9, yuv420p | Opus | the comment tag |
| .gif | 256 colours a frame | none | a comment block |
| .webp | lossy, quality 90 | none | EXIF's ImageDescription |

Colours are BT.709 in limited range where there is yuv.

Axes: T frames, H height, W width, N sound channels, S sound samples.
"""

import contextlib
import functools
import io
import struct
import warnings
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from cosmos3_jax import guard
from cosmos3_jax.io.clips import opened
from cosmos3_jax.io.media_read import to_uint8

CONTAINERS = {".mp4": "mp4", ".mov": "mov", ".webm": "webm"}
ANIMATIONS = (".gif", ".webp")
VIDEO_SUFFIXES = (*CONTAINERS, *ANIMATIONS)
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
SOUND_BITS_PER_SECOND = 256_000
# ffmpeg's default coder garbles the first 20 ms of a sound that starts at once. Noise substitution
# and intensity stereo save bits that 256 kb/s has to spare.
AAC_OPTIONS = {"aac_coder": "fast", "aac_pns": "0", "aac_is": "0"}
BT709 = 1  # H.273 gives its matrix, its primaries and its transfer curve the same number
COMMENT_KEY = "cosmos3_jax"  # of a png's text
IMAGE_DESCRIPTION = 0x010E  # of EXIF
LONGEST_JPEG_COMMENT = 65_533  # bytes, the format's own limit
LONGEST_MOV_COMMENT = 65_535
# Pixels of a side, that the encoders take.
LARGEST = {
    ".mp4": 16_384, ".mov": 16_384, ".webm": 16_384, ".gif": 65_535, ".webp": 16_383,
    ".jpg": 65_535, ".jpeg": 65_535,
}  # fmt: skip
GIF_FPS = 50  # players show what is faster as 10


def check_size(suffix: str, width: int, height: int) -> None:
    """Raise ValueError if a kind of file, by its suffix, cannot hold pictures of this size."""
    largest = LARGEST.get(suffix.lower())
    if largest is not None and max(width, height) > largest:
        raise ValueError(
            f"{width}x{height} is too large: a {suffix.lower()} holds at most {largest} pixels a "
            "side; make it smaller, or write single frames as .png"
        )


@contextlib.contextmanager
def _encoding(path: Path) -> Iterator[None]:
    """What an encoder says becomes a ValueError that names the kind of file."""
    try:
        yield
    except OSError:  # of the disk or the folder
        raise
    except (av.FFmpegError, RuntimeError, struct.error) as error:
        raise ValueError(f"the {path.suffix} could not be encoded ({error})") from error


def frame(video: np.ndarray, t: int) -> np.ndarray:
    """Frame `t` of [3, T, H, W] as uint8 [H, W, 3]: one at a time, so a long video is never copied
    whole.
    """
    return np.ascontiguousarray(to_uint8(video[:, t]).transpose(1, 2, 0))


def _fitting(path: Path, comment: str | None) -> str | None:
    """The comment, or None with a warning where the kind of file cannot hold it."""
    if comment is None:
        return None
    suffix, size = path.suffix.lower(), len(comment.encode())
    longest = {
        ".jpg": LONGEST_JPEG_COMMENT, ".jpeg": LONGEST_JPEG_COMMENT, ".mov": LONGEST_MOV_COMMENT,
    }.get(suffix, size)  # fmt: skip
    if size > longest:
        why = f"it has {size} bytes, and a {suffix} holds {longest}"
    elif suffix in CONTAINERS and "\0" in comment:
        why = f"it has a character NUL, which a {suffix} cannot hold"
    else:
        return comment
    warnings.warn(f"the file is written without its comment: {why}", stacklevel=3)
    return None


def write_container(
    path: Path,
    video: np.ndarray,
    rate: Fraction,
    sound: np.ndarray | None,
    sample_rate: int | None,
    crf: int,
    comment: str | None,
) -> None:
    """Write an mp4, mov or webm.

    Args:
        path: its suffix says which.
        video: [3, T, H, W] in [0, 1], of even sizes.
        rate: frames per second.
        sound: float32 [N, S], N 1 or 2, as long as the video; or None.
        sample_rate: of the sound, in Hz.
        crf: the encoder's quality, from 0 (best) to 51 (x264) or 63 (VP9).
        comment: any text; left out with a warning if the kind of file cannot hold it.
    """
    check_size(path.suffix, video.shape[3], video.shape[2])
    comment = _fitting(path, comment)
    webm = path.suffix.lower() == ".webm"
    # Edit lists count in the movie's time scale: the default, 1 ms, would round the sound to 48
    # samples. A webm has a random number in it, unless it is to be the same each time.
    options = {"fflags": "bitexact"} if webm else {
        "movflags": "faststart",
        "movie_timescale": str(sample_rate if sound is not None else 90_000),
    }  # fmt: skip
    kind = CONTAINERS[path.suffix.lower()]
    # Of "take:2/x.mp4" ffmpeg would make a protocol.
    with (
        _encoding(path),
        av.open(f"file:{path}", "w", format=kind, options=options) as container,
    ):
        if comment is not None:
            container.metadata["comment"] = comment
        packets = _encode_video(container, video, rate, crf, webm)
        if sound is not None and sample_rate is not None:
            packets += _encode_sound(container, sound, sample_rate, webm)
        # In order of time, so that a player can start before it has the whole file.
        for packet in sorted(packets, key=lambda packet: packet.dts * packet.time_base):
            container.mux(packet)


def _encode_video(
    container: av.container.OutputContainer,
    video: np.ndarray,
    rate: Fraction,
    crf: int,
    webm: bool,
) -> list[av.Packet]:
    worst = 63 if webm else 51
    if not 0 <= crf <= worst:
        raise ValueError(f"crf={crf} is not between 0 (best) and {worst} (worst)")
    options = {"crf": str(crf)} | ({"b": "0", "row-mt": "1"} if webm else _repeatable())
    stream = container.add_stream("libvpx-vp9" if webm else "libx264", rate=rate, options=options)
    stream.height, stream.width = video.shape[2:]
    stream.pix_fmt = "yuv420p"
    codec = stream.codec_context  # untagged files are read as BT.601, which shifts reds and greens
    codec.colorspace = codec.color_primaries = codec.color_trc = BT709
    codec.color_range = ColorRange.MPEG
    packets = []
    for t in range(video.shape[1]):
        picture = av.VideoFrame.from_ndarray(frame(video, t), format="rgb24").reformat(
            format="yuv420p",
            src_color_range=ColorRange.JPEG,
            dst_color_range=ColorRange.MPEG,
            dst_colorspace=Colorspace.ITU709,
        )
        picture.pts, picture.time_base = t, 1 / rate
        packets += stream.encode(picture)
    return packets + stream.encode()


@functools.cache
def _repeatable() -> dict[str, str]:
    """Options with which x264 gives the same bytes each time: its AVX-512 code was seen not to, on
    one thread and from the same pictures. A processor with AVX-512 has AVX2.
    """
    try:
        flags = Path("/proc/cpuinfo").read_text("utf-8", errors="replace")
    except OSError:
        return {}
    return {"x264-params": "asm=avx2"} if "avx512" in flags else {}


def _encode_sound(
    container: av.container.OutputContainer, sound: np.ndarray, sample_rate: int, webm: bool
) -> list[av.Packet]:
    layout = "mono" if sound.shape[0] == 1 else "stereo"
    name, codec, options = ("libopus", "Opus", {}) if webm else ("aac", "AAC", AAC_OPTIONS)
    stream = container.add_stream(name, rate=sample_rate, layout=layout, options=options)
    rates = stream.codec_context.codec.audio_rates
    if sample_rate not in rates:
        raise ValueError(
            f"sample_rate={sample_rate} is not one of {codec}'s: {rates}; resample, or use save_wav"
        )
    stream.bit_rate = SOUND_BITS_PER_SECOND
    packed = "flt" if webm else "fltp"
    size = 960 * sample_rate // 48_000 if webm else 1024  # samples of one packet
    packets = []
    for start in range(0, sound.shape[1], size):
        chunk = sound[:, start : start + size]
        if webm:
            chunk = chunk.T.reshape(1, -1)
        block = av.AudioFrame.from_ndarray(np.ascontiguousarray(chunk), packed, layout)
        block.sample_rate, block.pts, block.time_base = sample_rate, start, Fraction(1, sample_rate)
        packets += stream.encode(block)
    return packets + stream.encode()


def write_animation(path: Path, video: np.ndarray, rate: Fraction, comment: str | None) -> None:
    """Write [3, T, H, W] in [0, 1] as a gif or webp that loops for ever.

    A gif counts hundredths of a second, a webp thousandths: each frame ends at the nearest.
    """
    check_size(path.suffix, video.shape[3], video.shape[2])
    gif = path.suffix.lower() == ".gif"
    if gif and rate > GIF_FPS:
        warnings.warn(
            f"at {float(rate):g} frames per second a .gif has delays under 20 ms, which players "
            f"show as 100 ms; use fps={GIF_FPS} or less, or .webp or .mp4",
            stacklevel=4,
        )
    tick = 10 if gif else 1  # milliseconds
    count = video.shape[1]
    ends = [round(Fraction(1000, tick) * (t + 1) / rate) * tick for t in range(count)]
    durations = [end - start for start, end in zip([0, *ends], ends, strict=False)]

    def pictures() -> Iterator[Image.Image]:
        for t in range(count):
            picture = Image.fromarray(frame(video, t))
            yield picture.quantize(256) if gif else picture

    first, *others = pictures()
    options: dict[str, Any] = {"save_all": True, "append_images": others, "loop": 0}
    options |= {"duration": durations if count > 1 else durations[0]}
    with _encoding(path):
        if gif:
            options |= {"comment": comment.encode()} if comment is not None else {}
            first.save(path, "GIF", **options)
        else:
            first.save(path, "WEBP", quality=90, exif=_exif(comment), **options)


def write_image(path: Path, picture: np.ndarray, comment: str | None) -> None:
    """Write uint8 [H, W, 3] as png, jpg (quality 95, full resolution of colours) or webp (lossless)
    by the path's suffix. Warns if a jpg cannot hold the comment.
    """
    check_size(path.suffix, picture.shape[1], picture.shape[0])
    image, suffix = Image.fromarray(picture), path.suffix.lower()
    comment = _fitting(path, comment)
    with _encoding(path):
        if suffix == ".png":
            text = PngInfo()
            if comment is not None:
                text.add_itxt(COMMENT_KEY, comment)
            image.save(path, "PNG", pnginfo=text)
        elif suffix == ".webp":
            image.save(path, "WEBP", lossless=True, exif=_exif(comment))
        else:
            # As bytes: Pillow sizes its buffer by len(), and waits for ever if it is too small.
            said = {"comment": comment.encode()} if comment is not None else {}
            # To memory first: told of a path, Pillow takes a disk that is full for a short file.
            encoded = io.BytesIO()
            image.save(encoded, "JPEG", quality=95, subsampling=0, **said)
            path.write_bytes(encoded.getvalue())


def read_comment(path: Path) -> str | None:
    """The comment that a file was written with, or None.

    Raises:
        ValueError: it is no file of these kinds.
        OSError: it cannot be read.
    """
    if path.suffix.lower() in CONTAINERS:
        with opened(path) as container:
            return container.metadata.get("comment", container.metadata.get("COMMENT"))
    guard.check_plain(path)
    with guard.parsing(path, "an image that can be read"):
        with Image.open(path) as image:
            image.load()
            text = image.info.get(COMMENT_KEY, image.info.get("comment"))
            if text is None:
                text = image.getexif().get(IMAGE_DESCRIPTION)
                if isinstance(text, str):
                    text = text.encode("latin-1", "replace")  # as which Pillow reads the bytes
    if isinstance(text, bytes):
        return text.decode(errors="replace")
    return text if text is None else str(text)


def _exif(comment: str | None) -> Image.Exif:
    exif = Image.Exif()
    if comment is not None:
        exif[IMAGE_DESCRIPTION] = comment.encode()
    return exif
