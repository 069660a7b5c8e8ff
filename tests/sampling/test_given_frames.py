"""Frames that are given come out as they went in."""

from functools import partial

import jax
import numpy as np
import pytest
from generate_cases import DIFFERENT, OTHER_PROMPT, PROMPT, SETTINGS, assert_equal, assert_same
from hypothesis import given, settings
from hypothesis import strategies as st
from rounding import relative_l2

from cosmos3_jax import generate
from cosmos3_jax.sampling.request import initial_noise


# Frames that are given: none, the first (an image), the first two (a video), any, all.
@pytest.mark.parametrize("given", [[], [0], [0, 1], [1], [2, 0], [0, 1, 2]], ids=str)
def test_given_frames_come_out_as_they_went_in(request_, run, given):
    clean = initial_noise(7, request_.noise.shape)
    mask = np.isin(np.arange(3), given)[None]
    request = request_.replace(clean_latents=clean, frame_mask=mask)
    result = run(request)
    video = np.asarray(result["video"])
    np.testing.assert_array_equal(video[:, :, mask[0]], clean[:, :, mask[0]])  # bit for bit
    free, unconditioned = ~mask[0], run(request_)
    if not given:
        assert_same(result, unconditioned)
    for t in np.flatnonzero(free):
        assert relative_l2(video[:, :, t], clean[:, :, t]) > 0.1  # generated, not copied
    if given and free.any():  # and what is given is read by the other frames and by the sound
        reference = np.asarray(unconditioned["video"])
        assert relative_l2(video[:, :, free], reference[:, :, free]) > DIFFERENT
        assert relative_l2(result["sound"], unconditioned["sound"]) > DIFFERENT

    # Neither the noise under a given frame nor the clean latents under another one is read.
    frames = mask[:, None, :, None, None]
    hidden = request.replace(
        noise=np.where(frames, 9, request.noise).astype(np.float32),
        clean_latents=np.where(frames, clean, 9).astype(np.float32),
    )
    assert_equal(run(hidden), result)


@pytest.fixture(scope="module")
def pair(model):
    """A batch of two requests."""
    return model.prepare([PROMPT, OTHER_PROMPT], **SETTINGS)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    frames=st.lists(st.booleans(), min_size=6, max_size=6),
    seed=st.integers(0, 2**32 - 1),
    scale=st.sampled_from([0.0, 1e-30, 1.0, 3.14, 1e4]),
)
def test_any_given_frames_come_out_bit_for_bit(pair, run, frames, seed, scale):
    """Any set of frames, another one in each example of the batch, and latents of any size."""
    clean = np.float32(scale) * initial_noise(seed, pair.noise.shape)
    mask = np.reshape(frames, (2, 3))
    video = np.asarray(run(pair.replace(clean_latents=clean, frame_mask=mask))["video"])
    for b, t in zip(*np.nonzero(mask), strict=True):
        assert video[b, :, t].tobytes() == clean[b, :, t].tobytes()
    for b, t in zip(*np.nonzero(~mask), strict=True):
        assert np.isfinite(video[b, :, t]).all() and (video[b, :, t] != clean[b, :, t]).any()


def test_given_frames_stand_still_in_the_trajectory(model, request_):
    clean = initial_noise(7, request_.noise.shape)
    request = request_.replace(clean_latents=clean, frame_mask=np.array([[False, True, False]]))
    jitted = jax.jit(
        partial(generate, config=model.config, output="latents", return_trajectory=True)
    )
    for states in jitted(model.params, request)["trajectory"].values():
        for state in np.asarray(states["video"]):
            np.testing.assert_array_equal(state[:, :, 1], clean[:, :, 1])
