"""What the two autoencoders' parameters are before training."""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from cosmos3_jax.config import SoundVAEConfig, VideoVAEConfig
from cosmos3_jax.models import sound_vae, video_vae

Params = dict[str, Any]


def init_video_vae(
    config: VideoVAEConfig, key: Array, deviation: float = 0.05, level: float = 0.5
) -> Params:
    """Random float32 parameters: residual branches silent, the posterior's `deviation` constant.

    Silent branches leave the averaging and repeating shortcuts, which carry the picture through at
    once (after Goyal et al., 2017, for ResNets). What averages leave of a picture is little, so the
    means are made larger: else the noise would drown them. The first picture is grey of `level` in
    [0, 1]: far from the mean of all pictures, the way there is learned by every layer, and leaves
    none that tells one picture from another.
    """
    silent = r"(resnets_\d+/conv2|attentions_0/proj|decoder/conv_out)/kernel"
    params = _random(key, video_vae.param_shapes(config), silent)
    quant = params["encoder"]["quant_conv"]
    is_mean = jnp.arange(2 * config.z_dim) < config.z_dim
    params["encoder"]["quant_conv"] = {
        "kernel": jnp.where(is_mean, 8 * quant["kernel"], 0.0),
        # Of a weak type, the first step's program would not be the second's.
        "bias": jnp.where(is_mean, 0.0, 2 * jnp.log(deviation)).astype(jnp.float32),
    }
    params["decoder"]["conv_out"]["bias"] += 2 * level - 1
    return params


def init_sound_vae(config: SoundVAEConfig, key: Array, deviation: float = 0.05) -> Params:
    """Random float32 parameters: residual branches and waveform silent, the posterior's `deviation`
    nearly constant.

    Out of silence the samples' own error leads; out of noise, the spectral errors lead to silence,
    and so does noise in the latents that drowns what they say.
    """
    shapes = sound_vae.param_shapes(config, with_encoder=True)
    params = _random(key, shapes, r"(res_unit\d/conv2|pwconv2|decoder/conv2)/kernel")
    encoder, decoder = params["encoder"], params["decoder"]
    for i, stride in enumerate(reversed(config.dec_strides)):
        # Of the 2 * stride taps that count as inputs, each output sees two.
        decoder[f"block_{i}"]["conv_t1"]["kernel"] *= stride**0.5
    # The last convolution has no bias: it reads its scales from that of the one before it, 1 in
    # every channel, which its means leave out.
    last = len(config.enc_strides) * (config.enc_num_blocks + 1) + 1
    encoder[f"layers_{last - 1}"]["bias"] = jnp.ones_like(encoder[f"layers_{last - 1}"]["bias"])
    means, scales = jnp.split(encoder[f"layers_{last}"]["kernel"], 2, axis=-1)  # [1, width, C]
    means -= jnp.mean(means, axis=1, keepdims=True)
    scales = jnp.full_like(scales, math.log(math.expm1(deviation)) / scales.shape[1])
    encoder[f"layers_{last}"]["kernel"] = jnp.concatenate([means, scales], axis=-1)
    return params


def _random(key: Array, shapes: Params, silent: str) -> Params:
    """Kernels from N(0, 1 / inputs), scales 1, all else 0, and kernels that match `silent` too."""

    def leaf(path: tuple, shape: jax.ShapeDtypeStruct) -> Array:
        nonlocal key
        name = "/".join(entry.key for entry in path)
        if name.endswith("/scale"):
            return jnp.ones(shape.shape)
        if not name.endswith("/kernel") or re.search(silent, name):
            return jnp.zeros(shape.shape)
        key, own = jax.random.split(key)
        return jax.random.normal(own, shape.shape) / math.prod(shape.shape[:-1]) ** 0.5

    return jax.tree_util.tree_map_with_path(leaf, shapes)
