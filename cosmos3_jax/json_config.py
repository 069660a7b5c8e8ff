"""Dataclasses that are read by name from JSON files, with checks of types and ranges."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, Self, get_args, get_origin

from cosmos3_jax import guard, limits


class ConfigError(ValueError):
    """A configuration is unreadable, impossible, or asks for what is not implemented."""


def check(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _check_value(name: str, value: Any, kind: Any, least: float | None, most: float | None) -> None:
    """Raise unless `value` is of the declared type `kind`, and no number in it is too small or too
    large, as float32.

    `least` is the smallest number that is accepted; None stands for any positive one. `most` is the
    largest; None stands for `limits.DIMENSION` of whole numbers, and any finite one of others.
    JSON has one kind of number, so an integer will do for a float; true and false are not numbers.
    """
    found = f"{name}={limits.shown(value)}"
    if isinstance(kind, UnionType):  # X | None
        if value is not None:
            _check_value(name, value, get_args(kind)[0], least, most)
    elif get_origin(kind) is tuple:
        check(isinstance(value, tuple), f"{found} must be a tuple (in JSON: a list)")
        check(
            len(value) <= limits.ENTRIES,
            f"{name} has {len(value)} entries, and at most {limits.ENTRIES} are read",
        )
        for i, entry in enumerate(value):
            _check_value(f"{name}[{i}]", entry, get_args(kind)[0], least, most)
    elif kind is bool:
        check(isinstance(value, bool), f"{found} must be true or false")
    elif kind is str:
        check(isinstance(value, str), f"{found} must be a string")
        check(
            len(value) <= limits.LETTERS,
            f"{name} has {len(value)} letters, and at most {limits.LETTERS} are read",
        )
    elif kind in (int, float):
        number = isinstance(value, (int, kind)) and not isinstance(value, bool)
        check(number, f"{found} must be {'an integer' if kind is int else 'a number'}")
        check(abs(value) <= limits.LARGEST_FLOAT, f"{found} must be finite, as float32 too")
        if least is None:
            check(value > 0, f"{found} must be positive")
            check(value >= limits.SMALLEST_FLOAT, f"{found} must be positive, as float32 too")
        else:
            check(value >= least, f"{found} must be at least {least}")
        if most is None and kind is int:
            most = limits.DIMENSION
        if most is not None:
            check(abs(value) <= most, f"{found} must be at most {most:.10g}")


def only(value: Any) -> Any:
    """A field of which this one value is implemented; any other is refused when it is read."""
    return dataclasses.field(default=value, metadata={"only": value})


@dataclasses.dataclass(frozen=True)
class JsonConfig:
    """Reads the fields that it declares from a JSON object, and ignores the rest."""

    # The smallest numbers that some fields accept; those of every other field must be positive.
    _least: ClassVar[Mapping[str, float]] = {}
    # The largest ones that some fields accept, see `_check_value`.
    _most: ClassVar[Mapping[str, float]] = {}

    def __post_init__(self):
        fields = [(field, getattr(self, field.name)) for field in dataclasses.fields(self)]
        for field, value in fields:
            least, most = (of.get(field.name) for of in (self._least, self._most))
            _check_value(field.name, value, field.type, least, most)
        for field, value in fields:
            only = field.metadata.get("only", value)
            check(
                value == only,
                f"{field.name}={limits.shown(value)} is not supported; only {only!r} is",
            )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Build from a parsed JSON object, lists as tuples; ConfigError for impossible values."""
        known = {field.name for field in dataclasses.fields(cls)}
        chosen = {
            k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in known
        }
        return cls(**chosen)

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """Build from a JSON file. Raises ConfigError, naming the file, if it cannot be read."""
        values = read_json(path)
        with guard.parsing(path, "a configuration", ConfigError):
            try:
                return cls.from_dict(values)
            except ConfigError as error:
                raise ConfigError(f"{path}: {error}") from error


def read_json(path: str | Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises ConfigError if there is none."""
    try:
        content = guard.read(path, error=ConfigError)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    with guard.parsing(path, "valid JSON", ConfigError):
        values = json.loads(content.decode("utf-8"))
        json.dumps(values, ensure_ascii=False).encode("utf-8")  # half a letter (\ud800) is no text
    check(isinstance(values, dict), f"{path} holds a {type(values).__name__}, not a JSON object")
    return values
