"""From prompts and settings to the arrays of one generation; what can be refused is refused here.

It needs a configuration and a tokenizer but no weights, so bad input fails before anything is
loaded.

Axes: B batch, C channels; latents t frames, h rows, w columns; s sound latents; K steps.
"""

from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
from jax.typing import ArrayLike

from cosmos3_jax.config import Config
from cosmos3_jax.io.conditioning import resolve_given
from cosmos3_jax.io.media_read import ImageSource, VideoSource
from cosmos3_jax.io.prompt import (
    ResolvedPrompt,
    Tokenizer,
    encode_prompts,
    pad_token_ids,
    resolve_prompts,
)
from cosmos3_jax.models import sound_vae, video_vae
from cosmos3_jax.sampling import unipc
from cosmos3_jax.sampling.request import T2VRequest, check_request, initial_noise

TEXT_BUCKET = 128  # prompts are padded to a multiple of it, so that few programs are compiled


def prepare_request(
    config: Config,
    tokenizer: Tokenizer,
    prompt: str | Sequence[str],
    *,
    negative_prompt: str | Sequence[str] | None = None,
    image: ImageSource | Sequence[ImageSource] | None = None,
    video: VideoSource | None = None,
    condition_frames: Iterable[int] | None = None,
    keep: Literal["first", "last"] | None = None,
    clean_latents: ArrayLike | None = None,
    frame_mask: ArrayLike | None = None,
    num_frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    fps: float | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    flow_shift: float | None = None,
    schedule: str | None = None,
    sigmas: Sequence[float] | None = None,
    seed: int | Sequence[int] = 42,
    noise: ArrayLike | None = None,
    sound_noise: ArrayLike | None = None,
    sound: bool = False,
    prompt_style: str = "native",
    system_prompt: str | None = None,
) -> T2VRequest:
    """Check and tokenise everything that one generation needs. Sizes left None come from the
    recipe.

    Args:
        config: the checkpoint's.
        tokenizer: the checkpoint's.
        prompt: text, or a structured caption as JSON; a list is a batch.
        negative_prompt: one for all or one for each; None is the recipe's, else the style's
            default.
        image: what the video begins with: a path, a PIL image or an array (see
            `media.read_image`), one for all or a list of one for each. Resized to fill the picture
            and cropped in its middle.
        video: a clip to go on from, for all: a path, an array or a list of frames (see
            `media.read_video`); or [B, 3, T, H, W], as `generate` returns it, one for each.
            Resized likewise.
        condition_frames: the latent frames that the clip gives: 0 is its first frame, i > 0 its
            frames 4i - 3 to 4i, and -1 the last of the video to be made. Only frames 0 to 4i of
            the clip are needed, with i the largest. None means 0 and 1: five frames.
        keep: `first` or `last`, the end of the clip that those frames are taken from. None means
            `first`.
        clean_latents: [B, C, t, h, w] normalised latents (see `Cosmos3.encode_video`), instead of
            image or video: any frames of the video to be made, wherever they stand.
        frame_mask: bool [B, t], which of `clean_latents` are given.
        num_frames: 4k + 1; 1 makes an image.
        height: pixels, a multiple of 16.
        width: pixels, a multiple of 16.
        fps: frames per second.
        num_inference_steps: denoising steps, at least 1.
        guidance_scale: 1 skips the second branch, and with it the negative prompt.
        flow_shift: see `unipc.sigmas`.
        schedule: see `unipc.sigmas`.
        sigmas: K + 1 noise levels falling to 0; they override steps, schedule and shift.
        seed: one seed (example b takes seed + b) or one for each prompt.
        noise: [B, C, t, h, w] initial noise; overrides the seed.
        sound_noise: [B, C_sound, s] initial noise; overrides the seed.
        sound: whether to denoise sound along with the video.
        prompt_style: see `prompt.resolve_prompts`.
        system_prompt: see `prompt.resolve_prompts`.

    Raises:
        ValueError: on any value that cannot work.
        TypeError: on a prompt that is not text.
        FileNotFoundError: on an image or a clip that is not there.
    """
    recipe = config.recipe
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    num_frames = recipe.num_frames if num_frames is None else num_frames
    height = recipe.height if height is None else height
    width = recipe.width if width is None else width
    fps = recipe.fps if fps is None else fps
    guidance_scale = recipe.guidance_scale if guidance_scale is None else guidance_scale
    negative_prompt = recipe.negative_prompt if negative_prompt is None else negative_prompt
    if not (np.isscalar(guidance_scale) and np.isfinite(guidance_scale)):
        raise ValueError(f"guidance_scale={guidance_scale} must be a finite number")
    video_shape = video_vae.pixel_to_latent_shape(config.video_vae, num_frames, height, width)
    sound_frames = _sound_frames(config, num_frames, fps) if sound else 0
    levels = resolve_sigmas(
        config, steps=num_inference_steps, flow_shift=flow_shift, schedule=schedule, sigmas=sigmas
    )
    table = unipc.tableau(levels)
    resolved = resolve_batch(
        prompts, negative_prompt, style=prompt_style, system_prompt=system_prompt,
        num_frames=num_frames, height=height, width=width, fps=fps,
    )  # fmt: skip
    ids, negative_ids = zip(*(encode_prompts(tokenizer, one) for one in resolved), strict=True)
    text_ids, text_mask = pad_token_ids(ids, TEXT_BUCKET)
    guided = guidance_scale != 1
    neg_text_ids, neg_text_mask = (
        pad_token_ids(negative_ids, TEXT_BUCKET) if guided else (None, None)
    )
    seeds = _seeds(seed, len(prompts))
    channels, sound_channels = config.transformer.latent_channel, config.transformer.sound_dim
    if noise is None:
        noise = _draw(seeds, (channels, *video_shape))
    if sound_frames and sound_noise is None:
        sound_noise = _draw(seeds, (sound_channels, sound_frames))
    if sound_noise is not None and not sound_frames:
        raise ValueError("sound_noise is given, but no sound is asked for: pass sound=True too")
    given = resolve_given(
        config, len(prompts), video_shape, fps, image=image, video=video,
        condition_frames=condition_frames, keep=keep, clean_latents=clean_latents,
        frame_mask=frame_mask,
    )  # fmt: skip
    request = T2VRequest(
        text_ids=text_ids,
        text_mask=text_mask,
        neg_text_ids=neg_text_ids,
        neg_text_mask=neg_text_mask,
        video_shape=video_shape,
        fps=np.float32(fps),
        num_inference_steps=len(table.timestep),
        guidance_scale=np.float32(guidance_scale),
        noise=np.asarray(noise, np.float32),
        sound_frames=sound_frames,
        sound_noise=np.asarray(sound_noise, np.float32) if sound_frames else None,
        sampler=table,
        **given,
    )
    check_request(request, config)
    if not sound_frames and request.frame_mask is not None and request.frame_mask.all(axis=1).any():
        raise ValueError(
            f"all {video_shape[0]} latent frames are given, and nothing is left to make: ask for "
            "more num_frames, for fewer condition_frames, or for sound"
        )
    for name in ("noise", "sound_noise"):
        if getattr(request, name) is not None and not np.isfinite(getattr(request, name)).all():
            raise ValueError(f"{name} holds NaN or infinity; it should be standard normal")
    return request


def resolve_batch(
    prompts: Sequence[str], negative_prompt: str | Sequence[str] | None, **settings
) -> list[ResolvedPrompt]:
    """The exact texts that reach the tokenizer, one pair for each prompt (see
    `prompt.resolve_prompts`).
    """
    if not prompts:
        raise ValueError("the list of prompts is empty; give at least one")
    one_for_all = negative_prompt is None or isinstance(negative_prompt, str)
    negatives = [negative_prompt] * len(prompts) if one_for_all else list(negative_prompt)
    if len(negatives) != len(prompts):
        raise ValueError(
            f"{len(negatives)} negative prompts for {len(prompts)} prompts: give one for all, "
            "or one for each"
        )
    return [resolve_prompts(p, n, **settings) for p, n in zip(prompts, negatives, strict=True)]


def resolve_sigmas(
    config: Config,
    *,
    steps: int | None = None,
    flow_shift: float | None = None,
    schedule: str | None = None,
    sigmas: Sequence[float] | None = None,
) -> np.ndarray:
    """The K + 1 noise levels, float64. Given again as `sigmas`, they make the same video."""
    if sigmas is not None:
        return np.asarray(sigmas, np.float64)
    recipe, scheduler = config.recipe, config.scheduler
    karras = (scheduler.sigma_min, scheduler.sigma_max)
    return unipc.sigmas(
        recipe.schedule if schedule is None else schedule,
        recipe.num_inference_steps if steps is None else steps,
        recipe.flow_shift if flow_shift is None else flow_shift,
        **({} if None in karras else {"karras_range": karras}),
    )


def _sound_frames(config: Config, num_frames: int, fps: float) -> int:
    if not config.has_sound:
        raise ValueError(
            "sound is asked for, but this checkpoint has none or was loaded without: leave it out"
        )
    if num_frames == 1:
        raise ValueError(
            "num_frames=1 makes an image, which has no sound: ask for 5 frames or more"
        )
    frames = sound_vae.sound_latent_length(config.sound_vae, num_frames, fps)
    if frames < 1:
        raise ValueError(f"{num_frames} frames at fps={fps} are too short for sound: leave it out")
    return frames


def _seeds(seed: int | Sequence[int], batch: int) -> list[int]:
    one_for_all = isinstance(seed, int | np.integer)
    seeds = [seed + b for b in range(batch)] if one_for_all else np.atleast_1d(seed).tolist()
    if not all(isinstance(one, int) for one in seeds):
        raise ValueError(f"seed={seed!r} must be a whole number, or one for each prompt")
    if len(seeds) != batch:
        raise ValueError(
            f"{len(seeds)} seeds for {batch} prompts: give one for all, or one for each"
        )
    for one in seeds:
        if not 0 <= one < 2**32:
            raise ValueError(
                f"seed={one} is outside 0..{2**32 - 1}, the range of numpy's RandomState"
            )
    return seeds


def _draw(seeds: list[int], shape: tuple[int, ...]) -> np.ndarray:
    return np.stack([initial_noise(seed, shape) for seed in seeds])
