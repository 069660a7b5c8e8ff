"""Scores clips of the tiny world against their sentences, from pixels and samples alone.

`judge` looks at one clip and knows nothing of its sentence. `score` then compares what it saw and
heard with the words, and sight with sound. Beside each score stand two baselines: the same clips
under shuffled sentences (or, where sight is compared with sound, with shuffled sounds), and chance,
the mean over all wrong pairings.

    python -m examples.tiny.judge --folder DIR     DIR has mp4 files and scenes.json

Axes: T frames, H rows, W columns, S samples.
"""

import argparse
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cosmos3_jax.io import media
from examples.tiny import clips as cl
from examples.tiny import scenes as sc
from examples.tiny.hearing import Heard, listen
from examples.tiny.scenes import Scene
from examples.tiny.sight import Seen, Sight, watch

FRAME = 1 / sc.FPS
LATENT_FRAME = 4 / sc.FPS  # the video VAE's
NOON = (sc.WHEN["early"][1] + sc.WHEN["late"][0]) / 2  # parts early from late, in seconds
OFF_CENTRE = 12.0  # units from the middle; nearer bounces have no side
# The least share that the trained model must reach.
BARS = {
    "colour and shape": 0.95, "direction": 0.90, "pitch": 0.90,
    "bounce and tone, 1/24 s": 0.90, "bounce and tone, 4/24 s": 0.90,
}  # fmt: skip


class Verdict(NamedTuple):
    """What is in one clip."""

    sight: Sight
    heard: Heard


class Row(NamedTuple):
    """One attribute over many clips. `low` and `high` bound the share at 95% (Wilson, 1927)."""

    attribute: str
    right: int
    total: int
    share: float
    low: float
    high: float
    shuffled: float
    chance: float
    bar: float | None


def judge(
    video: np.ndarray, sound: np.ndarray, fps: float = sc.FPS, sample_rate: int = 48_000
) -> Verdict:
    """Look at and listen to one clip.

    Args:
        video: [T, H, W, 3], or [3, T, H, W] as the model returns it; uint8, or float in [0, 1].
        sound: float [2, S] in [-1, 1].

    Raises ValueError for other shapes, a clip of another length than the world's, NaN or infinity.
    """
    video, sound = np.asarray(video), np.asarray(sound)
    if video.ndim == 4 and video.shape[-1] != 3 and video.shape[0] == 3:
        video = np.moveaxis(video, 0, -1)
    if video.ndim != 4 or video.shape[-1] != 3 or video.shape[1] != video.shape[2]:
        raise ValueError(f"the video is {list(video.shape)}; expected [T, H, W, 3] with H = W")
    if abs(len(video) / fps - sc.DURATION) > 0.1:
        raise ValueError(
            f"{len(video)} frames at {fps} a second: clips of this world last {sc.DURATION:.2f} s"
        )
    if sound.ndim != 2 or sound.shape[0] != 2:
        raise ValueError(f"the sound is {list(sound.shape)}; expected [2, samples]")
    if not (np.isfinite(video).all() and np.isfinite(sound).all()):
        raise ValueError("the clip contains NaN or infinity: there is nothing to judge")
    return Verdict(watch(video, fps), listen(sound, sample_rate))


# Words against sight and sound: scene, verdict -> right or wrong, or None where nothing is said
# --------------------------------------------------------------------------------------------------


def _colour(scene: Scene, sight: Sight) -> bool:
    named = {scene.colour, scene.other or scene.colour}
    return {seen.colour for seen in sight.objects} == named


def _shape(scene: Scene, sight: Sight) -> bool:
    return bool(sight.objects) and all(seen.shape == scene.shape for seen in sight.objects)


def _first(scene: Scene, sight: Sight) -> Seen | None:
    """The shape that the sentence is about: of its colour, or else the commonest."""
    named = [seen for seen in sight.objects if seen.colour == scene.colour]
    return (named or sight.objects or [None])[0]


def _of_first(name: str) -> Callable[[Scene, Verdict], bool]:
    return lambda scene, verdict: (
        getattr(_first(scene, verdict.sight), name, None) == getattr(scene, name)
    )


def _when(scene: Scene, times: list[float]) -> bool | None:
    if scene.when is None:
        return None
    return bool(times) and (times[0] < NOON) == (scene.when == "early")


def _silence(scene: Scene, verdict: Verdict) -> bool | None:
    return None if scene.pitch else not verdict.heard.tones and not verdict.sight.bounces


WORDS: dict[str, Callable[[Scene, Verdict], bool | None]] = {
    "colour": lambda scene, verdict: _colour(scene, verdict.sight),
    "shape": lambda scene, verdict: _shape(scene, verdict.sight),
    "colour and shape": lambda scene, verdict: (
        _colour(scene, verdict.sight) and _shape(scene, verdict.sight)
    ),
    "size": _of_first("size"),
    "direction": _of_first("direction"),
    "speed": _of_first("speed"),
    "background": lambda scene, verdict: verdict.sight.background == scene.background,
    "pattern": lambda scene, verdict: verdict.sight.pattern == scene.pattern,
    "first bounce early or late": lambda scene, verdict: _when(
        scene, [turn.time for turn in verdict.sight.bounces]
    ),
    "first tone early or late": lambda scene, verdict: _when(
        scene, [tone.time for tone in verdict.heard.tones]
    ),
    "pitch": lambda scene, verdict: verdict.heard.pitch == scene.pitch if scene.pitch else None,
    "nothing touches or sounds": _silence,
}


# Sight against sound: scene, sight, heard -> the same. The scene only says whether to ask.
# --------------------------------------------------------------------------------------------------


def _together(tolerance: float) -> Callable[[Scene, Sight, Heard], bool | None]:
    """As many tones as bounces, one or more, and each within `tolerance` seconds of its bounce."""

    def right(scene: Scene, sight: Sight, heard: Heard) -> bool | None:
        if scene.pitch is None:
            return None
        pairs = list(zip(sight.bounces, heard.tones, strict=False))
        alike = 0 < len(pairs) == len(sight.bounces) == len(heard.tones)
        return alike and all(abs(turn.time - tone.time) <= tolerance for turn, tone in pairs)

    return right


def _first_together(scene: Scene, sight: Sight, heard: Heard) -> bool | None:
    if scene.pitch is None:
        return None
    found = bool(sight.bounces and heard.tones)
    return found and abs(sight.bounces[0].time - heard.tones[0].time) <= FRAME


def _side(scene: Scene, sight: Sight, heard: Heard) -> bool | None:
    """The first tone is louder on the side of the first bounce, if that is on one."""
    if scene.pitch is None or not sight.bounces:
        return None
    beside = sight.bounces[0].x - sc.WORLD / 2
    if abs(beside) < OFF_CENTRE:
        return None
    return bool(heard.tones) and (heard.tones[0].place > 0.5) == (beside > 0)


SENSES: dict[str, Callable[[Scene, Sight, Heard], bool | None]] = {
    "bounce and tone, 1/24 s": _together(FRAME),
    "bounce and tone, 4/24 s": _together(LATENT_FRAME),
    "first bounce and tone, 1/24 s": _first_together,
    "side of bounce and tone": _side,
}


def score(scenes: Sequence[Scene], verdicts: Sequence[Verdict], seed: int = 0) -> list[Row]:
    """The table: a row for each attribute of the words, and of sight against sound.

    Args:
        scenes: what the sentences say; only their words are read, never their numbers.
        verdicts: of `judge`, one for each scene.
        seed: of the shuffling.

    Raises ValueError if the numbers of scenes and verdicts differ, or are below two.
    """
    if len(scenes) != len(verdicts) or len(scenes) < 2:
        raise ValueError(
            f"{len(scenes)} scenes and {len(verdicts)} verdicts: give as many, 2 or more"
        )
    checks = {
        name: (lambda i, j, check=check: check(scenes[i], verdicts[j]))
        for name, check in WORDS.items()
    } | {
        name: (lambda i, j, check=check: check(scenes[i], verdicts[i].sight, verdicts[j].heard))
        for name, check in SENSES.items()
    }
    count = range(len(scenes))
    # A shuffle along one cycle: nobody keeps their own.
    order = np.random.default_rng(seed).permutation(len(scenes))
    partner = dict(zip(order, np.roll(order, 1), strict=True))
    rows = []
    for name, check in checks.items():
        own = [bool(mark) for i in count if (mark := check(i, i)) is not None]
        right, total = sum(own), len(own)
        share = right / total if total else math.nan
        shuffled = _mean(check(i, partner[i]) for i in count)
        chance = _mean(check(i, j) for i in count for j in count if i != j)
        low, high = wilson(right, total)
        rows.append(Row(name, right, total, share, low, high, shuffled, chance, BARS.get(name)))
    return rows


def _mean(marks) -> float:
    given = [bool(mark) for mark in marks if mark is not None]
    return sum(given) / len(given) if given else math.nan


def wilson(right: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """Bounds of a share (Wilson, "Probable inference", 1927); (nan, nan) of nothing."""
    if total == 0:
        return math.nan, math.nan
    share, spread = right / total, z * z / total
    middle = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / total + spread / (4 * total)) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


def markdown(rows: Sequence[Row], beside: Mapping[str, Sequence[Row]] | None = None) -> str:
    """The table for a README; `beside` adds a column of shares for each other table by its name."""
    beside = beside or {}
    titles = ["", "right", "95%", *beside, "shuffled", "chance", "bar"]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for n, row in enumerate(rows):
        cells = [
            row.attribute,
            f"{_percent(row.share)} ({row.right}/{row.total})",
            f"{_percent(row.low)} to {_percent(row.high)}" if row.total else "",
            *(_percent(other[n].share) for other in beside.values()),
            _percent(row.shuffled),
            _percent(row.chance),
            "" if row.bar is None else f"{row.bar:.0%}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _percent(share: float) -> str:
    """A share of nothing is a dash."""
    return "-" if math.isnan(share) else f"{share:.1%}"


# The command
# --------------------------------------------------------------------------------------------------


def report(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The table for a JSON file: undefined shares are null."""
    plain = [row._asdict() for row in rows]
    return [
        {
            name: None if isinstance(value, float) and math.isnan(value) else value
            for name, value in row.items()
        }
        for row in plain
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Score a folder of clips of the tiny world.")
    parser.add_argument(
        "--folder", type=Path, required=True, help=f"mp4 files and {cl.SCENES_FILE}"
    )
    parser.add_argument("--json", type=Path, help="write the table here")
    parser.add_argument("--markdown", type=Path, help="write it here too, for a README")
    args = parser.parse_args()
    clips = cl.read_folder(args.folder)
    verdicts = [judge(clip.video, clip.sound, clip.fps, clip.sample_rate) for clip in clips]
    rows = score([clip.scene for clip in clips], verdicts)
    if args.json:
        media.write_text(args.json, json.dumps(report(rows), indent=1) + "\n", overwrite=True)
    if args.markdown:
        media.write_text(args.markdown, markdown(rows), overwrite=True)
    print(markdown(rows), end="")


if __name__ == "__main__":
    main()
