"""All that reaches a generation, by name: processes that work together must have it in common."""

import argparse
import dataclasses
import functools
import hashlib
import os
import re
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cosmos3_jax.checkpoint import digests
from cosmos3_jax.cli.record import RUN, Record, parse_lora
from cosmos3_jax.sampling.request import Request

# The only option that each process has its own of, and what the parser adds.
NO_SETTINGS = ("process_id", "parser")
OUTPUTS = ("out", "save_latents")
FOLDERS = ("checkpoint",)  # which the record has digests of
# Of JAX's settings, those that are the process's own.
OF_A_PROCESS = (
    "cache", "visible_devices", "default_device", "address", "num_cpu", "mock_", "log", "dump",
    "profil",
)  # fmt: skip
# Of the environment, what libraries below JAX read.
VARIABLES = ("NVIDIA_TF32", "CUBLAS", "CUDNN", "LIBTPU")
DISTRIBUTION = "cosmos3-jax"


def everything(options: argparse.Namespace, record: Record, request: Request) -> dict[str, Any]:
    """What one process was told, for `distributed.check_alike`.

    Nothing is chosen by hand: every option of the parser, the content of every file that one names,
    all of the record but the processor and the run, every array of the request, every package that
    this one requires or that drives a device, and every setting of JAX's and XLA's.
    """
    said: dict[str, Any] = {}
    for name, value in vars(options).items():
        if name in NO_SETTINGS:
            continue
        flag = f"--{name.replace('_', '-')}"
        said[flag] = str(value)
        if name not in (*OUTPUTS, *FOLDERS):
            said |= {f"the content of {flag} {path}": digests.of_lora(path) for path in read(value)}
    said |= settled(record)
    for field in dataclasses.fields(request):
        leaves = jax.tree.leaves(getattr(request, field.name))
        said[f"the request's {field.name}"] = [
            hashlib.sha256(np.asarray(leaf).tobytes()).hexdigest() for leaf in leaves
        ]
    flags = os.environ.get("XLA_FLAGS", "").split()
    own = ("device_count", "dump", "profil")
    said["XLA_FLAGS"] = sorted(flag for flag in flags if not any(part in flag for part in own))
    said |= {name: text for name, text in os.environ.items() if name.startswith(VARIABLES)}
    said |= {
        name: str(value)
        for name, value in jax.config.values.items()
        if not any(own in name for own in OF_A_PROCESS)
    }
    return said | {f"the package {name}": version for name, version in _packages().items()}


def settled(record: Record) -> dict[str, Any]:
    """What decides the bits that are made: the record but for the run, one level of names."""
    said: dict[str, Any] = {}
    for name, value in record.items():
        if name in ("versions", "checkpoint_files"):
            inside = value if name == "versions" else value["files"]
            said |= {f"{name} of {inner}": text for inner, text in inside.items()}
        elif name not in (*RUN, "cpu"):
            said[name] = value
    return said


def read(value: Any) -> Iterator[Path]:
    """The files that an option names, if they are there. Folders are in the record."""
    for each in value if isinstance(value, list) else [value]:
        if isinstance(each, str | Path):
            path = parse_lora(str(each))[0]
            try:
                if path.is_file():
                    yield path
            except (OSError, ValueError):  # a text that is no name of a file
                continue


@functools.cache
def _packages() -> dict[str, str]:
    """What this package requires, and what drives the devices; of itself its source."""
    try:
        lines = [line for line in metadata.requires(DISTRIBUTION) or [] if "extra ==" not in line]
    except metadata.PackageNotFoundError:  # run from its source alone
        lines = []
    required = {_plain(re.match(r"[\w.-]+", line)[0]) for line in lines}
    found = {}
    for package in metadata.distributions():
        name = _plain(package.metadata["Name"] or "")
        if name in required or name.startswith(("jax", "nvidia")):
            found[name] = package.version
    digest = hashlib.sha256()
    root = Path(__file__).parents[1]
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return found | {"cosmos3_jax's source": digest.hexdigest()}


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
