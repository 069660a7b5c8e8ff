"""What a checkpoint weighs and what a generation of a given shape needs, by arithmetic on shapes
alone.
"""

import math

import jax
import jax.numpy as jnp

from cosmos3_jax import sound_vae, transformer, video_vae
from cosmos3_jax.checkpoint.rules import leaf_shapes
from cosmos3_jax.config import Config, TransformerConfig


def parameter_counts(config: Config) -> dict[str, int]:
    """Parameters that generation reads, by part: text tower, media tower, the autoencoders."""
    towers = transformer.param_shapes(config.transformer)
    parts = {"text tower": towers["und"], "media tower": towers["gen"]}
    parts["video VAE"] = video_vae.param_shapes(config.video_vae)
    if config.has_sound:
        parts["sound VAE"] = sound_vae.param_shapes(config.sound_vae, with_encoder=True)
    return {name: sum(map(math.prod, leaf_shapes(tree).values())) for name, tree in parts.items()}


def generation_bytes(
    config: Config,
    *,
    num_frames: int,
    height: int,
    width: int,
    fps: float = 24.0,
    sound: bool = False,
    guidance: bool = True,
    text_tokens: int = 2048,
    dtype: str = "bfloat16",
) -> dict[str, int]:
    """Device memory of one generation, by what needs it; an estimate.

    Weights, condition, sampler state and pixels are exact. A layer's working set is counted as the
    tensors that must be alive at once around its largest product; a compiler may keep more.
    """
    itemsize = jnp.dtype(dtype).itemsize
    shape = video_vae.pixel_to_latent_shape(config.video_vae, num_frames, height, width)
    sound_frames = sound_vae.sound_latent_length(config.sound_vae, num_frames, fps) if sound else 0
    branches = 2 if guidance else 1
    model = config.transformer
    tokens = math.prod(transformer.patch_grid(model, shape)) + sound_frames
    latents = 4 * (math.prod(shape) * model.latent_channel + sound_frames * (model.sound_dim or 0))
    key_value = 2 * model.num_key_value_heads * model.head_dim
    return {
        "weights": itemsize * sum(parameter_counts(config).values()),
        "condition": branches * itemsize * model.num_hidden_layers * text_tokens * key_value,
        "rotary tables": branches * 4 * tokens * model.head_dim,
        "sampler state": 6 * latents,
        "largest layer": branches * itemsize * tokens * _layer_width(model),
        "pixels": 4 * 3 * num_frames * height * width,
    }


def _layer_width(model: TransformerConfig) -> int:
    """Values a token that are alive around the SwiGLU: the residual, its norm, gate and up, their
    product.
    """
    return 2 * model.hidden_size + 3 * model.intermediate_size


def device_memory() -> int | None:
    """Bytes that the default device can hold, or None if it does not say."""
    stats = jax.devices()[0].memory_stats() or {}
    return stats.get("bytes_limit")
