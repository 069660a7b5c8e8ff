"""`cosmos3-jax bench`: time, energy, memory and rate of each stage of a generation, compiled anew
and measured warm, on random inputs.
"""

import math
import sys

import jax
import numpy as np

from cosmos3_jax import limits
from cosmos3_jax.config import Config, check_fps
from cosmos3_jax.io.prepare import TEXT_BUCKET
from cosmos3_jax.models import sound_vae, transformer, video_vae
from cosmos3_jax.models.layers import TimestepEmbedding
from cosmos3_jax.recipes import IMAGES_ONLY, parse_size
from cosmos3_jax.runtime import memory
from cosmos3_jax.runtime.job import Job
from cosmos3_jax.runtime.measure import GIB, Measure, device_peak_gib
from cosmos3_jax.sampling import stages, unipc
from cosmos3_jax.sampling.request import Request, initial_noise

SIZES = {"256p": (192, 320), "480p": (480, 832), "720p": (720, 1280)}  # height, width
PROMPT_TOKENS = 300


def jobs(
    config: Config,
    *,
    sizes: str | None = None,
    height: int | None = None,
    width: int | None = None,
    sound: bool = False,
    text_tokens: int = PROMPT_TOKENS,
    negative_tokens: int = PROMPT_TOKENS,
    speeds: str = "exact",
    **settings,
) -> dict[str, Job]:
    """The checked jobs that a command line asks for, by the names of their sizes; `480p fast` has
    as many steps as `fast` has evaluations.

    Smallest first: a device's peak memory never falls, so each size then shows its own.

    Args:
        config: the checkpoint's; what is left None comes from its recipe.
        sizes: as `recipes.parse_size` takes them, with commas between them, instead of `height`
            and `width`.
        height, width, sound, text_tokens, negative_tokens, settings: fields of `Job`.
        speeds: `exact`, `fast` or both with a comma between them.

    Raises:
        ValueError: an unknown size or speed, a size given twice over, or see `check_job`.
    """
    if not set(speeds.split(",")) <= {"exact", "fast"}:
        raise ValueError(f"speed {speeds!r} is unknown; choose exact, fast or exact,fast")
    recipe = config.recipe
    if sizes is None:
        height = recipe.height if height is None else height
        width = recipe.width if width is None else width
        name = next((n for n, size in SIZES.items() if size == (height, width)), None)
        chosen = {name or f"{height}x{width}": (height, width)}
    elif height is not None or width is not None:
        raise ValueError(f"size {sizes} sets height and width: give either those or the size")
    else:
        chosen = dict(map(_named_size, sizes.split(",")))
    made = {}
    for name, (height, width) in sorted(chosen.items(), key=lambda item: math.prod(item[1])):
        job = Job.of_recipe(
            config, height=height, width=width, sound=sound, text_tokens=text_tokens,
            negative_tokens=negative_tokens, **settings,
        )  # fmt: skip
        check_job(config, job)
        for speed in speeds.split(","):
            if speed == "fast":
                made[f"{name} fast"] = job.replace(steps=unipc.fast_evaluations(job.steps))
            else:
                made[name] = job
    return made


def _named_size(text: str) -> tuple[str, tuple[int, int]]:
    """A size's name in the results, and its height and width."""
    if text in SIZES:
        return text, SIZES[text]
    try:
        if text.strip().removesuffix("p") in IMAGES_ONLY:
            raise ValueError("that is a size for images")
        width, height = parse_size(text, None, "16,9")
    except ValueError as error:
        raise ValueError(
            f"size {text!r} is unknown; choose from {', '.join(SIZES)}, or others: {error}"
        ) from error
    named = (name for name, size in SIZES.items() if size == (height, width))
    return next(named, f"{height}x{width}"), (height, width)


def check_job(config: Config, job: Job) -> None:
    """Raise ValueError, naming value and limit, if a job cannot run at these sizes."""
    video_vae.pixel_to_latent_shape(config.video_vae, job.num_frames, job.height, job.width)
    for name in ("steps", "text_tokens", "negative_tokens", "decode_chunk_size"):
        value, least = getattr(job, name), 0 if name == "negative_tokens" else 1
        if value is not None and value < least:
            raise ValueError(f"{name}={value} must be at least {least}")
        if value is not None:
            limits.check_most(name, value)
    check_fps(job.fps)
    if job.sound and not config.has_sound:
        raise ValueError("sound is asked for, but these weights have none: leave it out")
    if job.sound and job.num_frames == 1:
        raise ValueError(
            "num_frames=1 makes an image, which has no sound: ask for 5 frames or more"
        )


def describe(job: Job) -> dict:
    """What a record says of a job."""
    names = (
        "num_frames", "height", "width", "fps", "steps", "sound", "text_tokens", "negative_tokens",
        "decode_chunk_size",
    )  # fmt: skip
    return {name: getattr(job, name) for name in names}


def padded(job: Job, dtype: str) -> Job:
    """A job whose prompts are padded as `random_request` pads them, as `memory` asks for it."""
    return job.replace(
        text_tokens=_padded(job.text_tokens), negative_tokens=_padded(job.negative_tokens),
        dtype=dtype,
    )  # fmt: skip


def _padded(tokens: int) -> int:
    return -(-tokens // TEXT_BUCKET) * TEXT_BUCKET


def random_request(config: Config, job: Job) -> Request:
    """A request of the job's sizes: random tokens, numpy noise, native schedule, guidance 6.

    Raises:
        ValueError: see `check_job`.
    """
    check_job(config, job)
    shape = video_vae.pixel_to_latent_shape(config.video_vae, job.num_frames, job.height, job.width)
    rng = np.random.RandomState(0)

    def tokens(count: int) -> tuple[np.ndarray, np.ndarray]:
        ids = rng.randint(0, config.transformer.vocab_size, (1, _padded(count))).astype(np.int32)
        return ids, np.arange(ids.size)[None] < count

    ids, mask = tokens(job.text_tokens)
    negative = tokens(job.negative_tokens) if job.negative_tokens else (None, None)
    sound = config.sound_vae if job.sound else None
    frames = sound_vae.sound_latent_length(sound, job.num_frames, job.fps) if sound else 0
    sound_noise = None
    if sound and frames:
        sound_noise = initial_noise(0, (1, sound.vocoder_input_dim, frames))
    return Request(
        text_ids=ids, text_mask=mask, neg_text_ids=negative[0], neg_text_mask=negative[1],
        video_shape=shape, fps=np.float32(job.fps), num_inference_steps=job.steps,
        guidance_scale=np.float32(6), sound_frames=frames,
        noise=initial_noise(0, (1, config.transformer.latent_channel, *shape)),
        sound_noise=sound_noise,
        sampler=unipc.tableau(unipc.sigmas("native", job.steps)),
    )  # fmt: skip


def denoise_flops(config: Config, request: Request) -> float:
    """Arithmetic of all steps: matrix products and attention of the media tower, each branch.

    A multiplication and an addition are two. Keys are the media tokens and the prompt's real ones:
    padding, and what a kernel adds, are no work that has to be done.
    """
    model = config.transformer
    width, heads = model.hidden_size, model.num_attention_heads * model.head_dim
    kv_heads = model.num_key_value_heads * model.head_dim
    video = math.prod(transformer.patch_grid(model, request.video_shape))
    tokens = video + request.sound_frames
    a_token = 2 * (width * (2 * heads + 2 * kv_heads) + 3 * width * model.intermediate_size)
    ends = 4 * width * video * model.patch_latent_dim
    ends += 4 * width * request.sound_frames * (model.sound_dim or 0)
    embedding = 2 * width * (2 * TimestepEmbedding.frequencies + width)
    masks = [mask for mask in (request.text_mask, request.neg_text_mask) if mask is not None]
    layers = sum(
        tokens * a_token + 4 * heads * tokens * (tokens + float(mask.sum())) for mask in masks
    )
    once = len(masks) * (ends + embedding)
    return float(request.num_inference_steps * (model.num_hidden_layers * layers + once))


def run_bench(config: Config, params: dict, job: Job, repeats: int = 3) -> dict:
    """Compile and run one job stage by stage.

    Args:
        config: the sizes.
        params: see `random_inputs.random_params`, or a checkpoint's.
        job: what to run.
        repeats: runs of each stage, see `measure.Measure`.

    Returns:
        What `json` can write:

        - `job`: its fields, and `repeats`.
        - `stages`: see `measure.Measure`, by the names of `sampling.stages`; and `one step`, in
          seconds alone: a part of `denoise`; with sound, of a loop of two, to be compared with
          `one step without sound`.
        - `seconds`, `joules`: of the whole job: condition, loop and decoding.
        - `denoise_tflop`, `denoise_tflops_per_second`: counted by `denoise_flops`, and its rate.
        - `weights_gib`, `peak_gib` and `peak_gib_before` (of this process so far and up to this
          job; None where the device does not say), `estimated_gib` (see `memory`).

    Raises:
        ValueError: see `check_job`.
    """
    request = random_request(config, job)
    flops = denoise_flops(config, request)
    peak_before = device_peak_gib()
    measure = Measure(params, config, repeats=repeats, report=_report)
    values = stages.initial_values(jax.device_put(request), decode_chunk_size=job.decode_chunk_size)
    stages.walk(values, measure)
    found = measure.stages
    seconds, joules = ([stage[name] for stage in found.values()] for name in ("seconds", "joules"))
    found["one step"] = {"seconds": found["denoise"]["seconds"] / job.steps}
    if job.sound:
        found["one step"] = _one_step(config, params, job, repeats)
        silent = job.replace(sound=False)
        found["one step without sound"] = _one_step(config, params, silent, repeats)
    dtype = str(transformer.compute_dtype(params["gen"]))
    return {
        "job": describe(job) | {"repeats": repeats},
        "stages": found,
        "seconds": sum(seconds),
        "joules": None if None in joules else sum(joules),
        "denoise_tflop": flops / 1e12,
        "denoise_tflops_per_second": flops / 1e12 / found["denoise"]["seconds"],
        "weights_gib": sum(leaf.nbytes for leaf in jax.tree.leaves(params)) / GIB,
        "peak_gib": device_peak_gib(),
        "peak_gib_before": peak_before,
        "estimated_gib": memory.generation_bytes(config, padded(job, dtype))["peak"] / GIB,
    }


def _report(name: str, found: dict) -> None:
    compiled = found["compile_seconds"]
    print(f"{name}: {found['seconds']:.3f} s, compiled in {compiled:.1f} s", file=sys.stderr)


def _one_step(config: Config, params: dict, job: Job, repeats: int) -> dict:
    """Half of a loop of two steps, in seconds."""
    request = jax.device_put(random_request(config, job.replace(steps=2)))
    measure = Measure(params, config, repeats=repeats)
    before, loop = stages.up_to_the_loop()
    stages.walk(stages.initial_values(request), measure, (*before, loop))
    ran = measure.stages[loop.name]
    return {"seconds": ran["seconds"] / 2, "samples": [s / 2 for s in ran["samples"]]}


COLUMNS = ("seconds", "min..max", "kJ", "TFLOP/s", "temporary GiB", "compile s", "cached s")


def table(name: str, result: dict) -> str:
    """What `bench.run_bench` returns, for people."""
    job = result["job"]
    lines = [
        f"{name}: {job['num_frames']} frames of {job['height']}x{job['width']} at {job['fps']:g} "
        f"fps, {job['steps']} steps, {job['text_tokens']} + {job['negative_tokens']} text tokens"
    ]
    lines.append(
        f"{'':24}{COLUMNS[0]:>9}{COLUMNS[1]:>20}" + "".join(f"{c:>15}" for c in COLUMNS[2:])
    )
    for stage, found in result["stages"].items():
        samples = found.get("samples")
        spread = f"{min(samples):.3f}..{max(samples):.3f}" if samples else "-"
        rate = result["denoise_tflops_per_second"] if stage == "denoise" else None
        joules = found.get("joules")
        cells = (
            None if joules is None else joules / 1e3,
            rate,
            found.get("temporary_gib"),
            found.get("compile_seconds"),
            found.get("compile_seconds_cached"),
        )
        shown = "".join(f"{'-' if cell is None else format(cell, '.3f'):>15}" for cell in cells)
        lines.append(f"  {stage:22}{found['seconds']:9.3f}{spread:>20}{shown}")
    peak = result["peak_gib"]
    peak = "the device does not say" if peak is None else f"{peak:.3f} GiB"
    joules = result["joules"]
    energy = "" if joules is None else f", {joules / 1e3:.3f} kJ"
    lines.append(
        f"  whole job {result['seconds']:.3f} s{energy}; peak memory {peak} "
        f"(estimated {result['estimated_gib']:.3f} GiB)"
    )
    return "\n".join(lines)
