"""Text, positions, timestep, given frames and patches: against the oracle, and mistaken."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from rounding import relative_l2, rounded_to
from transformer_cases import (
    BUCKET,
    FAR,
    FRAMES,
    HEIGHT,
    MODELS,
    TOLERANCE,
    TOLERANCES,
    WIDTH,
    Example,
    build,
    encode,
    error,
    example,
    ours,
    padded,
    step,
)

from cosmos3_jax.config import TransformerConfig
from cosmos3_jax.models import rope
from cosmos3_jax.models.transformer import patch_grid

# ---------------------------------------------------------------- text and its padding


@pytest.mark.parametrize("garbage", [1, 263, -1, 10_000], ids=lambda x: f"padding={x}")
def test_padding_tokens_change_nothing(half, garbage):
    """Bit for bit, in float32 and bfloat16, even for ids outside the vocabulary."""
    for model in half:
        case = example()
        reference = ours(model, case)
        found = ours(model, case, text=padded(case.ids, padding=garbage))
        for name in reference:
            np.testing.assert_array_equal(found[name], reference[name])


def test_padding_length_changes_rounding_only():
    """Another bucket is another program: equal terms, summed over keys in another order."""
    model, case = build(), example()
    reference = ours(model, case)
    for bucket in (len(case.ids), 64):
        found = ours(model, case, text=padded(case.ids, bucket=bucket, padding=5))
        assert error(found, reference) <= TOLERANCE
    # the mistake: padding that is attended to
    ids, _ = padded(case.ids, padding=5)
    assert (
        error(ours(model, case, text=(ids, np.ones_like(ids, bool))), reference) > FAR * TOLERANCE
    )


def test_batch_of_different_prompts_equals_each_alone():
    """Lengths, frame rates, given frames and latents of one row have no effect on another's."""
    model = build()
    cases = [
        example(7, seed=1, given=(0,)),
        example(40, seed=2, fps=30.0),
        example(BUCKET, seed=3, given=(1, 5), fps=12.5),
    ]
    together = ours(model, *cases)
    for row, case in enumerate(cases):
        found = {name: x[row] for name, x in together.items()}
        assert error(found, ours(model, case)) <= TOLERANCE
        assert error(found, case.oracle(model.oracle)) <= TOLERANCE


def test_text_is_causal():
    """A token changes the keys and values of its own place and of later ones, of none before."""
    model, case = build(), example(40)
    changed = dataclasses.replace(case, ids=[*case.ids[:20], 1, *case.ids[21:]])
    assert changed.ids[20] != case.ids[20]
    before, after = encode(model, case), encode(model, changed)
    for old, new in ((before.key, after.key), (before.value, after.value)):
        np.testing.assert_array_equal(new[:, :, :20], old[:, :, :20])
        assert (np.abs(new - old)[1:, 0, 20:40].max(axis=(0, 2, 3)) > 1e-3).all()


# ---------------------------------------------------------------- positions


def positions(config: TransformerConfig, case: Example, text_length: float) -> list[np.ndarray]:
    """The positions written out in float64: video [3, M] and sound [3, s]."""
    frames, rows, columns = np.indices(patch_grid(config, case.video.shape[:3])).reshape(3, -1)
    sound = np.zeros((3, case.sound_frames))
    sound[0] = np.arange(case.sound_frames) / 25 * 24 + text_length + 15000
    return [np.stack([frames / (case.fps / 4) * 6 + text_length + 15000, rows, columns]), sound]


def sound_behind_the_video(config, case):
    video, sound = positions(config, case, len(case.ids))
    sound[0] += video[0].max() + 1 - sound[0].min()
    return [video, sound]


# name -> the positions and the frequencies, mistaken
POSITION_MISTAKES = {
    "none": lambda config, case: positions(config, case, len(case.ids)),
    "bfloat16 positions": lambda config, case: [
        rounded_to(7, x) for x in positions(config, case, len(case.ids))
    ],
    "TF32 product": lambda config, case: [
        rounded_to(10, x) for x in positions(config, case, len(case.ids))
    ],
    "no text length": lambda config, case: positions(config, case, 0),
    "sound behind the video": sound_behind_the_video,
    "frame rate ignored": lambda config, case: positions(
        config, dataclasses.replace(case, fps=24.0), len(case.ids)
    ),
}


@pytest.mark.parametrize("mistake", POSITION_MISTAKES)
@pytest.mark.parametrize("name", MODELS)
def test_positions(name, mistake):
    """Pitfalls 1 and 12: blurred positions, and media placed without the length of the text.

    Every mistake is made in a table written out here; the table without one passes, the others are
    more than a thousand tolerances away from the oracle.
    """
    model, case = build(name), example(40, fps=30.0)
    places = np.concatenate(POSITION_MISTAKES[mistake](model.config, case), axis=1)
    frequencies = rope.inverse_frequencies(model.config)
    if mistake == "TF32 product":
        frequencies = rounded_to(10, frequencies)
    # float32 places and products, as in the reference: at 15,000 their rounding is visible
    angles = places.astype(np.float32)[rope.axis_of_slot(model.config)].T
    angles = (angles * frequencies.astype(np.float32)).astype(np.float64)
    condition = encode(model, case)
    table = tuple(function(angles)[None].astype(np.float32) for function in (np.cos, np.sin))
    found = step(model, condition.replace(rope=table), case)
    distance = error(found, case.oracle(model.oracle))
    if mistake == "none":
        assert distance <= TOLERANCES[name]
    else:
        assert distance > FAR * TOLERANCES[name]


# ---------------------------------------------------------------- timestep


@pytest.mark.parametrize(
    ("mistaken", "factor"),
    [
        pytest.param(0.967, FAR, id="scaled twice"),
        pytest.param(0.9676170, FAR, id="sigma"),
        pytest.param(967.6170, 10, id="a thousand sigma, not truncated"),
        pytest.param(968.0, 10, id="rounded to bfloat16"),
    ],
)
def test_model_time_is_the_integer_timestep(mistaken, factor):
    """Pitfall 2: the embedder takes the truncated integer, and scales it itself.

    An error of under one in 967 cannot move the velocity far: it must be ten tolerances away
    (measured 16 and 25), the gross mistakes a thousand.
    """
    model, case = build(), example()
    reference, condition = case.oracle(model.oracle), encode(model, case)
    assert error(step(model, condition, case, timestep=np.float32(967)), reference) <= TOLERANCE
    found = step(model, condition, case, timestep=np.float32(mistaken))
    assert error(found, reference) > factor * TOLERANCE


# ---------------------------------------------------------------- given frames


def test_given_frames_come_from_the_condition():
    """What the sampler holds at given frames is never read, nor the clean latents at the others."""
    model, case = build(), example(given=(0, 2))
    condition, reference = encode(model, case), ours(model, case)
    spoiled = case.video.copy()
    spoiled[list(case.given)] = np.nan
    found = step(model, condition, dataclasses.replace(case, video=spoiled))
    spoiled = np.where(case.frame_mask[:, None, None, None], case.video, np.nan)
    again = step(model, condition.replace(clean={"video": spoiled[None]}), case)
    for name in reference:
        np.testing.assert_array_equal(found[name], reference[name])
        np.testing.assert_array_equal(again[name], reference[name])


def test_given_frames_have_no_time_and_are_attended_to():
    """Pitfall 5: the mistakes are a time embedding on given frames, and no attention to them.

    Both are judged on the noisy frames and the sound alone, and lie a thousand tolerances off.
    """
    model, case = build(), example(given=(0,))
    reference = case.oracle(model.oracle)
    reference["video"] = reference["video"][1:]
    condition = encode(model, case)

    timed = step(model, condition.replace(given={"video": np.zeros((1, FRAMES), bool)}), case)
    timed["video"] = timed["video"][1:]
    assert error(timed, reference) > FAR * TOLERANCE

    rows, columns = patch_grid(model.config, (FRAMES, HEIGHT, WIDTH))[1:]
    without = condition.replace(
        rope=tuple(table[:, rows * columns :] for table in condition.rope),
        clean={"video": condition.clean["video"][:, 1:]},
        given={"video": condition.given["video"][:, 1:]},
    )
    alone = step(model, without, dataclasses.replace(case, video=case.video[1:], given=()))
    assert error(alone, reference) > FAR * TOLERANCE


# ---------------------------------------------------------------- patches


@pytest.mark.parametrize("padding", ["constant", "edge"])
def test_odd_latents_are_padded_with_zeros(padding):
    """Pitfall 6: the padding is zeros, at the bottom and right; copies of the edge lie far off."""
    model, case = build(), example()
    video = np.pad(case.video, [(0, 0), (0, 1), (0, 1), (0, 0)], mode=padding)
    even = dataclasses.replace(case, video=video)
    found = ours(model, even, video_shape=video.shape[:3])
    found["video"] = found["video"][:, :HEIGHT, :WIDTH]
    distance = error(found, case.oracle(model.oracle))
    assert distance <= TOLERANCE if padding == "constant" else distance > FAR * TOLERANCE


def test_padded_patches_take_part_in_attention():
    """Pitfall 6: cropping to even sizes, or masking padded patches, changes all the others."""
    model, case = build(), example()
    video = case.video[:, : HEIGHT - 1, : WIDTH - 1]
    found = ours(model, dataclasses.replace(case, video=video), video_shape=video.shape[:3])
    reference = case.oracle(model.oracle)
    reference["video"] = reference["video"][:, : HEIGHT - 1, : WIDTH - 1]
    assert error(found, reference) > FAR * TOLERANCE


@pytest.mark.parametrize(("head", "axis"), [("proj_in", 0), ("proj_out", -1)])
def test_patch_order_is_not_the_video_vaes(head, axis):
    """Pitfall 7: (row, column, channel) here; the VAE's (channel, column, row) lies far off."""
    model, case = build(), example()
    channels = model.config.latent_channel
    order = np.arange(4 * channels).reshape(2, 2, channels).transpose(2, 1, 0).ravel()
    gen = model.params["gen"]
    moved = {"kernel": jnp.take(gen[head]["kernel"], order, axis=axis)}
    moved["bias"] = gen[head]["bias"][order] if head == "proj_out" else gen[head]["bias"]
    mistaken = model._replace(params=model.params | {"gen": gen | {head: moved}})
    found, reference = ours(mistaken, case), case.oracle(model.oracle)
    assert relative_l2(found["video"], reference["video"]) > FAR * TOLERANCE
