"""What a clip of the tiny world is: its words, its numbers, and when things touch.

A scene has words, which its sentence names, and numbers, which are drawn at random within what the
words allow. One shape crosses the picture and bounces off its borders, or two equal shapes meet in
the middle and bounce off each other. Speeds are constant and bounces elastic, so a path is a
triangle wave and every contact time has a formula.

Units: the picture is WORLD x WORLD wide and high whatever the resolution it is drawn at; x runs to
the right and y down; time is in seconds, velocity in units a second.
Axes: K candidates, A the two axes x and y, E events.
"""

import dataclasses
import math
from typing import NamedTuple

import numpy as np

WORLD = 96.0
FPS = 24.0
FRAMES = 49  # 4k + 1, about two seconds
DURATION = FRAMES / FPS
MAX_BOUNCES = 3

# Flat, bright and far apart, in sRGB; the new ones are for fine-tuning, and never in training.
COLOURS = {
    "red": (228, 44, 56), "yellow": (252, 226, 56), "green": (36, 200, 72),
    "cyan": (40, 205, 215), "blue": (50, 100, 240), "pink": (240, 70, 190),
}  # fmt: skip
NEW_COLOURS = {"orange": (245, 130, 32)}
# Fifths, so that no pitch is near another one's neighbour; equal temperament, in Hz.
PITCHES = {"F3": 174.61, "C4": 261.63, "G4": 392.00, "D5": 587.33, "A5": 880.00}
NEW_PITCHES = {"E6": 1318.51}
# Dark and muted: the ground, and the marks of its pattern.
BACKGROUNDS = {
    "grey": ((72, 74, 80), (98, 100, 106)), "navy": ((36, 42, 72), (56, 64, 100)),
    "brown": ((76, 58, 48), (104, 82, 68)), "plum": ((68, 42, 66), (94, 62, 92)),
}  # fmt: skip
PATTERNS = ("plain", "striped", "checkered", "dotted")
SIZES = {"small": (11.5, 12.5), "large": (17.0, 19.0)}  # radius
SPEEDS = {"slow": (13.0, 20.0), "fast": (44.0, 58.0)}
WHEN = {"early": (0.4, 0.85), "late": (1.05, 1.5)}  # time of the first bounce
_DIAGONAL = math.sqrt(0.5)
DIRECTIONS = {
    "left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0),
    "up left": (-_DIAGONAL, -_DIAGONAL), "up right": (_DIAGONAL, -_DIAGONAL),
    "down left": (-_DIAGONAL, _DIAGONAL), "down right": (_DIAGONAL, _DIAGONAL),
}  # fmt: skip
STRAIGHT = ("left", "right", "up", "down")
# How far a shape of radius 1 reaches from its centroid, low and high side: ((x, x), (y, y)).
# Areas are alike, so that a size is a size whatever the shape.
SQUARE, TRIANGLE, CROSS, CROSS_ARM = 0.92, 1.4, 1.14, 0.42
_BASE = TRIANGLE * math.sqrt(3) / 2
REACH = {
    "circle": ((1.0, 1.0), (1.0, 1.0)),
    "square": ((SQUARE, SQUARE), (SQUARE, SQUARE)),
    "triangle": ((_BASE, _BASE), (TRIANGLE, TRIANGLE / 2)),
    "cross": ((CROSS, CROSS), (CROSS, CROSS)),
}
SHAPES = tuple(REACH)

# Two sounds or two turns closer than this are hard to tell apart for an eye or a judge, and a turn
# in the last moment is hard to see.
MIN_GAP = 0.25
LAST_BOUNCE = 1.85


@dataclasses.dataclass(frozen=True)
class Scene:
    """One clip. The words come first, then the numbers.

    `pitch` and `when` (of the first bounce) are None if nothing touches and nothing sounds.
    `other` is the colour of the second shape if two meet, else None; then `direction` is the first
    one's, the second comes against it, and `meets` is the time of their contact.
    """

    colour: str
    shape: str
    size: str
    direction: str
    speed: str
    background: str
    pattern: str
    pitch: str | None
    when: str | None
    other: str | None = None
    radius: float = 0.0
    x: float = 0.0
    y: float = 0.0
    pace: float = 0.0  # units a second along the direction
    meets: float | None = None

    @property
    def kind(self) -> str:
        """ "silent", "wall" or "meet"."""
        return "meet" if self.other else "wall" if self.pitch else "silent"


class Body(NamedTuple):
    """A moving shape: float64 [A] each. Its centroid stays within `low` and `high`."""

    position: np.ndarray
    velocity: np.ndarray
    low: np.ndarray
    high: np.ndarray


class Bounce(NamedTuple):
    """A contact: seconds from the first frame, and the point touched."""

    time: float
    x: float
    y: float


def colour_rgb(name: str) -> tuple[int, int, int]:
    """sRGB of a colour, trained or new."""
    return (COLOURS | NEW_COLOURS)[name]


def pitch_hz(name: str) -> float:
    """Fundamental of a pitch, trained or new."""
    return (PITCHES | NEW_PITCHES)[name]


def bodies(scene: Scene) -> list[Body]:
    """The one or two shapes of a scene. For two that meet, the contact is a wall to each: equal
    masses with opposite velocities turn back where they touch.
    """
    position = np.array([scene.x, scene.y])
    heading = np.array(DIRECTIONS[scene.direction])
    low, high = _room(scene.shape, scene.radius)
    if scene.other is None:
        return [Body(position, heading * scene.pace, low, high)]
    axis = int(np.argmax(np.abs(heading)))
    reach = sum(REACH[scene.shape][axis]) * scene.radius
    sign = heading[axis]
    first_end = position[axis] + sign * scene.pace * scene.meets
    second_end = first_end + sign * reach
    second = position.copy()
    second[axis] = second_end + sign * scene.pace * scene.meets
    limits = [(low.copy(), high.copy()) for _ in range(2)]
    for (least, most), end, side in zip(
        limits, (first_end, second_end), (sign, -sign), strict=True
    ):
        (most if side > 0 else least)[axis] = end
    velocity = heading * scene.pace
    return [Body(position, velocity, *limits[0]), Body(second, -velocity, *limits[1])]


def bounces(scene: Scene, duration: float = DURATION) -> list[Bounce]:
    """Every contact before `duration`, in order of time. Two shapes that meet make one."""
    body = bodies(scene)[0]
    found = []
    for axis in (0, 1):
        speed = abs(body.velocity[axis])
        if speed == 0:
            continue
        span = body.high[axis] - body.low[axis]
        start = body.position[axis] - body.low[axis]
        forward = body.velocity[axis] > 0
        time = (span - start if forward else start) / speed
        while time < duration:
            touched = reflect(body, time)
            touched[axis] += (
                (1 if forward else -1) * REACH[scene.shape][axis][int(forward)] * scene.radius
            )
            found.append(Bounce(float(time), float(touched[0]), float(touched[1])))
            time, forward = time + span / speed, not forward
    return sorted(found)


def reflect(body: Body, time: float) -> np.ndarray:
    """The centroid [A] at `time`: a triangle wave between `low` and `high`."""
    span = body.high - body.low
    phase = np.mod(body.position - body.low + body.velocity * time, 2 * span)
    return body.low + np.minimum(phase, 2 * span - phase)


def place(words: Scene, rng: np.random.Generator) -> Scene:
    """Draw the numbers of a scene from its words: uniform over the starts, radii and speeds that
    keep what the words promise, with at most MAX_BOUNCES bounces, MIN_GAP or more apart.

    Raises ValueError for words that contradict each other.
    """
    _check(words)
    for _ in range(100):
        scene = _meeting(words, rng) if words.other else _crossing(words, rng)
        if scene is not None:
            return scene
    raise ValueError(f"no start was found for {words}: its words leave no room")


def _check(words: Scene) -> None:
    if (words.pitch is None) != (words.when is None):
        raise ValueError(f"pitch={words.pitch} and when={words.when}: give both, or None for both")
    if words.pitch is None and words.speed == "fast":
        raise ValueError("a fast shape always reaches a wall: a silent scene needs speed='slow'")
    if words.other and (
        words.pitch is None
        or words.other == words.colour
        or (words.size, words.speed) != ("small", "slow")
        or words.direction not in STRAIGHT
    ):
        raise ValueError(
            f"{words}: two shapes that meet need room, so they are small and slow, head-on along x "
            "or y, of two colours, and sound"
        )


def _room(shape: str, radius: float) -> tuple[np.ndarray, np.ndarray]:
    """Least and largest centroid [A] of a shape that stays in the picture."""
    reach = np.array(REACH[shape]) * radius
    return reach[:, 0], WORLD - reach[:, 1]


def _crossing(words: Scene, rng: np.random.Generator, candidates: int = 128) -> Scene | None:
    """The first of `candidates` random starts that does as the words say."""
    radius = rng.uniform(*SIZES[words.size])
    low, high = _room(words.shape, radius)
    starts = rng.uniform(low + 1, high - 1, (candidates, 2))
    pace = rng.uniform(*SPEEDS[words.speed], (candidates, 1))
    velocity = np.array(DIRECTIONS[words.direction]) * pace  # [K, A]
    with np.errstate(divide="ignore"):
        first = np.where(velocity > 0, high - starts, starts - low) / np.abs(velocity)
        again = first + (high - low) / np.abs(velocity)
    times = np.sort(np.concatenate([first, again], 1), 1)  # [K, E], inf along an axis at rest
    times[times >= DURATION] = np.inf
    if words.when is None:
        # Some air is left at the end: a shape that just fails to touch would puzzle everyone.
        good = np.all(first > DURATION + 0.15, axis=1)
    else:
        earliest, latest = WHEN[words.when]
        happens = np.isfinite(times)
        gaps = np.where(happens[:, 1:], times[:, 1:], 99.0) - np.where(
            happens[:, :-1], times[:, :-1], 0.0
        )
        good = (times[:, 0] >= earliest) & (times[:, 0] <= latest) & np.all(gaps >= MIN_GAP, 1)
        good &= np.all(~happens | (times <= LAST_BOUNCE), 1) & (happens.sum(1) <= MAX_BOUNCES)
        good &= np.all((first >= DURATION + 0.05) | (first < DURATION), 1)
    chosen = np.flatnonzero(good)
    if not chosen.size:
        return None
    x, y = starts[chosen[0]]
    return dataclasses.replace(
        words, radius=float(radius), x=float(x), y=float(y), pace=float(pace[chosen[0], 0])
    )


def _meeting(words: Scene, rng: np.random.Generator) -> Scene | None:
    """Two shapes that touch once, at a time that the words allow, and no wall."""
    radius, meets = rng.uniform(*SIZES[words.size]), rng.uniform(*WHEN[words.when])
    heading = np.array(DIRECTIONS[words.direction])
    axis = int(np.argmax(np.abs(heading)))
    low, high = _room(words.shape, radius)
    reach = sum(REACH[words.shape][axis]) * radius
    # Both need room for the way that they go before the contact, and after it.
    seconds, room = max(meets, DURATION - meets), (high - low)[axis] - reach - 1
    slowest, fastest = SPEEDS[words.speed]
    fastest = min(fastest, room / 2 / seconds)
    if fastest < slowest:
        return None
    pace = rng.uniform(slowest, fastest)
    way = pace * seconds + 0.5
    lower = rng.uniform(low[axis] + way, high[axis] - way - reach)  # centroid at the contact
    position = rng.uniform(low, high)
    end = lower if heading[axis] > 0 else lower + reach
    position[axis] = end - heading[axis] * pace * meets
    return dataclasses.replace(
        words, radius=float(radius), x=float(position[0]), y=float(position[1]),
        pace=float(pace), meets=float(meets),
    )  # fmt: skip
