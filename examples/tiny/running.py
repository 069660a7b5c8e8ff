"""What the training commands share: options from a dataclass, and a log of JSON lines."""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any


def add_options(parser: argparse.ArgumentParser, kind: type) -> None:
    """An option for each field of a dataclass that has a default."""
    for field in dataclasses.fields(kind):
        name = f"--{field.name.replace('_', '-')}"
        if isinstance(field.default, bool):
            parser.add_argument(name, action=argparse.BooleanOptionalAction, default=field.default)
        elif field.default is not dataclasses.MISSING:
            parser.add_argument(name, type=type(field.default), default=field.default)


def chosen(kind: type, args: argparse.Namespace, **others) -> Any:
    """The dataclass of `add_options` from parsed arguments; `others` are its further fields."""
    names = {field.name for field in dataclasses.fields(kind)} - others.keys()
    return kind(**{name: getattr(args, name) for name in names}, **others)


def log_line(path: Path, values: dict) -> None:
    """Print values as a line of JSON, and append it to a file."""
    line = json.dumps(values)
    print(line, flush=True)
    with path.open("a") as file:
        file.write(line + "\n")
