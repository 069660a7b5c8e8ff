"""`--speed fast`: which noise levels it takes, what the record says, and what is refused."""

import json

import numpy as np
import pytest
from command_line import BARE, TEXTS

from cosmos3_jax import Cosmos3
from cosmos3_jax.cli import main as cli
from cosmos3_jax.config import Config, Recipes
from cosmos3_jax.io.prepare import resolve_settings, resolve_sigmas
from cosmos3_jax.io.settings import Settings
from cosmos3_jax.recipes import MODES
from cosmos3_jax.sampling import unipc


def resolved(model: str = "Nano", **settings) -> tuple[Settings, np.ndarray]:
    config = Config(recipes=Recipes(model))
    found, *_ = resolve_settings(config.recipes, Settings(**settings))
    return found, resolve_sigmas(config, found)


def of_u(levels: np.ndarray, shift: float) -> np.ndarray:
    """The levels before their shift, without the 0 at the end."""
    return levels[:-1] / (shift - (shift - 1) * levels[:-1])


def test_half_of_35_are_as_dense_as_all_at_both_ends():
    """Every step in u is between one step of the exact schedule and three; the least are first and
    last, the largest is in the middle, and both halves are alike.
    """
    exact, fast = (unipc.sigmas("native", 35, 10.0, evaluations=k) for k in (None, 18))
    one = -np.diff(of_u(exact, 10.0))[0]
    steps = -np.diff(of_u(fast, 10.0)) / one
    np.testing.assert_allclose(steps, steps[::-1], rtol=1e-6)
    assert 1 < steps[0] < 1.05 and (np.diff(steps[:9]) > 0).all() and 2.9 < steps[8] < 3
    assert fast[0] == exact[0] and fast[-2:] == pytest.approx(exact[-2:])


@pytest.mark.parametrize("steps", [1, 2, 3, 24, 35, 100])
def test_any_number_of_evaluations_can_be_stepped_on(steps):
    for count in {1, 2, 3, steps // 2, steps - 1, steps} & {*range(1, steps + 1)}:
        levels = unipc.sigmas("native", steps, 3.0, evaluations=count)
        assert np.isfinite(unipc.tableau(levels).predict).all() and len(levels) == count + 1


@pytest.mark.parametrize("model", ["Nano", "Super"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("evaluations", [None, 12, 1])
def test_every_recipe_has_the_rule(model, mode, evaluations):
    """The ends are those of the exact schedule; from both, the steps in u grow to the middle."""
    given = {
        "text2image": {"num_frames": 1}, "image2video": {"image": np.zeros((96, 96, 3), np.uint8)},
        "video2video": {"video": np.zeros((9, 96, 96, 3), np.uint8)},
    }.get(mode, {})  # fmt: skip
    exact, whole = resolved(model, **given)
    fast, levels = resolved(model, **given, speed="fast", evaluations=evaluations)
    count = evaluations or -(-exact.num_inference_steps // 2)
    assert (fast.speed, fast.evaluations, len(levels)) == ("fast", count, count + 1)
    np.testing.assert_allclose(levels[0], whole[0])
    if count > 1:
        np.testing.assert_allclose(levels[-2], whole[-2])
    steps = -np.diff(of_u(levels, exact.flow_shift))
    np.testing.assert_allclose(steps, steps[::-1], rtol=1e-6)
    assert (np.diff(steps[: len(steps) // 2]) > 0).all()


def test_exact_is_the_default_and_as_many_evaluations_are_exact():
    exact, levels = resolved()
    assert (exact.speed, exact.evaluations, len(levels)) == ("exact", None, 36)
    for given in ({"speed": "fast", "evaluations": 35}, {"speed": "exact", "evaluations": 35}):
        same, again = resolved(**given)
        assert (same.speed, same.evaluations) == ("exact", None)
        np.testing.assert_array_equal(again, levels)
    one, _ = resolved(speed="fast", num_inference_steps=1, schedule="karras")  # none are left out
    assert one.speed == "exact"


@pytest.mark.parametrize("given", [{"speed": "fast"}, {"evaluations": 2}, {"speed": "exact"}])
def test_given_levels_win(given):
    settings, levels = resolved(sigmas=[0.9, 0.5, 0.0], **given)
    assert (settings.speed, settings.evaluations, [*levels]) == ("exact", None, [0.9, 0.5, 0.0])


def test_levels_of_a_record_are_known_again():
    _, levels = resolved(speed="fast")
    settings, again = resolved(speed="fast", sigmas=levels.tolist())
    assert (settings.speed, settings.evaluations) == ("fast", 18)
    np.testing.assert_array_equal(again, levels)
    others, _ = resolved(speed="fast", sigmas=levels.tolist(), schedule="karras")
    assert others.speed == "exact"


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"speed": "fast", "schedule": "karras"},
            "18 evaluations of 35 steps, as of speed=fast, .* not for karras: take speed=exact or",
        ),
        ({"evaluations": 18, "schedule": "diffusers"}, "native schedule, not for diffusers"),
        (
            {"speed": "exact", "evaluations": 18},
            "speed=exact evaluates the model at each of 35 steps, and evaluations=18 is given",
        ),
        ({"evaluations": 36}, "evaluations=36 must be a whole number from 1 to the 35 steps"),
        ({"evaluations": 0}, "evaluations=0 must be"),
        ({"speed": "turbo"}, 'speed=.turbo. must be "exact" or "fast"'),
    ],
)
def test_what_cannot_be_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        resolved(**settings)


def test_the_request_has_as_many_steps():
    request = Cosmos3.open("random").prepare("A red ball.", speed="fast", num_inference_steps=7)
    assert request.num_inference_steps == len(request.sampler.timestep) == 4


def test_the_record_says_what_was_resolved_and_makes_it_again(tmp_path, own_cache):
    out, again, other = (tmp_path / name for name in ("out.mp4", "again.mp4", "other.mp4"))
    fast = [*BARE, *TEXTS, "--steps", "5", "--speed", "fast", "--out", str(out)]
    assert cli.main(fast) == 0
    record = json.loads(out.with_suffix(".json").read_text())
    asked = ("speed", "num_inference_steps", "evaluations")
    assert [record[name] for name in asked] == ["fast", 5, 3]
    assert len(record["sigmas"]) == 4
    assert cli.main(["generate", "--from-record", str(out), "--out", str(again)]) == 0
    assert again.read_bytes() == out.read_bytes()
    for given, expected in (
        (["--speed", "exact"], ["exact", 5, 5]), (["--evaluations", "2"], ["fast", 5, 2]),
        (["--steps", "7"], ["fast", 7, 4]), (["--sigmas", "0.9,0.5,0.2,0"], ["exact", 3, 3]),
    ):  # fmt: skip
        changed = ["generate", "--from-record", str(out), *given, "--out", str(other)]
        assert cli.main([*changed, "--overwrite"]) == 0
        record = json.loads(other.with_suffix(".json").read_text())
        assert [record[name] for name in asked] == expected
    # A finer choice than half is kept with other steps.
    finer = ["generate", "--from-record", str(out), "--evaluations", "2", "--overwrite"]
    assert cli.main([*finer, "--out", str(other)]) == 0
    changed = ["generate", "--from-record", str(other), "--steps", "7", "--out", str(again)]
    assert cli.main([*changed, "--overwrite"]) == 0
    record = json.loads(again.with_suffix(".json").read_text())
    assert [record[name] for name in asked] == ["fast", 7, 2]
