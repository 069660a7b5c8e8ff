"""Images and clips that a video of the small checkpoint starts from."""

import numpy as np
from oracle import SETTINGS
from PIL import Image

HEIGHT, WIDTH = SETTINGS["height"], SETTINGS["width"]


def picture(height: int, width: int, seed: int = 0, channels: int = 3) -> np.ndarray:
    """uint8 [height, width, channels]: waves with noise on them, so that every pixel counts."""
    rng = np.random.RandomState(seed)
    y, x = np.mgrid[: height / 20 : height * 1j, : width / 20 : width * 1j]
    waves = np.stack([np.sin(x + k) * np.cos(y - k + seed) for k in range(channels)], axis=-1)
    return np.uint8(np.clip(128 + 80 * waves + rng.normal(0, 20, waves.shape), 0, 255))


def save(image: np.ndarray, path):
    Image.fromarray(image).save(path)
    return path


CLIP = np.stack([picture(HEIGHT, WIDTH, seed) for seed in range(12)])
ONE, LATENTS = picture(60, 60), np.zeros((1, 6, 3, 3, 5), np.float32)
