"""The oracle's video VAE at a small width, with Nano's blocks and switches."""

import dataclasses
import functools

import jax
import numpy as np
import torch
from diffusers import AutoencoderKLWan

from cosmos3_jax.config import VideoVAEConfig
from cosmos3_jax.models import video_vae

NANO = VideoVAEConfig()
CONFIG = VideoVAEConfig(
    base_dim=8,
    decoder_base_dim=8,
    z_dim=6,
    latents_mean=NANO.latents_mean[:6],
    latents_std=NANO.latents_std[:6],
)
# Odd and oblong, as 720p's 45 rows: a transposed axis or a rounded-up size does not pass.
GRID = (3, 5)
# Relative L2 distance from the oracle, and from another program of ours: float32 rounding through
# some thirty convolutions, by `test_tolerance`.
TOLERANCES = {"decode": 5e-6, "encode": 1.25e-5}
decode = jax.jit(
    video_vae.decode, static_argnums=1, static_argnames=("chunk_size", "dtype", "video_dtype")
)
encode = jax.jit(video_vae.encode, static_argnums=1, static_argnames=("chunk_size", "dtype"))


def build_oracle(config: VideoVAEConfig) -> AutoencoderKLWan:
    fields = dataclasses.asdict(config)
    del fields["clip_output"]
    return AutoencoderKLWan(
        **{k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}
    )


def random_latents(t: int, batch: int = 1) -> np.ndarray:
    return np.random.default_rng(t).standard_normal((batch, t, *GRID, CONFIG.z_dim), np.float32)


def random_video(t: int, batch: int = 1) -> np.ndarray:
    """Pixels of `t` latent frames."""
    shape = (batch, 3, 4 * t - 3, 16 * GRID[0], 16 * GRID[1])
    return np.random.default_rng(t).random(shape, np.float32)


def oracle_statistics(
    config: VideoVAEConfig, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    mean = torch.tensor(config.latents_mean, dtype=dtype)
    inverse_std = 1.0 / torch.tensor(config.latents_std, dtype=dtype)
    return mean.view(1, -1, 1, 1, 1), inverse_std.view(1, -1, 1, 1, 1)


def oracle_decode(oracle, latents: torch.Tensor) -> torch.Tensor:
    """Normalised latents, channels last, to video in [0, 1], as the oracle's pipeline has it."""
    mean, inverse_std = oracle_statistics(CONFIG, oracle.dtype)
    latents = latents.movedim(-1, 1).to(oracle.dtype)
    return (oracle.decode(latents / inverse_std + mean).sample.float() + 1) / 2


def oracle_encode(oracle, video: torch.Tensor) -> torch.Tensor:
    mean, inverse_std = oracle_statistics(CONFIG, oracle.dtype)
    latents = oracle.encode((2 * video - 1).to(oracle.dtype)).latent_dist.mode()
    return ((latents - mean) * inverse_std).movedim(1, -1).float()


PASSES = {
    "decode": (decode, oracle_decode, random_latents),
    "encode": (encode, oracle_encode, random_video),
}


@functools.lru_cache
def reference(oracle, way: str, t: int, batch: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """The input and the oracle's float32 output."""
    _, run, random = PASSES[way]
    inputs = random(t, batch)
    with torch.no_grad():
        return inputs, run(oracle, torch.from_numpy(inputs)).numpy()
