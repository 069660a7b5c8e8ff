"""Adapters of the oracle's transformer, and its velocity as one array."""

import jax
import jax.numpy as jnp
import numpy as np
from diffusers import Cosmos3OmniTransformer
from oracle import oracle_velocity
from training_run import BUCKET, CONFIG, FRAMES, HEIGHT, SOUND, WIDTH, compiled

from cosmos3_jax.checkpoint import lora
from cosmos3_jax.models.transformer import Latents, encode_condition
from cosmos3_jax.models.transformer import velocity as our_velocity

# Relative L2 distances, by `test_tolerance`: of a velocity from the oracle's, of kernels from those
# that another program merged, and of latents from those of another program.
TOLERANCE = 1e-5
KERNELS = 1e-6
LATENTS = 1e-5
# Of a velocity with the adapter merged from one with it applied: they differ in the rounding of the
# sum of a kernel and its adapter. Measured, 8.5e-7; one unit in the last place moves it by 6.1e-7.
MERGED = 6e-6
TIMESTEP = 700


def trained(patterns=(".",), rank: int = 3, alpha: float = 6.0) -> lora.Lora:
    """An adapter whose B is not zero, as after training; by default one of every linear map."""
    adapter = lora.init(jax.random.key(0), CONFIG, patterns=patterns, rank=rank, alpha=alpha)
    random = np.random.RandomState(1)
    adapters = {
        name: pair | {"b": jnp.float32(0.2 * random.standard_normal(pair["b"].shape))}
        for name, pair in adapter.adapters.items()
    }
    return adapter.replace(adapters=adapters)


IDS = [5, 6, 7, 200, 9]
RANDOM = np.random.RandomState(2)
VIDEO = np.float32(RANDOM.standard_normal((FRAMES, HEIGHT, WIDTH, CONFIG.latent_channel)))
SOUNDS = np.float32(RANDOM.standard_normal((SOUND, CONFIG.sound_dim)))


@compiled
def _velocity(tree: dict) -> Latents:
    ids = np.zeros((1, BUCKET), np.int32)
    ids[0, : len(IDS)] = IDS
    mask, shape = np.arange(BUCKET)[None] < len(IDS), VIDEO.shape[:3]
    condition = encode_condition(
        tree["und"], CONFIG, ids, mask, video_shape=shape, fps=24.0, sound_frames=SOUND
    )
    latents = {"video": VIDEO[None], "sound": SOUNDS[None]}
    return our_velocity(tree["gen"], CONFIG, condition, latents, TIMESTEP)


def velocity(tree: dict) -> np.ndarray:
    found = _velocity(tree)
    return np.concatenate([np.ravel(found["video"]), np.ravel(found["sound"])])


def oracles(model: Cosmos3OmniTransformer) -> np.ndarray:
    found = oracle_velocity(model, IDS, VIDEO, SOUNDS, timestep=TIMESTEP)
    return np.concatenate([np.ravel(found["video"]), np.ravel(found["sound"])])
