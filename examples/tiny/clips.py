"""Folders of clips: mp4 files, and scenes.json with the sentence and the scene of each.

Axes: T frames, H rows, W columns, S samples.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cosmos3_jax.io import media
from examples.tiny.scenes import Scene

SCENES_FILE = "scenes.json"


class StoredClip(NamedTuple):
    """A clip: uint8 [T, H, W, 3], frames a second, float32 [2, S], Hz, its scene and sentence."""

    video: np.ndarray
    fps: float
    sound: np.ndarray
    sample_rate: int
    scene: Scene
    sentence: str


def save_scenes(folder: Path, scenes: Sequence[Scene], sentences: Sequence[str]) -> list[Path]:
    """Write scenes.json; returns the paths that the mp4 files must have, in the same order."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{n:04d}.mp4" for n in range(len(scenes))]
    entries = [
        {"file": name, "sentence": text, "scene": dataclasses.asdict(scene)}
        for name, text, scene in zip(names, sentences, scenes, strict=True)
    ]
    media.write_text(folder / SCENES_FILE, json.dumps(entries, indent=1), overwrite=True)
    return [folder / name for name in names]


def read_folder(folder: Path, limit: int | None = None) -> list[StoredClip]:
    """The clips that scenes.json names, or the first `limit`. A file without sound is silent."""
    clips = []
    for entry in json.loads((Path(folder) / SCENES_FILE).read_text())[:limit]:
        path = Path(folder) / entry["file"]
        video, fps = media.read_video(path)
        sound, rate = np.zeros((1, 1), np.float32), 48_000
        if media.probe(path).channels:
            sound, rate = media.read_sound(path)
        sound = np.broadcast_to(sound, (2, sound.shape[1]))
        scene = Scene(**entry["scene"])
        clips.append(StoredClip(video, fps, sound, rate, scene, entry["sentence"]))
    return clips
