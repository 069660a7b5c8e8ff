"""The tiny world's two autoencoders: their sizes, their training clips, and their public folders.

Axes: B batch, T frames, H height, W width, N samples, O objects, E events.
"""

import dataclasses
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array

from cosmos3_jax.checkpoint.files import TensorFiles, write_shard
from cosmos3_jax.checkpoint.layouts import sound_vae_layout, video_vae_layout
from cosmos3_jax.checkpoint.load import PUBLIC_STEM
from cosmos3_jax.checkpoint.rules import Layout, check, leaf_shapes, split_weight_norm
from cosmos3_jax.config import SoundVAEConfig, VideoVAEConfig
from cosmos3_jax.models import sound_vae, video_vae
from cosmos3_jax.training import autoencoder_init, autoencoders
from examples.tiny import scenes as sc
from examples.tiny import world

Params = dict[str, Any]
VIDEO_CHANNELS, SOUND_CHANNELS = 16, 32  # of the latents; Nano has 48 and 64
# So that colours kept for fine-tuning lie within what the video autoencoder has seen. For the
# highest pitch this share is too small: see the README.
ANY_COLOUR, ANY_PITCH = 0.3, 0.25  # shares of clips with one at random
LEVEL = 0.29  # of the mean pixel
LOWEST, HIGHEST = 150.0, 1500.0  # Hz

VIDEO_CONFIG = VideoVAEConfig(
    base_dim=16,
    decoder_base_dim=16,
    dim_mult=(1, 2, 4, 4),
    num_res_blocks=1,
    z_dim=VIDEO_CHANNELS,
    latents_mean=(0.0,) * VIDEO_CHANNELS,
    latents_std=(1.0,) * VIDEO_CHANNELS,
)
SOUND_CONFIG = SoundVAEConfig(
    # A spectrum whose bins are 94 Hz apart, 500 times a second: pitches are seen at once.
    enc_n_fft=512,
    enc_hop_length=96,
    enc_strides=(4, 5),
    enc_c_mults=(1, 2),
    enc_dim=64,
    dec_dim=24,
    dec_c_mults=(1, 2, 4, 8, 8),
    vocoder_input_dim=SOUND_CHANNELS,
    enc_latent_dim=2 * SOUND_CHANNELS,
    # The peak of a clip is no property of its latents: what is encoded is what comes back.
    normalize_volume=False,
)


@dataclasses.dataclass(frozen=True)
class Autoencoder:
    """What differs between sight and sound.

    Attributes:
        folder, class_name: in a checkpoint of the public layout.
        config: sizes.
        layout, shapes: of a configuration: how it is stored, and the tree of its parameters.
        init: (config, key) -> parameters.
        loss: (params, config, clips, key, weights=, dtype=) -> the loss and its parts.
        weights: of these parts.
        clips: (scenes, key, length) -> training clips.
        lengths: of them in each phase of training, in the unit of `clips`. Convolutions learn from
            parts what holds for whole clips.
    """

    folder: str
    class_name: str
    config: VideoVAEConfig | SoundVAEConfig
    layout: Callable[[Any], Layout]
    shapes: Callable[[Any], Params]
    init: Callable[[Any, Array], Params]
    loss: Callable[..., tuple[Array, dict[str, Array]]]
    weights: type
    clips: Callable[[dict[str, Array], Array, int], Array]
    lengths: tuple[int, ...]


def video_clips(scenes: dict[str, Array], key: Array, frames: int, size: int = world.SIZE) -> Array:
    """Videos [B, 3, T, H, W] that begin anywhere within the clips, some in any colours."""
    start_key, colour_key, which_key = jax.random.split(key, 3)
    batch, objects = scenes["visible"].shape
    start = jax.random.randint(start_key, (batch, 1, 1), 0, sc.FRAMES - frames + 1) / sc.FPS
    colours = jax.random.uniform(colour_key, (batch, objects, 3))
    other = jax.random.bernoulli(which_key, ANY_COLOUR, (batch, 1, 1))
    scenes = scenes | {
        "position": scenes["position"] + scenes["velocity"] * start,  # walls fold the path later
        "colour": jnp.where(other, colours, scenes["colour"]),
    }
    videos, _ = world.render_batch(scenes, frames=frames, size=size, samples=1)
    return jnp.moveaxis(videos, -1, 1)


def sound_clips(scenes: dict[str, Array], key: Array, latents: int) -> Array:
    """Waveforms [B, 2, N] of so many latent frames around the first tone, some of any pitch."""
    start_key, pitch_key, which_key = jax.random.split(key, 3)
    batch = scenes["hertz"].shape
    samples = latents * world.SAMPLES_PER_LATENT
    last = (world.sound_samples() - samples) / world.SAMPLE_RATE
    before = jax.random.uniform(start_key, batch) * samples / world.SAMPLE_RATE
    start = jnp.clip(scenes["times"][:, 0] - before, 0, last)
    span = jax.random.uniform(pitch_key, batch)
    other = jax.random.bernoulli(which_key, ANY_PITCH, batch)
    scenes = scenes | {
        "times": scenes["times"] - start[:, None],
        "hertz": jnp.where(other, LOWEST * (HIGHEST / LOWEST) ** span, scenes["hertz"]),
    }
    _, sounds = world.render_batch(scenes, frames=1, size=8, samples=samples)
    return sounds


AUTOENCODERS = {
    "video": Autoencoder(
        folder="vae",
        class_name="AutoencoderKLWan",
        config=VIDEO_CONFIG,
        layout=video_vae_layout,
        shapes=video_vae.param_shapes,
        init=partial(autoencoder_init.init_video_vae, level=LEVEL),
        loss=autoencoders.video_loss,
        weights=autoencoders.VideoLossWeights,
        clips=video_clips,
        lengths=(1, 17),
    ),
    "sound": Autoencoder(
        folder="sound_tokenizer",
        class_name="Cosmos3AVAEAudioTokenizer",
        config=SOUND_CONFIG,
        layout=partial(sound_vae_layout, with_encoder=True),
        shapes=partial(sound_vae.param_shapes, with_encoder=True),
        init=autoencoder_init.init_sound_vae,
        loss=autoencoders.sound_loss,
        weights=autoencoders.SoundLossWeights,
        clips=sound_clips,
        lengths=(24,),
    ),
}


# Folders in the public layout
# --------------------------------------------------------------------------------------------------


def write_public(folder: Path, model: Autoencoder, params: Params, dtype: str = "bfloat16") -> None:
    """Write `config.json` and the weights of `model.config` as diffusers reads them.

    A weight-norm pair is `split_weight_norm`'s. Raises OSError if the disk does not take it.
    """
    tensors, leaves = {}, flatten_dict(params, sep="/")
    for rule in model.layout(model.config).rules:
        value = np.asarray(rule.to_public(np.asarray(leaves[rule.leaf])), np.float32)
        if rule.weight_norm:
            tensors |= dict(zip(rule.keys, split_weight_norm(value), strict=True))
        else:
            tensors[rule.key] = value
    tensors = {key: value.astype(jnp.dtype(dtype)) for key, value in sorted(tensors.items())}
    write_shard(folder / f"{PUBLIC_STEM}.safetensors", tensors)
    values = {"_class_name": model.class_name} | dataclasses.asdict(model.config)
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def read_public(folder: Path, model: Autoencoder) -> tuple[Autoencoder, Params]:
    """What `write_public` wrote: the model with the stored configuration, float32 parameters.

    Raises CheckpointError or ConfigError if it is another model's.
    """
    model = dataclasses.replace(model, config=type(model.config).from_file(folder / "config.json"))
    layout, files = model.layout(model.config), TensorFiles(folder, PUBLIC_STEM)
    leaves = leaf_shapes(model.shapes(model.config))
    check(layout, files.shapes, leaves)
    params = {  # in these two layouts, a tensor is a whole leaf
        rule.leaf: jnp.asarray(rule.to_leaf(*(files.read(key) for key in rule.keys)), jnp.float32)
        for rule in layout.rules
    }
    return model, unflatten_dict(params, sep="/")
