"""diffusers' Cosmos3 pipeline at any sizes with random weights, and the time of its stages.

Whatever is timed runs inside the pipeline's own `__call__`; this module only holds the clock.
"""

import contextlib
import inspect
import math
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from types import SimpleNamespace
from unittest import mock

import torch
from diffusers import (
    AutoencoderKLWan,
    Cosmos3OmniPipeline,
    Cosmos3OmniTransformer,
    UniPCMultistepScheduler,
)
from diffusers.models.attention_dispatch import dispatch_attention_fn

from cosmos3_jax.config import Config
from cosmos3_jax.runtime.job import Job

# All that take grouped keys and values and need no package beside torch.
ATTENTION_BACKENDS = ("_native_cudnn", "_native_flash", "native")
COMPILE = {"fullgraph": True, "dynamic": False}  # a new size compiles anew, for that size alone


class FixedLengthTokenizer:
    """Random tokens in the numbers asked for, with the two that the pipeline adds."""

    eos_token_id = 1

    def __init__(self, vocabulary: int, **counts: int):
        self.vocabulary, self.counts = vocabulary, counts

    def convert_tokens_to_ids(self, token: str) -> int:
        return 2

    def apply_chat_template(self, conversation: list[dict], **options) -> SimpleNamespace:
        """Tokens for a text that begins with one of the names in `counts`."""
        text = conversation[-1]["content"]
        (count,) = (n for name, n in self.counts.items() if text.startswith(name))
        generator = torch.Generator().manual_seed(count)
        ids = torch.randint(0, self.vocabulary, (count - 2,), generator=generator, device="cpu")
        return SimpleNamespace(input_ids=ids.tolist())


def build_pipeline(config: Config, dtype_name: str, job: Job) -> Cosmos3OmniPipeline:
    """The pipeline without sound, random normal weights made on the device, the job's prompts."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    dtype = getattr(torch, dtype_name)
    transformer = build_transformer(config, device, dtype)
    vae = build_random(AutoencoderKLWan, config.video_vae, device, dtype)
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, use_karras_sigmas=False,
        flow_shift=10.0, sigma_max=200.0, sigma_min=0.147, timestep_spacing="linspace",
    )  # fmt: skip
    tokenizer = FixedLengthTokenizer(
        config.transformer.vocab_size, prompt=job.text_tokens, negative=job.negative_tokens
    )
    pipeline = Cosmos3OmniPipeline(
        transformer=transformer, text_tokenizer=tokenizer, vae=vae, scheduler=scheduler,
        enable_safety_checker=False, use_native_flow_schedule=True,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def build_transformer(config: Config, device: str, dtype: torch.dtype) -> Cosmos3OmniTransformer:
    """Both towers; the timestep embedding in float32, as `from_pretrained` keeps it."""
    model = build_random(Cosmos3OmniTransformer, config.transformer, device, dtype, sound_gen=False)
    model.time_embedder.float()
    return model


def build_random(
    kind: type, sizes, device: str, dtype: torch.dtype, **overrides
) -> Cosmos3OmniTransformer | AutoencoderKLWan:
    """A model with weights like `random_inputs.distribution`: 1 + 0.1 z for scales, else 0.02 z.

    It is built where it will run, so that no weight passes through the host, and by its constructor
    rather than from the meta device, so that buffers hold what the constructor puts there.
    """
    known = inspect.signature(kind.__init__).parameters
    named = {name: value for name, value in vars(sizes).items() if name in known} | overrides
    chosen = {k: list(v) if isinstance(v, tuple) else v for k, v in named.items()}
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = kind(**chosen).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(previous)
    for name, parameter in model.named_parameters():
        leaf = name.split(".")[-1]
        scale = leaf == "gamma" or (leaf == "weight" and parameter.ndim == 1)
        parameter.normal_(*((1.0, 0.1) if scale else (0.0, 0.02)))
    return model


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def attention_seconds(
    transformer: Cosmos3OmniTransformer, video_tokens: int, text_tokens: int
) -> dict[str, float | str]:
    """One attention of the media tower by each backend: its seconds, or why it cannot run."""
    sizes, device = transformer.config, transformer.device
    generator = torch.Generator(device).manual_seed(0)

    def draw(tokens: int, heads: int) -> torch.Tensor:
        shape = (1, tokens, heads, sizes.head_dim)
        return torch.randn(shape, generator=generator, device=device, dtype=transformer.dtype)

    query = draw(video_tokens, sizes.num_attention_heads)
    key = draw(video_tokens + text_tokens, sizes.num_key_value_heads)
    value = draw(video_tokens + text_tokens, sizes.num_key_value_heads)
    found: dict[str, float | str] = {}
    for backend in ATTENTION_BACKENDS:
        try:
            for repeat in range(4):
                if repeat == 1:  # the first run starts the library
                    synchronize(device)
                    start = time.perf_counter()
                dispatch_attention_fn(query, key, value, enable_gqa=True, backend=backend)
            synchronize(device)
            found[backend] = (time.perf_counter() - start) / 3
        except Exception as error:
            found[backend] = f"{type(error).__name__}: {error}"
    return found


def use_fastest_attention(pipeline: Cosmos3OmniPipeline, job: Job) -> dict[str, dict | str]:
    """Set the backend that is fastest at this size; which one, and the seconds of all."""
    sizes, patch = pipeline.vae.config, pipeline.transformer.config.latent_patch_size
    frames = (job.num_frames - 1) // sizes.scale_factor_temporal + 1
    sides = (-(-x // (sizes.scale_factor_spatial * patch)) for x in (job.height, job.width))
    seconds = attention_seconds(pipeline.transformer, frames * math.prod(sides), job.text_tokens)
    able = {name: found for name, found in seconds.items() if isinstance(found, float)}
    if not able:
        raise RuntimeError(f"no attention backend runs: {seconds}")
    fastest = min(able, key=able.get)
    pipeline.transformer.set_attention_backend(fastest)
    return {"backend": fastest, "attention_seconds": seconds}


def compile_blocks(pipeline: Cosmos3OmniPipeline, **options) -> None:
    """Compile the repeated blocks; cuDNN searches for its fastest convolutions, as XLA does."""
    pipeline.transformer.compile_repeated_blocks(**COMPILE | options)
    torch.backends.cudnn.benchmark = True


def measure_job(pipeline: Cosmos3OmniPipeline, job: Job, run_steps: int) -> dict:
    """Measure one job, by the fastest attention of its size; see `time_job` for what is found.

    All steps: a call that stops after one step comes before. Fewer: the first step of the call is
    left out.
    """
    start = time.perf_counter()
    attention = use_fastest_attention(pipeline, job)
    warm_autoencoder(pipeline, job)
    if run_steps == job.steps:
        time_job(pipeline, job, stop_after=1)
        warming = time.perf_counter() - start
        found = time_job(pipeline, job, stop_after=run_steps)
    else:
        found = time_job(pipeline, job, stop_after=1 + run_steps)
        warming, *found["step_samples"] = found["step_samples"]
        found["passes"] -= found["work"]["passes_per_step"]
    return found | attention | {"steps_timed": run_steps, "warm_up_seconds": warming}


def environment() -> dict:
    """What this side's measurements depend on."""
    on_gpu = torch.cuda.is_available()
    names = (
        "torch",
        "diffusers",
        "transformers",
        "triton",
        "nvidia-cudnn-cu12",
        "nvidia-cudnn-cu13",
    )
    found = {d.metadata["Name"]: d.version for d in metadata.distributions()}
    return {
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "versions": {name: found[name] for name in names if name in found},
    }


@torch.no_grad()
def warm_autoencoder(pipeline: Cosmos3OmniPipeline, job: Job) -> None:
    """Three latent frames through encoder and decoder: all the shapes that a video has."""
    vae = pipeline.vae
    video = torch.zeros(1, 3, 9, job.height, job.width, device=vae.device, dtype=vae.dtype)
    vae.decode(vae.encode(video).latent_dist.mode())


def time_job(pipeline: Cosmos3OmniPipeline, job: Job, stop_after: int) -> dict:
    """One text-to-video call: each step, the encoding of zeros, the decode, tokens and memory.

    After `stop_after` steps the pipeline is interrupted; it then decodes what it has.
    """
    device, marks = pipeline.transformer.device, {"encode": 0.0, "steps": []}

    def now() -> float:
        synchronize(device)
        return time.perf_counter()

    def on_step(pipe: Cosmos3OmniPipeline, step: int, timestep, tensors: dict) -> dict:
        marks["steps"].append(now())
        if step + 1 == stop_after:
            marks["finite"] = bool(tensors["latents"].isfinite().all())
            marks["loop end"] = now()
            pipe._interrupt = True
        return tensors

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with _watched(pipeline, marks, now), _packed_sizes(pipeline.transformer) as packed:
        start = now()
        result = pipeline(
            prompt="prompt", negative_prompt="negative", num_frames=job.num_frames,
            height=job.height, width=job.width, fps=job.fps, num_inference_steps=job.steps,
            guidance_scale=6.0,
            output_type="pt", callback_on_step_end=on_step, enable_safety_check=False,
            generator=torch.Generator(device).manual_seed(0),
        )  # fmt: skip
        end = now()
    assert len(marks["steps"]) == stop_after <= pipeline.num_timesteps == job.steps
    passes_per_step, rest = divmod(len(packed), stop_after)
    assert not rest, f"{len(packed)} passes in {stop_after} steps"
    starts = [marks["loop start"], *marks["steps"]]
    frames, _, out_height, out_width = result.video.shape
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
    return {
        "preparation_seconds": marks["loop start"] - start - marks["encode"],
        "encode_seconds": marks["encode"],
        "step_samples": [b - a for a, b in zip(starts, marks["steps"], strict=False)],
        "decode_samples": [end - marks["loop end"]],
        "finite": marks["finite"] and bool(result.video.isfinite().all()),
        "peak_gib": peak,
        "passes": len(packed),
        "work": {
            "text_tokens": packed[0][0],
            "negative_tokens": packed[1][0],
            "video_tokens": packed[0][1],
            "video": [frames, out_height, out_width],
            "passes_per_step": passes_per_step,
        },
    }


@contextlib.contextmanager
def _watched(pipeline: Cosmos3OmniPipeline, marks: dict, now: Callable) -> Iterator[None]:
    """Note when the video of zeros has been encoded and when the loop over steps begins."""
    encode, set_timesteps = pipeline._encode_video, pipeline.scheduler.set_timesteps

    def timed_encode(*arguments):
        start = now()
        found = encode(*arguments)
        marks["encode"] += now() - start
        return found

    def last_before_loop(*arguments, **named) -> None:
        set_timesteps(*arguments, **named)
        marks["loop start"] = now()

    with (
        mock.patch.object(pipeline, "_encode_video", timed_encode),
        mock.patch.object(pipeline.scheduler, "set_timesteps", last_before_loop),
    ):
        yield


@contextlib.contextmanager
def _packed_sizes(transformer: Cosmos3OmniTransformer) -> Iterator[list[tuple[int, int]]]:
    """(text tokens, video tokens) of each pass through the transformer."""
    found: list[tuple[int, int]] = []

    def look(module, arguments, named) -> None:
        found.append((named["und_len"], named["sequence_length"] - named["und_len"]))

    handle = transformer.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield found
    finally:
        handle.remove()
