"""How far one clip is from another: latents, pictures, sound, and what the judge of `tiny` says.

NumPy and SciPy on the host, so that other processes can measure while a device goes on.

Axes: B clips, T frames, H rows, W columns, C channels, S samples.
"""

import importlib.util
import math
import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from scipy import ndimage, signal

from examples.tiny import judge as jd
from examples.tiny.scenes import Scene

MOST_PSNR = 100.0  # dB, of pictures that do not differ
LUMA = np.array([0.299, 0.587, 0.114], np.float32)
SSIM_SIGMA, SSIM_RADIUS, SSIM_K = 1.5, 5, (0.01, 0.03)
# Samples of each transform, its hop and its window.
RESOLUTIONS = ((1024, 120, 600), (2048, 240, 1200), (512, 50, 240))
LEAST_POWER = 1e-8
Z = 1.96  # 95%
# Which end is the worst, of each measure of a pair of clips.
WORST: dict[str, Callable] = {
    "latents": max, "sound_latents": max, "psnr_db": min, "ssim": min, "flicker": max,
    "spectral": max, "lpips": max,
}  # fmt: skip
Marks = dict[str, bool | None]


class Clip(NamedTuple):
    """uint8 [T, H, W, 3], and float [C, S] or None."""

    video: np.ndarray
    sound: np.ndarray | None = None


def relative_l2(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """|b - a| / |a| of each clip; [B, ...] -> [B]."""
    a, b = (np.asarray(x, np.float64).reshape(len(x), -1) for x in (a, b))
    return np.linalg.norm(b - a, axis=1) / np.maximum(np.linalg.norm(a, axis=1), 1e-12)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Of the mean squared error of all frames and colours, in dB, at most `MOST_PSNR`."""
    squares = [np.mean(np.square(x.astype(np.float32) - y)) for x, y in zip(a, b, strict=True)]
    return min(MOST_PSNR, 10 * math.log10(255**2 / max(float(np.mean(squares)), 1e-9)))


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Mean structural similarity of the luma (Wang et al., 2004): a Gaussian window of 11 x 11,
    sigma 1.5, wherever it lies within the picture; the mean over frames.

    Raises ValueError if a picture is smaller than the window.
    """
    if min(a.shape[1:3]) <= 2 * SSIM_RADIUS:
        raise ValueError(f"pictures of {a.shape[1:3]} are smaller than the window of SSIM")
    return float(np.mean([_ssim_of_frame(x @ LUMA, y @ LUMA) for x, y in zip(a, b, strict=True)]))


def _ssim_of_frame(x: np.ndarray, y: np.ndarray) -> float:
    window = np.exp(-0.5 * np.square(np.arange(-SSIM_RADIUS, SSIM_RADIUS + 1) / SSIM_SIGMA))
    window /= window.sum()
    inside = slice(SSIM_RADIUS, -SSIM_RADIUS)

    def blur(image: np.ndarray) -> np.ndarray:
        rows = ndimage.correlate1d(image, window, 0)
        return ndimage.correlate1d(rows, window, 1)[inside, inside]

    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = ((k * 255) ** 2 for k in SSIM_K)
    alike = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return float(np.mean(alike / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))))


def flicker(video: np.ndarray) -> float:
    """The largest change from a frame to the next: mean absolute difference, in [0, 1]."""
    pairs = zip(video[:-1], video[1:], strict=True)
    changes = [np.mean(np.abs(y.astype(np.float32) - x)) for x, y in pairs]
    return float(max(changes, default=0.0)) / 255


def spectral_distance(a: np.ndarray, b: np.ndarray) -> float:
    """The multi-resolution STFT distance of Parallel WaveGAN (Yamamoto et al., 2020): spectral
    convergence plus the mean absolute difference of log magnitudes, the mean of three resolutions.
    """
    return float(np.mean([_stft_distance(a, b, *resolution) for resolution in RESOLUTIONS]))


def _stft_distance(a: np.ndarray, b: np.ndarray, size: int, hop: int, width: int) -> float:
    window = signal.get_window("hann", width)
    window = np.pad(window, (size - width) // 2).astype(np.float32)

    def magnitudes(sound: np.ndarray) -> np.ndarray:
        padded = np.pad(np.asarray(sound, np.float32), ((0, 0), (size // 2, size // 2)), "reflect")
        pieces = np.lib.stride_tricks.sliding_window_view(padded, size, 1)[:, ::hop]
        power = np.square(np.abs(np.fft.rfft(pieces * window)))
        return np.sqrt(np.maximum(power, LEAST_POWER))

    x, y = magnitudes(a), magnitudes(b)
    return float(np.linalg.norm(y - x) / np.linalg.norm(x) + np.mean(np.abs(np.log(y / x))))


def lpips() -> tuple[Callable[[Clip, Clip], float] | None, str]:
    """LPIPS with AlexNet, the mean over frames; or None and why. Nothing is downloaded."""
    if importlib.util.find_spec("lpips") is None:
        return None, "the package lpips is not installed"
    import lpips as package
    import torch

    if not list(Path(torch.hub.get_dir(), "checkpoints").glob("alexnet-*.pth")):
        return None, "AlexNet's weights are not on this machine"
    network = package.LPIPS(net="alex", verbose=False).eval()

    def distance(a: Clip, b: Clip) -> float:
        def frames(video: np.ndarray) -> Any:
            return torch.from_numpy(np.moveaxis(video, -1, 1) / np.float32(127.5) - 1)

        with torch.inference_mode():
            pairs = zip(frames(a.video), frames(b.video), strict=True)
            return float(np.mean([network(x[None], y[None]).item() for x, y in pairs]))

    return distance, "AlexNet"


def marks(scene: Scene, clip: Clip) -> Marks:
    """What the judge says of each attribute: right, wrong, or None where nothing is said of it."""
    verdict = jd.judge(clip.video, clip.sound)
    found = {name: check(scene, verdict) for name, check in jd.WORDS.items()}
    for name, check in jd.SENSES.items():
        found[name] = check(scene, verdict.sight, verdict.heard)
    return {name: mark if mark is None else bool(mark) for name, mark in found.items()}


def compare(a: Clip, b: Clip, scene: Scene | None = None) -> dict[str, Any]:
    """All measures of two clips but those of latents; the judge's `marks` are of the second.

    `flicker` is the second's, as a multiple of the first's.
    """
    found: dict[str, Any] = {
        "psnr_db": psnr(a.video, b.video),
        "ssim": ssim(a.video, b.video),
    }
    if len(a.video) > 1:
        found["flicker"] = flicker(b.video) / max(flicker(a.video), 1e-6)
    if a.sound is not None and b.sound is not None:
        found["spectral"] = spectral_distance(a.sound, b.sound)
    if scene is not None:
        found["marks"] = marks(scene, b)
    return found


def processes(count: int) -> Executor | None:
    """Workers that never touch an accelerator; None for none."""
    if not count:
        return None
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(count, context, initializer=_stay_on_host)


def _stay_on_host() -> None:
    jax.config.update("jax_platforms", "cpu")


# Over many clips
# --------------------------------------------------------------------------------------------------


def summary(values: Sequence[float], worst: Callable = max) -> dict[str, float]:
    """Mean with its 95% interval, median and worst. Raises ValueError of no values."""
    if not len(values):
        raise ValueError("there is nothing to summarise")
    mean, half = float(np.mean(values)), 0.0
    if len(values) > 1:
        half = Z * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return {
        "mean": mean, "low": mean - half, "high": mean + half,
        "median": float(np.median(values)), "worst": float(worst(values)),
    }  # fmt: skip


def paired_difference(only_a: int, only_b: int, total: int) -> tuple[float, float, float]:
    """Share of b minus share of a over the same clips, and its 95% interval (Bonett & Price, 2012),
    which has a width even where no clip differs.

    Args:
        only_a, only_b: clips that only the one, only the other has right.
        total: all clips.
    """
    if total < 1:
        return math.nan, math.nan, math.nan
    a, b = (only_a + 1) / (total + 2), (only_b + 1) / (total + 2)
    half = Z * math.sqrt((a + b - (b - a) ** 2) / (total + 2))
    return (only_b - only_a) / total, max(-1.0, b - a - half), min(1.0, b - a + half)


def judged(a: Sequence[Marks], b: Sequence[Marks]) -> list[dict[str, Any]]:
    """For each attribute the shares of both, over the clips where something is said of it in both,
    and the difference with its interval.
    """
    rows = []
    for name in a[0] if a else ():
        pairs = [(x[name], y[name]) for x, y in zip(a, b, strict=True)]
        pairs = [pair for pair in pairs if None not in pair]
        only_a, only_b = (sum(pair == each for pair in pairs) for each in ONE_RIGHT)
        difference, low, high = paired_difference(only_a, only_b, len(pairs))
        shares = [float(np.mean(side)) for side in zip(*pairs, strict=True)] or [math.nan] * 2
        rows.append({
            "attribute": name, "clips": len(pairs), "a": shares[0], "b": shares[1],
            "only_a": only_a, "only_b": only_b, "difference": difference, "low": low, "high": high,
        })  # fmt: skip
    return rows


ONE_RIGHT = ((True, False), (False, True))


def plain(value: Any) -> Any:
    """For a JSON file: six digits, null for what is no number."""
    if isinstance(value, Mapping):
        return {name: plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [plain(inner) for inner in value]
    if isinstance(value, float | np.floating):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
