"""The synthetic world, its sentences, and a judge that must be right on true clips and able to say
no.
"""

import collections
import dataclasses
import itertools
import re

import numpy as np
import pytest

from cosmos3_jax.io import media
from examples.tiny import clips as cl
from examples.tiny import grammar, judge, judge_check, sheets, sight, world
from examples.tiny import scenes as sc
from examples.tiny.scenes import Scene

WALL = Scene(
    "red", "circle", "large", "left", "slow", "grey", "striped", "G4", "early",
    radius=18.0, x=28.0, y=50.0, pace=18.0,
)  # fmt: skip
BOUNCE = 10 / 18  # seconds: the circle touches when its centre is at 18


@pytest.fixture(scope="module")
def held_out():
    """The first twelve of the test set, and their true clips."""
    chosen = grammar.held_out_sentences(12)
    scenes = [scene for scene, _ in chosen]
    return scenes, [text for _, text in chosen], list(judge_check.true_clips(scenes))


@pytest.fixture(scope="module")
def verdicts(held_out):
    return [judge.judge(*clip) for clip in held_out[2]]


@pytest.fixture(scope="module")
def training():
    """300 scenes and sentences of training."""
    return grammar.training_batch(np.random.default_rng(1), 300)


@pytest.fixture(scope="module")
def wall_clip():
    return next(judge_check.true_clips([WALL]))


def marks(scene: Scene, verdict: judge.Verdict) -> dict[str, bool | None]:
    """Every check on one clip."""
    words = {name: check(scene, verdict) for name, check in judge.WORDS.items()}
    senses = {name: check(scene, *verdict) for name, check in judge.SENSES.items()}
    return words | senses


def wrong(scene: Scene, verdict: judge.Verdict) -> set[str]:
    return {name for name, mark in marks(scene, verdict).items() if mark is not None and not mark}


# Scenes
# --------------------------------------------------------------------------------------------------


def test_bounces_are_where_a_simulation_has_them(training):
    """Small steps that turn back at the picture's borders, or where two bodies would overlap."""
    step = 2e-3
    for scene in training[0][:30]:
        reach = np.array(sc.REACH[scene.shape]) * scene.radius  # [A, low and high side]
        each = [body.position.copy() for body in sc.bodies(scene)]
        speeds = [body.velocity.copy() for body in sc.bodies(scene)]
        found = []
        for n in range(int(sc.DURATION / step)):
            for at, speed in zip(each, speeds, strict=True):
                at += step * speed
                out = ((at - reach[:, 0] < 0) & (speed < 0)) | (
                    (at + reach[:, 1] > sc.WORLD) & (speed > 0)
                )
                found += [n * step] * int(out.sum())
                speed[out] *= -1
            if len(each) == 2:
                axis = int(np.argmax(np.abs(speeds[0])))
                low, high = sorted(each, key=lambda at: at[axis])
                towards = (each[1] - each[0])[axis] * (speeds[1] - speeds[0])[axis] < 0
                if towards and low[axis] + reach[axis, 1] > high[axis] - reach[axis, 0]:
                    found.append(n * step)
                    speeds = [-speed for speed in speeds]
        times = [bounce.time for bounce in sc.bounces(scene)]
        # A step late at worst at every bounce, and three steps of drift by the third.
        np.testing.assert_allclose(times, found, atol=4 * step, err_msg=str(scene))


def test_scenes_keep_what_their_words_promise(training):
    for scene in training[0]:
        times = [bounce.time for bounce in sc.bounces(scene)]
        least, most = sc.SIZES[scene.size]
        assert least <= scene.radius <= most
        least, most = sc.SPEEDS[scene.speed]
        assert least <= scene.pace <= most
        if scene.when is None:
            assert not times
            continue
        earliest, latest = sc.WHEN[scene.when]
        assert earliest <= times[0] <= latest
        assert len(times) <= (1 if scene.other else sc.MAX_BOUNCES)
        assert np.all(np.diff(times) >= sc.MIN_GAP - 1e-9)
        assert times[-1] <= sc.LAST_BOUNCE


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"pitch": None}, "give both"),
        ({"pitch": None, "when": None, "speed": "fast"}, "always reaches a wall"),
        ({"other": "blue"}, "need room"),
        ({"other": "red", "size": "small"}, "of two colours"),
    ],
)
def test_words_that_contradict_each_other_are_refused(change, why):
    with pytest.raises(ValueError, match=why):
        sc.place(dataclasses.replace(WALL, **change), np.random.default_rng(0))


# Sentences
# --------------------------------------------------------------------------------------------------


def test_training_never_meets_a_held_out_combination(training):
    assert not any(grammar.held_out(grammar.combination(scene)) for scene in training[0])
    chosen = grammar.held_out_sentences(200)
    assert all(grammar.held_out(grammar.combination(scene)) for scene, _ in chosen)
    assert chosen[:50] == grammar.held_out_sentences(50)
    assert {scene.kind for scene, _ in chosen} == {"silent", "wall", "meet"}


def test_every_pair_of_attributes_is_trained():
    """What is held out are combinations of known things; the hash is fixed, so this is exact."""
    everything = list(grammar.combinations())
    out = [of for of in everything if grammar.held_out(of)]
    assert 0.08 < len(out) / len(everything) < 0.12

    def pairs(combinations):
        numbered = (enumerate(of) for of in combinations)
        return {pair for of in numbered for pair in itertools.combinations(of, 2)}

    assert pairs(of for of in everything if not grammar.held_out(of)) == pairs(everything)


def test_sentences_say_what_the_scene_is(training):
    words = set(grammar.vocabulary())
    phrasings = collections.defaultdict(set)
    for scene, text in zip(*training, strict=True):
        lower = text.lower()
        used = re.findall(r"\w+|[.,]", lower)
        assert set(used) <= words
        assert "{" not in text and text[0].isupper() and text.endswith(".")
        for said in (scene.colour, scene.shape, scene.pattern, scene.background, scene.other):
            assert said is None or said in used
        for way in scene.direction.split():
            assert way in used or f"{way}wards" in used
        named = {name for name in sc.PITCHES if name.lower() in used}
        named |= {name for name, word in grammar.PITCH_WORDS.items() if word in used}
        assert named == ({scene.pitch} if scene.pitch else set())
        phrasings[scene.kind].add(text.split()[0])
    assert all(len(starts) > 2 for starts in phrasings.values())
    assert grammar.sentence(WALL) == (
        "A large red circle moves slowly to the left over a striped grey background"
        " and bounces off the wall early with a middle tone."
    )


# Pixels and samples
# --------------------------------------------------------------------------------------------------


def test_a_clip_shows_and_sounds_what_the_numbers_say(wall_clip):
    video, sound = wall_clip
    assert video.shape == (49, 96, 96, 3) and video.dtype == np.float32
    assert sound.shape == (2, 52 * 1920) == (2, world.sound_samples())
    red = np.array(sc.COLOURS["red"]) / 255
    covered = np.abs(video - red).max(-1) < 1e-3
    # A disc of radius 18 less its blended edge, about one pixel wide.
    assert np.all(np.abs(covered.sum((1, 2)) - np.pi * 17.5**2) < 30)
    columns = (covered.sum(1) @ (np.arange(96) + 0.5)) / covered.sum((1, 2))
    time = np.arange(49) / 24
    # Whole pixels only: the centre of those is within a fifth of a pixel of the true one.
    np.testing.assert_allclose(columns, 18 + np.abs(28 - 18 - 18 * time), atol=0.2)
    first = np.flatnonzero(np.abs(sound).max(0) > 1e-4)[0] / 48_000
    assert 0 <= first - BOUNCE < 1e-3  # the onset is soft
    assert 0.85 < np.abs(sound[0]).max() < 0.97  # the left wall
    assert np.abs(sound[1]).max() < 0.35


def test_a_picture_is_the_same_at_twice_the_resolution(wall_clip):
    fine, _ = world.render(WALL, frames=1, size=192)
    coarse = fine.astype(np.float32).reshape(96, 2, 96, 2, 3).mean((1, 3)) / 255
    # Edges differ by how their width is blended, everything else by rounding to 8 bits.
    difference = np.abs(coarse - wall_clip[0][0])
    assert difference.mean() < 0.004 and difference.max() < 0.2


def test_nothing_touches_nothing_sounds():
    silent = dataclasses.replace(WALL, pitch=None, when=None, x=60.0)
    assert not sc.bounces(silent)
    [(_, sound)] = judge_check.true_clips([silent])
    assert not np.any(sound)


# The judge
# --------------------------------------------------------------------------------------------------


def test_the_judge_is_right_on_true_clips(held_out, verdicts):
    for scene, verdict in zip(held_out[0], verdicts, strict=True):
        assert not wrong(scene, verdict), (scene, verdict)
        times = [bounce.time for bounce in sc.bounces(scene)]
        # Turns are looked for every 1/48 s, onsets every 2.5 ms.
        np.testing.assert_allclose([turn.time for turn in verdict.sight.bounces], times, atol=0.025)
        np.testing.assert_allclose([tone.time for tone in verdict.heard.tones], times, atol=0.004)


@pytest.mark.parametrize("damage", ["mp4", "blur", "coarse", "noise", "sound"])
def test_the_judge_is_right_on_damaged_clips(held_out, damage):
    scenes, _, clips = held_out
    rng = np.random.default_rng(0)
    for scene, clip in list(zip(scenes, clips, strict=True))[:3]:
        verdict = judge.judge(*judge_check.DAMAGES[damage](*clip, rng))
        assert not wrong(scene, verdict), (scene, verdict)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"colour": "pink"}, {"colour", "colour and shape"}),
        ({"shape": "square"}, {"shape", "colour and shape"}),
        ({"size": "small"}, {"size"}),
        ({"direction": "up left"}, {"direction"}),
        ({"speed": "fast"}, {"speed"}),
        ({"background": "plum"}, {"background"}),
        ({"pattern": "plain"}, {"pattern"}),
        ({"pitch": "C4"}, {"pitch"}),
        ({"when": "late"}, {"first bounce early or late", "first tone early or late"}),
        ({"pitch": None, "when": None}, {"nothing touches or sounds"}),
        ({"other": "blue"}, {"colour", "colour and shape"}),
    ],
)
def test_other_words_are_wrong_for_a_clip(wall_clip, change, expected):
    seen = judge.judge(*wall_clip)
    assert not wrong(WALL, seen)
    assert wrong(dataclasses.replace(WALL, **change), seen) == expected


TOGETHER = {"bounce and tone, 1/24 s", "bounce and tone, 4/24 s", "first bounce and tone, 1/24 s"}


def later(sound: np.ndarray, seconds: float) -> np.ndarray:
    return np.roll(sound, round(seconds * 48_000), axis=1)


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda sound: later(sound, 0.075), TOGETHER - {"bounce and tone, 4/24 s"}),
        (lambda sound: later(sound, 0.2), TOGETHER),
        (lambda sound: sound * 0,
         TOGETHER | {"pitch", "first tone early or late", "side of bounce and tone"}),
        (lambda sound: sound + later(sound, 0.6) * 0.9,
         TOGETHER - {"first bounce and tone, 1/24 s"}),
        (lambda sound: sound[::-1], {"side of bounce and tone"}),
        # The same envelope and no pitch: noise.
        (lambda sound: sound * np.random.default_rng(0).choice([-1, 1], sound.shape), {"pitch"}),
    ],
    ids=["late by two frames", "late by five", "missing", "one too many", "other side", "noise"],
)  # fmt: skip
def test_a_spoilt_sound_is_wrong(wall_clip, spoil, expected):
    video, sound = wall_clip
    assert wrong(WALL, judge.judge(video, spoil(sound))) == expected


def test_a_spoilt_picture_is_wrong(wall_clip):
    video, sound = wall_clip
    mirrored = judge.judge(video[:, :, ::-1], sound)
    assert wrong(WALL, mirrored) == {
        "direction",
        "side of bounce and tone",
        "pattern",
    }  # the stripes too
    frozen = judge.judge(np.broadcast_to(video[:1], video.shape), sound)
    assert wrong(WALL, frozen) >= {"direction", *TOGETHER}
    # The second half held still: no turn back, so nothing to ring for.
    stopped = np.concatenate([video[:14], np.broadcast_to(video[13:14], (35, 96, 96, 3))])
    assert TOGETHER <= wrong(WALL, judge.judge(stopped, sound))


def test_what_is_kept_for_fine_tuning_can_be_drawn_and_judged():
    new = dataclasses.replace(WALL, colour="orange", pitch="E6")
    (clip,) = judge_check.true_clips([new])
    assert not wrong(new, judge.judge(*clip))
    assert not {"orange", "E6"} & {name for of in grammar.combinations() for name in of}
    assert set(re.findall(r"\w+", grammar.sentence(new).lower())) <= set(grammar.vocabulary())


@pytest.mark.parametrize("kind", ["black", "noise", "colour"])
def test_a_clip_without_shapes_has_nothing_right(kind):
    rng = np.random.default_rng(0)
    shape = (49, 96, 96, 3)
    video = {
        "black": np.zeros(shape, np.float32),
        "noise": rng.random(shape, np.float32),
        "colour": np.broadcast_to(np.float32([0.9, 0.1, 0.1]), shape),
    }[kind]
    seen = judge.judge(video, np.zeros((2, 98_000)))
    assert {"colour", "shape", "colour and shape", "direction", *TOGETHER} <= wrong(WALL, seen)


def test_a_clip_of_another_form_is_refused():
    sound = np.zeros((2, 98_000))
    with pytest.raises(ValueError, match=r"expected \[T, H, W, 3\]"):
        judge.judge(np.zeros((49, 96, 64, 3)), sound)
    with pytest.raises(ValueError, match="25 frames at 24"):
        judge.judge(np.zeros((25, 96, 96, 3)), sound)
    with pytest.raises(ValueError, match="NaN"):
        judge.judge(np.full((49, 96, 96, 3), np.nan), sound)
    with pytest.raises(ValueError, match=r"expected \[2, samples\]"):
        judge.judge(np.zeros((49, 96, 96, 3)), sound[0])


def test_the_table_has_shuffled_scores_near_chance(held_out, verdicts):
    rows = {row.attribute: row for row in judge.score(held_out[0], verdicts)}
    assert all(row.right == row.total for row in rows.values())
    assert all(rows[name].total >= 9 for name in judge.BARS)  # the other sentences are silent
    # Twelve clips: chance has to be well below every bar; shuffled ones scatter around it.
    for name in judge.BARS:
        assert rows[name].chance < 0.4 and rows[name].shuffled < 0.7, rows[name]
    table = judge.markdown(list(rows.values()))
    assert "| colour and shape | 100.0% (12/12)" in table
    assert "| untrained |" in judge.markdown(
        list(rows.values()), {"untrained": list(rows.values())}
    )
    with pytest.raises(ValueError, match="12 scenes and 11 verdicts"):
        judge.score(held_out[0], verdicts[:-1])


def test_bounds_of_a_share():
    # Newcombe, "Two-sided confidence intervals for the single proportion", 1998, table I.
    np.testing.assert_allclose(judge.wilson(81, 263), (0.2553, 0.3662), atol=5e-5)
    np.testing.assert_allclose(judge.wilson(0, 20), (0, 0.1611), atol=5e-5)


def test_a_folder_is_judged_and_drawn(held_out, verdicts, tmp_path, monkeypatch, capsys):
    scenes, texts, clips = (each[:2] for each in held_out)
    paths = cl.save_scenes(tmp_path, scenes, texts)
    for path, (video, sound) in zip(paths, clips, strict=True):
        clip = {"video": np.moveaxis(video, -1, 0), "sound": sound, "sample_rate": 48_000}
        media.save_mp4(clip, path)
    stored = cl.read_folder(tmp_path)
    assert [clip.scene for clip in stored] == scenes
    assert [clip.sentence for clip in stored] == texts
    table = tmp_path / "table.json"
    command = ["judge", "--folder", str(tmp_path), "--json", str(table)]
    monkeypatch.setattr("sys.argv", command)
    judge.main()
    assert "| direction | 100.0% (2/2)" in capsys.readouterr().out
    assert '"bounce and tone, 1/24 s"' in table.read_text()
    picture = sheets.sheet([(clip.video, clip.sound, clip.sentence) for clip in stored], columns=3)
    pixels = np.asarray(picture)
    for scene in scenes:
        colour = np.array(sc.colour_rgb(scene.colour))
        assert (np.abs(pixels.astype(int) - colour).max(-1) < 20).sum() > 1000
    with pytest.raises(ValueError, match="0 clips"):
        sheets.sheet([])


def test_turns_are_found_on_uneven_and_noisy_paths():
    """A model's shapes change speed a little at a wall, and shake."""
    time = np.arange(49) / 24
    shake = np.random.default_rng(0).normal(0, 0.4, 49)
    path = 60 - 30 * time + 54 * np.maximum(time - 0.9, 0) + shake
    velocity, turns = sight.fit_path(path, 24.0)
    assert velocity == pytest.approx(-30, abs=2)
    assert turns == pytest.approx([0.9], abs=1 / 24)
    assert sight.fit_path(60 - 20 * time + shake, 24.0)[1] == []
