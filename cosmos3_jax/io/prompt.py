"""Captions and their metadata, as texts and as token ids.

The reference implementations turn the same words into different tokens, and at guidance 6 that
outweighs any rounding. Each set of choices is a named style: `native` (cosmos-framework, the
model's own), `phyai` (PhyAI), `diffusers` (`Cosmos3OmniPipeline.tokenize_prompt` of diffusers
0.42.1, whose ids the tests reproduce).

Axes: B prompts, S tokens (padded).
"""

import dataclasses
import functools
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cosmos3_jax import guard, limits
from cosmos3_jax.config import read_json
from cosmos3_jax.io.captions import contradictions, parse_caption, unwrap
from cosmos3_jax.models.tokenizer import Tokenizer
from cosmos3_jax.recipes import nearest_aspect

PROMPT_STYLES = ("native", "phyai", "diffusers")

# "give" is what the model was trained with; corrected spelling would be other tokens.
SYSTEM_PROMPT = "You are a helpful assistant who will generate {medium}s from a give prompt."


@dataclasses.dataclass(frozen=True)
class ResolvedPrompt:
    """The exact texts that go into the chat template. `system_prompt` None: no system turn."""

    prompt: str
    negative_prompt: str
    system_prompt: str | None
    style: str


@dataclasses.dataclass(frozen=True)
class _Metadata:
    """What a caption says about the clip: frames, pixels, frames per second."""

    num_frames: int
    height: int
    width: int
    fps: float

    def __post_init__(self):
        for name in ("num_frames", "height", "width"):
            value = getattr(self, name)
            if not isinstance(value, (int, np.integer)) or value < 1:
                raise ValueError(f"{name}={value!r} must be a positive whole number")
        if not 0 < self.fps < float("inf"):
            raise ValueError(
                f"fps={self.fps!r} must be positive and finite; the model's own rate is 24"
            )

    @property
    def medium(self) -> str:
        return "image" if self.num_frames == 1 else "video"

    @property
    def seconds(self) -> float:
        return self.num_frames / self.fps

    def sentences(self, negated: bool = False, medium: str | None = None) -> list[str]:
        """Duration (videos only), then resolution."""
        verb = "is not" if negated else "is"
        size = f"This {medium or self.medium} {verb} of {self.height}x{self.width} resolution."
        if self.medium == "image":
            return [size]
        return [
            f"The video {verb} {self.seconds:.1f} seconds long and {verb} of {self.fps:.0f} FPS.",
            size,
        ]

    def fields(self, aspect_ratio: str | None) -> dict[str, Any]:
        """The same as fields of a caption. An image lasts no time: its duration and fps are
        None.
        """
        video = self.medium == "video"
        return {
            "duration": f"{int(self.seconds)}s" if video else None,
            "fps": self.fps if video else None,
            "resolution": {"H": int(self.height), "W": int(self.width)},
            "aspect_ratio": aspect_ratio or nearest_aspect(self.width, self.height),
        }


def _inject(caption: Mapping[str, Any], fields: Mapping[str, Any]) -> str:
    """`caption` as JSON text with `fields`; those present keep their place, and None takes one
    out.
    """
    absent = [name for name, value in fields.items() if value is None]
    return json.dumps(
        {key: value for key, value in {**caption, **fields}.items() if key not in absent}
    )


def resolve_prompts(
    prompt: str,
    negative_prompt: str | None,
    *,
    style: str,
    num_frames: int,
    height: int,
    width: int,
    fps: float,
    system_prompt: str | Literal[False] | None = None,
    aspect_ratio: str | None = None,
    metadata: bool = True,
) -> ResolvedPrompt:
    """Add a style's metadata to a prompt and its negative.

    | | native | phyai | diffusers |
    |---|---|---|---|
    | `prompt`: text | + sentences | + sentences, of a "video" always | + sentences |
    | `prompt`: JSON object | fields injected | fields injected | + sentences |
    | `aspect_ratio` None | the nearest of `recipes.ASPECTS` | no such field | not used |
    | `negative_prompt` | + sentences | unchanged | + negated sentences |
    | `negative_prompt` None | means the built-in | means the built-in | means "" |
    | `system_prompt` None | no system turn | no system turn | SYSTEM_PROMPT |

    A negative is never parsed as JSON: sentences follow its closing brace. What is appended to an
    empty text stands alone, except in the native and PhyAI positive prompt: ". The video is ...",
    as they have it. Fields of the user's caption are replaced. Where they contradict what is made,
    one warning names them.

    `num_frames` (1: an image), `height`, `width` in pixels and `fps` are the request's own,
    unrounded; `system_prompt` False or "" turns the system turn off; `aspect_ratio` is written
    "16,9"; without `metadata` both texts stay as they are. Raises ValueError for an unknown style,
    an impossible size or rate, or invalid Unicode; TypeError for a prompt that is no string.
    """
    if style not in PROMPT_STYLES:
        raise ValueError(
            f"prompt style {style!r} is unknown; choose one of {', '.join(PROMPT_STYLES)}"
        )
    if system_prompt is False:
        system_prompt = ""
    texts = {"prompt": prompt, "negative_prompt": negative_prompt, "system_prompt": system_prompt}
    for name, text in texts.items():
        if text is not None or name == "prompt":
            _check_text(name, text)
    made = _Metadata(num_frames, height, width, float(fps))
    if style == "diffusers" and system_prompt is None:
        system_prompt = SYSTEM_PROMPT.format(medium=made.medium)
    if negative_prompt is None:
        negative_prompt = "" if style == "diffusers" else built_in_negative_prompt()

    caption, fields, written = parse_caption(prompt), made.fields(aspect_ratio), {}
    if metadata and style != "diffusers":
        kept = "aspect_ratio" if style == "phyai" and not aspect_ratio else None
        written = {name: value for name, value in fields.items() if name != kept}
    if caption is not None:
        _warn_of_contradictions(contradictions(caption, fields, made.seconds), written)

    positive, negative = prompt, negative_prompt
    if metadata and style == "diffusers":
        positive = _append(prompt, made.sentences())
        negative = _append(negative, made.sentences(negated=True))
    elif metadata:
        if caption is None:
            medium = "video" if style == "phyai" else None
            positive = _append_stripped(prompt, made.sentences(medium=medium))
        else:
            positive = _inject(caption, written)
        if style == "native":  # which takes the separator off the front of a negative again
            negative = _append_stripped(negative, made.sentences()).lstrip(".").strip()
    return ResolvedPrompt(positive, negative, system_prompt or None, style)


def _warn_of_contradictions(
    found: Mapping[str, tuple[Any, Any]], written: Mapping[str, Any]
) -> None:
    if not found:
        return
    fields = []
    for name, (said, made) in found.items():
        truth = "an image has none" if made is None else json.dumps(made)
        fate = "is replaced by" if made is not None else "is left out:"
        fate = fate if name in written else "stays, though not true:"
        fields.append(f"{name} {guard.line(json.dumps(said))} {fate} {truth}")
    warnings.warn(f"the caption contradicts what is made: {'; '.join(fields)}", stacklevel=3)


def _append(text: str, sentences: list[str]) -> str:
    """diffusers' join: only trailing dots go, so "a cat. " keeps its dot and its space."""
    for sentence in sentences:
        text = text.rstrip(".")
        text = f"{text}. {sentence}" if text else sentence
    return text


def _append_stripped(text: str, sentences: list[str]) -> str:
    """cosmos-framework's and PhyAI's join: white space at both ends goes first, then trailing
    dots.
    """
    for sentence in sentences:
        text = text.strip().rstrip(".") + ". " + sentence
    return text


@functools.cache
def built_in_negative_prompt() -> str:
    """The negative where the caller gives None: unwanted qualities, as a structured caption of our
    own.

    It is not NVIDIA's `neg_prompts.json`; to compare with a reference, pass both the same negative.
    """
    return json.dumps(read_json(Path(__file__).with_name("negative_prompt.json")))


def read_prompt(path: str | Path) -> str:
    """The text of a prompt file, unchanged: no stripping, no newline conversion.

    It may be plain, a caption, or an upsampler's record (see `captions.unwrap`, which `prepare`
    applies); and a pipe, such as `/dev/stdin`. Raises FileNotFoundError, or ValueError if the file
    is not UTF-8, starts with a byte order mark, is empty, has more than `limits.LETTERS`, holds
    several prompts, or is named `.json` or `.jsonl` and holds no JSON object: each would silently
    become another prompt.
    """
    path, name = Path(path), f"prompt file {path}"
    content = guard.read(path, 4 * limits.LETTERS, pipes=True)  # bytes of the longest letters
    try:
        text = content.decode("utf-8")  # newlines are not converted
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 ({error}); save it as UTF-8") from error
    if text.startswith("\ufeff"):
        raise ValueError(f"{name} starts with a byte order mark; save it as UTF-8 without one")
    if not text.strip():
        raise ValueError(f'{name} is empty; for an empty prompt pass "" instead of a file')
    limits.check_most(f"letters of {name}", len(text), limits.LETTERS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # `prepare` gives them
        prompt, _ = unwrap(text, name)
    named_json = path.suffix.lower() in (".json", ".jsonl")
    if named_json and prompt == text and parse_caption(text) is None:
        raise ValueError(f"{name} holds no JSON object; a plain prompt belongs in a .txt file")
    return text


def encode_prompts(tokenizer: Tokenizer, resolved: ResolvedPrompt) -> tuple[list[int], list[int]]:
    """Token ids of the prompt and of its negative. Their lengths differ."""
    encode = functools.partial(tokenizer.encode_chat, system_prompt=resolved.system_prompt)
    return encode(resolved.prompt), encode(resolved.negative_prompt)


def pad_token_ids(id_lists: Sequence[Sequence[int]], bucket: int) -> tuple[np.ndarray, np.ndarray]:
    """A batch of prompts: ids int32 [B, S], and mask bool [B, S] that is True at real tokens.

    S is the longest length rounded up to a multiple of `bucket`, so prompts of similar lengths
    share one compiled program. Padding is on the right, id 0. Raises ValueError without prompts or
    for an empty one.
    """
    lengths = [len(ids) for ids in id_lists]
    if min(lengths, default=0) == 0 or bucket < 1:
        raise ValueError(
            f"prompt lengths {lengths} and bucket={bucket}: each must be at least 1 token"
        )
    padded_length = -(-max(lengths) // bucket) * bucket
    mask = np.arange(padded_length) < np.array(lengths)[:, None]
    ids = np.zeros(mask.shape, np.int32)
    ids[mask] = np.concatenate([np.asarray(row, np.int32) for row in id_lists])
    return ids, mask


def _check_text(name: str, text: object) -> None:
    if not isinstance(text, str):
        raise TypeError(f"{name} is a {type(text).__name__}, not a string: {text!r:.80}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} is not valid Unicode ({error}); decode its source as UTF-8"
        ) from error
