"""What a checkpoint weighs, and what a generation of a given shape needs, by arithmetic."""

import dataclasses
import math

import jax.numpy as jnp

from cosmos3_jax import sound_vae, transformer, video_vae
from cosmos3_jax.checkpoint.rules import leaf_shapes
from cosmos3_jax.config import Config, TransformerConfig
from cosmos3_jax.generate import ONE_BATCH_TOKENS


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
    """Device memory of one generation, by what needs it.

    Weights, condition, sampler state and pixels are counted. The two working sets are estimates:
    the tensors alive around a layer's largest product and, by measurement, 17 tensors of the
    decoder's last stage. Denoising and decoding follow one another: `peak` has the larger.
    """
    itemsize = jnp.dtype(dtype).itemsize
    shape = video_vae.pixel_to_latent_shape(config.video_vae, num_frames, height, width)
    sound_frames = sound_vae.sound_latent_length(config.sound_vae, num_frames, fps) if sound else 0
    model, vae = config.transformer, config.video_vae
    tokens = math.prod(transformer.patch_grid(model, shape)) + sound_frames
    branches = 2 if guidance else 1
    at_once = branches if tokens <= ONE_BATCH_TOKENS else 1
    key_value = 2 * model.num_key_value_heads * model.head_dim
    latents = 4 * (math.prod(shape) * model.latent_channel + sound_frames * (model.sound_dim or 0))
    last_stage = vae.scale_factor_temporal * height * width // vae.patch_size**2
    parts = {
        "weights": _weight_bytes(config, sound, itemsize),
        "condition": branches * itemsize * model.num_hidden_layers * text_tokens * key_value,
        "rotary tables": branches * 4 * tokens * model.head_dim,
        "sampler state": 6 * latents,
        "denoising step": at_once * itemsize * tokens * _layer_width(model),
        "decoding step": 17 * itemsize * last_stage * vae.decoder_base_dim,
        "pixels": 4 * 3 * num_frames * height * width,
    }
    decoding = parts["decoding step"] + parts["pixels"]
    shared = sum(parts[name] for name in ("weights", "condition", "rotary tables", "sampler state"))
    return parts | {"peak": shared + max(parts["denoising step"], decoding)}


def _weight_bytes(config: Config, sound: bool, itemsize: int) -> int:
    """Of everything that is loaded; the timestep embedding stays float32."""
    model = dataclasses.replace(
        config.transformer, sound_gen=config.transformer.sound_gen and sound
    )
    trees = [transformer.param_shapes(model), video_vae.param_shapes(config.video_vae)]
    if sound:
        trees.append(sound_vae.param_shapes(config.sound_vae, with_encoder=True))
    return sum(
        math.prod(shape) * (4 if "time_embedder" in path else itemsize)
        for tree in trees
        for path, shape in leaf_shapes(tree).items()
    )


def _layer_width(model: TransformerConfig) -> int:
    """Values a token alive around the SwiGLU: residual, its norm, gate and up, their product."""
    return 2 * model.hidden_size + 3 * model.intermediate_size
