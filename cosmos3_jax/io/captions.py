"""Structured captions: the forms in which people and upsamplers write them, and their keys.

The generator was trained on captions as JSON objects, whose keys are in `caption_schema.json`.
"""

import difflib
import functools
import json
import re
import warnings
from pathlib import Path
from typing import Any

from cosmos3_jax import guard
from cosmos3_jax.config import read_json

# What an upsampler thinks aloud before it writes; the generator was not trained on it.
SCRATCHPAD = "scene_imagination"

# Keys of a record that change nothing, and those that say what a setting says, by the names of
# cosmos-framework, diffusers and this package.
_REMARKS = ("name", "extra")
_SETTINGS = (
    "model_mode", "vision_path", "seed", "num_frames", "fps", "duration", "resolution",
    "aspect_ratio", "height", "width", "size", "steps", "num_steps", "num_inference_steps",
    "guidance", "guidance_scale", "shift",
)  # fmt: skip
# Where other tools keep the text that a record has under `prompt`.
_OTHER_NAMES = ("caption", "caption_json", "text", "upsampled_prompt")

_SAME_RATE = 0.01  # 23.976 is 24, 24.4 is not
_SAME_ASPECT = 0.03  # 1280x704 and 832x480 are 16:9, 16:10 is not
_FENCE = re.compile(r"```((?i:json)|\w+(?=[ \t]*\r?\n))?")
_FOREIGN_FENCE = re.compile(r"(~~~|'''|\"\"\")(?:\s*json)?\s*[{\[]|\s*~~~", re.IGNORECASE)
_TAG = r"<%s(?:think|thinking|reasoning|answer|final_prompt)>"
_MARKUP = re.compile(rf"\A\s*{_TAG % ''}|{_TAG % '/'}", re.IGNORECASE)
_THOUGHT = re.compile(r".*</think(?:ing)?>\s*", re.IGNORECASE | re.DOTALL)


def parse_caption(text: str) -> dict[str, Any] | None:
    """The structured caption that `text` holds, or None: JSON arrays, numbers and strings are plain
    text.
    """
    value = _loads(text)
    return value if isinstance(value, dict) else None


def unwrap(text: str, name: str = "the prompt") -> tuple[str, str | None]:
    """The prompt that a text or a file holds, and its record's negative prompt (None: no such).

    | `text` | the prompt |
    |---|---|
    | plain text, a caption | as it is, byte for byte |
    | `{"prompt": ..., "negative_prompt": ...}`, an upsampler's record | the record's |
    | an array of one caption or record; a line of JSON lines | what it holds |
    | any of these between fences of three backticks, with or without `json` | what they enclose |
    | any JSON after `<think>...</think>` | as without the thoughts |
    | a caption with a `scene_imagination`, at any depth | without it, by `json.dumps` |

    `name` is what messages call the text. Raises ValueError for several prompts, for a fence that
    is not closed, not the whole text or not of backticks, for tags of an upsampler's answer that
    are not followed by JSON, and for a record with keys that are no settings. TypeError for what
    is no string.

    Warns about settings in a record, which are not read, and about text that looks like a caption
    and is no JSON, or JSON that is no caption: both are plain text to the model.
    """
    if not isinstance(text, str):
        advice = "; give a caption by json.dumps" if isinstance(text, dict) else ""
        raise TypeError(f"{name} is a {type(text).__name__}, not a string{advice}: {text!r:.80}")
    if text.startswith("\ufeff"):
        raise ValueError(f"{name} starts with a byte order mark; leave it out")
    try:
        return _unwrap(text, name)
    except RecursionError:
        raise ValueError(f"{name} is JSON that is nested too deeply for a caption") from None


def _unwrap(text: str, name: str) -> tuple[str, str | None]:
    text, is_json = _unfence(_after_thoughts(text, name), name)
    value = _loads(text)
    if value is None:
        lines = [_loads(line) for line in text.split("\n") if line.strip()]
        if len(lines) > 1 and _all_objects(lines):
            raise ValueError(f"{name} holds {len(lines)} prompts; give one")
        if is_json:
            raise ValueError(
                f"{name} is fenced as json and is no valid JSON; it may have been cut off"
            )
        if re.match(r"\s*\{\s*[\"']", text):
            warnings.warn(
                f"{name} looks like a JSON caption but is no valid JSON, so it is plain text to "
                "the model; write it with json.dumps",
                stacklevel=3,
            )
    if isinstance(value, list) and _all_objects(value):
        if len(value) != 1:
            raise ValueError(f"{name} holds {len(value)} prompts; give one")
        [value], text = value, text.strip()[1:-1].strip()
    if isinstance(value, list | str):
        kind = "a JSON array" if isinstance(value, list) else "a JSON string, in quotes,"
        warnings.warn(
            f"{name} is {kind} and no caption, so all of it is plain text to the model; give the "
            "text alone, or a caption, which is a JSON object",
            stacklevel=3,
        )
    if not isinstance(value, dict):
        return text, None
    if "prompt" in value:
        return _of_record(value, name)
    other = [key for key in _OTHER_NAMES if key in value]
    if other and not value.keys() & caption_schema()["properties"].keys():
        raise ValueError(f"{name} has its text under {other[0]!r}; a record has it under 'prompt'")
    if not value.keys() & caption_schema()["properties"].keys():
        warnings.warn(
            f"{name} is a JSON object with no key of a caption, which the model was not trained on",
            stacklevel=3,
        )
    kept = _without_scratchpad(value)
    return text if kept == value else json.dumps(kept), None


def contradictions(
    caption: dict[str, Any], made: dict[str, Any], seconds: float
) -> dict[str, tuple[Any, Any]]:
    """The fields of a caption that say something else than what is made: name -> (said, made).

    Args:
        caption: the user's.
        made: `duration` and `fps` (None for an image), `resolution`, `aspect_ratio`.
        seconds: how long it is; a duration may be it rounded either way.
    """
    return {
        name: (caption[name], value)
        for name, value in made.items()
        if caption.get(name) not in (None, "", 0, [], {})
        and (value is None or not _agree(name, caption[name], value, seconds))
    }


def _agree(name: str, said: Any, made: Any, seconds: float) -> bool:
    """Whether a field says what is made, in any spelling of it."""
    if name == "resolution" and isinstance(said, dict):
        return said == made
    numbers = [float(number) for number in re.findall(r"\d+(?:\.\d+)?", str(said))]
    if not 1 <= len(numbers) <= 3 or max(numbers) > 1e6:
        return False
    if name == "resolution":  # "1280x720", [1280, 720], "720p"
        return numbers in ([made["W"], made["H"]], [min(made.values())])
    if name == "aspect_ratio":  # "16:9"
        if len(numbers) != 2 or min(numbers) == 0:
            return False
        width, height = map(float, made.split(","))
        ratio = width / height
        return abs(numbers[0] / numbers[1] - ratio) <= _SAME_ASPECT * ratio
    if name == "fps":
        return len(numbers) == 1 and abs(numbers[0] - made) <= _SAME_RATE * made
    said_seconds = sum(60**i * number for i, number in enumerate(reversed(numbers)))  # "0:07"
    return abs(said_seconds - seconds) < 1


@functools.cache
def caption_schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of a caption, its keys in the order of training."""
    return read_json(Path(__file__).with_name("caption_schema.json"))


def check_caption(caption: dict[str, Any] | str) -> list[str]:
    """What is wrong with the keys of a structured caption, one sentence each; [] if nothing is.

    Args:
        caption: an object, or a text as prompts may be (see `unwrap`). The keys of what is made
            (`duration`, `fps`, `resolution`, `aspect_ratio`) may be missing: the native style
            writes them. One without any key of time is an image's.

    Raises:
        ValueError: on a text that holds no JSON object.
    """
    if isinstance(caption, str):
        parsed = parse_caption(unwrap(caption, "the caption")[0])
        if parsed is None:
            raise ValueError(f"the caption is no JSON object: {caption!r:.80}")
        caption = parsed
    try:
        return _check(_without_scratchpad(caption), caption_schema(), "")
    except RecursionError:
        return ["the caption is nested too deeply"]


def _check(value: Any, schema: dict[str, Any], path: str) -> list[str]:
    if "items" in schema and isinstance(value, list):
        return [
            problem
            for i, item in enumerate(value)
            for problem in _check(item, schema["items"], f"{path}[{i}]")
        ]
    kind = schema.get("type")
    if kind in ("object", "array") and not isinstance(value, dict if kind == "object" else list):
        return [f"{path} is {value!r:.40}, not an {kind}"]
    if "properties" not in schema:
        return []
    if not isinstance(value, dict):
        return [f"{path} is {value!r:.40}, not an object"]
    value = {str(key): item for key, item in value.items()}
    known, prefix = schema["properties"], f"{path}." if path else ""
    problems, meant = [], set(value)
    for key in value:
        if key in known:
            problems += _check(value[key], known[key], prefix + key)
            continue
        free = [name for name in known if name not in value]
        close = difflib.get_close_matches(key.lower(), free, n=1)
        if close:
            problems.append(f"{prefix}{key} is unknown: did you mean {close[0]}?")
            meant.add(close[0])
        elif schema.get("additionalProperties") is False:
            problems.append(f"{prefix}{key} is unknown")
    needed = [[key] for key in schema.get("required", [])]
    if "if" in schema and meant & set(_alternatives(schema["if"])):
        needed += [[key] for key in schema["then"]["required"]]
    if "anyOf" in schema:
        needed.append(_alternatives(schema))
    return problems + [
        f"{prefix}{' or '.join(keys)} is missing" for keys in needed if not meant & set(keys)
    ]


def _alternatives(schema: dict[str, Any]) -> list[str]:
    return [key for one in schema["anyOf"] for key in one["required"]]


def _loads(text: str) -> Any:
    """A JSON value; None for `null` and for what is no JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _all_objects(values: list[Any]) -> bool:
    return bool(values) and all(isinstance(value, dict) for value in values)


def _after_thoughts(text: str, name: str) -> str:
    """The JSON that follows what an upsampler thought; text without its tags as it is."""
    if _loads(text) is not None or not (tag := _MARKUP.search(text)):
        return text
    thought = _THOUGHT.match(text)
    answer = text[thought.end() if thought else 0 :].strip()
    if not _MARKUP.search(answer) and isinstance(_loads(_unfence(answer, name)[0]), dict | list):
        return answer
    raise ValueError(
        f"{name} holds {tag[0].strip()}, a tag of an upsampler's answer; give the caption alone"
    )


def _unfence(text: str, name: str) -> tuple[str, bool]:
    """What fences enclose, and whether they call it JSON; other text as it is."""
    stripped = text.strip()
    if foreign := _FOREIGN_FENCE.match(stripped):
        raise ValueError(
            f"{name} is fenced with {foreign[0].strip()[:3]}; a caption is fenced with three "
            "backticks, or not at all"
        )
    if not stripped.startswith("```"):
        if re.search(r"```(?:json)?\s*[{\[]", text, re.IGNORECASE):
            raise ValueError(f"{name} has text before its fenced caption; give the caption alone")
        return text, False
    opening = _FENCE.match(stripped)
    inner = stripped[opening.end() :] if opening else ""
    if opening is None or not inner.endswith("```"):
        raise ValueError(
            f"{name} does not end with the fence (three backticks) that it opens: it was cut off, "
            "or text follows the fence"
        )
    tag = opening[1]
    if tag and tag.lower() != "json":
        raise ValueError(f"{name} is fenced as {tag!r:.40}; a caption is fenced as json")
    return inner.removesuffix("```").strip(), tag is not None


def _of_record(record: dict[str, Any], name: str) -> tuple[str, str | None]:
    unknown = record.keys() - {"prompt", "negative_prompt", *_REMARKS, *_SETTINGS}
    if unknown:
        raise ValueError(
            f"{name} is a record with {guard.line(', '.join(sorted(unknown)))} beside its prompt, "
            "which are not read from there: give settings as options, and leave prompt and "
            "negative_prompt"
        )
    unread = [key for key in _SETTINGS if key in record]
    if unread:
        warnings.warn(
            f"{name} is a record that also holds {' and '.join(unread)}, which is not read: give "
            "frames, image or video, and all other settings, as options",
            stacklevel=3,
        )
    texts = {}
    for key in ("prompt", "negative_prompt"):
        text = record.get(key)
        texts[key] = json.dumps(text) if isinstance(text, dict) else text
        if not isinstance(texts[key], str) and (key == "prompt" or text is not None):
            raise ValueError(f"{name} is a record whose {key} is {text!r:.40}, not a text")
    prompt, inner_negative = unwrap(texts["prompt"], name)
    negative = texts["negative_prompt"]
    return prompt, inner_negative if negative is None else negative


def _without_scratchpad(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_scratchpad(one) for one in value]
    if isinstance(value, dict):
        return {key: _without_scratchpad(one) for key, one in value.items() if key != SCRATCHPAD}
    return value
