"""Mistakes in the video VAE, pitfalls 7 to 10 of docs/pitfalls.md.

Each has the right shapes and raises nothing, so only the tests against the oracle can tell: here
each is made on purpose, to show that they do.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from rounding import relative_l2
from video_vae_cases import CONFIG, reference

from cosmos3_jax.models import video_vae, video_vae_modules

# What a mistake must at least cost for `test_agrees_with_the_oracle` to have caught it.
OBVIOUS = 0.1


def height_major_patches(monkeypatch):
    """7: the transformer's patch order, where the VAE has width before height."""
    right = video_vae_modules.rearrange
    monkeypatch.setattr(
        video_vae_modules,
        "rearrange",
        lambda x, p, **sizes: right(x, p.replace("(C w h)", "(C h w)"), **sizes),
    )


def up_conv_sees_frame_zero(monkeypatch):
    """8: frame 0 passes by the upsampling convolution, but is in its cache."""

    class Upsample(video_vae_modules.Upsample):
        @nn.compact
        def __call__(self, x, first):
            if not first:
                return super().__call__(x, first)
            C = x.shape[-1]
            if self.time == 2:
                video_vae_modules.CausalConv(2 * C, self.plan, (3, 1, 1), name="time_conv")(x)
            x = x.repeat(2, axis=2).repeat(2, axis=3)
            return video_vae_modules.Conv2d(C, self.plan, padding=(1, 1), name="resample_1")(x)

    monkeypatch.setattr(video_vae_modules, "Upsample", Upsample)


def down_conv_reads_padding(monkeypatch):
    """8: frame 0 goes through the downsampling convolution behind padding, where it should pass
    by.
    """

    class Downsample(video_vae_modules.Downsample):
        def __call__(self, x, first):
            if first and self.time == 2:
                x = jnp.concatenate([jnp.zeros_like(x), x], axis=1)
            return super().__call__(x, False)

    monkeypatch.setattr(video_vae_modules, "Downsample", Downsample)


def no_shortcut_in_the_last_down_block(monkeypatch):
    """9: the encoder's last block has no downsampling, but does add its input."""
    right = video_vae_modules.avg_down
    monkeypatch.setattr(
        video_vae_modules,
        "avg_down",
        lambda x, c, time, space: (space > 1) * right(x, c, time, space),
    )


def shortcut_in_the_last_up_block(monkeypatch):
    """9: the decoder's last block adds nothing."""

    class UpBlock(video_vae_modules.UpBlock):
        def __call__(self, x, first):
            y = super().__call__(x, first)
            return y if self.space == 2 else y + video_vae_modules.avg_down(x, self.features, 1, 1)

    monkeypatch.setattr(video_vae_modules, "UpBlock", UpBlock)


def zeros_after_frame_zero(monkeypatch):
    """9: frame 0 in the first half of its averaging box, where it belongs in the second."""
    right = video_vae_modules.avg_down

    def wrong(x, features, time, space):
        behind = ((0, 0), (0, -x.shape[1] % time), (0, 0), (0, 0), (0, 0))
        return right(jnp.pad(x, behind), features, time, space)

    monkeypatch.setattr(video_vae_modules, "avg_down", wrong)


def columns_select_the_channel(monkeypatch):
    """10: where the width halves, a pixel's row selects the input channel of the shortcut, not its
    column.
    """
    right = video_vae_modules.dup_up

    def wrong(x, *args):
        return right(x.swapaxes(2, 3), *args).swapaxes(2, 3)

    monkeypatch.setattr(video_vae_modules, "dup_up", wrong)


@pytest.mark.parametrize(
    ("way", "mistake"),
    [
        ("decode", height_major_patches),
        ("encode", height_major_patches),
        ("decode", up_conv_sees_frame_zero),
        ("encode", down_conv_reads_padding),
        ("encode", no_shortcut_in_the_last_down_block),
        ("decode", shortcut_in_the_last_up_block),
        ("encode", zeros_after_frame_zero),
        ("decode", columns_select_the_channel),
    ],
)
def test_mistakes_would_be_noticed(video_oracle, video_params, monkeypatch, way, mistake):
    inputs, expected = reference(video_oracle, way, 2, 2)
    mistake(monkeypatch)
    ours = jax.jit(lambda x: getattr(video_vae, way)(video_params, CONFIG, x))(inputs)
    assert relative_l2(ours, expected) > OBVIOUS
