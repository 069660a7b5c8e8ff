"""The video VAE against diffusers' AutoencoderKLWan, at a small width with Nano's blocks."""

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from rounding import check, relative_l2
from video_vae_cases import (
    CONFIG,
    GRID,
    NANO,
    PASSES,
    TOLERANCES,
    build_oracle,
    decode,
    encode,
    oracle_decode,
    oracle_statistics,
    random_latents,
    reference,
)

from cosmos3_jax.checkpoint import rules
from cosmos3_jax.checkpoint.layouts import video_vae_layout
from cosmos3_jax.models import video_vae, video_vae_modules

STATISTICS = 1e-6  # of latents brought to mean 0 and deviation 1, or back
GRADIENT = 2e-5  # of decoding: the way back is as long as the way there
each_way = pytest.mark.parametrize("way", PASSES)


@each_way
@pytest.mark.parametrize(("frames", "batch"), [(1, 1), (5, 2), (21, 1)])
def test_tolerance(record_property, video_oracle, video_params, way, frames, batch):
    inputs, _ = reference(video_oracle, way, (frames + 3) // 4, batch)

    def run(params, inputs):
        return PASSES[way][0](params, CONFIG, inputs)

    check(record_property, TOLERANCES[way], run, video_params, inputs)


@each_way
@pytest.mark.parametrize(("frames", "batch"), [(1, 1), (5, 2), (21, 1)])
def test_agrees_with_the_oracle(video_oracle, video_params, way, frames, batch):
    inputs, expected = reference(video_oracle, way, (frames + 3) // 4, batch)
    ours = PASSES[way][0](video_params, CONFIG, inputs)
    assert relative_l2(ours, expected) < TOLERANCES[way]
    video = ours if way == "decode" else inputs
    assert video.shape == (batch, 3, frames, 48, 80)
    assert ours.dtype == jnp.float32
    if way == "decode":
        assert np.mean((expected == 0) | (expected == 1)) < 0.02  # the clamp hides next to nothing


def test_video_is_clamped(video_params):
    loud = video_params["decoder"] | {
        "conv_out": jax.tree.map(lambda x: 30 * x, video_params["decoder"]["conv_out"])
    }
    video = decode({"decoder": loud}, CONFIG, random_latents(1), video_dtype=jnp.bfloat16)
    assert (video.min(), video.max(), video.dtype) == (0, 1, jnp.bfloat16)


@each_way
def test_bfloat16_is_as_close_as_the_oracle(video_oracle, video_params, way):
    """Both round activations to bfloat16 at nearly the same places, so the errors are random and
    alike.

    Measured over seeds: 4e-3 (decode) and 1.2e-2 to 1.9e-2 (encode) for both, ours 0.77 to 1.09
    times theirs. 1.2 is what is left to chance.
    """
    ours, theirs, _ = PASSES[way]
    inputs, exact = reference(video_oracle, way, 2, 2)
    # Without oneDNN, whose bfloat16 convolutions are wrong at some small widths.
    with torch.no_grad(), torch.backends.mkldnn.flags(enabled=False):
        rounded = theirs(copy.deepcopy(video_oracle).bfloat16(), torch.from_numpy(inputs))
    result = ours(video_params, CONFIG, inputs, dtype=jnp.bfloat16)
    assert result.dtype == jnp.bfloat16
    their_error = relative_l2(rounded, exact)
    assert 1e-3 < their_error < 0.05  # it is bfloat16, and no nonsense that would excuse ours
    assert relative_l2(result, exact) < 1.2 * their_error


@each_way
def test_chunk_size_changes_nothing(video_oracle, video_params, way):
    """But rounding: XLA may sum a longer convolution in another order."""
    run = PASSES[way][0]
    inputs, _ = reference(video_oracle, way, 6)
    assert video_vae.decode_chunk_size(*GRID) == 1  # what is used here if nothing is said
    streamed = run(video_params, CONFIG, inputs)
    # 1 + 2 + 2 + 1: two chunks and a rest
    chunked = run(video_params, CONFIG, inputs, chunk_size=2)
    assert relative_l2(chunked, streamed) < TOLERANCES[way]


@pytest.mark.parametrize("kind", ["frame by frame", "causal"])
def test_a_convolution_rounds_once(kind):
    """In bfloat16 on a CPU: what the float32 one gives, bias included, rounded.

    The two may sum in another order, which moves one value in ten thousand to the other side of a
    boundary. Rounding before the bias is added as well moves a third of them.
    """
    modules = {
        "frame by frame": lambda plan: video_vae_modules.Conv2d(8, plan, padding=(1, 1)),
        "causal": lambda plan: video_vae_modules.CausalConv(8, plan),
    }
    random = np.random.default_rng(0)
    x = jnp.asarray(random.standard_normal((1, 3, 6, 5, 8)), jnp.bfloat16)
    arithmetic = video_vae_modules.convolve_on(jax.devices("cpu")[0])
    low, high = (
        modules[kind](video_vae_modules.Plan(dtype, convolve=arithmetic))
        for dtype in (jnp.bfloat16, jnp.float32)
    )
    params = low.init(jax.random.key(0), x)["params"] | {
        "bias": jnp.asarray(random.standard_normal(8), jnp.float32)
    }
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16).astype(jnp.float32), params)

    def convolve(module, params):
        return module.apply({"params": params}, x.astype(module.plan.dtype), mutable=["cache"])[0]

    rounded, exact = convolve(low, params), convolve(high, params)
    assert rounded.dtype == jnp.bfloat16
    assert (rounded != exact.astype(jnp.bfloat16)).mean() < 0.01
    bias = params["bias"].astype(jnp.bfloat16)
    twice = convolve(high, params | {"bias": 0 * params["bias"]}).astype(jnp.bfloat16) + bias
    assert (rounded != twice).mean() > 0.1


@pytest.mark.parametrize("latent_frames", [1, 3])
def test_prefix_encodes_to_the_prefix(video_oracle, video_params, latent_frames):
    """Given frames may be encoded alone: as in our whole clip, and in the oracle's."""
    video, theirs = reference(video_oracle, "encode", 6)
    prefix = encode(video_params, CONFIG, video[:, :, : 4 * latent_frames - 3])
    for whole in (encode(video_params, CONFIG, video), theirs):
        assert relative_l2(prefix, whole[:, :latent_frames]) < TOLERANCES["encode"]
    backwards = encode(video_params, CONFIG, video[:, :, ::-1])
    assert relative_l2(prefix, backwards[:, :latent_frames]) > 0.1


@each_way
def test_memory_does_not_grow_with_the_clip(video_params, way):
    """Measured: 64 bytes more for 8 more latent frames, the scan's frame numbers.

    Allowed: less than one copy of what is smallest and grows, the latents, would take (360 bytes a
    frame). A copy of the video would take 184 kB a latent frame.
    """
    run, _, random = PASSES[way]

    def temporary_bytes(t: int) -> int:
        inputs = jax.ShapeDtypeStruct(random(t).shape, jnp.float32)
        program = run.lower(video_params, CONFIG, inputs).compile()
        return program.memory_analysis().temp_size_in_bytes

    assert temporary_bytes(12) - temporary_bytes(4) < (12 - 4) * 360


def test_gradient_agrees_with_the_oracle(record_property, video_oracle, video_params):
    latents = random_latents(2)
    weights = np.random.default_rng(0).standard_normal((1, 3, 5, 48, 80), np.float32)

    @jax.jit
    @functools.partial(jax.grad, argnums=1)
    def gradient(params, latents, weights):
        return jnp.sum(weights * video_vae.decode(params, CONFIG, latents))

    check(record_property, GRADIENT, gradient, video_params, latents, weights)
    ours = gradient(video_params, latents, weights)
    variable = torch.from_numpy(latents).requires_grad_()
    (torch.from_numpy(weights) * oracle_decode(video_oracle, variable)).sum().backward()
    assert np.all(np.isfinite(ours)) and np.all(np.any(ours != 0, axis=(0, 2, 3, 4)))
    assert relative_l2(ours, variable.grad) < GRADIENT


def test_norm_has_a_gradient_at_zero():
    norm = video_vae_modules.RMSNorm()
    gradient = jax.grad(lambda x: norm.apply({"params": {"scale": jnp.ones(4)}}, x).sum())(
        jnp.zeros((1, 4))
    )
    assert np.all(np.isfinite(gradient))


def test_latent_statistics_in_float32(record_property):
    """XLA may divide by way of a reciprocal, and add in the same rounding."""
    values = np.random.default_rng(0).standard_normal((1, 2, 1, 1, NANO.z_dim), np.float32)
    mean, inverse_std = (x.movedim(1, -1) for x in oracle_statistics(NANO, torch.float32))
    theirs = torch.from_numpy(values)
    for name, expected in (
        ("normalize_latents", (theirs - mean) * inverse_std),
        ("denormalize_latents", theirs / inverse_std + mean),
    ):
        ours = functools.partial(getattr(video_vae, name), NANO)
        check(record_property, STATISTICS, ours, values, name=name)
        assert relative_l2(ours(values), expected) < STATISTICS


def test_latent_statistics_round_as_the_oracle_does():
    """In bfloat16, operation by operation: all values but those at a boundary of rounding.

    The deviation itself, in place of its rounded reciprocal, changes a sixth of them.
    """
    values = np.random.default_rng(0).standard_normal((1, 2, 1, 1, NANO.z_dim), np.float32)
    mean, inverse_std = (x.movedim(1, -1) for x in oracle_statistics(NANO, torch.bfloat16))
    std = torch.tensor(NANO.latents_std, dtype=torch.bfloat16)
    theirs, ours = torch.from_numpy(values).bfloat16(), jnp.asarray(values, jnp.bfloat16)
    for found, expected, mistaken in (
        (
            video_vae.normalize_latents(NANO, ours),
            (theirs - mean) * inverse_std,
            (theirs - mean) / std,
        ),
        (
            video_vae.denormalize_latents(NANO, ours),
            theirs / inverse_std + mean,
            theirs * std + mean,
        ),
    ):
        assert found.dtype == jnp.bfloat16
        found = np.float32(found)
        assert (found != expected.float().numpy()).mean() < 0.02
        assert (found != mistaken.float().numpy()).mean() > 0.1


@pytest.mark.parametrize("config", [CONFIG, NANO], ids=["small", "nano"])
def test_layout_covers_the_public_tensors(config):
    with torch.device("meta"):
        tensors = build_oracle(config).state_dict()
    layout, leaves = video_vae_layout(config), rules.leaf_shapes(video_vae.param_shapes(config))
    rules.check(layout, {key: tuple(value.shape) for key, value in tensors.items()}, leaves)
    assert len(layout.rules) == len(leaves) == 196
    assert leaves["decoder/up_blocks_0/resnets_1/conv1/kernel"][:3] == (3, 3, 3)


def test_pixel_to_latent_shape():
    assert video_vae.pixel_to_latent_shape(NANO, 189, 720, 1280) == (48, 45, 80)
    assert video_vae.pixel_to_latent_shape(NANO, 1, 16, 16) == (1, 1, 1)


@pytest.mark.parametrize(
    ("frames", "height", "width", "message"),
    [
        (190, 720, 1280, r"num_frames=190 is not 4k\+1; nearest are 189 and 193"),
        (0, 720, 1280, r"num_frames=0 is not 4k\+1; nearest are 1 and 5"),
        (189, 725, 1280, "height=725 is not a multiple of 16; nearest are 720 and 736"),
        (189, 720, 8, "width=8 is not a multiple of 16; nearest are 16 and 32"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(video_params, frames, height, width, message):
    with pytest.raises(ValueError, match=message):
        video_vae.pixel_to_latent_shape(NANO, frames, height, width)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(
            lambda: video_vae.encode(video_params, CONFIG, jnp.zeros((1, 3, frames, height, width)))
        )


def test_wrong_axes_and_chunks_are_refused(video_params):
    with pytest.raises(
        ValueError, match=r"latents have shape \(1, 6, 1, 3, 5\), not \[B, t, h, w, 6\]"
    ):
        video_vae.decode(video_params, CONFIG, np.zeros((1, 6, 1, 3, 5)))
    with pytest.raises(
        ValueError, match=r"video has shape \(1, 5, 48, 80, 3\), not \[B, 3, T, H, W\]"
    ):
        video_vae.encode(video_params, CONFIG, np.zeros((1, 5, 48, 80, 3)))
    with pytest.raises(ValueError, match="chunk_size=0 must be at least 1"):
        video_vae.decode(video_params, CONFIG, random_latents(2), chunk_size=0)
