"""What can be seen in a clip of the tiny world: pixels -> words, paths and bounces.

Knows the palette, the shapes and the backgrounds, and that things move straight between bounces;
knows nothing of the sentence or the scene. Every clip gets the same thresholds.

Units as in `scenes`: the picture is 96 wide whatever its pixels, time is in seconds.
Axes: T frames, H rows, W columns, P pixels, N candidates, K coefficients, Y and X of a patch.
"""

import functools
import itertools
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from examples.tiny import scenes as sc
from examples.tiny import world

MIN_CHROMA = 0.4  # of a shape's inside; no background has more than 0.15
MIN_SPEED = 4.0  # units a second; less is at rest
FAST = 32.0
LARGE = 14.75
MIN_OVERLAP = 0.6  # intersection over union with the best template, or it is no known shape
TOGETHER = 0.15  # seconds; turns of two shapes, or along x and y, that are this near are one
PATCH = 27  # half the side of a shape's portrait
TURNS = np.arange(0.15, sc.DURATION - 0.1, 1 / 48)  # candidates for the time of a bounce


class Turn(NamedTuple):
    """A bounce that was seen, and where the centroid was."""

    time: float
    x: float
    y: float


class Seen(NamedTuple):
    """One moving shape. A word is None where nothing known fits."""

    colour: str | None
    shape: str | None
    size: str
    direction: str | None
    speed: str
    turns: list[Turn]
    path: np.ndarray  # [T, 2], x and y


class Sight(NamedTuple):
    """A clip: its shapes, the commoner colour first, and its background."""

    objects: list[Seen]
    bounces: list[Turn]
    background: str
    pattern: str


def watch(video: np.ndarray, fps: float = sc.FPS) -> Sight:
    """Look at a clip: uint8 or float in [0, 1], [T, H, W, 3], H = W."""
    video = np.asarray(video)
    video = video.astype(np.float32) / (255 if video.dtype == np.uint8 else 1)
    video = ndimage.gaussian_filter(video, (0, 0.8, 0.8, 0))
    scale = sc.WORLD / video.shape[1]
    covers = _covers(video)
    objects = [_follow(colour, cover, fps, scale) for colour, cover in covers]
    hidden = sum((cover for _, cover in covers), np.zeros(video.shape[:3], np.float32))
    background, pattern = _behind(video, hidden)
    objects = [seen for seen in objects if seen is not None]
    turns = sorted(turn for seen in objects for turn in seen.turns)
    return Sight(objects, _merge(turns), background, pattern)


# Where the shapes are
# --------------------------------------------------------------------------------------------------


def _covers(video: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """Up to two colours, and how much of each pixel that shape covers: float [T, H, W]."""
    red, green, blue = np.moveaxis(video, -1, 0)
    chroma = np.maximum(np.maximum(red, green), blue) - np.minimum(np.minimum(red, green), blue)
    inside = chroma > max(MIN_CHROMA, 0.6 * np.quantile(chroma[::4], 0.98))
    calm = chroma[::8] < MIN_CHROMA / 2
    if inside.mean() < 0.005 or calm.mean() < 0.1:
        return []  # nothing stands out, or everything does
    names = list(sc.COLOURS | sc.NEW_COLOURS)
    palette = np.array([sc.colour_rgb(name) for name in names], np.float32) / 255
    pixels = video[inside]
    labels = _nearest(pixels, palette)
    counts = np.bincount(labels, minlength=len(names))
    first, second = np.argsort(-counts)[:2]
    found = [first]
    if counts[second] > 0.4 * counts[first]:
        rows = np.argwhere(inside)[:, 1:]
        middles = [np.median(rows[labels == label], 0) for label in (first, second)]
        # Two shapes are apart; a shape of two tones is in one place.
        if np.linalg.norm(middles[0] - middles[1]) > video.shape[1] / 8:
            found.append(second)
    ground = np.median(video[::8][calm], 0)
    tones = np.array([np.median(pixels[labels == label], 0) for label in found])
    covers = []
    for i, label in enumerate(found):
        towards = tones[i] - ground
        cover = np.clip((video - ground) @ towards / (towards @ towards), 0, 1)
        if len(found) > 1:
            near, far = (np.square(video - tones[j]) @ np.ones(3, np.float32) for j in (i, 1 - i))
            cover = np.where(near < far, cover, 0)
        covers.append((names[label], np.stack([_largest(frame) for frame in cover])))
    return covers


def _nearest(pixels: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """Index [P] of the nearest colour, by Euclidean distance in sRGB."""
    return np.argmin((palette**2).sum(1) - 2 * pixels @ palette.T, 1)


def _largest(cover: np.ndarray) -> np.ndarray:
    """The largest connected piece, and its soft edge; speckles elsewhere become zero."""
    pieces, count = ndimage.label(cover > 0.5)
    if count == 0:
        return np.zeros_like(cover)
    if count > 1:
        pieces = pieces == 1 + np.argmax(np.bincount(pieces.ravel())[1:])
    return np.where(ndimage.binary_dilation(pieces, iterations=3), cover, 0)


# How a shape moves
# --------------------------------------------------------------------------------------------------


def _follow(colour: str, cover: np.ndarray, fps: float, scale: float) -> Seen | None:
    frames, height, width = cover.shape
    area = cover.sum((1, 2))
    visible = area > 0.4 * np.median(area)
    if visible.sum() < frames / 2:
        return None
    area = np.maximum(area, 1e-6)
    x = (cover.sum(1) @ (np.arange(width) + 0.5)) / area
    y = (cover.sum(2) @ (np.arange(height) + 0.5)) / area
    when = np.arange(frames)
    centre = [np.interp(when, when[visible], path[visible]) for path in (x, y)]
    path = scale * np.stack(centre, 1)
    shape, radius = _portrait(cover[::2], [path[::2] for path in centre], scale)
    velocity, times = zip(*(fit_path(path[:, axis], fps) for axis in (0, 1)), strict=True)
    turns = [
        Turn(time, *(float(np.interp(time * fps, when, path[:, axis])) for axis in (0, 1)))
        for time in sorted(itertools.chain(*times))
    ]
    speed = float(np.hypot(*velocity))
    return Seen(
        colour=colour,
        shape=shape,
        size="large" if radius > LARGE else "small",
        direction=_direction(velocity) if speed > MIN_SPEED else None,
        speed="fast" if speed > FAST else "slow",
        turns=_merge(turns),
        path=path,
    )


def _direction(velocity: tuple[float, float]) -> str:
    """The nearest of the eight."""
    return max(sc.DIRECTIONS, key=lambda name: np.dot(sc.DIRECTIONS[name], velocity))


def fit_path(path: np.ndarray, fps: float) -> tuple[float, list[float]]:
    """Fit a path along one axis, [T], with straight pieces; returns the first velocity, and when
    it turns back.

    0, 1 or 2 turns: the fewest whose error is near that of the best fit.
    """
    fits = []
    for turns, (basis, inverse, knots) in enumerate(_bases(len(path), fps)):
        coefficients = inverse @ path  # [N, K]
        slopes = np.cumsum(coefficients[:, 1:], 1)
        error = np.square(np.einsum("ntk,nk->nt", basis, coefficients) - path).mean(1)
        if turns:
            # A wall sends things back, and about as fast as they came.
            steepness = np.abs(slopes)
            back = np.all(slopes[:, 1:] * slopes[:, :-1] < 0, 1)
            lively = steepness.min(1) > np.maximum(MIN_SPEED, 0.35 * steepness.max(1))
            error = np.where(back & lively, error, np.inf)
        best = int(np.argmin(error))
        fits.append((float(np.sqrt(error[best])), float(slopes[best, 0]), knots[best]))
    least = min(fit[0] for fit in fits)
    _, velocity, knots = next(fit for fit in fits if fit[0] <= max(0.35, 1.5 * least))
    return velocity, [float(knot) for knot in knots]


@functools.cache
def _bases(frames: int, fps: float) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """For 0, 1 and 2 turns: bases [N, T, K] of a constant, the time, and the time since each turn;
    their pseudo-inverses [N, K, T]; and the turns [N, K - 2].
    """
    time = np.arange(frames) / fps
    candidates = TURNS[TURNS < time[-1] - 0.05]
    pairs = [
        pair for pair in itertools.combinations(candidates, 2) if pair[1] - pair[0] > sc.MIN_GAP
    ]
    result = []
    for knots in (np.zeros((1, 0)), candidates[:, None], np.array(pairs)):
        plain = np.broadcast_to(np.stack([np.ones_like(time), time], 1), (len(knots), frames, 2))
        since = np.maximum(time[None, :, None] - knots[:, None, :], 0)
        basis = np.concatenate([plain, since], 2)
        result.append((basis, np.linalg.pinv(basis), knots))
    return result


def _merge(turns: list[Turn]) -> list[Turn]:
    """Turns that happen together as one, at their mean."""
    groups = []
    for turn in turns:
        if groups and turn.time - groups[-1][0].time < TOGETHER:
            groups[-1].append(turn)
        else:
            groups.append([turn])
    return [Turn(*(float(value) for value in np.mean(group, 0))) for group in groups]


# What it looks like
# --------------------------------------------------------------------------------------------------


def _portrait(
    cover: np.ndarray, centre: list[np.ndarray], scale: float
) -> tuple[str | None, float]:
    """The shape and radius whose template overlaps most with the mean picture of the object."""
    offsets = np.arange(-PATCH, PATCH + 1) / scale
    frames = np.arange(len(cover))
    rows = centre[1][:, None, None] - 0.5 + offsets[:, None]
    columns = centre[0][:, None, None] - 0.5 + offsets[None, :]
    where = np.broadcast_arrays(frames[:, None, None], rows, columns)
    patch = ndimage.map_coordinates(cover, where, order=1).mean(0).ravel()
    templates, names, radii = _templates()
    both, patch_sum = np.minimum(templates, patch).sum(1), patch.sum()
    overlap = both / (templates.sum(1) + patch_sum - both)
    best = int(np.argmax(overlap))
    return (names[best] if overlap[best] > MIN_OVERLAP else None), radii[best]


@functools.cache
def _templates() -> tuple[np.ndarray, list[str], list[float]]:
    """Every shape in many radii, sharp and blurred: float [N, Y * X]."""
    offsets = np.arange(-PATCH, PATCH + 1, dtype=np.float32)
    pictures, names, radii = [], [], []
    for index, shape in enumerate(sc.SHAPES):
        for radius in np.arange(8.0, 23.0, 0.5):
            edge = world.distance(index, offsets[None, :], offsets[:, None], radius)
            sharp = np.clip(0.5 - np.asarray(edge), 0, 1)
            for blur in (0.9, 1.8, 2.7):
                pictures.append(ndimage.gaussian_filter(sharp, blur).ravel())
                names.append(shape)
                radii.append(float(radius))
    return np.array(pictures), names, radii


def _behind(video: np.ndarray, hidden: np.ndarray) -> tuple[str, str]:
    """The background that differs least from what no shape covers, averaged over the frames."""
    weight = (hidden < 0.05).astype(np.float32)
    often = weight.sum(0)
    picture = (video * weight[..., None]).sum(0) / np.maximum(often, 1)[..., None]
    backgrounds, names = _backgrounds(video.shape[1])
    errors = (np.square(backgrounds - picture).sum(-1) * often).sum((1, 2))
    return names[int(np.argmin(errors))]


@functools.cache
def _backgrounds(size: int) -> tuple[np.ndarray, list[tuple[str, str]]]:
    """All backgrounds: float [N, H, W, 3], as blurred as `watch` sees them."""
    axis = (np.arange(size, dtype=np.float32) + 0.5) * (sc.WORLD / size)
    pictures, names = [], []
    for index, pattern in enumerate(sc.PATTERNS):
        amount = np.broadcast_to(world.marks(index, axis[None, :], axis[:, None]), (size, size))
        amount = ndimage.gaussian_filter(amount, 0.8)[..., None]
        for name, tones in sc.BACKGROUNDS.items():
            ground, mark = np.array(tones, np.float32) / 255
            pictures.append(ground + amount * (mark - ground))
            names.append((name, pattern))
    return np.array(pictures), names
