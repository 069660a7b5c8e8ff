"""The sound VAE against diffusers' AVAE, at a small width with Nano's strides, switches and
spectrum.
"""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import Cosmos3AVAEAudioTokenizer
from oracle import perturb, tree_from_state_dict
from rounding import check, relative_l2

from cosmos3_jax.checkpoint import rules
from cosmos3_jax.checkpoint.layouts import sound_vae_layout
from cosmos3_jax.config import SoundVAEConfig
from cosmos3_jax.models import sound_vae

SMALL = {"dec_dim": 8, "enc_dim": 8, "vocoder_input_dim": 4, "enc_latent_dim": 8}
CONFIG = SoundVAEConfig(**SMALL)
NANO = SoundVAEConfig()
FPS = 24.0
# Relative L2 distance from the oracle, and from another program of ours: float32 rounding through
# 37 layers, by `test_tolerance`.
TOLERANCE = 1e-5
# What a mistake must at least cost for the tests above to have caught it.
OBVIOUS = 5e-3

decode = jax.jit(sound_vae.decode, static_argnums=1, static_argnames="dtype")
encode = jax.jit(sound_vae.encode, static_argnums=1, static_argnames="dtype")


@pytest.fixture(scope="module")
def oracle():
    torch.manual_seed(0)
    return perturb(Cosmos3AVAEAudioTokenizer(**SMALL), seed=1)


@pytest.fixture(scope="module")
def params(oracle):
    shapes = sound_vae.param_shapes(CONFIG, with_encoder=True)
    return tree_from_state_dict(sound_vae_layout(CONFIG, True), oracle.state_dict(), shapes)


def random_latents(frames: int, batch: int = 1) -> np.ndarray:
    return np.random.default_rng(frames).standard_normal((batch, frames, 4), np.float32)


def random_waveform(samples: int, batch: int = 1) -> np.ndarray:
    """Noise that grows louder, up to 0.8: not stationary, and not of the peak that encoding gives
    it.
    """
    noise = np.random.default_rng(samples).uniform(-0.8, 0.8, (batch, 2, samples))
    return (noise * np.linspace(0, 1, samples)).astype(np.float32)


@torch.no_grad()
def oracle_decode(oracle, latents: np.ndarray) -> np.ndarray:
    latents = torch.from_numpy(latents).transpose(1, 2).to(oracle.dtype)
    return oracle.decode(latents).float().numpy()


@torch.no_grad()
def oracle_encode(oracle, waveform: np.ndarray) -> np.ndarray:
    mean = oracle.encode(torch.from_numpy(waveform)).latent_dist.mode()
    return mean.float().transpose(1, 2).numpy()


# ---- parity ----


@pytest.mark.parametrize(
    ("function", "inputs"),
    [(decode, random_latents(n)) for n in (2, 31)]
    + [(encode, random_waveform(n) + np.float32(0.1)) for n in (1, 10000, 40 * 1920)],
    ids=[
        *(f"decode {n} latents" for n in (2, 31)),
        *(f"encode {n} samples" for n in (1, 10000, 40 * 1920)),
    ],
)
def test_tolerance(record_property, params, function, inputs):
    check(record_property, TOLERANCE, lambda p, x: function(p, CONFIG, x), params, inputs)


@pytest.mark.parametrize("video_frames", [1, 5, 13, 17, 30])
def test_decode_equals_oracle(oracle, params, video_frames):
    frames = sound_vae.sound_latent_length(CONFIG, video_frames, FPS)
    latents = random_latents(frames)
    expected = oracle_decode(oracle, latents)
    assert np.abs(expected).max() < 1, "the cut-off would hide errors"
    ours = decode(params, CONFIG, latents)
    assert ours.shape == (1, 2, 1920 * frames) and ours.dtype == jnp.float32
    assert relative_l2(ours, expected) <= TOLERANCE


@pytest.mark.parametrize("samples", [1, 2000, 10000, 26000, 34000, 40 * 1920])
def test_encode_equals_oracle(oracle, params, samples):
    """The sound of 1, 5, 13, 17 video frames, which ends inside a latent frame; one sample; whole
    frames.
    """
    waveform = random_waveform(samples) + np.float32(0.1)
    ours = encode(params, CONFIG, waveform)
    assert ours.shape == (1, math.ceil(samples / 1920), 4) and ours.dtype == jnp.float32
    assert relative_l2(ours, oracle_encode(oracle, waveform)) <= TOLERANCE


def test_bfloat16_is_as_exact_as_the_oracle(oracle, params):
    """Both against the float32 oracle. 1.2: what the order of roundings may differ, and no more."""
    low = Cosmos3AVAEAudioTokenizer(**SMALL)
    low.load_state_dict(oracle.state_dict())
    low = low.to(torch.bfloat16).eval()
    latents, waveform = random_latents(6), random_waveform(10000)
    # oneDNN's bfloat16 strided convolution is plainly wrong at these widths (error 1), so we do
    # without it.
    with torch.backends.mkldnn.flags(enabled=False):
        low_decoded, low_encoded = oracle_decode(low, latents), oracle_encode(low, waveform)
    decoded, encoded = oracle_decode(oracle, latents), oracle_encode(oracle, waveform)
    ours_decoded = decode(params, CONFIG, latents, dtype=jnp.bfloat16)
    ours_encoded = encode(params, CONFIG, waveform, dtype=jnp.bfloat16)
    assert ours_decoded.dtype == ours_encoded.dtype == jnp.float32
    for ours, low, exact in (
        (ours_decoded, low_decoded, decoded),
        (ours_encoded, low_encoded, encoded),
    ):
        their_error = relative_l2(low, exact)
        assert 1e-3 < their_error < 0.05  # it is bfloat16, and no nonsense that would excuse ours
        assert relative_l2(ours, exact) <= 1.2 * their_error


# ---- mistakes that load without an error (pitfall 11) ----


def fold_over(axes, direction, gain):
    return gain * direction / np.sqrt(np.sum(direction**2, axis=axes, keepdims=True))


@pytest.mark.parametrize("stride", NANO.dec_strides)
def test_transposed_convolution(record_property, stride):
    """Each stride alone against torch, and three mistakes made on purpose: a kernel that is not
    turned round,
    a weight norm per output channel, and 'SAME' padding (one sample off at the odd stride, right
    elsewhere).
    """
    torch.manual_seed(stride)
    theirs = torch.nn.ConvTranspose1d(
        6, 4, 2 * stride, stride, padding=math.ceil(stride / 2), output_padding=stride % 2
    )
    theirs = perturb(torch.nn.utils.parametrizations.weight_norm(theirs), seed=stride)
    x = np.random.default_rng(stride).standard_normal((2, 9, 6), np.float32)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(x).transpose(1, 2)).transpose(1, 2).numpy()
    tensors = {
        rules.canonical_key(key): value.numpy() for key, value in theirs.state_dict().items()
    }
    rule = rules.Rule("weight", "kernel", "i o k -> k i o", weight_norm=True)
    direction, gain, bias = (tensors[key] for key in (*rule.keys, "bias"))

    def error(kernel):
        module = sound_vae.ConvTranspose(4, stride, jnp.float32)
        return relative_l2(module.apply({"params": {"kernel": kernel, "bias": bias}}, x), expected)

    kernel = rule.to_leaf(direction, gain)
    apply = sound_vae.ConvTranspose(4, stride, jnp.float32).apply
    leaves = {"params": {"kernel": kernel, "bias": bias}}
    check(record_property, TOLERANCE, apply, leaves, x)
    assert error(kernel) <= TOLERANCE
    assert error(kernel[::-1]) > OBVIOUS
    assert error(np.moveaxis(fold_over((0, 2), direction, gain), 2, 0)) > OBVIOUS
    same = jax.lax.conv_transpose(x, kernel[::-1], (stride,), "SAME", precision="highest") + bias
    assert (relative_l2(same, expected) > OBVIOUS) == (stride % 2 == 1)


def test_turned_kernel_shows_in_the_waveform(oracle, params):
    """One transposed convolution of the five turned wrongly is far above the whole decoder's
    tolerance.
    """
    latents = random_latents(6)
    expected = oracle_decode(oracle, latents)
    for block in range(5):
        wrong = jax.tree.map(lambda leaf: leaf, params)
        conv = wrong["decoder"][f"block_{block}"]["conv_t1"]
        conv["kernel"] = conv["kernel"][::-1]
        assert relative_l2(decode(wrong, CONFIG, latents), expected) > OBVIOUS


def test_weight_norm_axis_shows_in_the_waveform(oracle, monkeypatch):
    """Norms per last axis but one, as one might fold a transposed convolution's [in, out, k]."""
    monkeypatch.setattr(rules, "fold_weight_norm", functools.partial(fold_over, (0, 2)))
    shapes = sound_vae.param_shapes(CONFIG, with_encoder=True)
    wrong = tree_from_state_dict(sound_vae_layout(CONFIG, True), oracle.state_dict(), shapes)
    latents, waveform = random_latents(6), random_waveform(10000)
    assert relative_l2(decode(wrong, CONFIG, latents), oracle_decode(oracle, latents)) > OBVIOUS
    assert relative_l2(encode(wrong, CONFIG, waveform), oracle_encode(oracle, waveform)) > OBVIOUS


# ---- the layout ----


@pytest.mark.parametrize("config", [CONFIG, NANO], ids=["small", "nano"])
@pytest.mark.parametrize(("with_encoder", "count"), [(True, 249), (False, 182)])
def test_layout_fits_the_public_checkpoint(config, with_encoder, count):
    """Names and shapes at both sizes, with nothing allocated on either side; and the parts do not
    mix.
    """
    sizes = dataclasses.asdict(config)
    with torch.device("meta"):
        public = Cosmos3AVAEAudioTokenizer(**sizes, encoder_enabled=with_encoder).state_dict()
    shapes = {key: tuple(value.shape) for key, value in public.items()}
    leaves = rules.leaf_shapes(sound_vae.param_shapes(config, with_encoder))
    layout = sound_vae_layout(config, with_encoder)
    assert len(shapes) == count == sum(len(rule.keys) for rule in layout.rules)
    rules.check(layout, shapes, leaves)
    if with_encoder:  # a full checkpoint also serves a model that only decodes
        decoder_leaves = rules.leaf_shapes(sound_vae.param_shapes(config, False))
        rules.check(sound_vae_layout(config, False), shapes, decoder_leaves)
    else:
        full_leaves = rules.leaf_shapes(sound_vae.param_shapes(config, True))
        with pytest.raises(rules.CheckpointError, match=r"missing \(67\)"):
            rules.check(sound_vae_layout(config, True), shapes, full_leaves)


def test_rules_are_invertible(params):
    """to_public and back is the identity on every leaf."""
    leaves = {
        "/".join(key.key for key in path): leaf for path, leaf in jax.tree.leaves_with_path(params)
    }
    for rule in sound_vae_layout(CONFIG, True).rules:
        leaf = np.asarray(leaves[rule.leaf])
        public = rule.to_public(leaf)
        back = dataclasses.replace(rule, weight_norm=False).to_leaf(public)
        np.testing.assert_array_equal(back, leaf)


def test_shapes_at_full_size():
    """Nano's 197 latent frames of a 189-frame video, traced only."""
    shapes = sound_vae.param_shapes(NANO, with_encoder=True)
    waveform = jax.eval_shape(
        lambda p, x: sound_vae.decode(p, NANO, x, dtype=jnp.bfloat16),
        shapes,
        jnp.zeros((1, 197, 64)),
    )
    assert (waveform.shape, waveform.dtype) == ((1, 2, 378240), jnp.float32)
    latents = jax.eval_shape(lambda p, x: sound_vae.encode(p, NANO, x), shapes, waveform)
    assert (latents.shape, latents.dtype) == ((1, 197, 64), jnp.float32)


# ---- contracts ----


def test_waveform_is_cut_off_at_one(oracle, params):
    """No tanh: what lies within -1 and 1 is untouched."""
    latents = random_latents(2)
    loud = jax.tree.map(lambda leaf: leaf, params)
    loud["decoder"]["conv2"]["kernel"] = 20 * loud["decoder"]["conv2"]["kernel"]
    ours = np.asarray(decode(loud, CONFIG, latents))
    assert ours.min() == -1 and ours.max() == 1
    expected = np.clip(20 * oracle_decode(oracle, latents), -1, 1)
    assert relative_l2(ours, expected) <= TOLERANCE


def test_stored_dtype_is_free(params):
    """bfloat16 parameters compute in the dtype asked for, as if they had been widened first."""
    low = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    widened = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), low)
    latents, waveform = random_latents(2), random_waveform(2000)
    # Compiled separately, so sums may be ordered differently: the parity tolerance.
    assert relative_l2(decode(low, CONFIG, latents), decode(widened, CONFIG, latents)) <= TOLERANCE
    assert (
        relative_l2(encode(low, CONFIG, waveform), encode(widened, CONFIG, waveform)) <= TOLERANCE
    )


def test_examples_of_a_batch_do_not_meet(oracle, params):
    """A loud neighbour changes nothing. The oracle scales by the loudest; one at a time it agrees
    with us.
    """
    waveform = random_waveform(5000, batch=3) * np.float32([[[1.0]], [[0.1]], [[0.0]]])
    together = np.asarray(encode(params, CONFIG, waveform))
    latents = random_latents(3, batch=3)
    decoded = np.asarray(decode(params, CONFIG, latents))
    assert np.isfinite(together).all(), "silence divides by its peak"
    for i in range(3):
        alone = slice(i, i + 1)
        assert relative_l2(encode(params, CONFIG, waveform[alone]), together[alone]) <= TOLERANCE
        assert relative_l2(decode(params, CONFIG, latents[alone]), decoded[alone]) <= TOLERANCE
        assert relative_l2(together[alone], oracle_encode(oracle, waveform[alone])) <= TOLERANCE
    assert relative_l2(together, oracle_encode(oracle, waveform)) > OBVIOUS


def test_volume_is_left_alone_on_request(oracle, params):
    config = dataclasses.replace(CONFIG, normalize_volume=False)
    waveform = random_waveform(5000)
    scaled = waveform * np.float32(0.95 / (np.abs(waveform).max() + 1e-5))
    normalised = encode(params, CONFIG, waveform)
    assert relative_l2(encode(params, config, scaled), normalised) <= TOLERANCE
    assert relative_l2(encode(params, config, waveform), normalised) > OBVIOUS


def test_gradients_reach_both_inputs(params):
    def loss(function, x):
        return jnp.mean(function(params, CONFIG, x) ** 2)

    for function, x in (
        (sound_vae.decode, random_latents(2)),
        (sound_vae.encode, random_waveform(2000)),
    ):
        gradient = np.asarray(jax.jit(jax.grad(functools.partial(loss, function)))(x))
        assert gradient.shape == x.shape
        assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0


@pytest.mark.parametrize(
    ("num_frames", "fps", "length"),
    [
        (189, 24, 197),
        (109, 25, 109),  # ceil(109 / 25 * 25.0) would be 110
        (1, 24, 2),
        (5, 24, 6),
        (13, 24, 14),
        (17, 24, 18),
        (24, 24, 25),
        (61, 23.976, 64),
        (93, 16.0, 146),
        (189, 30, 158),
        (25, 24.9999, 25),  # 48000.19 samples are 48000 before they are latent frames
    ],
)
def test_sound_latent_length(num_frames, fps, length):
    assert sound_vae.sound_latent_length(NANO, num_frames, fps) == length


def test_errors(params):
    with pytest.raises(ValueError, match="num_frames=0 must be at least 1"):
        sound_vae.sound_latent_length(NANO, 0, 24)
    for fps in (0, -24.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"fps={fps} must be positive"):
            sound_vae.sound_latent_length(NANO, 5, fps)
    with pytest.raises(ValueError, match=r"\(1, 4, 7\) are not \[batch, frames, 4\]"):
        sound_vae.decode(params, CONFIG, jnp.zeros((1, 4, 7)))  # channels first
    for shape in ((1, 1, 1920), (1, 2, 0), (2, 1920)):
        with pytest.raises(
            ValueError, match=re.escape(f"{shape} is not [batch, 2, at least one sample]")
        ):
            sound_vae.encode(params, CONFIG, jnp.zeros(shape))
    with pytest.raises(ValueError, match="load or convert a checkpoint"):
        sound_vae.encode({"decoder": params["decoder"]}, CONFIG, jnp.zeros((1, 2, 1920)))
