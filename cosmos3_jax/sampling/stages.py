"""What a generation consists of: its stages, in order, each a pure function of one part of the
parameters and of values that earlier stages made.

This is the only description of that. `generate` calls the functions one after the other, inside of
one program; `runtime.programs` compiles each by itself, so that the part of the weights which one
has read can leave the device before the next comes, and runs, compiles ahead or measures them. A
new capability is a stage here.

Axes: as in `denoise`; B batch, T frames, H rows, W columns of pixels.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import einops
import jax
import jax.numpy as jnp
from jax import Array

from cosmos3_jax.config import Config
from cosmos3_jax.models import sound_vae, video_vae
from cosmos3_jax.sampling import denoise
from cosmos3_jax.sampling.request import Request

Values = dict[str, Any]  # what a generation has made so far, by name


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of a generation that is one program.

    Attributes:
        name: in tables and messages.
        part: of the parameters that it reads: `und`, `gen`, `video_vae` or `sound_vae`.
        function: (parameters, *inputs, config=..., **static) -> the values that it makes.
        inputs: values -> the function's inputs, trees of arrays. What is not among them compiles
            nothing anew.
        needed: whether a generation with these values has this stage.
        static: values -> the function's hashable arguments.
        loop: whether the last input is steps, which may be given in blocks, one call after another;
            the values of a call are inputs of the next.
        donated: the input whose memory the results take.
        drops: values that no later stage reads; they leave the device after this one.
    """

    name: str
    part: str
    function: Callable[..., Values]
    inputs: Callable[[Values], tuple]
    needed: Callable[[Values], bool] = lambda values: True
    static: Callable[[Values], dict] = lambda values: {}
    loop: bool = False
    donated: int | None = None
    drops: tuple[str, ...] = ()


def initial_values(
    request: Request,
    *,
    output: str = "media",
    decode_chunk_size: int | None = None,
    trajectory: bool = False,
) -> Values:
    """What the first stage starts from.

    Raises ValueError on an output that is neither `media` nor `latents`.
    """
    if output not in ("media", "latents"):
        raise ValueError(f"output={output!r} is unknown; choose media or latents")
    return {
        "request": request,
        "steps": denoise.all_steps(request),
        "output": output,
        "decode_chunk_size": decode_chunk_size,
        "keep_trajectory": trajectory,
    }


def encode_given(params: dict, clean_video: Array, frame_mask: Array, *, config: Config) -> Values:
    """Pixels that are given -> the fields of a request that gives latents.

    Args:
        params: the video VAE's.
        clean_video, frame_mask: see `Request`.

    Returns:
        `given`: `clean_latents` [B, C, t, h, w] in float32, zero behind what the pixels reach;
        `frame_mask` [B, t], False there.
    """
    latents = video_vae.encode(params, config.video_vae, clean_video, dtype=params_dtype(params))
    latents = einops.rearrange(latents.astype(jnp.float32), "b t h w c -> b c t h w")
    reach, frames = latents.shape[2], frame_mask.shape[1]
    clean = jnp.pad(latents, [(0, 0), (0, 0), (0, frames - reach), (0, 0), (0, 0)])
    return {
        "given": {
            "clean_latents": clean,
            "frame_mask": frame_mask & (jnp.arange(frames)[None] < reach),
        }
    }


def encode_text(params: dict, request: Request, *, config: Config) -> Values:
    """The prompts' keys and values, and what the loop over steps starts from."""
    conditions = denoise.encode_conditions(params, request, config)
    conditions, state = denoise.start(conditions, request, config)
    return {"conditions": conditions, "state": state}


def decode_video(
    params: dict, latents: Array, *, config: Config, chunk_size: int | None = None
) -> Values:
    """Latents [B, C, t, h, w] -> `video`, float32 [B, 3, T, H, W] in [0, 1]."""
    latents = denoise.channels_last({"video": latents})["video"]
    video = video_vae.decode(
        params, config.video_vae, latents, chunk_size=chunk_size, dtype=params_dtype(params),
        video_dtype=jnp.float32,
    )  # fmt: skip
    return {"video": video}


def decode_sound(params: dict, latents: Array, *, config: Config) -> Values:
    """Latents [B, C_sound, s] -> `sound`, waveform [B, channels, samples] in [-1, 1]."""
    latents = denoise.channels_last({"sound": latents})["sound"]
    sound = sound_vae.decode(params, config.sound_vae, latents, dtype=params_dtype(params))
    return {"sound": sound}


def encode_video(params: dict, video: Array, *, config: Config, chunk_size: int) -> Array:
    """Video [B, 3, T, H, W] in [0, 1] -> latents [B, C, t, h, w]."""
    dtype = params_dtype(params)
    latents = video_vae.encode(params, config.video_vae, video, chunk_size=chunk_size, dtype=dtype)
    return denoise.channels_first({"video": latents})["video"]


def encode_sound(params: dict, waveform: Array, *, config: Config) -> Array:
    """Waveform [B, channels, samples] in [-1, 1] -> latents [B, C_sound, s]."""
    latents = sound_vae.encode(params, config.sound_vae, waveform, dtype=params_dtype(params))
    return denoise.channels_first({"sound": latents})["sound"]


def params_dtype(params: dict) -> jnp.dtype:
    """The dtype that an autoencoder computes in: that of its weights."""
    return jax.tree.leaves(params)[0].dtype


def _text_request(values: Values) -> tuple[Request]:
    """Without what the number of steps changes: one program serves all."""
    request = values["request"].replace(sampler=None, num_inference_steps=1, clean_video=None)
    return (request.replace(**values.get("given", {})),)


STAGES = (
    Stage(
        "video encode", "video_vae", encode_given,
        lambda values: (values["request"].clean_video, values["request"].frame_mask),
        needed=lambda values: values["request"].clean_video is not None,
    ),
    Stage("condition", "und", encode_text, _text_request, drops=("given",)),
    Stage(
        "denoise", "gen", denoise.advance,
        lambda values: (values["conditions"], values["state"], values["steps"]),
        static=lambda values: {"trajectory": values["keep_trajectory"]},
        loop=True, donated=1, drops=("conditions", "state", "clean"),
    ),
    Stage(
        "video decode", "video_vae", decode_video,
        lambda values: (values["latents"]["video"],),
        needed=lambda values: values["output"] == "media",
        static=lambda values: {"chunk_size": values["decode_chunk_size"]},
    ),
    Stage(
        "sound decode", "sound_vae", decode_sound,
        lambda values: (values["latents"]["sound"],),
        needed=lambda values: values["output"] == "media" and "sound" in values["latents"],
    ),
)  # fmt: skip


def walk(
    values: Values,
    execute: Callable[[Stage, Values], Values],
    stages: tuple[Stage, ...] | None = None,
) -> Values:
    """Execute the stages that a generation needs, one after the other: the one driver.

    Args:
        values: see `initial_values`.
        execute: a stage and the values so far -> the values that the stage makes.
        stages: in order; None for `STAGES`.

    Returns:
        All values.
    """
    for stage in STAGES if stages is None else stages:
        if stage.needed(values):
            values = values | execute(stage, values)
            values = {name: x for name, x in values.items() if name not in stage.drops}
    return values


def up_to_the_loop() -> tuple[tuple[Stage, ...], Stage]:
    """The stages before the loop over steps, and the loop."""
    at = next(i for i, stage in enumerate(STAGES) if stage.loop)
    return STAGES[:at], STAGES[at]


def result_of(values: Values) -> dict:
    """What a generation returns: `video` and `sound`, pixels and waveform or latents, and, where it
    was kept, the `trajectory`.
    """
    if values["output"] == "latents":
        found = dict(values["latents"])
    else:
        found = {name: values[name] for name in ("video", "sound") if name in values}
    if "trajectory" in values:
        found["trajectory"] = values["trajectory"]
    return found
