"""What `parity.ipynb` needs of diffusers' internals, and two small tools of its own.

Axes: B batch, C channels, t latent frames, h rows, w columns, s sound latents, K steps, L layers, S
text tokens, M media tokens, D model.
"""

import contextlib
import gc
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import jax
import numpy as np
import torch
import transformers
from diffusers import Cosmos3OmniPipeline, UniPCMultistepScheduler

from convert.verify import reference
from cosmos3_jax import Request
from cosmos3_jax.checkpoint.load import load_config


class RecordingScheduler(UniPCMultistepScheduler):
    """diffusers' scheduler, which also keeps the sample after every step.

    The pipeline steps a deep copy of it for sound, whose latents it shows nobody: hence one list
    for all instances.
    """

    samples: ClassVar[list[np.ndarray]] = []

    def step(self, *args, **kwargs):
        out = super().step(*args, **kwargs)
        self.samples.append(out[0].float().cpu().numpy())
        return out


def load_diffusers(folder: Path, dtype: str, device: str) -> Cosmos3OmniPipeline:
    """The pipeline with the schedule that this package calls `native`: linear flow, shifted as the
    checkpoint's recipe says.
    """
    pipe = Cosmos3OmniPipeline.from_pretrained(
        folder, torch_dtype=getattr(torch, dtype), enable_safety_checker=False
    ).to(device)
    pipe.scheduler = RecordingScheduler.from_config(
        pipe.scheduler.config,
        flow_shift=load_config(folder).recipe.flow_shift,
        use_karras_sigmas=False,
    )
    pipe.register_to_config(use_native_flow_schedule=True)
    # For a prompt alone it encodes a black clip, of which it reads the shape: once is enough.
    encode, encoded = pipe._encode_video, {}

    def encode_once(clip: torch.Tensor) -> torch.Tensor:
        assert not clip.any()
        if clip.shape not in encoded:
            encoded[clip.shape] = encode(clip)
        return encoded[clip.shape]

    pipe._encode_video = encode_once
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Shelf:
    """Holds the results of `load(*key)`, the last `room` of them; others leave memory first."""

    def __init__(self, load: Callable, room: int):
        self.load, self.room, self.held = load, room, OrderedDict()

    def __call__(self, *key) -> Any:
        if key not in self.held:
            while len(self.held) >= self.room:
                self.held.popitem(last=False)
                gc.collect()
                torch.cuda.empty_cache()
            self.held[key] = self.load(*key)
        return self.held[key]


def be_quiet() -> None:
    """No progress bars while loading, and no warnings of code that calls older code."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()


def run_pipeline(
    pipe: Cosmos3OmniPipeline,
    prompt: str,
    negative: str,
    request: Request,
    *,
    decode: bool,
    **size,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """diffusers' pipeline on a request's own noise.

    Args:
        pipe: see `load_diffusers`.
        prompt, negative: as the request was made from.
        request: of one example.
        decode: whether to decode.
        **size: what both pipelines are told of sizes, steps and guidance.

    Returns:
        By name, every step's latents [K, 1, C, ...], and `video` [1, 3, T, H, W] in [0, 1] and
        `sound` [1, 2, N] if decoded.
    """
    shapes = {"video": request.noise.shape}
    if request.sound_frames:
        shapes["sound"] = request.sound_noise.shape
    pipe.scheduler.samples.clear()
    with reference.exact_arithmetic():
        out = pipe(
            prompt, negative_prompt=negative, enable_sound=bool(request.sound_frames),
            latents=torch.from_numpy(request.noise),
            sound_latents=torch.from_numpy(request.sound_noise[0]) if "sound" in shapes else None,
            output_type="np" if decode else "latent", **size,
        )  # fmt: skip
    samples = {name: pipe.scheduler.samples[i :: len(shapes)] for i, name in enumerate(shapes)}
    steps = {name: np.stack([x.reshape(shapes[name]) for x in samples[name]]) for name in shapes}
    if not decode:
        return steps, {}
    media = {"video": out.video.transpose(3, 0, 1, 2)[None]}
    if "sound" in shapes:
        media["sound"] = _numpy(out.sound)[None]
    return steps, media


def run_transformer(pipe: Cosmos3OmniPipeline, ids, video, sound, timestep: int, fps: float):
    """One call of diffusers' transformer on one example, packed by its pipeline's own methods.

    Args:
        pipe: see `load_diffusers`.
        ids: of the prompt, a list.
        video: [1, C, t, h, w] latents, and `sound` [1, C, s] or None.
        timestep: 0..999.
        fps: of the video.

    Returns:
        The velocity by name, each as its latents came in, and what the layers read and made:
        `inputs`, of each layer the text tokens [S, D], the media tokens [M, D] and the rotary
        tables; `gen` [L, M, D], the media tokens after each; `value` [L, S, K, H], the text's
        values; `rope`, the tables (cos text, sin text, cos media, sin media).
    """
    model, seen = pipe.transformer, {"inputs": [], "gen": [], "value": []}

    def layer(module, inputs, output):
        und, gen, tables = inputs
        seen["rope"] = [_numpy(table) for table in tables]
        seen["inputs"].append((_numpy(und), _numpy(gen), seen["rope"]))
        seen["gen"].append(output[1])

    def text_value(module, inputs, output):
        seen["value"].append(output.unflatten(-1, (-1, model.config.head_dim)))

    hooks = [one.register_forward_hook(layer) for one in model.layers]
    hooks += [one.self_attn.to_v.register_forward_hook(text_value) for one in model.layers]
    try:
        with reference.exact_arithmetic():
            out = model(
                **reference.pack(
                    model.config, list(ids), np.moveaxis(video[0], 0, -1),
                    None if sound is None else np.moveaxis(sound[0], 0, -1),
                    timestep=timestep, fps=fps, given=(), device=model.device, dtype=model.dtype,
                )
            )  # fmt: skip
    finally:
        for hook in hooks:
            hook.remove()
    velocity = {"video": _numpy(out.sample[0])}
    if sound is not None:
        velocity["sound"] = _numpy(out.sound[0])[None]
    for name in ("gen", "value"):
        seen[name] = np.stack([_numpy(x) for x in seen[name]])
    return velocity, seen


def run_layer(pipe: Cosmos3OmniPipeline, index: int, und, gen, tables) -> np.ndarray:
    """Layer `index` of diffusers' transformer on given inputs: its media tokens [M, D]."""
    model = pipe.transformer
    with reference.exact_arithmetic():
        und, gen, *tables = (
            torch.from_numpy(x).to(model.device, model.dtype) for x in (und, gen, *tables)
        )
        return _numpy(model.layers[index](und, gen, tuple(tables))[1])


def decode_video(pipe: Cosmos3OmniPipeline, latents: np.ndarray) -> np.ndarray:
    """Normalised latents [B, C, t, h, w] -> [B, 3, T, H, W] in [0, 1], as in the pipeline."""
    mean, std = _statistics(pipe.vae)
    with reference.exact_arithmetic():
        z = torch.from_numpy(latents).to(pipe.vae.device, pipe.vae.dtype)
        video = pipe.vae.decode(z / (1 / std) + mean).sample
        return _numpy((video.float().clamp(-1, 1) + 1) / 2)


def encode_video(pipe: Cosmos3OmniPipeline, video: np.ndarray) -> np.ndarray:
    """The way back: the posterior's mean, normalised."""
    mean, std = _statistics(pipe.vae)
    with reference.exact_arithmetic():
        x = torch.from_numpy(2 * video - 1).to(pipe.vae.device, pipe.vae.dtype)
        return _numpy((pipe.vae.encode(x).latent_dist.mode() - mean) * (1 / std))


def decode_sound(pipe: Cosmos3OmniPipeline, latents: np.ndarray) -> np.ndarray:
    """Latents [B, C, s] -> waveform [B, 2, N]."""
    vae = pipe.sound_tokenizer
    with reference.exact_arithmetic():
        return _numpy(vae.decode(torch.from_numpy(latents).to(vae.device, vae.dtype)))


def encode_sound(pipe: Cosmos3OmniPipeline, waveform: np.ndarray) -> np.ndarray:
    """Waveform [B, 2, N] -> latents [B, C, s], the posterior's mean."""
    vae = pipe.sound_tokenizer
    # oneDNN's strided convolutions of one dimension are wrong in bfloat16 on some CPUs.
    sound = torch.backends.mkldnn.flags(enabled=vae.dtype == torch.float32)
    with reference.exact_arithmetic(), sound:
        return _numpy(vae.encode(torch.from_numpy(waveform).to(vae.device)).latent_dist.mode())


def _statistics(vae) -> list[torch.Tensor]:
    return [
        torch.tensor(x, dtype=vae.dtype, device=vae.device).view(1, -1, 1, 1, 1)
        for x in (vae.config.latents_mean, vae.config.latents_std)
    ]


def _numpy(x: torch.Tensor) -> np.ndarray:
    return x.detach().float().cpu().numpy()


@contextlib.contextmanager
def counting_compilations() -> Iterator[list[float]]:
    """A list that gets one entry, its seconds, for every program that XLA compiles meanwhile."""
    log = []

    def listen(event: str, seconds: float, **_):
        if event.endswith("backend_compile_duration"):
            log.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield log
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
