"""Iterables without an end, or nearly, are refused before they are gone through."""

import itertools

import pytest
from small_config import CONFIG

from cosmos3_jax.io.prepare import prepare_request

SIZES = dict(num_frames=5, height=32, width=32)
LONG = range(10**9)


@pytest.mark.parametrize(
    "name, value, says",
    [
        ("seed", LONG, "1025 seeds for 1 prompts"),
        ("sigmas", LONG, "sigmas=range.* must be a list of numbers"),
        ("noise", LONG, "noise=range.* must be real numbers"),
        ("image", LONG, "the image is a range of more entries"),
        ("video", LONG, "the video is a range of more entries"),
    ],
)
def test_settings(byte_tokenizer, name, value, says):
    with pytest.raises(ValueError, match=says):
        prepare_request(CONFIG, byte_tokenizer, "a", **SIZES | {name: value})


def test_condition_frames(byte_tokenizer):
    clip = [[[[0] * 3] * 32] * 32] * 5
    with pytest.raises(ValueError, match="condition_frames has 2, but this video"):
        prepare_request(
            CONFIG, byte_tokenizer, "a", **SIZES, video=clip, condition_frames=itertools.count()
        )


def test_prompts(byte_tokenizer):
    for prompts in (LONG, itertools.repeat("a")):
        with pytest.raises(ValueError, match="batch=1025 is beyond the limit"):
            prepare_request(CONFIG, byte_tokenizer, prompts, **SIZES)
