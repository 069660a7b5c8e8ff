"""Losses for the two autoencoders, and the scale of their latents.

Both losses are pure functions of parameters, clips and a key: encode, sample the posterior, decode,
and compare. Video is compared pixel by pixel at several resolutions and by its differences in space
and time; sound by its samples and by its spectra at several window lengths. No network judges
either.

Axes: B batch, T frames (of pixels or latents), H height, W width, C channels, N samples, S latent
frames of sound, F frequencies, K time steps of a spectrum.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import reduce
from jax import Array

from cosmos3_jax.config import SoundVAEConfig, VideoVAEConfig
from cosmos3_jax.models import sound_vae, video_vae
from cosmos3_jax.models.layers import precision

Params = dict[str, Any]
SMOOTH = 1e-3  # where the absolute value of a pixel error turns into its square
FLOOR = 1e-3  # spectral magnitude, of a full tone's 0.5, below which logarithms level off


@dataclasses.dataclass(frozen=True)
class VideoLossWeights:
    """Of the parts of `video_loss`; pixels count once."""

    gradient: float = 1.0
    kl: float = 1e-3


@dataclasses.dataclass(frozen=True)
class SoundLossWeights:
    """Of the parts of `sound_loss`; spectral convergence counts once.

    Absolute errors and logarithms count less than in speech or music: where most of a clip is
    silence, they would soon silence all of it. The relative error pulls out of silence.
    """

    relative_error: float = 3.0
    log_magnitude: float = 0.1
    waveform: float = 1.0
    kl: float = 1e-3


def kl_divergence(mean: Array, deviation: Array) -> Array:
    """From N(mean, deviation^2) to N(0, 1), the mean over all numbers, in nats.

    Published weights are for its sum over a clip or over channels; this one does not depend on the
    shapes.
    """
    return jnp.mean((mean**2 + deviation**2 - 1) / 2 - jnp.log(deviation))


def sample_posterior(key: Array, mean: Array, deviation: Array) -> Array:
    """Mean + deviation * noise (Kingma & Welling, 2014)."""
    return mean + deviation * jax.random.normal(key, mean.shape, mean.dtype)


# Video
# --------------------------------------------------------------------------------------------------


def pixel_loss(video: Array, target: Array, scales: Sequence[int] = (1, 2, 4)) -> Array:
    """The smooth absolute error sqrt(d^2 + 0.001^2) of pictures and of their means over squares.

    (Charbonnier et al., 1994.) The larger the squares, the more a flat error counts beside an edge.

    Args:
        video, target: [B, C, T, H, W]; H and W are multiples of the scales.
        scales: sides of the squares, in pixels.
    """
    error = video - target
    pattern = "B C T (H h) (W w) -> B C T H W"
    errors = [reduce(error, pattern, "mean", h=side, w=side) for side in scales]
    return sum(jnp.mean(jnp.sqrt(error**2 + SMOOTH**2)) for error in errors) / len(errors)


def gradient_loss(video: Array, target: Array) -> Array:
    """The mean absolute error of differences between neighbours in height, width and time, summed.

    Edges and motion, which the mean over pixels hardly notices. (Mathieu et al., 2016, for space.)
    One frame has no differences in time.
    """
    error = video - target
    axes = [axis for axis in (2, 3, 4) if error.shape[axis] > 1]
    return sum(jnp.mean(jnp.abs(jnp.diff(error, axis=axis))) for axis in axes)


def video_loss(
    params: Params,
    config: VideoVAEConfig,
    video: Array,
    key: Array,
    weights: VideoLossWeights = VideoLossWeights(),
    dtype: Any = jnp.float32,
) -> tuple[Array, dict[str, Array]]:
    """The loss of clips [B, 3, T, H, W] in [0, 1], and its parts before they are weighted.

    The latents' normalisation is left out: it is known after training (`latent_statistics`). Frames
    after the first go through in one piece; memory for a gradient is that of all of them.

    Errors as for `video_vae.encode`.
    """
    config = without_normalization(config)
    settings = {
        "chunk_size": max((video.shape[2] - 1) // config.scale_factor_temporal, 1),
        "dtype": dtype,
        "convolve": convolve,
    }
    mean, deviation = video_vae.posterior(params, config, video, **settings)
    latents = sample_posterior(key, mean, deviation)
    decoded = video_vae.decode(
        params, config, latents, video_dtype=jnp.float32, clip=False, **settings
    )
    parts = {
        "pixel": pixel_loss(decoded, video),
        "gradient": gradient_loss(decoded, video),
        "kl": kl_divergence(mean, deviation),
    }
    loss = sum(getattr(weights, name, 1.0) * value for name, value in parts.items())
    return loss, parts | {"psnr": psnr(decoded, video), "deviation": jnp.mean(deviation)}


def convolve(x: Array, kernel: Array, padding: Sequence[tuple[int, int]], stride: int = 1) -> Array:
    """As `video_vae_modules.convolve`: what a kernel reads side by side in channels, times it.

    GPU libraries have many kernels for the gradient of a convolution with so few channels, most of
    them a hundred times too slow: a compiler that tries them all takes minutes, and one that does
    not may take a bad one. Products of matrices are fast at once.
    """
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    rows, columns = (
        stride * ((size - reach) // stride) + 1
        for size, reach in zip(x.shape[1:3], kernel.shape[:2], strict=True)
    )
    windows = [
        x[:, i : i + rows : stride, j : j + columns : stride]
        for i in range(kernel.shape[0])
        for j in range(kernel.shape[1])
    ]
    windows = windows[0] if len(windows) == 1 else jnp.concatenate(windows, axis=-1)
    kernel = kernel.reshape(-1, kernel.shape[-1])
    return jnp.matmul(windows, kernel, precision=precision(x.dtype))


def psnr(video: Array, target: Array) -> Array:
    """Peak signal to noise of pixels in [0, 1] after clipping, in dB, over the whole batch."""
    error = jnp.mean(jnp.square(jnp.clip(video, 0, 1) - target))
    return -10 * jnp.log10(jnp.maximum(error, 1e-10))


def without_normalization(config: VideoVAEConfig) -> VideoVAEConfig:
    """The same, with latents as the encoder makes them."""
    zeros, ones = (0.0,) * config.z_dim, (1.0,) * config.z_dim
    return dataclasses.replace(config, latents_mean=zeros, latents_std=ones)


# Sound
# --------------------------------------------------------------------------------------------------


def magnitudes(waveform: Array, size: int, hop: int) -> Array:
    """Smoothed spectral magnitudes sqrt(|X|^2 + FLOOR^2): [..., N] -> [..., K, F].

    Centred windows (Hann, periodic) with silence outside, K = N / hop + 1, divided by the sum of a
    window: a tone of amplitude 1 has 0.5 in all sizes. The smoothing gives silence a gradient, and
    a logarithm.

    Raises ValueError unless size / 2 and N are multiples of hop.
    """
    samples = waveform.shape[-1]
    if size % (2 * hop) or samples % hop:
        raise ValueError(
            f"half a window of {size} and {samples} samples must be multiples of hop={hop}"
        )
    ends = [(0, 0)] * (waveform.ndim - 1) + [(size // 2, size // 2)]
    blocks = jnp.pad(waveform, ends).reshape(*waveform.shape[:-1], -1, hop)
    # Shifted blocks side by side, not a gather, whose gradient would scatter.
    count = samples // hop + 1
    windows = jnp.concatenate([blocks[..., i : i + count, :] for i in range(size // hop)], axis=-1)
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(size) / size)
    spectrum = jnp.fft.rfft(windows * (hann / hann.sum()).astype(np.float32))
    return jnp.sqrt(spectrum.real**2 + spectrum.imag**2 + FLOOR**2)


def spectral_loss(
    waveform: Array, target: Array, sizes: Sequence[int] = (240, 960, 3840)
) -> tuple[Array, Array]:
    """Spectral convergence and the error of log magnitudes, means over window sizes.

    The multi-resolution loss of Parallel WaveGAN (Yamamoto et al., 2020), hops a quarter of the
    windows. Convergence is |M - M'| / |M|, Frobenius norms over the whole batch, so that a silent
    example in it counts no more than others. Stereo is compared as left and right and as their
    means and half differences (Steinmetz et al., 2021), so that places are learned too.

    Args:
        waveform, target: [B, 2, N].
        sizes: of windows; N is a multiple of a quarter of each, as whole latent frames of 1920 are.
    """
    both = jnp.stack([_with_middle_and_side(waveform), _with_middle_and_side(target)])
    convergence, logarithm = [], []
    for size in sizes:
        ours, theirs = magnitudes(both, size, size // 4)
        distance = jnp.sum(jnp.square(ours - theirs))
        # At equality a square root has no gradient, and the error is zero to rounding there.
        convergence.append(jnp.sqrt((distance + 1e-12) / jnp.sum(jnp.square(theirs))))
        logarithm.append(jnp.mean(jnp.abs(jnp.log(ours) - jnp.log(theirs))))
    return sum(convergence) / len(sizes), sum(logarithm) / len(sizes)


def _with_middle_and_side(waveform: Array) -> Array:
    left, right = waveform[:, 0], waveform[:, 1]
    return jnp.stack([left, right, (left + right) / 2, (left - right) / 2], axis=1)


def sound_loss(
    params: Params,
    config: SoundVAEConfig,
    waveform: Array,
    key: Array,
    weights: SoundLossWeights = SoundLossWeights(),
    dtype: Any = jnp.float32,
) -> tuple[Array, dict[str, Array]]:
    """The loss of waveforms [B, 2, N] in [-1, 1], and its parts before they are weighted.

    With `config.normalize_volume` the encoder hears another volume than it is to give back: train
    with it off.

    Raises ValueError if it is on, and as `sound_vae.encode` does.
    """
    if config.normalize_volume:
        raise ValueError(
            "normalize_volume=True hides the volume from the encoder; train with False"
        )
    mean, deviation = sound_vae.posterior(params, config, waveform, dtype=dtype)
    latents = sample_posterior(key, mean, deviation)
    decoded = sound_vae.decode(params, config, latents, dtype=dtype, clip=False)
    target = jnp.pad(waveform, ((0, 0), (0, 0), (0, decoded.shape[-1] - waveform.shape[-1])))
    convergence, logarithm = spectral_loss(decoded, target)
    parts = {
        "convergence": convergence,
        "log_magnitude": logarithm,
        "relative_error": relative_error(decoded, target),
        "waveform": jnp.mean(jnp.abs(decoded - target)),
        "kl": kl_divergence(mean, deviation),
    }
    loss = sum(getattr(weights, name, 1.0) * value for name, value in parts.items())
    return loss, parts | {"snr": snr(decoded, target), "deviation": jnp.mean(deviation)}


def relative_error(waveform: Array, target: Array) -> Array:
    """|x - y| / |y|, Euclidean norms over the whole batch: 1 for silence. Finite if y is silent."""
    noise, signal = jnp.sum(jnp.square(waveform - target)), jnp.sum(jnp.square(target))
    return jnp.sqrt((noise + 1e-8) / (signal + 1e-3))


def snr(waveform: Array, target: Array) -> Array:
    """Signal to noise over the whole batch, in dB."""
    signal, noise = jnp.sum(jnp.square(target)), jnp.sum(jnp.square(waveform - target))
    return 10 * jnp.log10((signal + 1e-8) / (noise + 1e-8))


# Latents
# --------------------------------------------------------------------------------------------------


def latent_statistics(mean: Array, deviation: Array) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each channel of posteriors [..., C] over data: [C] each.

    Of samples, not of means: a channel that says nothing has the prior's deviation and a mean near
    0, and stays near 0 when it is normalised, where dividing by the deviation of the means would
    blow up what the decoder ignores.
    """
    mean, deviation = (
        np.asarray(x, np.float64).reshape(-1, x.shape[-1]) for x in (mean, deviation)
    )
    variance = mean.var(axis=0) + np.square(deviation).mean(axis=0)
    return mean.mean(axis=0), np.sqrt(variance)


def rescale_sound_latents(params: Params, config: SoundVAEConfig, deviation: np.ndarray) -> Params:
    """Sound VAE parameters whose latents are those of `params` divided by `deviation`, [C].

    The layout has no statistics for sound latents, so the scale goes into the encoder's last
    convolution and the decoder's first: encoding and decoding is the same function as before.
    (The posterior's own deviation is left as it was; only training reads it.)

    Raises ValueError if a deviation is not positive and finite, or their number is wrong.
    """
    deviation = np.asarray(deviation, np.float32)
    channels = config.vocoder_input_dim
    if deviation.shape != (channels,) or not np.all((deviation > 0) & np.isfinite(deviation)):
        raise ValueError(f"deviation={deviation} must be {channels} positive, finite numbers")
    encoder, decoder = dict(params["encoder"]), dict(params["decoder"])
    last = f"layers_{len(config.enc_strides) * (config.enc_num_blocks + 1) + 1}"
    scale = np.concatenate([1 / deviation, np.ones(channels, np.float32)])
    encoder[last] = {"kernel": encoder[last]["kernel"] * scale}  # [1, width, 2 C]: means come first
    first = decoder["conv1"]
    decoder["conv1"] = first | {"kernel": first["kernel"] * deviation[:, None]}
    return {"encoder": encoder, "decoder": decoder}
