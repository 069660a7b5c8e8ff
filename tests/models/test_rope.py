"""Positions and mRoPE tables against diffusers' own and against float64, past position 15,000.

Positions are compared bit for bit: they are products, quotients and sums, element by element, and
each is rounded as IEEE 754 has it, on any processor. `rope` keeps compilers from changing them.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.models.transformers.transformer_cosmos3 import Cosmos3VLTextRotaryEmbedding
from diffusers.pipelines.cosmos.pipeline_cosmos3_omni import (
    get_3d_mrope_ids_text_tokens,
    get_3d_mrope_ids_vae_tokens,
)
from rounding import check, relative_l2, rounded_to

from cosmos3_jax.config import TransformerConfig
from cosmos3_jax.models import rope

NANO = TransformerConfig()
STEADY = TransformerConfig(enable_fps_modulation=False)
FRAME_RATES = (24.0, 30.0, 25.0, 23.976, 29.97, 12.5, 59.94)
HALF_UNIT = 2.0**-24  # the relative error of one float32 rounding

_video = jax.jit(rope.video_positions, static_argnames=("config", "grid"))
_sound = jax.jit(rope.sound_positions, static_argnames=("config", "frames"))
_table = jax.jit(rope.rope_table, static_argnames=("config",))


def video(grid, fps, text_length, config=NANO) -> np.ndarray:
    fps, length = np.array([fps], np.float32), np.array([text_length], np.int32)
    return np.asarray(_video(config, grid, fps, length))[0]


def sound(frames, text_length, config=NANO) -> np.ndarray:
    return np.asarray(_sound(config, frames, np.array([text_length], np.int32)))[0]


# ---------------------------------------------------------------- positions


def test_text_positions():
    reference, _ = get_3d_mrope_ids_text_tokens(300, 0, use_float_positions=True)
    np.testing.assert_array_equal(rope.text_positions(300), reference.numpy())


@pytest.mark.parametrize("config", [NANO, STEADY], ids=["modulated", "not modulated"])
@pytest.mark.parametrize("fps", FRAME_RATES)
@pytest.mark.parametrize("text_length", [7, 4097])
def test_video_positions_are_the_oracles(fps, text_length, config):
    """Bit for bit, in time-major order, under jit; a single frame stands at the offset itself."""
    for grid in ((397, 2, 3), (1, 3, 2)):
        rate = fps if config.enable_fps_modulation else None
        reference, _ = get_3d_mrope_ids_vae_tokens(*grid, text_length + 15000, True, rate)
        np.testing.assert_array_equal(video(grid, fps, text_length, config), reference.numpy())


@pytest.mark.parametrize("text_length", [7, 4097])
def test_sound_positions_are_the_oracles(text_length):
    """Bit for bit over 160 seconds, long enough for a product in place of the division to show."""
    reference, _ = get_3d_mrope_ids_vae_tokens(
        4000, 1, 1, text_length + 15000, True, 25.0, temporal_compression_factor=1
    )
    np.testing.assert_array_equal(sound(4000, text_length), reference.numpy())


def test_sound_and_video_start_together():
    """Both start a margin behind the text; a second is 6 positions of video and 24 of sound.

    A latent frame of video lasts 4 / fps seconds, one of sound 1 / 25, at every frame rate. Sound
    behind the video, or media without the length of the text, would be off by 7 and more.
    """
    # one rounding at up to 32,768 (half of 2^-9), and those of the products before it
    tolerance = dict(atol=2**-10 + 1e-4, rtol=0)
    for text_length in (7, 40, 4097):
        for fps in FRAME_RATES:
            moving, heard = video((200, 1, 1), fps, text_length)[0], sound(200, text_length)[0]
            assert moving[0] == heard[0] == text_length + 15000
            np.testing.assert_allclose(
                moving - moving[0], 6 * 4 * np.arange(200) / fps, **tolerance
            )
            np.testing.assert_allclose(heard - heard[0], 24 * np.arange(200) / 25, **tolerance)
    assert not sound(9, 7)[1:].any()  # sound has no place in the picture


def test_rows_of_a_batch_have_their_own_lengths_and_rates():
    fps, length = np.array([24, 30, 12.5], np.float32), np.array([7, 40, 300], np.int32)
    together = np.asarray(_video(NANO, (5, 2, 3), fps, length))
    for row, alone in enumerate(zip(fps, length, strict=True)):
        np.testing.assert_array_equal(together[row], video((5, 2, 3), *alone))


# ---------------------------------------------------------------- frequencies and axes


def test_axis_order_is_interleaved():
    """Written out by hand: 24 slots of time, 20 of height, 20 of width."""
    names = "THW" * 20 + "TTTT"
    axes = rope.axis_of_slot(NANO)
    assert "".join("THW"[axis] for axis in axes) == names
    assert [names.count(axis) for axis in "THW"] == list(NANO.rope_axes_dim)


@pytest.mark.parametrize(
    ("head_dim", "section", "theta"),
    [
        (128, (24, 20, 20), 5e6),
        (128, (24, 20, 20), 1e8),
        (16, (4, 2, 2), 5e6),
        (64, (16, 8, 8), 1e4),
    ],
)
def test_frequencies_are_the_oracles(head_dim, section, theta):
    """Right in float64, and torch's but for the last bit, which its float32 power does not promise.

    Ours rounds the power and its inverse, half a unit each; torch's power may be a whole unit off.
    """
    config = TransformerConfig(head_dim=head_dim, rope_axes_dim=section, rope_theta=theta)
    found = rope.inverse_frequencies(config)
    assert found.dtype == np.float32
    exact = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    np.testing.assert_allclose(found, exact, rtol=2.1 * HALF_UNIT)
    reference = Cosmos3VLTextRotaryEmbedding(head_dim, theta, section).inv_freq.numpy()
    np.testing.assert_allclose(found, reference, rtol=6 * HALF_UNIT)


# ---------------------------------------------------------------- tables


@functools.cache
def media(fps: float, text_length: int = 1500) -> tuple[np.ndarray, np.ndarray]:
    """Positions [3, M] of a long clip with sound, by numpy: in float64 and in float32."""
    grid, frames = (60, 23, 40), 400
    exact = []
    for real in (np.float64, np.float32):
        time, rows, columns = np.indices(grid).reshape(3, -1).astype(real)
        offset = real(text_length + 15000)
        time = time / (real(np.float32(fps)) / real(4)) * real(6) + offset
        heard = np.zeros((3, frames), real)
        heard[0] = np.arange(frames, dtype=real) / real(25) * real(24) + offset
        exact.append(np.concatenate([np.stack([time, rows, columns]), heard], axis=1))
    assert exact[0].dtype == np.float64 and exact[1].dtype == np.float32
    return exact[0], exact[1]


def tables(fps: float) -> list[np.ndarray]:
    positions = np.concatenate([video((60, 23, 40), fps, 1500), sound(400, 1500)], axis=1)
    return [np.asarray(x)[0] for x in _table(NANO, positions)]


def exact_angles(positions: np.ndarray) -> np.ndarray:
    """Angles [M, J] in float64 from theta^(-2j / 128) in float64."""
    frequencies = 5e6 ** (-np.arange(64) / 64)
    return positions.astype(np.float64)[rope.axis_of_slot(NANO)].T * frequencies


def rounded_angles(positions: np.ndarray, frequencies: np.ndarray) -> np.ndarray:
    """The reference's angles: float32 elementwise products (then widened, exactly)."""
    assert positions.dtype == frequencies.dtype == np.float32
    return (positions[rope.axis_of_slot(NANO)].T * frequencies).astype(np.float64)


# cos and sin of a float32 angle. Measured: 0.54 units in the last place of values just below 1
# (2^-24), XLA's and torch's alike, with every instruction set. Four are allowed.
TABLE_TOLERANCE = 2.0**-22


@pytest.mark.parametrize("fps", [24.0, 30.0, 23.976, 29.97])
def test_tables_past_15000(fps):
    """Exact for the angles of the reference, and as near pure float64 as float32 allows.

    Pitfall 1, the mistakes: positions in bfloat16, a TF32 product, a fast approximation of cosine.
    The first two are made here and lie more than a thousand tolerances off.
    """
    exact, rounded = media(fps)
    assert rounded[0].max() > 16_500
    frequencies = rope.inverse_frequencies(NANO)
    angles, pure = rounded_angles(rounded, frequencies), exact_angles(exact)
    # Four roundings lie between pure float64 and the angle: position, power, inverse, product. Each
    # is at most half a unit, relative to the angle. The fifth half stands for those inside the
    # position, which are made at a tenth of its size.
    bound = 5 * HALF_UNIT * pure + TABLE_TOLERANCE
    assert 4e-3 < bound.max() < 6e-3  # a loose bound would not tell anything
    for function, table in zip((np.cos, np.sin), tables(fps), strict=True):
        assert table.dtype == np.float32
        np.testing.assert_allclose(table, function(angles), atol=TABLE_TOLERANCE, rtol=0)
        assert (np.abs(table - function(pure)) <= bound).all()
        for mistaken in (
            rounded_angles(rounded_to(7, rounded), frequencies),
            rounded_angles(rounded_to(10, rounded), rounded_to(10, frequencies)),
        ):
            assert np.abs(table - function(mistaken)).max() > 1000 * TABLE_TOLERANCE
            assert (np.abs(table - function(mistaken)) > bound).mean() > 0.05


@pytest.mark.parametrize("fps", [24.0, 29.97])
def test_tables_are_the_oracles(fps):
    """Equal angles, two libraries' cosines: each has the tolerance."""
    module = Cosmos3VLTextRotaryEmbedding(128, NANO.rope_theta, NANO.rope_axes_dim)
    positions = torch.from_numpy(media(fps)[1])[:, None]
    reference = [x[0, :, :64].numpy() for x in module(positions, "cpu", torch.float32)]
    for table, expected in zip(tables(fps), reference, strict=True):
        np.testing.assert_allclose(table, expected, atol=2 * TABLE_TOLERANCE, rtol=0)


ROTATION = 2e-6  # relative L2 distance of what is rotated


def test_rotation_pairs_the_two_halves(record_property):
    """Element j turns with j + J, as a complex number; neighbours (2j, 2j + 1) would be far off."""
    random = np.random.RandomState(0)
    x = random.standard_normal((2, 5, 3, 16)).astype(np.float32)
    angles = random.uniform(0, 7, (2, 5, 8))
    table = tuple(function(angles).astype(np.float32) for function in (np.cos, np.sin))
    found = rope.apply_rope(jnp.asarray(x), table)

    turned = (x[..., :8] + 1j * x[..., 8:]) * np.exp(1j * angles)[:, :, None]
    assert relative_l2(found, np.concatenate([turned.real, turned.imag], axis=-1)) <= ROTATION
    check(record_property, ROTATION, rope.apply_rope, jnp.asarray(x), table)
    turned = (x[..., ::2] + 1j * x[..., 1::2]) * np.exp(1j * angles)[:, :, None]
    mistaken = np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)
    assert relative_l2(found, mistaken) > 0.1


def test_rotation_keeps_the_dtype_and_the_tables_are_float32():
    """A bfloat16 model rounds the tables when they are used, never the angles."""
    cos, sin = rope.rope_table(NANO, rope.text_positions(4))
    assert cos.dtype == sin.dtype == jnp.float32
    assert rope.apply_rope(jnp.ones((1, 4, 2, 128), jnp.bfloat16), (cos, sin)).dtype == jnp.bfloat16
