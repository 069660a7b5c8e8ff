"""What a record may hold, by type and range: a damaged or made-up one is refused by the field."""

import json
from collections.abc import Callable
from pathlib import PurePath
from typing import Any

from cosmos3_jax import limits

MOST = 2**53  # whole numbers that JSON, NumPy and JAX all know exactly


def parse_record(text: str, name: str, where: str = "in it") -> dict[str, Any]:
    """The record in a text.

    Args:
        text: JSON.
        name: of what was read, for errors.
        where: in it the text was.

    Raises:
        ValueError: it is no record, or a field cannot be what a record holds.
    """
    try:
        record = json.loads(text)
    except Exception:  # what is nested too deeply is more than a ValueError
        record = None
    if not isinstance(record, dict) or not {"prompt", "seed", "sigmas"} <= record.keys():
        raise ValueError(
            f"{name}: there is no record {where}; give the .json beside it, or a file that was "
            "written without --no-metadata"
        )
    for field, (accepts, words) in _FIELDS.items():
        if field in record and not accepts(record[field]):
            value = limits.shown(record[field], 60)
            raise ValueError(f"{name}: the record {where} is damaged: {field}={value}, not {words}")
    return record


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= MOST


def _number(value: Any) -> bool:
    whole_or_float = isinstance(value, int | float) and not isinstance(value, bool)
    return whole_or_float and -MOST <= value <= MOST


def _name(value: Any) -> bool:
    """Of a file or folder; not of whatever folder is at hand."""
    return _text(value) and "\0" not in value and PurePath(value).name not in ("", ".", "..")


def _file(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and _name(value.get("path"))
        and _or_none(_text)(value.get("sha256"))
    )


def _lora(value: Any) -> bool:
    return _file(value) and _number(value.get("factor"))


def _digests(value: Any) -> bool:
    if not isinstance(value, dict) or not _or_none(_text)(value.get("revision")):
        return False
    files = value.get("files")
    return isinstance(files, dict) and all(isinstance(each, dict) for each in files.values())


def _or_none(accepts: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or accepts(value)


def _each(accepts: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: (
        isinstance(value, list) and len(value) <= 10_000 and all(map(accepts, value))
    )


def _texts(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_text, value.values()))


_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "checkpoint": (_name, "the name of a folder or a Hub id"),
    "checkpoint_files": (_digests, "digests of files"),
    "lora": (_each(_lora), "a list of files with factors"),
    "prompt": (_text, "a text"),
    "negative_prompt": (_or_none(_text), "a text"),
    "system_prompt": (lambda value: value in (None, False) or _text(value), "a text or false"),
    "prompt_style": (_text, "a text"),
    "prompt_metadata": (lambda value: isinstance(value, bool), "true or false"),
    "image": (_or_none(_file), "a file"),
    "video": (_or_none(_file), "a file"),
    "num_frames": (_whole, "a whole number"),
    "height": (_whole, "a whole number"),
    "width": (_whole, "a whole number"),
    "fps": (_number, "a number"),
    "sound_frames": (_whole, "a whole number"),
    "seed": (_whole, "a whole number"),
    "noise": (_or_none(_name), "a file"),
    "noise_sha256": (_or_none(_text), "a digest"),
    "condition_frames": (_each(_whole), "a list of whole numbers"),
    "keep": (lambda value: value in (None, "first", "last"), "first or last"),
    "num_inference_steps": (_whole, "a whole number"),
    "evaluations": (_whole, "a whole number"),
    "speed": (lambda value: value in ("exact", "fast"), "exact or fast"),
    "guidance_scale": (_number, "a number"),
    "flow_shift": (_or_none(_number), "a number"),
    "schedule": (_or_none(_text), "a text"),
    "sigmas": (lambda value: _each(_number)(value) and len(value) > 1, "a list of noise levels"),
    "steps_per_program": (_whole, "a whole number"),
    "dtype": (lambda value: value in ("bfloat16", "float32"), "bfloat16 or float32"),
    "mesh": (lambda value: isinstance(value, dict) and all(map(_whole, value.values())), "sizes"),
    "versions": (_texts, "versions of packages"),
}
