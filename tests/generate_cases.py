"""A request of three steps, and how results of two programs are compared."""

import numpy as np
from rounding import relative_l2

# Odd latent height and width, (3, 3, 5), and sound; short prompts, which share one padding bucket.
SETTINGS = dict(
    num_frames=9, height=48, width=80, num_inference_steps=3, guidance_scale=3.0, sound=True,
    negative_prompt="blurry",
)  # fmt: skip
PROMPT, OTHER_PROMPT = "A red ball", "Rain on a window pane"
# Relative L2 distance of two programs for the same arithmetic: another batch size, vmap, another
# padding. Guidance amplifies rounding; `test_tolerance` measures it at the largest scale used here.
SAME = 2e-5
# What counts as another result: every one below differs by more than 0.005.
DIFFERENT = 1e-3


def with_seed(request, seed):
    """The same request, its noise drawn by `generate` itself."""
    return request.replace(noise=None, sound_noise=None, seed=seed)


def assert_same(ours, reference):
    """Two programs, which may round differently."""
    assert ours.keys() == reference.keys() <= {"video", "sound"}
    for name in ours:
        assert relative_l2(ours[name], reference[name]) <= SAME, name


def assert_equal(ours, reference):
    """One program, twice."""
    assert ours.keys() == reference.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], reference[name])
