"""Settings of a generation: what they do, and what is refused before the model runs."""

import jax
import numpy as np
import pytest
from oracle import NEGATIVE, PROMPT, SETTINGS, prepare

from cosmos3_jax import Cosmos3
from cosmos3_jax.checkpoint import find
from cosmos3_jax.io.prepare import prepare_request
from cosmos3_jax.io.prompt import PROMPT_STYLES
from cosmos3_jax.runtime import programs
from cosmos3_jax.sampling import unipc

# Relative L2 distance of latents, pixels and waveforms from the oracle's, and from those of another
# program. It is float32 rounding that guidance 6 amplifies: test_pipeline.py measures it.
TOLERANCE = 1e-5


def test_explicit_noise_is_what_the_seed_draws(model):
    settings = dict(sound=True, negative_prompt=NEGATIVE, **SETTINGS)
    drawn = model.prepare(PROMPT, seed=9, **settings)
    given = model.prepare(PROMPT, noise=drawn.noise, sound_noise=drawn.sound_noise, **settings)
    np.testing.assert_array_equal(given.noise, drawn.noise)
    np.testing.assert_array_equal(given.sound_noise, drawn.sound_noise)
    # float32 of numpy's stream, and the sound's noise repeats the video's first values (pitfall 15)
    stream = np.random.RandomState(9).standard_normal(drawn.noise.size).astype(np.float32)
    np.testing.assert_array_equal(drawn.noise.ravel(), stream)
    np.testing.assert_array_equal(drawn.sound_noise.ravel(), stream[: drawn.sound_noise.size])
    # either may be given alone; the seed draws the other
    half = model.prepare(PROMPT, seed=9, noise=np.zeros_like(drawn.noise), **settings)
    assert not half.noise.any()
    np.testing.assert_array_equal(half.sound_noise, drawn.sound_noise)


def test_flow_shift_is_read_except_under_karras(model):
    """Pitfall 13, as a request has it."""

    def sigma(schedule, shift):
        return prepare(model, schedule=schedule, flow_shift=shift).sampler.sigma

    np.testing.assert_array_equal(sigma("karras", 1.0), sigma("karras", 10.0))
    for schedule in ("native", "diffusers"):
        assert np.abs(sigma(schedule, 1.0) - sigma(schedule, 10.0)).max() > 0.1


def test_explicit_sigmas_override_the_schedule(model):
    levels = [0.9, 0.55, 0.3, 0.0]
    request = prepare(
        model, sigmas=levels, schedule="karras", num_inference_steps=7, flow_shift=3.0
    )
    assert request.num_inference_steps == 3
    np.testing.assert_array_equal(request.sampler.timestep, [900, 550, 300])
    np.testing.assert_array_equal(request.sampler.sigma, np.float32(levels[:-1]))


def test_the_recipe_fills_in_what_is_left_out(model):
    """A public checkpoint has no recipe of its own: Nano's."""
    request = model.prepare(PROMPT)
    assert request.video_shape == (48, 45, 80)
    assert (float(request.fps), float(request.guidance_scale)) == (24, 6)
    np.testing.assert_array_equal(
        request.sampler.sigma, unipc.tableau(unipc.sigmas("native", 35, 10.0)).sigma
    )
    named = model.prepare(
        PROMPT, num_frames=189, height=720, width=1280, fps=24.0, num_inference_steps=35,
        guidance_scale=6.0, flow_shift=10.0, schedule="native", seed=42, prompt_style="native",
    )  # fmt: skip
    assert jax.tree.structure(named) == jax.tree.structure(request)
    jax.tree.map(np.testing.assert_array_equal, named, request)


# Settings that cannot work, and what is said about them: the value, the limit and the way out.
BAD_SETTINGS = [
    (dict(num_frames=190), r"num_frames=190 is not 4k\+1; nearest are 189 and 193"),
    (dict(num_frames=0), r"num_frames=0 is not 4k\+1; nearest are 1 and 5"),
    (dict(height=50), "height=50 is not a multiple of 16; nearest are 48 and 64"),
    (dict(width=8), "width=8 is not a multiple of 16; nearest are 16 and 32"),
    (dict(fps=0), "fps=0 must be positive and finite"),
    (dict(fps=float("nan"), sound=True), "fps=nan must be positive and finite"),
    (dict(num_frames=1, sound=True), "num_frames=1 makes an image, which has no sound"),
    (dict(schedule="fast"), "schedule='fast' is unknown; choose one of native, diffusers, karras"),
    (
        dict(prompt_style="x"),
        f"prompt style 'x' is unknown; choose one of {', '.join(PROMPT_STYLES)}",
    ),
    (dict(num_inference_steps=0), "num_inference_steps=0 must be at least 1"),
    (dict(flow_shift=0), "flow_shift=0 must be positive"),
    (dict(sigmas=[0.5, 0.1]), "sigmas must end in 0, the last is 0.1"),
    (dict(guidance_scale=float("nan")), "guidance_scale=nan must be a finite number"),
    (
        dict(noise=np.zeros((1, 6, 3, 5, 3))),
        r"noise has shape \(1, 6, 3, 5, 3\), this request needs \(1, 6, 3, 3, 5\)",
    ),
    (
        dict(sound=True, sound_noise=np.zeros((1, 5, 9))),
        r"sound_noise has shape \(1, 5, 9\), this request needs \(1, 5, 10\)",
    ),
    (dict(seed=-1), "seed=-1 is outside 0..4294967295"),
    (dict(seed=2**32), "seed=4294967296 is outside 0..4294967295"),
    (dict(seed=[1, 2]), "2 seeds for 1 prompts"),
    (dict(negative_prompt=["a", "b"]), "2 negative prompts for 1 prompts"),
]


@pytest.mark.parametrize(("settings", "message"), BAD_SETTINGS, ids=lambda x: str(x)[:40])
def test_bad_settings_are_refused_without_weights(public_checkpoint, settings, message):
    config, tokenizer = find.open_folder(public_checkpoint)
    small = dict(num_frames=9, height=48, width=80)
    with pytest.raises(ValueError, match=message):
        prepare_request(config, tokenizer, PROMPT, **small | settings)


@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [([], ValueError, "the list of prompts is empty"), ([3], TypeError, "prompt is a int")],
)
def test_bad_prompts_are_refused(model, prompt, error, message):
    with pytest.raises(error, match=message):
        model.prepare(prompt)


def test_bad_input_stops_before_the_model_runs(model, monkeypatch):
    monkeypatch.setattr(programs.Run, "__call__", lambda *_: pytest.fail("the model ran"))
    for settings, message in BAD_SETTINGS[:3]:
        with pytest.raises(ValueError, match=message):
            model.generate(PROMPT, **SETTINGS | settings)
    with pytest.raises(ValueError, match="output='pixels' is unknown; choose media or latents"):
        model.generate(PROMPT, output="pixels")


def test_sound_is_refused_where_there_is_none(silent_checkpoint):
    config, tokenizer = find.open_folder(silent_checkpoint)
    with pytest.raises(ValueError, match="sound is asked for, but this checkpoint has none"):
        prepare_request(config, tokenizer, PROMPT, sound=True)
    with pytest.raises(ValueError, match="loaded without sound, or has none"):
        Cosmos3.from_pretrained(silent_checkpoint).decode_sound(np.zeros((1, 5, 3)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(guidance_scale=[3, 8]), r"guidance_scale=\[3, 8\] must be a finite number"),
        (dict(seed="42"), "seed='42' must be a whole number"),
        (dict(seed=1.5), "seed=1.5 must be a whole number"),
        (dict(sound_noise=np.zeros((1, 5, 3))), "sound_noise is given, but no sound"),
    ],
)
def test_settings_of_the_wrong_kind(model, settings, message):
    with pytest.raises(ValueError, match=message):
        model.prepare("A cat", num_frames=5, height=32, width=48, **settings)
