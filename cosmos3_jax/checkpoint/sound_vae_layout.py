"""Where the tensors of the public `sound_tokenizer/` live in our tree (see `sound_vae.py`).

A leaf has its tensor's name with slashes for dots, and an underscore before a list index. The full
checkpoint has 249 tensors; 182 of them are the decoder's, and a checkpoint with these alone is as
valid.
"""

import re

from cosmos3_jax.checkpoint.rules import Layout, Rule
from cosmos3_jax.config import SoundVAEConfig

CONV = "o i k -> k i o"
CONV_TRANSPOSE = "i o k -> k i o"


def sound_vae_layout(config: SoundVAEConfig, with_encoder: bool) -> Layout:
    """The rules of the sound VAE. Without `with_encoder`, encoder tensors may be there but stay
    unread.
    """
    if with_encoder:
        return Layout("sound VAE", (*_decoder(config), *_encoder(config)))
    return Layout("sound VAE", tuple(_decoder(config)), unused=(r"encoder\..*",))


def _decoder(config: SoundVAEConfig) -> list[Rule]:
    rules = _conv("decoder.conv1") + _snake("decoder.snake1") + _conv("decoder.conv2", bias=False)
    for i in range(len(config.dec_strides)):
        block = f"decoder.block.{i}"
        rules += _snake(f"{block}.snake1") + _conv(f"{block}.conv_t1", CONV_TRANSPOSE)
        for unit in (f"{block}.res_unit{j}" for j in (1, 2, 3)):
            rules += _snake(f"{unit}.snake1") + _conv(f"{unit}.conv1")
            rules += _snake(f"{unit}.snake2") + _conv(f"{unit}.conv2")
    return rules


def _encoder(config: SoundVAEConfig) -> list[Rule]:
    stage = config.enc_num_blocks + 1
    last = stage * len(config.enc_strides) + 1
    rules = _conv("encoder.layers.0", bias=False) + _conv(f"encoder.layers.{last}", bias=False)
    for i in range(1, last):
        layer = f"encoder.layers.{i}"
        rules += _conv(layer) if i % stage == 0 else _convnext(layer)
    return rules


def _convnext(name: str) -> list[Rule]:
    norm = Rule(f"{name}.norm.weight", _leaf(name, "norm/scale"), "c -> c")
    convs = (
        _conv(f"{name}.{conv}", weight_norm=False) for conv in ("dwconv.1", "pwconv1", "pwconv2")
    )
    return [norm, *sum(convs, []), *_snake(f"{name}.act")]


def _conv(
    name: str, pattern: str = CONV, bias: bool = True, weight_norm: bool = True
) -> list[Rule]:
    kernel = Rule(f"{name}.weight", _leaf(name, "kernel"), pattern, weight_norm=weight_norm)
    return [kernel, Rule(f"{name}.bias", _leaf(name, "bias"), "o -> o")] if bias else [kernel]


def _snake(name: str) -> list[Rule]:
    return [
        Rule(f"{name}.{which}", _leaf(name, which), "1 c 1 -> c") for which in ("alpha", "beta")
    ]


def _leaf(name: str, leaf: str) -> str:
    return re.sub(r"\.(\d+)", r"_\1", name).replace(".", "/") + f"/{leaf}"
