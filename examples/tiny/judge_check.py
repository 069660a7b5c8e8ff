"""How well the judge itself does: true clips of the 200 held-out sentences, clean and damaged.

    python -m examples.tiny.judge_check [--count 200] [--damage none|mp4|blur|coarse|noise|sound]
                                          (or all of them in turn: --damage all)

A judge that misreads what is really there cannot measure a model.

Axes: T frames, H rows, W columns, C channels, S samples.
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from scipy import ndimage

from cosmos3_jax.io import media
from examples.tiny import grammar, world
from examples.tiny.judge import Verdict, judge, markdown, score
from examples.tiny.scenes import Scene

BATCH = 8
Clip = tuple[np.ndarray, np.ndarray]


def true_clips(scenes: list[Scene]) -> Iterator[Clip]:
    """Videos float32 [T, H, W, 3] and sounds float32 [2, S], rendered a few at a time."""
    for start in range(0, len(scenes), BATCH):
        chosen = scenes[start : start + BATCH]
        padded = chosen + chosen[-1:] * (BATCH - len(chosen))  # one compiled program for all
        videos, sounds = map(np.asarray, world.render_batch(world.stack(padded)))
        yield from list(zip(videos, sounds, strict=True))[: len(chosen)]


def blur(video: np.ndarray, sound: np.ndarray, rng: np.random.Generator) -> Clip:
    """Out of focus by 1.5 pixels."""
    return ndimage.gaussian_filter(video, (0, 1.5, 1.5, 0)), sound


def coarse(video: np.ndarray, sound: np.ndarray, rng: np.random.Generator) -> Clip:
    """A quarter of the resolution, and back."""
    frames, size = video.shape[:2]
    small = video.reshape(frames, size // 4, 4, size // 4, 4, 3).mean((2, 4))
    rows = np.clip((np.arange(size) + 0.5) / 4 - 0.5, 0, size // 4 - 1)
    low = np.minimum(rows.astype(int), size // 4 - 2)
    part = (rows - low).astype(np.float32)
    small = small[:, low] * (1 - part)[:, None, None] + small[:, low + 1] * part[:, None, None]
    return small[:, :, low] * (1 - part)[:, None] + small[:, :, low + 1] * part[:, None], sound


def noise(video: np.ndarray, sound: np.ndarray, rng: np.random.Generator) -> Clip:
    """A twentieth of the range on every pixel."""
    grain = rng.normal(0, 0.05, video.shape).astype(np.float32)
    return np.clip(video + grain, 0, 1), sound


def spoilt_sound(video: np.ndarray, sound: np.ndarray, rng: np.random.Generator) -> Clip:
    """An envelope known only every 40 ms, as the sound's latents are, and hiss 30 dB below."""
    step, samples = 120, sound.shape[1]
    count = samples // step
    level = np.sqrt(np.square(sound[:, : count * step]).reshape(2, count, step).mean((0, 2)))
    blocks = np.sqrt(np.square(level[: count // 16 * 16]).reshape(-1, 16).mean(1))
    wanted = np.interp(np.arange(samples), (np.arange(len(blocks)) + 0.5) * step * 16, blocks)
    present = np.interp(np.arange(samples), (np.arange(count) + 0.5) * step, level)
    sound = sound * np.minimum(wanted / np.maximum(present, 1e-3), 4)
    power = np.square(sound[:, np.abs(sound).max(0) > 0.01]).mean() if sound.any() else 0.04
    hiss = rng.normal(0, np.sqrt(power * 10**-3), sound.shape)
    return video, np.clip(sound + hiss, -1, 1).astype(np.float32)


def mp4(video: np.ndarray, sound: np.ndarray, rng: np.random.Generator) -> Clip:
    """Through a file, h264 and AAC."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        clip = {"video": np.moveaxis(video, -1, 0), "sound": sound, "sample_rate": 48_000}
        media.save_mp4(clip, path)
        return media.read_video(path)[0], media.read_sound(path)[0]


def every(video: np.ndarray, sound: np.ndarray, rng: np.random.Generator) -> Clip:
    """All of them, one after the other."""
    for damage in (blur, coarse, noise, spoilt_sound, mp4):
        video, sound = damage(video, sound, rng)
    return video, sound


DAMAGES = {
    "none": lambda video, sound, rng: (video, sound),
    "mp4": mp4, "blur": blur, "coarse": coarse, "noise": noise, "sound": spoilt_sound,
    "all": every,
}  # fmt: skip


def verdicts(scenes: list[Scene], damage: str = "none", seed: int = 0) -> list[Verdict]:
    """The judge on true clips, after one of DAMAGES."""
    rng = np.random.default_rng(seed)
    return [judge(*DAMAGES[damage](*clip, rng)) for clip in true_clips(scenes)]


def main() -> None:
    parser = argparse.ArgumentParser(description="Judge true clips of the tiny world.")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--damage", choices=DAMAGES, default="none")
    args = parser.parse_args()
    scenes = [scene for scene, _ in grammar.held_out_sentences(args.count)]
    print(markdown(score(scenes, verdicts(scenes, args.damage))), end="")


if __name__ == "__main__":
    main()
