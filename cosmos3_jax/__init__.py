"""Cosmos3 generation in JAX/Flax: a prompt becomes an image or a video, also with sound, also from
an image or a video.

What is named here is imported when it is first used, so that the command line's help needs no JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

from cosmos3_jax import moved

if TYPE_CHECKING:
    from cosmos3_jax.io.captions import check_caption
    from cosmos3_jax.io.media import save_image, save_mp4, save_video
    from cosmos3_jax.models.sound_vae import sound_latent_length
    from cosmos3_jax.models.video_vae import pixel_to_latent_shape
    from cosmos3_jax.pipeline import Cosmos3
    from cosmos3_jax.sampling.generate import generate
    from cosmos3_jax.sampling.request import Request
    from cosmos3_jax.sampling.request import Request as T2VRequest

__version__ = "0.1.0"

__all__ = [
    "Cosmos3",
    "Request",
    "T2VRequest",
    "check_caption",
    "generate",
    "pixel_to_latent_shape",
    "save_image",
    "save_mp4",
    "save_video",
    "sound_latent_length",
]

_HOME = {
    "Cosmos3": "pipeline",
    "Request": "sampling.request",
    "check_caption": "io.captions",
    "generate": "sampling.generate",
    "pixel_to_latent_shape": "models.video_vae",
    "save_image": "io.media",
    "save_mp4": "io.media",
    "save_video": "io.media",
    "sound_latent_length": "models.sound_vae",
}


def __getattr__(name: str) -> Any:
    # Request had the other name before it served every mode.
    public = "Request" if name == "T2VRequest" else name
    if public not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[public]}"), public)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


moved.install()
