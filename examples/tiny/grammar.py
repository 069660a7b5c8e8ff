"""Sentences of the tiny world, and which of their combinations training never sees.

A combination is what a sentence says of colour, shape, direction and pitch (and of the second
colour, if two shapes meet). A hash of it decides, once and for all, whether it is held out: about
one in ten is. Every single attribute and every pair of attributes still occurs in training, so a
held-out sentence asks for known things in a new company.
"""

import itertools
import re
import zlib
from collections.abc import Iterator

import numpy as np

from examples.tiny import scenes as sc
from examples.tiny.scenes import Scene

HELD_OUT_SHARE = 0.1
SILENT_SHARE, MEET_SHARE = 0.12, 0.15
Combination = tuple[str, str, str, str, str]

# The first of each is the plainest, and `sentence(scene)` without a generator takes it.
SIZE_WORDS = {"small": ("small", "little"), "large": ("large", "big")}
SPEED_WORDS = {"slow": ("slowly",), "fast": ("fast", "quickly")}
WHEN_WORDS = {"early": ("early", "soon"), "late": ("late",)}
PITCH_WORDS = {
    "F3": "deep", "C4": "low", "G4": "middle", "D5": "high", "A5": "shrill", "E6": "piercing",
}  # fmt: skip
NOUNS = ("tone", "bell", "chime")
VERBS = ("moves", "glides", "flies")
WAY_WORDS = {
    "left": ("to the left", "leftwards"), "right": ("to the right", "rightwards"),
    "up": ("up", "upwards"), "down": ("down", "downwards"),
    "up left": ("up and to the left", "diagonally up and left"),
    "up right": ("up and to the right", "diagonally up and right"),
    "down left": ("down and to the left", "diagonally down and left"),
    "down right": ("down and to the right", "diagonally down and right"),
}  # fmt: skip
GROUND_WORDS = ("over", "on", "in front of")

# {thing}: "small red circle"; {goes}: "moves slowly to the left"; {ground}: "a plain grey
# background"; {note}: "a low bell" or "the note C4"; {when}: "early"; {second}: "blue square".
TEMPLATES = {
    "wall": (
        "A {thing} {goes} {over} {ground} and bounces off the wall {when} with {note}.",
        "A {thing} {goes} {over} {ground}. It hits the wall {when} and makes {note}.",
        "{Over} {ground}, a {thing} {goes} and bounces {when} off the wall with {note}.",
        "{Note} sounds {when} as a {thing} {goes} {over} {ground} and hits the wall.",
    ),
    "silent": (
        "A {thing} {goes} {over} {ground} without a sound.",
        "A {thing} {goes} {over} {ground}. It hits nothing and makes no sound.",
        "{Over} {ground}, a {thing} {goes} in silence.",
    ),
    "meet": (
        "A {thing} {goes} {over} {ground}, meets a {second} and bounces off it {when} with {note}.",
        "A {thing} {goes} {over} {ground}. It hits a {second} {when} and makes {note}.",
        "{Over} {ground}, a {thing} {goes} and bounces {when} off a {second} with {note}.",
        "{Note} sounds {when} as a {thing} {goes} {over} {ground} and hits a {second}.",
    ),
}


def sentence(scene: Scene, rng: np.random.Generator | None = None) -> str:
    """What the clip shows and sounds like, in words; with a generator, in one of many phrasings."""

    def pick(choices):
        return choices[0] if rng is None else choices[rng.integers(len(choices))]

    goes = f"{pick(VERBS)} {pick(SPEED_WORDS[scene.speed])} {pick(WAY_WORDS[scene.direction])}"
    over, note = pick(GROUND_WORDS), ""
    if scene.pitch:
        note = pick((f"a {PITCH_WORDS[scene.pitch]} {pick(NOUNS)}", f"the note {scene.pitch}"))
    return pick(TEMPLATES[scene.kind]).format(
        thing=f"{pick(SIZE_WORDS[scene.size])} {scene.colour} {scene.shape}",
        goes=goes,
        over=over,
        Over=_capital(over),
        ground=f"a {scene.pattern} {scene.background} background",
        note=note,
        Note=_capital(note),
        when=pick(WHEN_WORDS[scene.when]) if scene.when else "",
        second=f"{scene.other} {scene.shape}",
    )


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def combination(scene: Scene) -> Combination:
    """(colour, shape, direction, pitch or "silent", second colour or "alone")."""
    pitch, other = scene.pitch or "silent", scene.other or "alone"
    return scene.colour, scene.shape, scene.direction, pitch, other


def held_out(of: Combination) -> bool:
    """Whether training never sees this combination: a fixed property of its words."""
    return zlib.crc32(" ".join(of).encode()) % 1000 < 1000 * HELD_OUT_SHARE


def combinations() -> Iterator[Combination]:
    """All that there are, in a fixed order: 1,152 of one shape and 2,400 of two."""
    pitches = tuple(sc.PITCHES)
    for of in itertools.product(sc.COLOURS, sc.SHAPES, sc.DIRECTIONS, (*pitches, "silent")):
        yield (*of, "alone")
    for of in itertools.product(sc.COLOURS, sc.SHAPES, sc.STRAIGHT, pitches, sc.COLOURS):
        if of[0] != of[4]:
            yield of


def sample(rng: np.random.Generator, from_held_out: bool = False) -> Scene:
    """A random scene, words and numbers, of a combination that is for training, or held out."""
    while True:
        words = _words(rng)
        if held_out(combination(words)) == from_held_out:
            return sc.place(words, rng)


def _words(rng: np.random.Generator) -> Scene:
    def pick(choices):
        names = tuple(choices)
        return names[rng.integers(len(names))]

    kind = rng.random()
    silent, meet = kind < SILENT_SHARE, kind > 1 - MEET_SHARE
    colour = pick(sc.COLOURS)
    return Scene(
        colour=colour,
        shape=pick(sc.SHAPES),
        size="small" if meet else pick(sc.SIZES),
        direction=pick(sc.STRAIGHT if meet else sc.DIRECTIONS),
        speed="slow" if meet or silent else pick(sc.SPEEDS),
        background=pick(sc.BACKGROUNDS),
        pattern=pick(sc.PATTERNS),
        pitch=None if silent else pick(sc.PITCHES),
        when=None if silent else pick(sc.WHEN),
        other=pick([name for name in sc.COLOURS if name != colour]) if meet else None,
    )


def held_out_sentences(count: int = 200, seed: int = 0) -> list[tuple[Scene, str]]:
    """The test set: scenes of held-out combinations with their sentences, always the same ones;
    a smaller count gives the first of them.
    """
    rng = np.random.default_rng(seed)
    chosen = []
    for _ in range(count):
        scene = sample(rng, from_held_out=True)
        chosen.append((scene, sentence(scene, rng)))
    return chosen


def training_batch(rng: np.random.Generator, count: int) -> tuple[list[Scene], list[str]]:
    """Scenes for `world.stack` and `world.render_batch`, and their sentences; never held out."""
    scenes = [sample(rng) for _ in range(count)]
    return scenes, [sentence(scene, rng) for scene in scenes]


def vocabulary() -> list[str]:
    """Every word and mark that a sentence can have, sorted, in lower case; notes too. The colours
    and pitches that are kept for fine-tuning are among them.
    """
    texts = [text for each in TEMPLATES.values() for text in each]
    fixed = re.sub(r"{\w+}", " ", " ".join(texts))
    tables = (SIZE_WORDS, SPEED_WORDS, WHEN_WORDS, WAY_WORDS)
    words = [word for table in tables for group in table.values() for word in group]
    words += [*PITCH_WORDS, *PITCH_WORDS.values(), *NOUNS, *VERBS, *GROUND_WORDS, "the note"]
    words += [*sc.COLOURS, *sc.NEW_COLOURS, *sc.SHAPES, *sc.BACKGROUNDS, *sc.PATTERNS]
    words += ["background"]
    return sorted(set(re.findall(r"\w+|[.,]", " ".join([fixed, *words]).lower())))
