"""The tiny Cosmos3: sizes of its towers, the recipe it generates by, its parameters at first.

Sizes of the autoencoders are read from their folders, so that whatever was trained fits.

Axes: those of the parameter tree, see `transformer.param_shapes`.
"""

import math
from typing import Any

import jax
import numpy as np

from cosmos3_jax.checkpoint import random_checkpoint
from cosmos3_jax.config import SoundVAEConfig, TransformerConfig, VideoVAEConfig
from cosmos3_jax.models import transformer
from examples.tiny import scenes as sc
from examples.tiny import world

MAX_BYTES = 25_000_000  # of the whole checkpoint, tokenizer and configurations included
# The longest sentence has 79 tokens with its chat and its metadata.
MAX_TOKENS = 88

# The keys of a published file, with other values. A latent pixel is a token, since a picture has
# only 36. Neither theta nor the timestep's scale are Nano's: over 13 x 6 x 6 positions all
# frequencies should turn, and the embedding of a timestep should differ from its neighbour's.
TRANSFORMER: dict[str, Any] = random_checkpoint.TRANSFORMER | {
    "hidden_size": 192, "num_hidden_layers": 8, "num_attention_heads": 6, "num_key_value_heads": 2,
    "head_dim": 32, "intermediate_size": 512, "rope_theta": 256.0, "timestep_scale": 0.1,
    "latent_patch_size": 1,
}  # fmt: skip
RECIPE: dict[str, Any] = {
    "num_frames": sc.FRAMES, "height": world.SIZE, "width": world.SIZE, "fps": sc.FPS,
    "num_inference_steps": 24, "guidance_scale": 2.5, "flow_shift": 3.0, "schedule": "native",
    "negative_prompt": "",
}  # fmt: skip
# Together with the scheduler's file these make diffusers sample as the recipe says.
MODEL_INDEX: dict[str, Any] = random_checkpoint.MODEL_INDEX | {
    "default_use_system_prompt": False, "use_native_flow_schedule": True,
}  # fmt: skip


def scheduler(recipe: dict[str, Any]) -> dict[str, Any]:
    """`scheduler_config.json` that samples as the recipe does."""
    return random_checkpoint.SCHEDULER | {
        "use_karras_sigmas": False,
        "flow_shift": recipe["flow_shift"],
    }


def transformer_values(
    video: VideoVAEConfig,
    sound: SoundVAEConfig,
    vocab_size: int,
    sizes: dict[str, Any] = TRANSFORMER,
) -> dict[str, Any]:
    """`transformer/config.json` for these autoencoders and this tokenizer."""
    return sizes | {
        "vocab_size": vocab_size,
        "latent_channel": video.z_dim,
        "patch_latent_dim": video.z_dim * sizes["latent_patch_size"] ** 2,
        "sound_dim": sound.vocoder_input_dim,
        "sound_latent_fps": sound.sampling_rate / sound.samples_per_latent,
    }


def init_params(config: TransformerConfig, seed: int = 0) -> dict:
    """Random float32 parameters `{"und", "gen"}` to begin with.

    Kernels keep variances, those that add to the residual stream are smaller by sqrt(2 L) (GPT-2),
    and the two that predict are zero: the first loss is the variance of noise - data.
    """
    branches = math.sqrt(2 * config.num_hidden_layers)
    leaves, tree = jax.tree_util.tree_flatten_with_path(transformer.param_shapes(config))
    random, made = np.random.RandomState(seed), []
    for path, leaf in leaves:
        names = [entry.key for entry in path]
        normal = random.standard_normal(leaf.shape).astype(np.float32)
        if names[-1] == "scale":
            made.append(np.ones(leaf.shape, np.float32))
        elif names[-1] == "bias" or names[1] in ("proj_out", "sound_proj_out"):
            made.append(np.zeros(leaf.shape, np.float32))
        elif names[-1] == "kernel":
            outputs = branches if names[-2] in ("out", "down") else 1.0
            made.append(normal / np.float32(math.sqrt(_inputs(names, leaf.shape)) * outputs))
        else:  # embeddings: of tokens, of sound
            made.append(normal if names[-1] == "embedding" else np.float32(0.02) * normal)
    return jax.tree.unflatten(tree, made)


def _inputs(names: list[str], shape: tuple[int, ...]) -> int:
    """How many numbers a kernel adds up for each of its outputs."""
    shape = shape["layers" in names :]
    return int(np.prod(shape[:2])) if names[-2] == "out" else shape[0]


def count(params: dict) -> int:
    """Numbers in a tree."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def flops_per_example(config: TransformerConfig, tokens: int, text: int) -> float:
    """Of a training step, forwards and backwards: 6 a parameter and token, and attention."""
    shapes = transformer.param_shapes(config)
    embedding = config.vocab_size * config.hidden_size
    linear = 6 * (count(shapes["gen"]) * tokens + (count(shapes["und"]) - embedding) * text)
    width = config.num_attention_heads * config.head_dim
    attention = 12 * config.num_hidden_layers * width * tokens * (tokens + text)
    return float(linear + attention)
