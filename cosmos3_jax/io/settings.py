"""The settings of one generation: their names, defaults and help, told once.

`Settings` holds them, the command line takes its help from it, and `SettingsDict` gives type
checkers and editors the same names as keyword arguments.
"""

from __future__ import annotations

import dataclasses
import decimal
import difflib
import itertools
import numbers
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypedDict

from cosmos3_jax import limits
from cosmos3_jax.config import Recipe

if TYPE_CHECKING:  # the command line's help needs these settings, and neither JAX nor PyAV
    from jax.typing import ArrayLike

    from cosmos3_jax.io.media_read import ImageSource, VideoSource

    Texts: TypeAlias = str | Sequence[str]
    Images: TypeAlias = ImageSource | Sequence[ImageSource]
    Numbers: TypeAlias = ArrayLike  # real ones
    Mask: TypeAlias = ArrayLike  # of bool
End = Literal["first", "last"]
Speed = Literal["exact", "fast"]
LONGEST = 2**16  # list that becomes an array; prompts, noise levels and latent frames are fewer


class SettingsDict(TypedDict, total=False):
    """The fields of `Settings` as keyword arguments."""

    negative_prompt: Texts | None
    image: Images | None
    video: VideoSource | None
    condition_frames: Iterable[int] | None
    keep: End | None
    clean_latents: Numbers | None
    frame_mask: Mask | None
    num_frames: int | None
    size: str | int | tuple[int, int] | None
    aspect: str | None
    height: int | None
    width: int | None
    fps: float | None
    num_inference_steps: int | None
    guidance_scale: float | None
    flow_shift: float | None
    schedule: str | None
    sigmas: Sequence[float] | None
    speed: Speed | None
    evaluations: int | None
    seed: int | Sequence[int]
    noise: Numbers | None
    sound_noise: Numbers | None
    sound: bool
    prompt_style: str
    system_prompt: str | Literal[False] | None
    prompt_metadata: bool


def _setting(default: Any, text: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": " ".join(text.split())})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What a generation is made of besides its prompt. None is the recipe's, where it has one.

    Each is held to its type, and numbers to `limits.SETTINGS`, when it is made: ValueError. NumPy's
    and JAX's scalars become Python's.

    Axes: B batch, C channels; latents t frames, h rows, w columns; s sound latents; K steps.
    """

    negative_prompt: Texts | None = _setting(
        None,
        "one for all or one for each; default: the recipe's, else the style's; an empty text "
        "is an empty prompt",
    )
    image: Images | None = _setting(
        None,
        "what the video begins with: a path, a PIL image or an array, one for all or a list of "
        "one for each; resized to fill the picture and cropped in its middle; what is transparent "
        "in it becomes white",
    )
    video: VideoSource | None = _setting(
        None,
        "a clip to go on from, for all: a path, an array or a list of frames; or "
        "[B, 3, T, H, W], as `generate` returns it, one for each; resized likewise; "
        "a file with uneven time stamps is sampled at fps",
    )
    condition_frames: Iterable[int] | None = _setting(
        None,
        "the latent frames that the clip gives: 0 is its first frame, i > 0 its frames 4i - 3 "
        "to 4i, and -1 the last of the video to be made; default: 0 and 1, which is five frames",
    )
    keep: End | None = _setting(None, "the end of the clip to take them from; default: first")
    clean_latents: Numbers | None = _setting(
        None,
        "[B, C, t, h, w] normalised latents (see `Cosmos3.encode_video`), instead of image or "
        "video: any frames of the video to be made, wherever they stand",
    )
    frame_mask: Mask | None = _setting(None, "bool [B, t], which of `clean_latents` are given")
    num_frames: int | None = _setting(None, "4k + 1; 1 is an image")
    size: str | int | tuple[int, int] | None = _setting(
        None,
        "256p, 480p, 704p, 720p, 768p or, for images, 1080p; or WIDTHxHEIGHT; instead of height "
        "and width",
    )
    aspect: str | None = _setting(
        None, "1:1, 4:3, 3:4, 16:9 or 9:16; default: the recipe's, or the nearest to the input's"
    )
    height: int | None = _setting(None, "pixels, a multiple of 16")
    width: int | None = _setting(None, "pixels, a multiple of 16")
    fps: float | None = _setting(None, "frames per second")
    num_inference_steps: int | None = _setting(None, "denoising steps, at least 1")
    guidance_scale: float | None = _setting(
        None, "1 skips the second branch, and with it the negative prompt"
    )
    flow_shift: float | None = _setting(None, "of the schedule, see `unipc.sigmas`")
    schedule: str | None = _setting(None, "of the noise levels, see `unipc.sigmas`")
    sigmas: Sequence[float] | None = _setting(
        None,
        "K + 1 noise levels falling to 0; they override steps, schedule, shift, speed and "
        "evaluations",
    )
    speed: Speed | None = _setting(
        None,
        "exact, the default, evaluates the model at every step; fast half as often, in half the "
        "time and not to the same result, see docs/fast.md",
    )
    evaluations: int | None = _setting(
        None, "of the model, from 1 to the number of steps: a finer choice than speed"
    )
    seed: int | Sequence[int] = _setting(
        42, "one seed (example b takes seed + b) or one for each prompt"
    )
    noise: Numbers | None = _setting(None, "[B, C, t, h, w] initial noise; overrides the seed")
    sound_noise: Numbers | None = _setting(
        None, "[B, C_sound, s] initial noise; overrides the seed"
    )
    sound: bool = _setting(False, "denoise sound along with the video")
    prompt_style: str = _setting("native", "see `prompt.resolve_prompts`")
    system_prompt: str | Literal[False] | None = _setting(
        None, "default: the style's; an empty text, or False, turns it off"
    )
    prompt_metadata: bool = _setting(
        True, "tell the model size, duration and rate along with the prompt, as the style does"
    )

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = _read(field.name, getattr(self, field.name), field.type.split(" | "))
            object.__setattr__(self, field.name, value)
            if isinstance(value, int | float) and field.name in limits.SETTINGS:
                limits.check_most(field.name, value)

    @property
    def mode(self) -> str:
        """One of `recipes.MODES`: what is made, and from what."""
        if self.num_frames == 1:
            return "text2image"
        if self.video is not None or self.clean_latents is not None:
            return "video2video"
        return "text2video" if self.image is None else "image2video"

    def filled(self, recipe: Recipe) -> Settings:
        """With the recipe's values where there are none; height and width say the size."""
        chosen = {
            field.name: getattr(recipe, field.name)
            for field in dataclasses.fields(recipe)
            if getattr(self, field.name) is None
        }
        return dataclasses.replace(self, **chosen | {"size": None, "aspect": None})


def _whole(value: Any) -> int:
    if isinstance(value, bool) or getattr(value, "ndim", 0):
        raise TypeError
    return operator.index(value)  # of bool arrays it fails by itself


def _wholes(values: Iterable[Any]) -> list[int]:
    """Those that a batch may have, and one more if there are more."""
    return [_whole(value) for value in itertools.islice(values, limits.BATCH + 1)]


def _number(value: Any) -> float:
    if isinstance(value, bool) or getattr(value, "ndim", 0):
        raise TypeError
    if isinstance(value, int | float):
        return value
    if hasattr(value, "dtype"):
        return _numbers(value).item()
    if not isinstance(value, numbers.Real | decimal.Decimal):
        raise TypeError
    return float(value)


def _array(value: Any, kinds: str) -> Any:
    import numpy as np

    dtype = getattr(value, "dtype", None)
    if not isinstance(dtype, np.dtype):  # a list, or another library's array
        if operator.length_hint(value) > LONGEST:
            raise TypeError
        value = np.asarray(value)
        dtype = value.dtype
    small = dtype.kind == "V" and dtype.name.startswith(("bfloat", "float"))  # NumPy has them not
    if dtype.kind not in kinds and not (small and "f" in kinds):
        raise TypeError
    return value


def _numbers(value: Any) -> Any:
    return _array(value, "fiu")


def _instance(kind: type) -> Callable[[Any], Any]:
    def read(value: Any) -> Any:
        if not isinstance(value, kind):
            raise TypeError
        return value

    return read


def _one_of(*allowed: Any) -> Callable[[Any], Any]:
    def read(value: Any) -> Any:
        if not any(value is one or (isinstance(one, str) and value == one) for one in allowed):
            raise TypeError
        return value

    return read


def _texts(value: Any) -> Any:
    if isinstance(value, str):
        return value
    texts = value if isinstance(value, list | tuple) else [*_ordered(value)]
    if not all(isinstance(text, str | None) for text in texts):
        raise TypeError
    return texts


def _ordered(value: Any) -> Any:
    if isinstance(value, str | bytes | Mapping | Set):
        raise TypeError
    return value


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        value = _array(value, "b")
        if value.ndim:
            raise TypeError
    return bool(value)


def _sequence(value: Any, length: int | None = None) -> Any:
    if length and len(value) != length:
        raise TypeError
    return _ordered(value)


def _levels(value: Any) -> Any:
    len(value)  # of one number it fails
    return _numbers(value)


def _frames(value: Any) -> Any:
    if isinstance(value, Mapping):  # those who read the media judge the rest
        raise TypeError
    return value


# Each word of the annotations above: what it is called in a message, and a function that gives the
# value as it is kept, or raises. Media are judged by those who read them.
_KINDS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "None": ("", _one_of(None)),
    "bool": ("True or False", _flag),
    "str": ("a text", _instance(str)),
    "int": ("a whole number", _whole),
    "float": ("a finite number", _number),
    "End": ('"first" or "last"', _one_of("first", "last")),
    "Speed": ('"exact" or "fast"', _one_of("exact", "fast")),
    "Literal[False]": ("False", _one_of(False)),
    "tuple[int, int]": ("two of them", lambda value: tuple(map(_whole, _sequence(value, 2)))),
    "Sequence[int]": ("one for each prompt", lambda value: _wholes(_sequence(value))),
    "Sequence[float]": ("a list of numbers", _levels),
    "Texts": ("a text or a list of texts", _texts),
    "Numbers": ("real numbers", _numbers),
    "Mask": ("bool, True where given", lambda value: _array(value, "b")),
    "Iterable[int]": ("whole numbers", _frames),
    "Images": ("", lambda value: value),
    "VideoSource": ("", lambda value: value),
}


def _read(name: str, value: Any, kinds: Sequence[str]) -> Any:
    """A setting as it is kept. Raises ValueError unless it is of one of these kinds."""
    if value is None and "None" in kinds:
        return None
    for kind in kinds:
        try:
            return _KINDS[kind][1](value)
        except Exception:  # of any kind, as the value is
            continue
    words = ", or ".join(filter(None, (_KINDS[kind][0] for kind in kinds)))
    if getattr(value, "ndim", 0):
        raise ValueError(f"{name} holds {getattr(value, 'dtype', None)}: give {words}")
    raise ValueError(f"{name}={limits.shown(value, 80)} must be {words}")


# What other libraries call a setting -> what it is here.
OTHER_NAMES = {
    "steps": "num_inference_steps", "cfg": "guidance_scale", "guidance": "guidance_scale",
    "frames": "num_frames", "negative": "negative_prompt", "generator": "seed",
    "shift": "flow_shift", "resolution": "size",
}  # fmt: skip


def read_settings(given: dict[str, Any]) -> Settings:
    """`Settings` of keyword arguments. Raises TypeError on another name, with the nearest one."""
    known = [field.name for field in dataclasses.fields(Settings)]
    for name in given.keys() - set(known):
        near = difflib.get_close_matches(name, known, 1)
        right = OTHER_NAMES.get(name) or (near[0] if near else None)
        hint = f": do you mean {right}?" if right else f"; there are {', '.join(known)}"
        raise TypeError(f"unexpected keyword argument {name!r}{hint}")
    return Settings(**given)


def help_of(name: str) -> str:
    """The help of one setting."""
    return Settings.__dataclass_fields__[name].metadata["help"]
