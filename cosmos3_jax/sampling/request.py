"""The arrays that one generation needs, whether they fit one another, and the noise to start from.

Axes: B batch, C channels, S text tokens; T pixel frames, H rows, W columns; latents t frames, h
rows, w columns; s sound latents; K steps.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from cosmos3_jax import limits
from cosmos3_jax.config import Config
from cosmos3_jax.sampling import unipc
from cosmos3_jax.sampling.unipc import AnyArray

Scalars = AnyArray | np.floating | float  # one for all examples, or [B]


class Request(struct.PyTreeNode, kw_only=True):
    """The arrays that one generation needs. `Cosmos3.prepare` makes it from a prompt.

    Attributes:
        text_ids, text_mask: int32 and bool [B, S]; prompts padded on the right, mask True on the
            prompt.
        neg_text_ids, neg_text_mask: the same for the negative prompts, of the same or another
            length. None skips the second branch of classifier-free guidance: the guidance scale 1.
        video_shape: latent (t, h, w); see `pixel_to_latent_shape`. Static.
        fps: frames per second, a scalar or float [B].
        num_inference_steps: K, static.
        guidance_scale: v_uncond + scale (v_cond - v_uncond); a scalar or float [B].
        seed: int scalar (example b takes seed + b) or [B], read where `noise` is None.
        noise: [B, C, t, h, w] initial noise, unit variance, or None.
        sound_frames: sound latents s, 0 for a video without sound. Static. See
            `sound_latent_length`.
        sound_noise: [B, C_sound, s], or None.
        sampler: the UniPC tableau; None is the native schedule with shift 10.
        frame_mask: bool [B, t], the given frames, any of them: their latents come out bit for bit
            as they went in. None: all frames are generated.
        clean_latents: [B, C, t, h, w] normalised latents, read at the given frames, or None.
        clean_video: [B, 3, T, H, W] pixels in [0, 1] to be encoded for that instead, or None: what
            the video begins with, T = 4k + 1. Latent frames from k + 1 on are generated whatever
            `frame_mask` says of them.
    """

    text_ids: AnyArray
    text_mask: AnyArray
    neg_text_ids: AnyArray | None = None
    neg_text_mask: AnyArray | None = None
    video_shape: tuple[int, int, int] = struct.field(pytree_node=False)
    fps: Scalars = 24.0
    num_inference_steps: int = struct.field(pytree_node=False, default=35)
    guidance_scale: Scalars = 6.0
    seed: AnyArray | int | None = None
    noise: AnyArray | None = None
    sound_frames: int = struct.field(pytree_node=False, default=0)
    sound_noise: AnyArray | None = None
    sampler: unipc.Tableau | None = None
    frame_mask: AnyArray | None = None
    clean_latents: AnyArray | None = None
    clean_video: AnyArray | None = None


def check_request(request: Request, config: Config) -> None:
    """Raise ValueError, naming the value and the way out, if the shapes of a request do not fit."""
    batch, longest = request.text_ids.shape
    limits.check_most("batch", batch)
    limits.check_most("text_tokens", longest)
    limits.check_most("num_inference_steps", request.num_inference_steps)
    expected = {
        "text_mask": request.text_ids.shape,
        "noise": (batch, config.transformer.latent_channel, *request.video_shape),
        "clean_latents": (batch, config.transformer.latent_channel, *request.video_shape),
        "frame_mask": (batch, request.video_shape[0]),
        "sound_noise": (batch, config.transformer.sound_dim, request.sound_frames),
    }
    if request.neg_text_ids is not None:
        expected["neg_text_ids"] = (batch, request.neg_text_ids.shape[-1])
        expected["neg_text_mask"] = request.neg_text_ids.shape
    for name, shape in expected.items():
        value = getattr(request, name)
        if value is not None and tuple(value.shape) != tuple(shape):
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}, this request needs {tuple(shape)}"
            )
    for name in ("fps", "guidance_scale", "seed"):
        shape = np.shape(getattr(request, name)) if getattr(request, name) is not None else ()
        if shape not in ((), (batch,)):
            raise ValueError(f"{name} has shape {shape}: give one for all, or {batch}")
    if (request.neg_text_ids is None) != (request.neg_text_mask is None):
        raise ValueError("neg_text_ids and neg_text_mask belong together: give both or neither")
    if request.num_inference_steps < 1:
        raise ValueError(f"num_inference_steps={request.num_inference_steps} must be at least 1")
    if request.sampler is not None and len(request.sampler.timestep) != request.num_inference_steps:
        raise ValueError(
            f"num_inference_steps={request.num_inference_steps}, but the sampler has "
            f"{len(request.sampler.timestep)} steps; make both agree"
        )
    if request.seed is None and request.noise is None:
        raise ValueError("a request needs noise, or a seed to draw it from")
    if request.seed is None and request.sound_frames and request.sound_noise is None:
        raise ValueError("a request with sound needs sound_noise, or a seed to draw it from")
    if request.sound_frames and not config.has_sound:
        raise ValueError("sound_frames is not 0, but this checkpoint has no sound: leave sound out")
    given = [x for x in (request.clean_latents, request.clean_video) if x is not None]
    if len(given) != (request.frame_mask is not None):
        raise ValueError("frame_mask goes with one of clean_latents and clean_video, or is None")
    if request.frame_mask is not None and request.frame_mask.dtype != bool:
        raise ValueError(
            f"frame_mask holds {request.frame_mask.dtype}: give bool, True where given"
        )
    if request.clean_video is not None:
        _check_clean_video(request.clean_video, request.video_shape, batch, config)


def _check_clean_video(
    clean_video: AnyArray, video_shape: tuple[int, int, int], batch: int, config: Config
) -> None:
    frames, *size = video_shape
    time, space = config.video_vae.scale_factor_temporal, config.video_vae.scale_factor_spatial
    expected, shape = (batch, 3, "T", *(space * side for side in size)), clean_video.shape
    if len(shape) != 5 or (*shape[:2], "T", *shape[3:]) != expected:
        raise ValueError(f"clean_video has shape {shape}, this request needs {expected}")
    longest = time * (frames - 1) + 1
    if shape[2] > longest or (shape[2] - 1) % time:
        raise ValueError(
            f"clean_video has {shape[2]} frames; give {time}k + 1 of them, at most the video's "
            f"{longest}"
        )
    if not jnp.issubdtype(clean_video.dtype, jnp.floating):
        raise ValueError(
            f"clean_video holds {clean_video.dtype}: give floats in [0, 1], divide by 255"
        )


def check_axes(name: str, array: AnyArray, axes: str, channels: int) -> None:
    """Raise ValueError unless these are floats with as many axes, and as many channels on the
    second.
    """
    shape, dtype = np.shape(array), jnp.result_type(array)
    if len(shape) != len(axes.split()) or shape[1] != channels:
        raise ValueError(f"{name} of shape {shape}: expected {axes}, with {channels} channels")
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"{name} of {dtype}: give floats; pixels are divided by 255")


def initial_noise(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """float32 standard normal noise of numpy's `RandomState(seed)`, as the reference draws it.

    Video and sound each start from a fresh `RandomState` of the same seed, so the sound's noise
    repeats the video's first values. So does the reference.
    """
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


def draw_noise(seed: AnyArray | int, batch: int, shape: tuple[int, ...]) -> Array:
    """Noise of each example's own seed, drawn on the host even where the seed is traced."""
    seeds = jnp.asarray(seed, jnp.uint32)
    seeds = seeds + jnp.arange(batch, dtype=jnp.uint32) if seeds.ndim == 0 else seeds

    def draw(seeds):
        # As a numpy array: to iterate over a JAX array would run JAX inside of the callback.
        return np.stack([initial_noise(int(seed), shape) for seed in np.asarray(seeds)])

    result = jax.ShapeDtypeStruct((batch, *shape), jnp.float32)
    return jax.pure_callback(draw, result, seeds, vmap_method="sequential")
