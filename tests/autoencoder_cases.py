"""Autoencoders that compile in seconds. Of each kind of layer there is one."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from cosmos3_jax.config import SoundVAEConfig, VideoVAEConfig
from examples.tiny.autoencoder_models import AUTOENCODERS, video_clips

# One stage of everything; the sizes and switches of the real ones are tested by their own modules.
SMALL_VIDEO = VideoVAEConfig(
    base_dim=8, decoder_base_dim=8, z_dim=4, dim_mult=(1, 1), num_res_blocks=1,
    temperal_downsample=(True,), scale_factor_spatial=4, scale_factor_temporal=2,
    latents_mean=(0.0,) * 4, latents_std=(1.0,) * 4,
)  # fmt: skip
SMALL_SOUND = SoundVAEConfig(
    enc_dim=8, enc_c_mults=(1, 2), enc_strides=(10, 12), enc_num_blocks=1, dec_dim=4,
    dec_c_mults=(1, 2), dec_strides=(40, 48), vocoder_input_dim=4, enc_latent_dim=8,
    normalize_volume=False,
)  # fmt: skip
SMALL = {
    "video": dataclasses.replace(
        AUTOENCODERS["video"],
        config=SMALL_VIDEO,
        clips=functools.partial(video_clips, size=16),
        lengths=(3,),
    ),
    "sound": dataclasses.replace(AUTOENCODERS["sound"], config=SMALL_SOUND, lengths=(2, 4)),
}
each = pytest.mark.parametrize("what", SMALL)
# Relative L2 distance from torch's, and from another program's: float32 through a dozen layers.
# Each test measures what one unit in the last place does. A wrong value is of order 1.
TOLERANCE = 1.5e-5


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def waveforms(batch: int = 2, samples: int = 3840, seed: int = 0) -> np.ndarray:
    return np.clip(0.3 * random(batch, 2, samples, seed=seed), -1, 1)


def perturbed(model) -> dict:
    """Initial parameters with no leaf at 0 or 1, so that each of them matters."""
    params = model.init(model.config, jax.random.key(0))
    leaves, tree = jax.tree.flatten(params)
    return jax.tree.unflatten(
        tree, [np.asarray(x) + 0.1 * random(*x.shape, seed=i) for i, x in enumerate(leaves)]
    )
