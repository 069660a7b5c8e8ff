"""Pictures, clips and sounds that several files write and read."""

import numpy as np

RATE = 48_000


def smooth_video(frames: int, height: int = 64, width: int = 96) -> np.ndarray:
    """Slowly moving colour waves, float32 [3, T, H, W] in [0, 1]."""
    t, y, x = np.meshgrid(np.arange(frames), np.arange(height), np.arange(width), indexing="ij")
    channels = [0.5 + 0.4 * np.sin((x + c * y) / 20 + t / 10 + c) for c in range(3)]
    return np.stack(channels).astype(np.float32)


def tones(samples: int, left: float = 440.0, right: float = 1000.0) -> np.ndarray:
    """A different sine in each channel, float32 [2, S]."""
    t = np.arange(samples) / RATE
    return np.stack([0.5 * np.sin(2 * np.pi * f * t) for f in (left, right)]).astype(np.float32)
