"""Initial noise from a NumPy archive."""

from pathlib import Path

import numpy as np


def load_noise(path: Path) -> dict[str, np.ndarray]:
    """`noise` and, if it is there, `sound_noise` of an npz file."""
    try:
        with np.load(path) as arrays:
            found = {name: arrays[name] for name in ("noise", "sound_noise") if name in arrays}
    except Exception as error:  # numpy, zipfile and zlib raise half a dozen kinds
        raise ValueError(f"--noise {path} cannot be read as an npz file: {error}") from error
    if "noise" not in found:
        raise ValueError(f"--noise {path} holds no array named noise")
    return found
