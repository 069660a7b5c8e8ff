"""Training of the autoencoders: losses against torch, gradients, and latents' scale."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from autoencoder_cases import SMALL, SMALL_SOUND, TOLERANCE, each, perturbed, random, waveforms
from rounding import check, relative_l2

from cosmos3_jax.models import sound_vae, video_vae_modules
from cosmos3_jax.training import autoencoders as ae

# ---- the arithmetic of training ----


@pytest.mark.parametrize("stride, padding", [(1, ((1, 1), (1, 1))), (2, ((0, 1), (0, 1)))])
def test_products_are_the_convolution(record_property, stride, padding):
    """Values and gradients by pictures and kernel."""
    x, kernel = random(2, 6, 8, 3), random(3, 3, 3, 4, seed=1)

    def loss(convolve, x, kernel):
        return jnp.sum(jnp.sin(convolve(x, kernel, padding, stride)) ** 2)

    run, others = (
        jax.value_and_grad(functools.partial(loss, convolve), (0, 1))
        for convolve in (ae.convolve, video_vae_modules.convolve)
    )
    check(record_property, TOLERANCE, run, x, kernel)
    ours, expected = run(x, kernel), others(x, kernel)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        assert relative_l2(one, other) < TOLERANCE


def test_the_video_loss_has_no_convolution():
    """Or the products are not used, and the tests of their values say nothing."""
    model = SMALL["video"]
    shapes = jax.eval_shape(lambda: model.init(model.config, jax.random.key(0)))
    video = jax.ShapeDtypeStruct((1, 3, 5, 16, 16), jnp.float32)

    def loss(params, video):
        return ae.video_loss(params, model.config, video, jax.random.key(0))[0]

    assert "conv_general_dilated" not in str(jax.make_jaxpr(loss)(shapes, video))


@pytest.mark.parametrize("dilation", [1, 3, 9])
def test_the_gradients_of_dilated_convolutions(record_property, dilation):
    x, kernel = random(2, 40, 3), random(7, 3, 3, seed=1)

    def plain(x, kernel, dilation):
        return jax.lax.conv_general_dilated(
            x, kernel, (1,), [(3 * dilation,) * 2], rhs_dilation=(dilation,),
            dimension_numbers=("NWC", "WIO", "NWC"),
        )  # fmt: skip

    def loss(convolve, x, kernel):
        return jnp.sum(jnp.sin(convolve(x, kernel, dilation)))

    gradient = jax.grad(functools.partial(loss, sound_vae.dilated_convolution), (0, 1))
    check(record_property, TOLERANCE, gradient, x, kernel)
    for ours, expected in zip(
        gradient(x, kernel),
        jax.grad(functools.partial(loss, plain), (0, 1))(x, kernel),
        strict=True,
    ):
        assert relative_l2(ours, expected) < TOLERANCE


# ---- losses ----


def test_kl_equals_torch(record_property):
    mean, deviation = random(30, 5), np.exp(random(30, 5, seed=1))
    normal = torch.distributions.Normal
    theirs = torch.distributions.kl_divergence(
        normal(torch.tensor(mean), torch.tensor(deviation)), normal(0.0, 1.0)
    ).mean()

    def of_rows(*arrays):  # a single number may come out the same
        return [ae.kl_divergence(*row) for row in zip(*arrays, strict=True)]

    check(record_property, TOLERANCE, of_rows, mean, deviation)
    assert relative_l2(ae.kl_divergence(mean, deviation), theirs) < TOLERANCE
    assert abs(ae.kl_divergence(jnp.zeros(4), jnp.ones(4))) < 1e-6


def torch_magnitudes(waveform: torch.Tensor, size: int) -> torch.Tensor:
    window = torch.hann_window(size)
    flat = waveform.reshape(-1, waveform.shape[-1])
    spectrum = torch.stft(
        flat, size, size // 4, window=window, pad_mode="constant", return_complex=True
    )
    return torch.sqrt(torch.abs(spectrum / window.sum()) ** 2 + ae.FLOOR**2)


# Where a bin's error is near 0, rounding decides the gradient's sign.
SPECTRAL_GRADIENT = 1e-3


def test_spectral_loss_and_gradient_equal_torch(record_property):
    """Against torch.stft."""
    ours, target = waveforms(seed=1), waveforms(seed=2)

    def torch_loss(x, y):
        def channels(z):
            return torch.stack([z[:, 0], z[:, 1], (z[:, 0] + z[:, 1]) / 2, (z[:, 0] - z[:, 1]) / 2])

        total = 0.0
        for size in (240, 960, 3840):
            a, b = torch_magnitudes(channels(x), size), torch_magnitudes(channels(y), size)
            total += (torch.linalg.norm(a - b) / torch.linalg.norm(b)) / 3
            total += torch.mean(torch.abs(torch.log(a) - torch.log(b))) / 3
        return total

    variable = torch.tensor(ours, requires_grad=True)
    theirs = torch_loss(variable, torch.tensor(target))
    theirs.backward()
    loss = jax.jit(jax.value_and_grad(lambda x, y: sum(ae.spectral_loss(x, y))))

    terms = jax.jit(ae.spectral_loss)

    def values(clips):  # means of many numbers: most come out the same
        return np.array([terms(clip, target) for clip in clips])

    clips = [waveforms(seed=seed) for seed in range(3, 27)]
    check(record_property, TOLERANCE, values, clips, name="values")
    check(record_property, SPECTRAL_GRADIENT, lambda *x: loss(*x)[1], ours, target, name="grad")
    value, gradient = loss(ours, target)
    assert relative_l2(value, theirs.detach()) < TOLERANCE
    assert relative_l2(gradient, variable.grad) < SPECTRAL_GRADIENT


def test_spectral_loss_hears_places_and_silence():
    """Left and right exchanged is an error, and silence is no division by zero."""
    target = waveforms()
    target[:, 1] *= 0.1
    loss = jax.jit(lambda x, y: sum(ae.spectral_loss(x, y)))
    assert loss(target, target) < 1e-4 < 0.5 < loss(target[:, ::-1], target)
    silence = np.zeros_like(target)
    for pair in ((silence, target), (target, silence), (silence, silence)):
        value, gradient = jax.jit(jax.value_and_grad(lambda x, y: sum(ae.spectral_loss(x, y))))(
            *pair
        )
        assert np.isfinite(value) and np.all(np.isfinite(gradient))


def test_magnitudes_of_a_tone():
    """A full tone has 0.5 at its frequency, whatever the window; sizes that do not fit are told."""
    tone = np.sin(2 * np.pi * 1000 / 48_000 * np.arange(3840), dtype=np.float32)
    for size in (240, 960):
        found = ae.magnitudes(tone, size, size // 4)
        assert found.shape == (3840 // (size // 4) + 1, size // 2 + 1)
        assert found[5].max() == pytest.approx(0.5, rel=1e-3)
        assert np.argmax(found[5]) == 1000 * size // 48_000
    with pytest.raises(ValueError, match="a window of 960 and 3841 samples must be multiples of"):
        ae.magnitudes(np.zeros(3841), 960, 240)


def test_relative_error():
    """By hand, and of silence, whose root has a gradient too."""
    target = np.array([[3.0, 4.0]], np.float32)
    assert ae.relative_error(0 * target, target) == pytest.approx(1, rel=1e-4)
    assert ae.relative_error(target + np.array([[0.3, 0.4]]), target) == pytest.approx(
        0.1, rel=1e-3
    )
    assert np.all(np.isfinite(jax.grad(ae.relative_error)(0 * target, 0 * target)))


def test_video_losses():
    """By hand: a flat error is all pixel loss; a moving edge is seen by the gradient loss."""
    target = np.zeros((1, 3, 3, 8, 8), np.float32)
    assert ae.pixel_loss(target + 0.5, target) == pytest.approx(0.5, rel=1e-5)
    assert ae.gradient_loss(target + 0.5, target) == 0
    assert ae.pixel_loss(target, target) == pytest.approx(ae.SMOOTH, rel=1e-5)
    edge = target.copy()
    edge[:, :, 1:, :, 4:] = 1  # from frame 1 on: an edge in x in 2 of 3 frames, half changes once
    assert ae.gradient_loss(edge, target) == pytest.approx(2 / 3 / 7 + 0.5 / 2, rel=1e-5)
    assert ae.psnr(target + 0.1, target) == pytest.approx(20, abs=1e-3)


@each
def test_gradients_reach_every_parameter(what):
    """Of a silent and of a plain clip too: finite, and none is zero but where symmetry says so."""
    model = SMALL[what]
    params = perturbed(model)
    shape = (2, 3, 3, 16, 16) if what == "video" else (2, 2, 3840)
    clips = np.random.default_rng(0).random(shape, np.float32) - (what == "sound") * 0.5
    grad = jax.jit(jax.grad(lambda p, x: model.loss(p, model.config, x, jax.random.key(0))[0]))
    gradient = grad(params, clips)
    dead = [
        jax.tree_util.keystr(path)
        for path, leaf in jax.tree_util.tree_leaves_with_path(gradient)
        if not np.any(leaf)
    ]
    assert dead == []
    for values in (gradient, grad(params, 0 * clips)):
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(values))


def test_volume_must_not_be_normalised():
    config = dataclasses.replace(SMALL_SOUND, normalize_volume=True)
    with pytest.raises(ValueError, match="normalize_volume=True hides the volume"):
        ae.sound_loss({}, config, jnp.zeros((1, 2, 1920)), jax.random.key(0))


# ---- latents ----


def test_latent_statistics():
    """Of samples: what deviations add to the means' spread; a channel that says nothing stays 1."""
    rng = np.random.default_rng(0)
    mean = rng.normal([2.0, 0.0], [3.0, 0.0], (50, 400, 2))
    deviation = np.broadcast_to([0.5, 1.0], mean.shape)
    centre, scale = ae.latent_statistics(mean, deviation)
    samples = (mean + deviation * rng.standard_normal(mean.shape)).reshape(-1, 2)
    # 20,000 samples: their own mean and deviation scatter by 0.7%.
    np.testing.assert_allclose(centre, samples.mean(0), atol=0.1)
    np.testing.assert_allclose(scale, samples.std(0), rtol=0.03)
    np.testing.assert_allclose(scale, [np.hypot(3.0, 0.5), 1.0], rtol=0.03)


def test_rescaled_sound_latents_sound_the_same(record_property):
    model = SMALL["sound"]
    params, deviation = perturbed(model), np.array([0.2, 3.0, 1.0, 7.0], np.float32)
    rescaled = ae.rescale_sound_latents(params, SMALL_SOUND, deviation)
    encode = jax.jit(lambda p, x: sound_vae.posterior(p, SMALL_SOUND, x))
    decode = jax.jit(lambda p, z: sound_vae.decode(p, SMALL_SOUND, z))
    mean, spread = encode(params, waveforms())
    check(record_property, TOLERANCE, encode, params, waveforms(), name="encode")
    check(record_property, TOLERANCE, decode, params, np.asarray(mean), name="decode")
    new_mean, new_spread = encode(rescaled, waveforms())
    assert relative_l2(new_mean, mean / deviation) < TOLERANCE
    assert relative_l2(new_spread, spread) < TOLERANCE
    assert relative_l2(decode(rescaled, new_mean), decode(params, mean)) < TOLERANCE
    for wrong in (np.ones(3), np.array([1, 1, 0, 1.0]), np.array([1, 1, np.nan, 1])):
        with pytest.raises(ValueError, match="must be 4 positive, finite numbers"):
            ae.rescale_sound_latents(params, SMALL_SOUND, wrong)


@each
def test_first_parameters(what):
    """Of one type, or the second step would compile again; and the first clip is empty."""
    params = SMALL[what].init(SMALL[what].config, jax.random.key(0))
    assert all(x.dtype == jnp.float32 and not x.weak_type for x in jax.tree.leaves(params))
    last = params["decoder"]["conv_out" if what == "video" else "conv2"]
    assert not np.any(last["kernel"])
