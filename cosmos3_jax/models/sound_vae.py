"""AVAE, the sound autoencoder: 48 kHz waveforms to and from 64 channels, 25 times a second.

The decoder is Oobleck's (Evans et al., "Fast Timing-Conditioned Latent Audio Diffusion", 2024) with
SnakeBeta activations (Lee et al., "BigVGAN", 2023, after Ziyin et al., 2020). The encoder is a
stack of ConvNeXt blocks (Liu et al., "A ConvNet for the 2020s", 2022) over a short-time spectrum.
Weight norm is folded when a checkpoint is read, so every convolution here is a plain one.

Axes: B batch, S latent frames, N waveform samples, T positions at any rate between the two, C
channels, R the real and imaginary part, F frequencies. Inside, channels are last; waveforms are [B,
C, N] for callers.
"""

import itertools
import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn

from cosmos3_jax.config import SoundVAEConfig, check_fps
from cosmos3_jax.models.layers import over_last, precision, traced_once
from cosmos3_jax.parallel import sharding


def decode(
    params: Mapping[str, Any],
    config: SoundVAEConfig,
    latents: jax.Array,
    *,
    dtype: Any = jnp.float32,
    clip: bool = True,
) -> jax.Array:
    """Turn sound latents into a waveform.

    Args:
        params: `{"decoder": ...}`, in any floating dtype; an encoder may be there too.
        config: the sound VAE's configuration.
        latents: [B, S, 64], as the transformer makes them: AVAE has no latent normalisation.
        dtype: what convolutions compute in. Snakes compute in float32 whatever it is.
        clip: False leaves samples beyond -1 and 1: a sample that is cut off has no gradient.

    Returns:
        float32 [B, 2, 1920 * S] at `config.sampling_rate`, cut off (not squashed) at -1 and 1.

    Raises:
        ValueError: the latents are not [B, S, `config.vocoder_input_dim`].
    """
    channels = config.vocoder_input_dim
    if latents.ndim != 3 or latents.shape[-1] != channels:
        raise ValueError(
            f"sound latents of shape {latents.shape} are not [batch, frames, {channels}]"
        )
    # Whole on each device that has the prompt: it is a hundredth of the video's work.
    latents = sharding.constrain(latents, sharding.PROMPTS, None, None)
    waveform = Decoder(config, dtype).apply({"params": params["decoder"]}, latents)
    waveform = rearrange(waveform.astype(jnp.float32), "b n c -> b c n")
    return jnp.clip(waveform, -1.0, 1.0) if clip else waveform


def encode(
    params: Mapping[str, Any],
    config: SoundVAEConfig,
    waveform: jax.Array,
    *,
    dtype: Any = jnp.float32,
) -> jax.Array:
    """Turn a waveform into the mean of its latent distribution.

    Each example is scaled to a peak of 0.95 by itself, over its channels together so that their
    balance stays: what one example encodes to must not depend on which others share its batch.
    (diffusers takes the peak of the whole batch; for a batch of one there is no difference.)

    Args:
        params: a tree with an `"encoder"`, in any floating dtype.
        config: the sound VAE's configuration.
        waveform: [B, 2, N] in [-1, 1] at `config.sampling_rate`; silence completes its last latent
            frame.
        dtype: what convolutions compute in. Spectra, norms and snakes are float32 whatever it is.

    Returns:
        float32 [B, ceil(N / 1920), 64].

    Raises:
        ValueError: the waveform has the wrong number of channels or no samples, or `params` has no
            encoder.
    """
    mean, _ = jnp.split(_moments(params, config, waveform, dtype), 2, axis=-1)
    return mean


def posterior(
    params: Mapping[str, Any],
    config: SoundVAEConfig,
    waveform: jax.Array,
    *,
    dtype: Any = jnp.float32,
) -> tuple[jax.Array, jax.Array]:
    """What training samples latents from: a normal distribution for each number.

    Args and errors as for `encode`, whose result is this mean.

    Returns:
        Mean and standard deviation, float32 [B, ceil(N / 1920), 64] each. The deviation is
        softplus(scale) + 1e-4, as in the bottleneck of stable-audio-tools and in the public code.
    """
    mean, scale = jnp.split(_moments(params, config, waveform, dtype), 2, axis=-1)
    return mean, jax.nn.softplus(scale) + 1e-4


def _moments(
    params: Mapping[str, Any], config: SoundVAEConfig, waveform: jax.Array, dtype: Any
) -> jax.Array:
    """The encoder's output, float32 [B, ceil(N / 1920), 128]."""
    if "encoder" not in params:
        raise ValueError(
            "these sound VAE weights have a decoder only; to encode sound, load or convert a "
            "checkpoint whose sound_tokenizer/ has encoder.* tensors"
        )
    channels = config.audio_channels
    if waveform.ndim != 3 or waveform.shape[1] != channels or waveform.shape[2] == 0:
        raise ValueError(
            f"waveform of shape {waveform.shape} is not [batch, {channels}, at least one sample]"
        )
    waveform = waveform.astype(jnp.float32)
    if config.normalize_volume:
        peak = jnp.max(jnp.abs(waveform), axis=(1, 2), keepdims=True)
        waveform = waveform * (0.95 / (peak + 1e-5))
    silence = -waveform.shape[2] % config.samples_per_latent
    waveform = jnp.pad(waveform, ((0, 0), (0, 0), (0, silence)))
    spectrum = short_time_spectrum(waveform, config.enc_n_fft, config.enc_hop_length)
    moments = Encoder(config, dtype).apply({"params": params["encoder"]}, spectrum)
    return moments.astype(jnp.float32)


def sound_latent_length(config: SoundVAEConfig, num_frames: int, fps: float) -> int:
    """Latent frames of the sound that covers a video: ceil(int(num_frames / fps * 48000) / 1920).

    The waveform is thus up to 1919 samples longer than the video; nothing trims it. Whole samples
    come first because ceil(num_frames / fps * 25) has a frame too many where rounding lifts it over
    a whole number.

    Raises:
        ValueError: `num_frames` is less than 1, or `fps` is not a positive, finite number.
    """
    if num_frames < 1:
        raise ValueError(f"num_frames={num_frames} must be at least 1")
    check_fps(fps)
    samples = int(num_frames / fps * config.sampling_rate)
    return -(-samples // config.samples_per_latent)


@traced_once
def param_shapes(config: SoundVAEConfig, with_encoder: bool) -> dict[str, Any]:
    """The parameter tree with a `jax.ShapeDtypeStruct` for each leaf. Nothing is computed or
    allocated.
    """

    def shapes(module: nn.Module, *inputs: int) -> dict[str, Any]:
        return jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros(inputs)))["params"]

    tree = {"decoder": shapes(Decoder(config, jnp.float32), 1, 1, config.vocoder_input_dim)}
    if with_encoder:
        bins = config.audio_channels * (config.enc_n_fft + 2)
        tree["encoder"] = shapes(
            Encoder(config, jnp.float32), 1, math.prod(config.enc_strides), bins
        )
    return tree


class Decoder(nn.Module):
    """Oobleck: latents [B, S, C] -> waveform [B, N, C], not yet cut off at -1 and 1."""

    config: SoundVAEConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config = self.config
        widths = [config.dec_dim * multiple for multiple in (1, *config.dec_c_mults)]
        x = _conv(widths.pop(), 7, self.dtype, "conv1")(x)
        for i, stride in enumerate(reversed(config.dec_strides)):
            x = DecoderBlock(widths.pop(), stride, self.dtype, name=f"block_{i}")(x)
        x = Snake(self.dtype, name="snake1")(x)
        return _conv(config.dec_out_channels, 7, self.dtype, "conv2", use_bias=False)(x)


class DecoderBlock(nn.Module):
    """Upsampling, then residual units that look ever farther: [B, T, C] -> [B, T * stride,
    width].
    """

    width: int
    stride: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = Snake(self.dtype, name="snake1")(x)
        x = ConvTranspose(self.width, self.stride, self.dtype, name="conv_t1")(x)
        for i, dilation in enumerate((1, 3, 9), start=1):
            x = ResidualUnit(dilation, self.dtype, name=f"res_unit{i}")(x)
        return x


class ResidualUnit(nn.Module):
    """A dilated and a pointwise convolution around which the input is carried."""

    dilation: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        y = Snake(self.dtype, name="snake1")(x)
        y = DilatedConv(self.dilation, self.dtype, name="conv1")(y)
        y = Snake(self.dtype, name="snake2")(y)
        return x + _conv(width, 1, self.dtype, "conv2")(y)


class Encoder(nn.Module):
    """Spectrum [B, T, C] -> moments [B, S, 2C]: means, then what the scales are made from.

    `layers` are counted straight through, as in the public checkpoint.
    """

    config: SoundVAEConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config, names = self.config, (f"layers_{i}" for i in itertools.count())
        widths = [config.enc_dim * multiple for multiple in config.enc_c_mults]
        x = _conv(widths[0], 1, self.dtype, next(names), use_bias=False)(x)
        for width, stride in zip(widths[1:] + widths[-1:], config.enc_strides, strict=True):
            for _ in range(config.enc_num_blocks):
                x = ConvNeXtBlock(self.dtype, name=next(names))(x)
            padding = math.ceil(stride / 2)
            x = _conv(width, 2 * stride, self.dtype, next(names), padding=padding, strides=stride)(
                x
            )
        return _conv(config.enc_latent_dim, 1, self.dtype, next(names), use_bias=False)(x)


class ConvNeXtBlock(nn.Module):
    """Mix positions channel by channel, normalise, then mix channels: [B, T, C] -> [B, T, C]."""

    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        y = _conv(width, 7, self.dtype, "dwconv_1", feature_group_count=width)(x)
        # The fast variance E[x^2] - E[x]^2 loses digits where a channel's mean dwarfs its spread.
        y = nn.LayerNorm(1e-5, jnp.float32, use_bias=False, use_fast_variance=False, name="norm")(y)
        y = _conv(4 * width, 1, self.dtype, "pwconv1")(y)
        y = Snake(self.dtype, name="act")(y)
        return x + _conv(width, 1, self.dtype, "pwconv2")(y)


class Snake(nn.Module):
    """SnakeBeta: x + sin^2(a x) / b with a = exp(alpha), b = exp(beta) a channel.

    In float32 whatever `dtype` is: a sine needs its angle's absolute error to be small, not its
    relative one.
    """

    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        alpha = self.param("alpha", nn.initializers.zeros_init(), x.shape[-1:]).astype(jnp.float32)
        beta = self.param("beta", nn.initializers.zeros_init(), x.shape[-1:]).astype(jnp.float32)
        x = x.astype(jnp.float32)
        a, b = over_last(jnp.exp(alpha), x), over_last(jnp.exp(beta), x)
        return (x + jnp.sin(a * x) ** 2 / (b + 1e-9)).astype(self.dtype)


class ConvTranspose(nn.Module):
    """The transpose of a strided convolution: [B, T, C] -> [B, T * stride, width], for odd strides
    too.

    The kernel, [2 * stride, C in, C out], runs backwards over the input, spread out with zeros in
    between. It is stored in the checkpoint's order, and turned round here.
    """

    width: int
    stride: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        size = 2 * self.stride
        kernel = self.param(
            "kernel", nn.initializers.lecun_normal(), (size, x.shape[-1], self.width)
        )
        bias = self.param("bias", nn.initializers.zeros_init(), (self.width,))
        before = size - 1 - math.ceil(self.stride / 2)
        after = before + self.stride % 2
        y = jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            kernel.astype(self.dtype)[::-1],
            window_strides=(1,),
            padding=((before, after),),
            lhs_dilation=(self.stride,),
            dimension_numbers=("NWC", "WIO", "NWC"),
            precision=precision(self.dtype),
        )
        return y + over_last(bias.astype(self.dtype), y)


def short_time_spectrum(waveform: jax.Array, size: int, hop: int) -> jax.Array:
    """Short-time Fourier transform, uncentred, under a periodic Hann window.

    Args:
        waveform: float32 [B, C, N]; N is a multiple of `hop`.
        size: samples in a window.
        hop: samples from one window to the next; `size - hop` samples of silence go half before,
            half after.

    Returns:
        float32 [B, N / hop, C * R * F] with F = `size` / 2 + 1.
    """
    before = (size - hop) // 2
    waveform = jnp.pad(waveform, ((0, 0), (0, 0), (before, size - hop - before)))
    starts = jnp.arange(0, waveform.shape[-1] - size + 1, hop)
    windows = waveform[:, :, starts[:, None] + jnp.arange(size)]
    hann = 0.5 - 0.5 * jnp.cos(2 * jnp.pi * jnp.arange(size) / size)
    spectrum = jnp.fft.rfft(windows * hann)
    return rearrange([spectrum.real, spectrum.imag], "r b c t f -> b t (c r f)")


class DilatedConv(nn.Module):
    """A convolution over T with gaps between its seven taps: [B, T, C] -> [B, T, C]."""

    dilation: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (7, width, width))
        bias = self.param("bias", nn.initializers.zeros_init(), (width,))
        y = dilated_convolution(x.astype(self.dtype), kernel.astype(self.dtype), self.dilation)
        return y + over_last(bias.astype(self.dtype), y)


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def dilated_convolution(x: jax.Array, kernel: jax.Array, dilation: int) -> jax.Array:
    """Padded with zeros to keep T. x: [B, T, C], kernel: [taps, C, C'], an odd number of taps."""
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(1,),
        padding=((len(kernel) // 2 * dilation,) * 2,),
        rhs_dilation=(dilation,),
        dimension_numbers=("NWC", "WIO", "NWC"),
        precision=precision(x.dtype),
    )


@dilated_convolution.defjvp
def _dilated_jvp(dilation: int, primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    """By the kernel tap by tap, as products of matrices.

    Else the kernel's gradient would be a convolution whose kernel is as long as the clip, for which
    GPU libraries have nothing fast: nine tenths of a training step went into it.
    """
    (x, kernel), (dx, dkernel) = primals, tangents
    reach, T = len(kernel) // 2 * dilation, x.shape[1]
    padded = jnp.pad(x, ((0, 0), (reach, reach), (0, 0)))
    dy = dilated_convolution(dx, kernel, dilation)
    for i, tap in enumerate(dkernel):
        dy += jnp.matmul(padded[:, i * dilation :][:, :T], tap, precision=precision(x.dtype))
    return dilated_convolution(x, kernel, dilation), dy


def _conv(width: int, size: int, dtype: Any, name: str, **options: Any) -> nn.Conv:
    """A convolution over T that keeps its length, unless `options` say otherwise."""
    options = {"padding": size // 2, **options}
    return nn.Conv(width, (size,), dtype=dtype, precision=precision(dtype), name=name, **options)
