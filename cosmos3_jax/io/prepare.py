"""From prompts and settings to the arrays of one generation; what can be refused is refused here.

It needs a configuration and a tokenizer but no weights, so bad input fails before anything is
loaded.

Axes: B batch, C channels; latents t frames, h rows, w columns; s sound latents; K steps.
"""

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping, Sequence, Set
from itertools import islice
from typing import Unpack

import numpy as np
from jax.typing import ArrayLike

from cosmos3_jax import limits
from cosmos3_jax.config import Config, Recipe, Recipes, check_fps
from cosmos3_jax.io.captions import unwrap
from cosmos3_jax.io.conditioning import input_shape, resolve_given
from cosmos3_jax.io.prompt import (
    ResolvedPrompt,
    Tokenizer,
    encode_prompts,
    pad_token_ids,
    resolve_prompts,
)
from cosmos3_jax.io.settings import Settings, SettingsDict, read_settings
from cosmos3_jax.models import sound_vae, video_vae
from cosmos3_jax.parallel import device
from cosmos3_jax.recipes import (
    LARGEST,
    aspect_name,
    check_recommended,
    fill_size,
    nearest_aspect,
    of_tier,
    parse_size,
    tier_name,
)
from cosmos3_jax.sampling import unipc
from cosmos3_jax.sampling.request import Request, check_request, initial_noise

log = logging.getLogger("cosmos3_jax")

# What is denoised or given, and how its numbers are distributed.
LATENTS = {
    "noise": "standard normal",
    "sound_noise": "standard normal",
    "clean_latents": "of about unit variance, as encode_video makes it",
}
TEXT_BUCKET = 128  # prompts are padded to a multiple of it, so that few programs are compiled


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A request, and what it was resolved from.

    Attributes:
        request: the arrays.
        settings: without gaps, see `Settings.filled`.
        mode: one of `recipes.MODES`.
        sources: for each setting that a recipe has, where its value comes from, in words.
        notes: what was decided for the caller and is worth saying, in words.
        texts: the exact texts of each prompt.
        sigmas: float64 [K + 1]. Given again as `sigmas`, they make the same video; the request's
            are rounded, and 1000 sigma may then be truncated to another timestep.
    """

    request: Request
    settings: Settings
    mode: str
    sources: dict[str, str]
    notes: list[str]
    texts: list[ResolvedPrompt]
    sigmas: np.ndarray


def prepare(
    config: Config,
    tokenizer: Tokenizer,
    prompt: str | Sequence[str],
    settings: Settings,
    check: Callable[[Request], object] = lambda request: None,
) -> Prepared:
    """Check, read and tokenise everything that one generation needs.

    Numbers and sizes are judged first, and nothing of the size of the video is made before.

    Args:
        config: the checkpoint's.
        tokenizer: the checkpoint's.
        prompt: text, or a structured caption as JSON, also in an upsampler's record (see
            `captions.unwrap`), whose negative prompt counts where none is given; a list is a batch.
        settings: see `Settings`; what is None comes from the recipe.
        check: called with the request before its pixels are read and its noise is drawn, and
            without them; it may raise.

    Raises:
        ValueError: on any value that cannot work, and on noise that does not fit the host's memory.
        TypeError: on a prompt that is not text.
        FileNotFoundError: on an image or a clip that is not there.
    """
    settings, mode, sources, notes = resolve_settings(config.recipes, settings)
    for note in notes:
        log.warning(note)  # which Python shows, where nobody has asked for another way
    prompts = _prompts(prompt)
    unwrapped = [unwrap(one) for one in prompts]
    prompts, negatives = [one for one, _ in unwrapped], [negative for _, negative in unwrapped]
    if sources["negative_prompt"] != "given" and any(one is not None for one in negatives):
        default = settings.negative_prompt
        negatives = [default if one is None else one for one in negatives]
        settings = dataclasses.replace(settings, negative_prompt=negatives)
        sources["negative_prompt"] = "the prompt's record"
    num_frames, height, width = settings.num_frames, settings.height, settings.width
    fps, guidance_scale = settings.fps, settings.guidance_scale
    video_shape = video_vae.pixel_to_latent_shape(config.video_vae, num_frames, height, width)
    sound_frames = _sound_frames(config, num_frames, fps) if settings.sound else 0
    sigmas = resolve_sigmas(config, settings)
    table = unipc.tableau(sigmas)
    texts = resolve_texts(prompts, settings)
    ids, negative_ids = zip(*(encode_prompts(tokenizer, one) for one in texts), strict=True)
    limits.check_most("text_tokens", max(map(len, ids + negative_ids)))
    text_ids, text_mask = pad_token_ids(ids, TEXT_BUCKET)
    guided = guidance_scale != 1
    neg_text_ids, neg_text_mask = (
        pad_token_ids(negative_ids, TEXT_BUCKET) if guided else (None, None)
    )
    seeds = _seeds(settings.seed, len(prompts))
    if settings.sound_noise is not None and not sound_frames:
        raise ValueError("sound_noise is given, but no sound is asked for: pass sound=True too")
    request = Request(
        text_ids=text_ids,
        text_mask=text_mask,
        neg_text_ids=neg_text_ids,
        neg_text_mask=neg_text_mask,
        video_shape=video_shape,
        fps=np.float32(fps),
        num_inference_steps=len(table.timestep),
        guidance_scale=np.float32(guidance_scale),
        sound_frames=sound_frames,
        sampler=table,
    )
    shapes = {"noise": (config.transformer.latent_channel, *video_shape)}
    if sound_frames:
        shapes["sound_noise"] = (config.transformer.sound_dim, sound_frames)
    _check_room(len(prompts), shapes)
    check(request)
    given = resolve_given(
        config, len(prompts), video_shape, fps, image=settings.image, video=settings.video,
        condition_frames=settings.condition_frames, keep=settings.keep,
        clean_latents=settings.clean_latents, frame_mask=settings.frame_mask,
    )  # fmt: skip
    for name, shape in shapes.items():
        given[name] = _draw(seeds, shape) if (x := getattr(settings, name)) is None else _float32(x)
    request = request.replace(**given)
    check_request(request, config)
    if not sound_frames and request.frame_mask is not None and request.frame_mask.all(axis=1).any():
        raise ValueError(
            f"all {video_shape[0]} latent frames are given, and nothing is left to make: ask for "
            "more num_frames, for fewer condition_frames, or for sound"
        )
    for name, expected in LATENTS.items():
        if getattr(settings, name) is not None:
            _check_latents(name, getattr(request, name), expected)
    return Prepared(request, settings, mode, sources, notes, texts, sigmas)


def _prompts(prompt: str | Sequence[str]) -> list[str]:
    """Of one prompt, or of a batch of them."""
    if isinstance(prompt, Mapping | Set | bytes) or not hasattr(prompt, "__iter__"):
        advice = "; give a caption by json.dumps" if isinstance(prompt, Mapping) else ""
        raise TypeError(
            f"the prompt is a {type(prompt).__name__}, not a string{advice}: "
            f"{limits.shown(prompt, 80)}"
        )
    prompts = [prompt] if isinstance(prompt, str) else [*islice(prompt, limits.BATCH + 1)]
    limits.check_most("batch", len(prompts))
    for text in prompts:
        _check_letters("prompt", text)
    return prompts


def _check_letters(name: str, text: object) -> None:
    if isinstance(text, str):
        limits.check_most(f"letters of the {name}", len(text), limits.LETTERS)


def _check_room(batch: int, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ValueError if noise of these shapes is more than the host's memory."""
    needed, memory = 4 * batch * sum(map(math.prod, shapes.values())), device.host_memory()
    if memory is not None and needed > memory:
        raise ValueError(
            f"the noise alone needs {needed / 2**30:.2f} GiB, and this machine has "
            f"{memory / 2**30:.2f}: take fewer num_frames, a smaller size or fewer prompts"
        )


def _float32(values: ArrayLike) -> np.ndarray:
    with np.errstate(over="ignore"):  # what is infinite then is refused
        return np.asarray(values, np.float32)


def _check_latents(name: str, values: np.ndarray, expected: str) -> None:
    low, high = values.min(initial=0), values.max(initial=0)
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ValueError(f"{name} holds NaN or infinity; it should be {expected}")
    if (largest := max(-low, high)) > limits.LATENT:
        raise ValueError(
            f"{name} holds {largest:g}, beyond the limit of {limits.LATENT:g}; it should be "
            f"{expected}"
        )


def with_seed(prepared: Prepared, seed: int) -> Prepared:
    """One prompt's request with another seed's noise, as if it were prepared anew; noise that was
    given stays. Raises ValueError on a seed that numpy does not take.
    """
    seeds, settings = _seeds(seed, 1), prepared.settings
    drawn = {
        name: _draw(seeds, noise.shape[1:])
        for name in ("noise", "sound_noise")
        if getattr(settings, name) is None
        and (noise := getattr(prepared.request, name)) is not None
    }
    return dataclasses.replace(
        prepared,
        request=prepared.request.replace(**drawn),
        settings=dataclasses.replace(settings, seed=seed),
    )


def resolve_settings(
    recipes: Recipes, settings: Settings
) -> tuple[Settings, str, dict[str, str], list[str]]:
    """Settings without gaps, and `Prepared`'s mode, sources and notes.

    Raises:
        ValueError: the size is said twice, or cannot be read; or a number is out of range.
    """
    mode = settings.mode
    recipe = recipes.of(mode)
    names = [field.name for field in dataclasses.fields(recipe) if field.name != "size"]
    sources = {
        name: "given" if getattr(settings, name) is not None else recipes.source(mode, name)
        for name in names
    }
    width, height, source, notes = _size(recipe, settings, mode)
    if source is not None:
        settings = dataclasses.replace(settings, width=width, height=height)
        sources |= {"width": source, "height": source}
    settings = _with_evaluations(settings.filled(recipe))
    check_fps(settings.fps)
    if not math.isfinite(settings.guidance_scale):
        raise ValueError(f"guidance_scale={settings.guidance_scale} must be a finite number")
    if recipes.recognised:
        check_recommended(settings.num_frames, settings.height, settings.width, settings.fps)
    return settings, mode, sources, notes


def _with_evaluations(settings: Settings) -> Settings:
    """Speed and evaluations agree: `fast` has a number of them, and `exact` None. Noise levels that
    are given win, and are `exact`, unless they are those of such evaluations, as in a record.
    """
    steps, evaluations = settings.num_inference_steps, settings.evaluations
    if evaluations is None and settings.speed == "fast":
        evaluations = unipc.fast_evaluations(steps)
    if evaluations == steps:
        evaluations = None
    if evaluations is not None and settings.sigmas is not None:
        evaluations = evaluations if _are_of(settings, evaluations) else None
    elif evaluations is not None and settings.speed == "exact":
        raise ValueError(
            f"speed=exact evaluates the model at each of {steps} steps, and "
            f"evaluations={evaluations} is given: leave one of them out"
        )
    speed = "exact" if evaluations is None else "fast"
    return dataclasses.replace(settings, evaluations=evaluations, speed=speed)


def _are_of(settings: Settings, evaluations: int) -> bool:
    """Whether the noise levels that are given are those of so many evaluations."""
    steps, given = settings.num_inference_steps, np.asarray(settings.sigmas, np.float64)
    if (settings.schedule, given.shape) != ("native", (evaluations + 1,)) or evaluations > steps:
        return False
    levels = unipc.sigmas("native", steps, settings.flow_shift, evaluations=evaluations)
    return np.allclose(given, levels, rtol=1e-6)


def _size(recipe: Recipe, settings: Settings, mode: str) -> tuple[int, int, str | None, list[str]]:
    """Width and height, where they come from (None: the recipe), and what is worth saying."""
    size, aspect = settings.size, settings.aspect
    size = "x".join(map(str, size)) if isinstance(size, list | tuple) else size
    size = None if size is None else str(size)
    aspect = None if aspect is None else aspect_name(aspect)
    height, width = settings.height, settings.width
    for name, pixels in (("height", height), ("width", width)):
        if pixels is not None and not (
            isinstance(pixels, int | np.integer) and 0 < pixels <= LARGEST
        ):
            raise ValueError(f"{name}={pixels!r} must be a whole number of pixels, 16 to {LARGEST}")
    if height is not None or width is not None:
        if size is not None or aspect is not None:
            said = f"size={size!r}" if size is not None else f"aspect={settings.aspect!r}"
            raise ValueError(f"{said} beside height={height}, width={width}: give one or the other")
        if height is not None and width is not None:
            return width, height, "given", []
    elif size is not None and tier_name(size) is None:
        return *parse_size(size, settings.aspect, ""), "given", []
    elif size is None and recipe.size is None and aspect is not None:
        raise ValueError(
            f"aspect={settings.aspect!r}: this checkpoint makes {recipe.width}x{recipe.height}, of "
            "no size that has other aspects; give size too, or height and width"
        )
    ratio, given = recipe.width / recipe.height, None
    if aspect is None and mode in ("image2video", "video2video"):
        given = input_shape(settings.image, settings.video)
    said = "" if given is None else f"the input's {given[1]}x{given[0]}"
    if size is None and recipe.size is None and height is None and width is None:
        crops = given and abs(given[1] / given[0] / ratio - 1) > 0.05
        note = f"size {recipe.width}x{recipe.height}, the checkpoint's own: {said} is cropped to it"
        return recipe.width, recipe.height, None, [note] if crops else []
    if given is None:
        chosen = aspect or nearest_aspect(recipe.width, recipe.height)
        source = "given"
    else:
        chosen = nearest_aspect(given[1], given[0])
        source = f"{chosen.replace(',', ':')} is nearest to {said}"
    if height is not None or width is not None:
        across, down = map(int, chosen.split(","))
        if recipe.size is None:
            across, down = recipe.width, recipe.height
        source = f"{across}:{down}, with {'width' if height is None else 'height'} given"
        width, height = fill_size(width, height, across, down)
        return width, height, source, [f"size {width}x{height}: {source}"]
    if size is None and aspect is None and given is None:
        return recipe.width, recipe.height, None, []
    width, height = of_tier(tier_name(size or str(recipe.size)) or "", chosen)
    note = f"size {width}x{height}: {source}"
    return width, height, source, [note] if source != "given" else []


def prepare_request(
    config: Config,
    tokenizer: Tokenizer,
    prompt: str | Sequence[str],
    **settings: Unpack[SettingsDict],
) -> Request:
    """The request alone; see `prepare`, and `Settings` for the keyword arguments."""
    return prepare(config, tokenizer, prompt, read_settings(dict(settings))).request


def resolve_texts(prompts: Sequence[str], settings: Settings) -> list[ResolvedPrompt]:
    """The exact texts that reach the tokenizer, one pair for each prompt (see
    `prompt.resolve_prompts`).
    """
    if not prompts:
        raise ValueError("the list of prompts is empty; give at least one")
    negative = settings.negative_prompt
    one_for_all = negative is None or isinstance(negative, str)
    negatives = [negative] * len(prompts) if one_for_all else list(negative)
    for text in [settings.system_prompt, *negatives]:
        _check_letters("negative or system prompt", text)
    if len(negatives) != len(prompts):
        raise ValueError(
            f"{len(negatives)} negative prompts for {len(prompts)} prompts: give one for all, "
            "or one for each"
        )
    return [
        resolve_prompts(
            text, negative, style=settings.prompt_style, system_prompt=settings.system_prompt,
            metadata=settings.prompt_metadata, num_frames=settings.num_frames,
            height=settings.height, width=settings.width, fps=settings.fps,
        )
        for text, negative in zip(prompts, negatives, strict=True)
    ]  # fmt: skip


def resolve_sigmas(config: Config, settings: Settings) -> np.ndarray:
    """The K + 1 noise levels of settings without gaps, float64."""
    if settings.sigmas is not None:
        return np.asarray(settings.sigmas, np.float64)
    karras = (config.scheduler.sigma_min, config.scheduler.sigma_max)
    return unipc.sigmas(
        settings.schedule,
        settings.num_inference_steps,
        settings.flow_shift,
        evaluations=settings.evaluations,
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
                f"seed={one} is outside 0..{2**32 - 1}, the range of numpy's RandomState: take it "
                "modulo 2**32"
            )
    return seeds


def _draw(seeds: list[int], shape: tuple[int, ...]) -> np.ndarray:
    return np.stack([initial_noise(seed, shape) for seed in seeds])
