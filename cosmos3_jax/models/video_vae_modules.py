"""The modules of the Wan2.2 video VAE, from causal convolutions to encoder and decoder.

Axes: B batch, T frames (of pixels or latents, whichever the array holds), H height, W width, C
channels. Arrays are [B, T, H, W, C].

Everything is causal: no frame sees a later one. So each convolution over time keeps the last frames
that it read in the variable collection "cache", a clip passes through in pieces, and the pieces
equal the whole. Frame 0 stands alone (a latent frame of one pixel frame; each later one is worth
four), which is why the first piece is that frame, and why the layers that change the frame rate
take `first`.

Source: Wan (arXiv:2503.20314), the VAE of its 2.2 release. Parameters may be stored in any dtype;
they are cast to the compute dtype where they are used.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange, reduce, repeat
from jax import lax
from jax.typing import DTypeLike

from cosmos3_jax.config import VideoVAEConfig
from cosmos3_jax.models.layers import over_last, precision
from cosmos3_jax.parallel.device import AnyDevice
from cosmos3_jax.parallel.rows import Rows, divide_rows, on_own_rows, rows_around, surround

Convolve = Callable[..., jax.Array]  # as `convolve`


def convolve(
    x: jax.Array, kernel: jax.Array, padding: Sequence[tuple[int, int]], stride: int = 1
) -> jax.Array:
    """Each picture of x, [N, H, W, C], with a kernel [h, w, C, C']."""
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding=padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=precision(x.dtype),
    )


def convolve_in_float32(
    x: jax.Array, kernel: jax.Array, padding: Sequence[tuple[int, int]], stride: int = 1
) -> jax.Array:
    """`convolve` for a CPU, which has no units for bfloat16: the sums come in float32, which its
    kernel computes in anyway, and are rounded once, with the bias in them.
    """
    return convolve(x.astype(jnp.float32), kernel.astype(jnp.float32), padding, stride)


def convolve_on(device: AnyDevice) -> Convolve:
    """The convolution for a device."""
    return convolve_in_float32 if device.platform == "cpu" else convolve


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a pass is computed: the same in all of its modules.

    Attributes:
        dtype: what convolutions and attention compute in, and round to.
        rows: how those of the pictures divide over a mesh; the default is for one device.
        convolve: the arithmetic of a convolution.
    """

    dtype: DTypeLike
    rows: Rows = Rows()
    convolve: Convolve = convolve


class Conv2d(nn.Module):
    """A convolution of each frame by itself."""

    features: int
    plan: Plan
    size: int = 3
    stride: int = 1
    padding: tuple[int, int] = (0, 0)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        plan, shape = self.plan, (self.size, self.size, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape).astype(plan.dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.features,)).astype(plan.dtype)
        x = plan.rows.place(x.astype(plan.dtype))
        frames = rearrange(x, "B T H W C -> (B T) H W C")
        y = plan.convolve(frames, kernel, (self.padding, self.padding), self.stride)
        y = rearrange(y, "(B T) H W C -> B T H W C", B=len(x))
        return divide_rows((y + over_last(bias, y)).astype(plan.dtype))


class EnlargingConv(nn.Module):
    """Nearest-neighbour upsampling by two, and a 3x3 convolution of the result, padded with zeros.

    The large picture is not written down. Its convolution reads the same pixel of the small one
    several times: two by two of them for each of the square's pixels, by the sums of the weights
    that meet there. That is 4 products instead of 9.
    """

    features: int
    plan: Plan

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        plan, shape = self.plan, (3, 3, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        bias = self.param("bias", nn.initializers.zeros, (self.features,)).astype(plan.dtype)
        x = plan.rows.place(x.astype(plan.dtype))
        kernel = kernel.astype(jnp.float32)  # so that sums are rounded once

        def enlarge(rows: tuple, kernel: jax.Array) -> jax.Array:
            x, around = rows
            height, width = x.shape[2:4]
            frames = rearrange(surround(x, around), "B T H W C -> (B T) H W C")
            # A row and a column too many: libraries pad both ends alike, or a copy is padded.
            padding = ((1, 1) if around is None else (0, 0), (1, 1))

            def pixel(row: int, column: int) -> jax.Array:
                two = _as_two(_as_two(kernel, row, 0), column, 1).astype(plan.dtype)
                y = plan.convolve(frames, two, padding)
                return y[:, row : row + height, column : column + width]

            y = jnp.stack([jnp.stack([pixel(h, w) for w in (0, 1)], 3) for h in (0, 1)], 2)
            return rearrange(y, "(B T) H h W w C -> B T (H h) (W w) C", B=len(x))

        y = on_own_rows(enlarge, (x, rows_around(x)), kernel)
        return divide_rows((y + over_last(bias, y)).astype(plan.dtype))


def _as_two(kernel: jax.Array, place: int, axis: int) -> jax.Array:
    """The three weights along an axis as two, for one of a pair of enlarged pixels. The first
    (`place` 0) reads the small pixel before its own once and its own twice; the second reads its
    own twice and the one after once. The two weights of one small pixel are added.
    """
    first, second, third = jnp.split(kernel, 3, axis)
    parts = (first + second, third) if place else (first, second + third)
    return jnp.concatenate(parts, axis)


class CausalConv(nn.Module):
    """A convolution over frames, zero-padded in space, preceded by the frames that its last call
    ended with.

    With stride s a kernel of t frames must see t - s earlier ones; before the clip they are zeros.
    The frames that one output reads are laid side by side in the channels: one plain
    two-dimensional convolution a frame, which GPU libraries run a tenth to a sixth faster than the
    three-dimensional one.
    """

    features: int
    plan: Plan
    size: tuple[int, int, int] = (3, 3, 3)
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        plan, shape = self.plan, (*self.size, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape).astype(plan.dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.features,)).astype(plan.dtype)
        reach = self.size[1] // 2  # to the rows above and below, and to the columns beside
        x = x.astype(plan.dtype)
        x = plan.rows.place(x) if reach else divide_rows(x)  # placed before it is remembered
        history = self.size[0] - self.stride
        frames = (x.shape[1] - self.stride) // self.stride + 1
        span = max(self.stride * (frames - 1) + 1, 0)

        def remembered(name: str, x: jax.Array) -> tuple[jax.Array, jax.Array]:
            """The last frames of the call before, and x; those of x are kept for the next."""
            shape = (len(x), history, *x.shape[2:])
            past = self.variable("cache", name, jnp.zeros, shape, x.dtype)
            before = divide_rows(past.value)
            past.value = divide_rows(_window(before, x, x.shape[1], history))
            return before, x

        parts = [remembered("past", x)]
        around = rows_around(x) if reach else None
        if around is not None:  # they come once, and are remembered with the frame
            parts.append(remembered("past_around", around))

        def convolve(parts: list, kernel: jax.Array) -> jax.Array:
            def window(start: int) -> jax.Array:
                return surround(*(_window(*part, start, span)[:, :: self.stride] for part in parts))

            windows = [window(i) for i in range(self.size[0])]
            x = rearrange(jnp.concatenate(windows, axis=-1), "B T H W C -> (B T) H W C")
            padding = ((reach, reach) if around is None else (0, 0), (reach, reach))
            y = plan.convolve(x, kernel, padding)
            return rearrange(y, "(B T) H W C -> B T H W C", B=len(windows[0]))

        kernel = rearrange(kernel, "t h w c d -> h w (t c) d")
        # A convolution of single pixels needs no neighbours, and may have no frames yet: XLA's.
        y = convolve(parts, kernel) if around is None else on_own_rows(convolve, parts, kernel)
        return divide_rows((y + over_last(bias, y)).astype(plan.dtype))


def _window(past: jax.Array, x: jax.Array, start: int, length: int) -> jax.Array:
    """Frames start .. start + length of `past` followed by `x`, without writing the two down in a
    row.
    """

    def place(frames: jax.Array, at: int) -> jax.Array:
        ends = (at - start, length - (at - start) - frames.shape[1], 0)
        none = [(0, 0, 0)] * (x.ndim - 2)
        return lax.pad(frames, jnp.zeros((), x.dtype), [(0, 0, 0), ends, *none])

    return place(past, 0) + place(x, past.shape[1])


class RMSNorm(nn.Module):
    """x / |x| sqrt(C) scale over channels, in float32. The next convolution rounds, once."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,)).astype(jnp.float32)
        x = x.astype(jnp.float32)
        # The bound of 1e-12 on |x| is put on its square: the root then has a gradient at x = 0.
        square = jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24)
        return x * lax.rsqrt(square) * over_last(channels**0.5 * scale, x)


class ResBlock(nn.Module):
    features: int
    plan: Plan

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = nn.silu(RMSNorm(name="norm1")(x))
        h = CausalConv(self.features, self.plan, name="conv1")(h)
        h = nn.silu(RMSNorm(name="norm2")(h))
        h = CausalConv(self.features, self.plan, name="conv2")(h)
        if x.shape[-1] != self.features:
            x = CausalConv(self.features, self.plan, (1, 1, 1), name="conv_shortcut")(x)
        return x + h


class Attention(nn.Module):
    """Attention with one head over the pixels of each frame; frames do not see each other."""

    plan: Plan

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        plan, (H, W, C) = self.plan, x.shape[2:]
        einsum = partial(jnp.einsum, precision=precision(plan.dtype))
        qkv = Conv2d(3 * C, plan, 1, name="to_qkv")(RMSNorm(name="norm")(x))
        q, k, v = rearrange(qkv, "B T H W (qkv C) -> qkv B T (H W) C", qkv=3)
        # Where a mesh divides the rows, these queries read the pixels of all.
        k, v = (plan.rows.gather(x, H, W) for x in (k, v))
        logits = einsum("BTQC,BTKC->BTQK", q, k, preferred_element_type=jnp.float32)
        weights = nn.softmax(logits * C**-0.5).astype(plan.dtype)
        h = einsum("BTQK,BTKC->BTQC", weights, v)
        return x + Conv2d(C, plan, 1, name="proj")(h.reshape(x.shape))


class MidBlock(nn.Module):
    plan: Plan

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = ResBlock(x.shape[-1], self.plan, name="resnets_0")(x)
        x = Attention(self.plan, name="attentions_0")(x)
        return ResBlock(x.shape[-1], self.plan, name="resnets_1")(x)


def avg_down(x: jax.Array, features: int, time: int, space: int) -> jax.Array:
    """The encoder's shortcut: fold time x space x space boxes into channels, then average groups of
    them.

    A frame 0 that comes alone fills the end of its box, after zeros.
    """
    x = jnp.pad(x, ((0, 0), (-x.shape[1] % time, 0), (0, 0), (0, 0), (0, 0)))
    x = rearrange(x, "B (T t) (H h) (W w) C -> B T H W (C t h w)", t=time, h=space, w=space)
    return reduce(x, "B T H W (C group) -> B T H W C", "mean", C=features)


def dup_up(x: jax.Array, features: int, time: int, space: int, first: bool) -> jax.Array:
    """The decoder's shortcut: repeat each channel, then unfold channels into time x space x space
    boxes.

    Frame 0 keeps only the last frame of its box.
    """
    x = repeat(x, "B T H W C -> B T H W (C n)", n=features * time * space**2 // x.shape[-1])
    x = rearrange(x, "B T H W (C t h w) -> B (T t) (H h) (W w) C", t=time, h=space, w=space)
    return x[:, time - 1 :] if first else x


class Downsample(nn.Module):
    """Halves height and width, and the frame rate where `time` is 2. Frame 0 comes alone."""

    time: int
    plan: Plan

    @nn.compact
    def __call__(self, x: jax.Array, first: bool) -> jax.Array:
        C = x.shape[-1]
        x = Conv2d(C, self.plan, stride=2, padding=(0, 1), name="resample_1")(x)
        if self.time == 1:
            return x
        # Frame 0 passes by. The convolution remembers it, and has no output until two more frames
        # come.
        later = CausalConv(C, self.plan, (3, 1, 1), stride=2, name="time_conv")(x)
        return jnp.concatenate([x[:, : int(first)], later], axis=1)


class Upsample(nn.Module):
    """Doubles height and width, and the frame rate where `time` is 2, of all frames but frame 0."""

    time: int
    plan: Plan

    @nn.compact
    def __call__(self, x: jax.Array, first: bool) -> jax.Array:
        C = x.shape[-1]
        if self.time == 2:
            # Frame 0 passes by, and the convolution never sees it: frame 1 follows zeros.
            later = CausalConv(2 * C, self.plan, (3, 1, 1), name="time_conv")(x[:, int(first) :])
            later = rearrange(later, "B T H W (t C) -> B (T t) H W C", t=2)
            x = jnp.concatenate([x[:, : int(first)], later], axis=1)
        return EnlargingConv(C, self.plan, name="resample_1")(x)


class DownBlock(nn.Module):
    """Residual blocks and a downsampling (none where `space` is 1), beside a shortcut from end to
    end.
    """

    features: int
    depth: int
    time: int
    space: int
    plan: Plan

    @nn.compact
    def __call__(self, x: jax.Array, first: bool) -> jax.Array:
        # The last block's boxes hold one pixel: its shortcut is the identity, not absent.
        shortcut = avg_down(x, self.features, self.time, self.space)
        for i in range(self.depth):
            x = ResBlock(self.features, self.plan, name=f"resnets_{i}")(x)
        if self.space == 2:
            x = Downsample(self.time, self.plan, name="downsampler")(x, first)
        return x + shortcut


class UpBlock(nn.Module):
    """Residual blocks and an upsampling beside a shortcut from end to end; neither where `space` is
    1.
    """

    features: int
    depth: int
    time: int
    space: int
    plan: Plan

    @nn.compact
    def __call__(self, x: jax.Array, first: bool) -> jax.Array:
        start = x
        for i in range(self.depth):
            x = ResBlock(self.features, self.plan, name=f"resnets_{i}")(x)
        if self.space == 1:
            return x
        x = Upsample(self.time, self.plan, name="upsampler")(x, first)
        return x + dup_up(start, self.features, self.time, self.space, first)


class Encoder(nn.Module):
    """Pixels [B, T, H, W, 3] in [-1, 1] -> the posterior's mean [B, T/4, H/16, W/16, z_dim], not
    normalised.

    With `first`, T is 1 and makes one latent frame; otherwise T is a multiple of 4. With `moments`,
    the posterior's log-variance follows the mean: 2 z_dim channels.
    """

    config: VideoVAEConfig
    plan: Plan
    moments: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, first: bool = False) -> jax.Array:
        config, plan, patch = self.config, self.plan, self.config.patch_size
        # Width before height within a patch: not the order of the transformer's patches.
        x = rearrange(x, "B T (H h) (W w) C -> B T H W (C w h)", h=patch, w=patch)
        x = CausalConv(config.base_dim, plan, name="conv_in")(x)
        boxes = [(1 + time, 2) for time in config.temperal_downsample] + [(1, 1)]
        for i, (mult, box) in enumerate(zip(config.dim_mult, boxes, strict=True)):
            features, depth = mult * config.base_dim, config.num_res_blocks
            x = DownBlock(features, depth, *box, plan, name=f"down_blocks_{i}")(x, first)
        x = MidBlock(plan, name="mid_block")(x)
        x = nn.silu(RMSNorm(name="norm_out")(x))
        x = CausalConv(2 * config.z_dim, plan, name="conv_out")(x)
        x = CausalConv(2 * config.z_dim, plan, (1, 1, 1), name="quant_conv")(x)
        return x if self.moments else x[..., : config.z_dim]


class Decoder(nn.Module):
    """Latents [B, T, H, W, z_dim], denormalised -> pixels [B, 4T, 16H, 16W, 3], about [-1, 1], not
    clipped.

    With `first`, T is 1 and makes one pixel frame.
    """

    config: VideoVAEConfig
    plan: Plan

    @nn.compact
    def __call__(self, x: jax.Array, first: bool = False) -> jax.Array:
        config, plan, patch = self.config, self.plan, self.config.patch_size
        x = CausalConv(config.z_dim, plan, (1, 1, 1), name="post_quant_conv")(x)
        x = CausalConv(config.dim_mult[-1] * config.decoder_base_dim, plan, name="conv_in")(x)
        x = MidBlock(plan, name="mid_block")(x)
        boxes = [(1 + time, 2) for time in reversed(config.temperal_downsample)] + [(1, 1)]
        for i, (mult, box) in enumerate(zip(reversed(config.dim_mult), boxes, strict=True)):
            features, depth = mult * config.decoder_base_dim, config.num_res_blocks + 1
            x = UpBlock(features, depth, *box, plan, name=f"up_blocks_{i}")(x, first)
        x = nn.silu(RMSNorm(name="norm_out")(x))
        x = CausalConv(config.out_channels, plan, name="conv_out")(x)
        return rearrange(x, "B T H W (C w h) -> B T (H h) (W w) C", h=patch, w=patch)
