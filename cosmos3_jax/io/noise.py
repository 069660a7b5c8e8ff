"""Initial noise from a NumPy archive."""

import math
import zipfile
from pathlib import Path
from typing import IO

import numpy as np

from cosmos3_jax import guard

NAMES = ("noise", "sound_noise")
MOST_BYTES = 2**30  # of both arrays; 720p needs 33 MB of float32 a prompt


def load_noise(path: Path) -> dict[str, np.ndarray]:
    """`noise` and, if it is there, `sound_noise` of an npz file.

    Type and size are judged before anything is read.

    Raises:
        ValueError: it is no npz file, its arrays are no floats, are not finite or too large.
    """
    name = f"--noise {path}"
    try:
        guard.check_plain(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{name} cannot be read as an npz file: {error}") from error
    with guard.parsing(name, "an npz file"), zipfile.ZipFile(path) as archive:
        members = {each: f"{each}.npy" for each in NAMES if f"{each}.npy" in archive.namelist()}
        if "noise" not in members:
            raise ValueError(f"{name} holds no array named noise")
        size = sum(archive.getinfo(member).file_size for member in members.values())
        if size > MOST_BYTES:
            raise ValueError(f"{name} holds {size} bytes of noise, and {MOST_BYTES} is the limit")
        found = {}
        for each, member in members.items():
            with archive.open(member) as file:
                _check_header(f"{name} {each}", file)
            with archive.open(member) as file:
                found[each] = np.lib.format.read_array(file, allow_pickle=False)
    for each, values in found.items():
        if not np.isfinite(values).all():
            raise ValueError(f"{name}: {each} holds NaN or infinity; it should be standard normal")
    return found


def _check_header(name: str, file: IO[bytes]) -> None:
    """Raise ValueError unless an array is of floats, and no larger than the limit."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0
    shape, _, dtype = (read if version == (1, 0) else np.lib.format.read_array_header_2_0)(file)
    if dtype.kind != "f" or dtype.itemsize > 8:
        raise ValueError(f"{name} holds {dtype}: give floats, of standard normal distribution")
    if math.prod(shape) * dtype.itemsize > MOST_BYTES:
        raise ValueError(f"{name} has shape {shape}, and {MOST_BYTES} bytes are the limit")
