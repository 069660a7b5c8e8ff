"""Where the tensors of the public `vae/` folder live in the parameter tree of `video_vae.py`.

Names stay as they are, but for the indices of lists (`resnets.1` becomes `resnets_1`) and for the
two 1x1x1 convolutions at the latents, which move into the half of the VAE that uses them.
"""

import re
from collections.abc import Iterator

from cosmos3_jax.checkpoint.rules import Layout, Rule
from cosmos3_jax.config import VideoVAEConfig

CONV_2D = "o i h w -> h w i o"
CONV_3D = "o i t h w -> t h w i o"
NORM_2D = "c 1 1 -> c"
NORM_3D = "c 1 1 1 -> c"


def video_vae_layout(config: VideoVAEConfig) -> Layout:
    """One rule for each of the public tensors: 196 in Nano."""
    return Layout("video VAE", tuple(_rules(config)))


def _rules(config: VideoVAEConfig) -> Iterator[Rule]:
    yield from _conv("quant_conv")
    yield from _conv("post_quant_conv")
    for half in ("encoder", "decoder"):
        yield from _conv(f"{half}.conv_in")
        yield from _resnet(f"{half}.mid_block.resnets.0", widened=False)
        yield _norm(f"{half}.mid_block.attentions.0.norm", NORM_2D)
        yield from _conv(f"{half}.mid_block.attentions.0.to_qkv", CONV_2D)
        yield from _conv(f"{half}.mid_block.attentions.0.proj", CONV_2D)
        yield from _resnet(f"{half}.mid_block.resnets.1", widened=False)
        yield _norm(f"{half}.norm_out")
        yield from _conv(f"{half}.conv_out")
    down, up = config.temperal_downsample, tuple(reversed(config.temperal_downsample))
    widths, depth = (1, *config.dim_mult), config.num_res_blocks
    yield from _blocks("encoder.down_blocks", "downsampler", widths, depth, down)
    widths = (config.dim_mult[-1], *reversed(config.dim_mult))
    yield from _blocks("decoder.up_blocks", "upsampler", widths, depth + 1, up)


def _blocks(
    prefix: str, resampler: str, widths: tuple[int, ...], depth: int, time: tuple[bool, ...]
) -> Iterator[Rule]:
    """The blocks of one half. `widths` has one entry more than there are blocks, `time` one
    fewer.
    """
    for i in range(len(widths) - 1):
        for j in range(depth):
            yield from _resnet(
                f"{prefix}.{i}.resnets.{j}", widened=j == 0 and widths[i] != widths[i + 1]
            )
        if i < len(time):
            yield from _conv(f"{prefix}.{i}.{resampler}.resample.1", CONV_2D)
            if time[i]:
                yield from _conv(f"{prefix}.{i}.{resampler}.time_conv")


def _resnet(key: str, widened: bool) -> Iterator[Rule]:
    yield _norm(f"{key}.norm1")
    yield from _conv(f"{key}.conv1")
    yield _norm(f"{key}.norm2")
    yield from _conv(f"{key}.conv2")
    if widened:
        yield from _conv(f"{key}.conv_shortcut")


def _conv(key: str, rearrange: str = CONV_3D) -> tuple[Rule, Rule]:
    return (
        Rule(f"{key}.weight", f"{_path(key)}/kernel", rearrange),
        Rule(f"{key}.bias", f"{_path(key)}/bias", "o -> o"),
    )


def _norm(key: str, rearrange: str = NORM_3D) -> Rule:
    return Rule(f"{key}.gamma", f"{_path(key)}/scale", rearrange)


def _path(key: str) -> str:
    half = {"quant_conv": "encoder.", "post_quant_conv": "decoder."}.get(key, "")
    return re.sub(r"\.(\d+)", r"_\1", half + key).replace(".", "/")
