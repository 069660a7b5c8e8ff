"""Cosmos3 generation in JAX/Flax: a prompt becomes an image or a video, also with sound, also from
an image or a video."""

from cosmos3_jax import moved
from cosmos3_jax.io.media import save_image, save_mp4
from cosmos3_jax.models.sound_vae import sound_latent_length
from cosmos3_jax.models.video_vae import pixel_to_latent_shape
from cosmos3_jax.pipeline import Cosmos3
from cosmos3_jax.sampling.generate import generate
from cosmos3_jax.sampling.request import Request

__version__ = "0.1.0"
T2VRequest = Request  # its name before it served every mode

__all__ = [
    "Cosmos3",
    "Request",
    "T2VRequest",
    "generate",
    "pixel_to_latent_shape",
    "save_image",
    "save_mp4",
    "sound_latent_length",
]

moved.install()
