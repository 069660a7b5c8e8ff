"""Requests: the smallest, and those that are refused."""

import importlib

import numpy as np
import pytest
from generate_cases import assert_same, with_seed

from cosmos3_jax import Cosmos3, T2VRequest, generate

# The package's name `generate` is the function; the module has to be asked for.
module = importlib.import_module("cosmos3_jax.sampling.generate")


def test_a_request_without_a_sampler_is_native(request_, run):
    """The smallest request that research code can write down."""
    smallest = T2VRequest(
        text_ids=request_.text_ids,
        text_mask=request_.text_mask,
        video_shape=request_.video_shape,
        num_inference_steps=3,
        seed=42,
    )
    silent = dict(sound_frames=0, sound_noise=None, neg_text_ids=None, neg_text_mask=None)
    result = run(smallest)
    assert result.keys() == {"video"}
    assert_same(result, run(request_.replace(**silent)))


# One field of a good request made bad, and what is said about it.
BAD_REQUESTS = {
    "noise": (
        dict(noise=np.zeros((1, 6, 3, 3, 4))),
        r"noise has shape \(1, 6, 3, 3, 4\), this request needs \(1, 6, 3, 3, 5\)",
    ),
    "sound noise": (
        dict(sound_noise=np.zeros((1, 5, 2))),
        r"sound_noise has shape \(1, 5, 2\), this request needs \(1, 5, 10\)",
    ),
    "mask": (dict(text_mask=np.ones((1, 9), bool)), r"text_mask has shape \(1, 9\)"),
    "negative batch": (
        dict(neg_text_ids=np.ones((2, 9), int)),
        r"neg_text_ids has shape \(2, 9\), this request needs \(1, 9\)",
    ),
    "negative mask": (
        dict(neg_text_mask=np.ones((1, 9), bool)),
        r"neg_text_mask has shape \(1, 9\), this request needs \(1, 128\)",
    ),
    "clean": (
        dict(clean_latents=np.zeros((1, 6, 1, 3, 5)), frame_mask=np.ones((1, 3), bool)),
        r"clean_latents has shape \(1, 6, 1, 3, 5\)",
    ),
    "frames": (
        dict(clean_latents=np.zeros((1, 6, 3, 3, 5)), frame_mask=np.ones((1, 1), bool)),
        r"frame_mask has shape \(1, 1\)",
    ),
    "mask alone": (
        dict(frame_mask=np.ones((1, 3), bool)),
        "frame_mask goes with one of clean_latents and clean_video, or is None",
    ),
    "no steps": (dict(num_inference_steps=0), "num_inference_steps=0 must be at least 1"),
    "steps": (dict(num_inference_steps=4), "num_inference_steps=4, but the sampler has 3 steps"),
    "no noise": (dict(noise=None), "a request needs noise, or a seed"),
    "no sound noise": (dict(sound_noise=None), "a request with sound needs sound_noise, or a seed"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_bad_requests_are_refused_before_any_work(model, request_, monkeypatch, name):
    change, message = BAD_REQUESTS[name]
    monkeypatch.setattr(module, "walk", lambda *_: pytest.fail("work was begun"))
    with pytest.raises(ValueError, match=message):
        generate(model.params, request_.replace(**change), config=model.config)


def test_sound_is_refused_where_there_is_none(silent_checkpoint, request_, monkeypatch):
    silent = Cosmos3.from_pretrained(silent_checkpoint, dtype="float32")
    monkeypatch.setattr(module, "walk", lambda *_: pytest.fail("work was begun"))
    request = with_seed(request_, 0)
    with pytest.raises(ValueError, match="sound_frames is not 0, but this checkpoint has no sound"):
        generate(silent.params, request, config=silent.config)


def test_unknown_output_is_refused(model, request_):
    with pytest.raises(ValueError, match="output='pixels' is unknown; choose media or latents"):
        generate(model.params, request_, config=model.config, output="pixels")
