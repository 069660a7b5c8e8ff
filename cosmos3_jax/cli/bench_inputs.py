"""What the benchmark runs: jobs of named sizes, random weights and random requests.

Random, never zeros: a GPU draws less power on zeros and runs faster than it ever will on a video.
"""

import dataclasses
import math
import os
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from cosmos3_jax.cli.bench_measure import GIB
from cosmos3_jax.config import Config, check_fps
from cosmos3_jax.io.prepare import TEXT_BUCKET
from cosmos3_jax.models import sound_vae, transformer, video_vae
from cosmos3_jax.parallel.device import default_device, memory_limit
from cosmos3_jax.sampling import unipc
from cosmos3_jax.sampling.request import T2VRequest, initial_noise

SIZES = {"256p": (192, 320), "480p": (480, 832), "720p": (720, 1280)}  # height, width
DRAW_VALUES = 2**22  # random values that are drawn at a time: 16 MiB before they are rounded


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One generation to measure, and how often.

    Attributes:
        num_frames, height, width: of the video, in pixels.
        fps: frames per second.
        steps: denoising steps.
        sound: whether sound is denoised and decoded too.
        text_tokens: of the prompt; they are padded as prompts are.
        negative_tokens: of the negative prompt; 0 leaves guidance, the second branch, out.
        decode_chunk_size: latent frames decoded at a time; None chooses by size.
        repeats: runs of each stage; the median counts.
    """

    num_frames: int = 189
    height: int = 720
    width: int = 1280
    fps: float = 24.0
    steps: int = 35
    sound: bool = False
    text_tokens: int = 300
    negative_tokens: int = 300
    decode_chunk_size: int | None = None
    repeats: int = 3

    def check(self, config: Config) -> None:
        """Raise ValueError, naming value and limit, if this job cannot run at these sizes."""
        video_vae.pixel_to_latent_shape(config.video_vae, self.num_frames, self.height, self.width)
        for name in ("steps", "text_tokens", "negative_tokens", "decode_chunk_size", "repeats"):
            value, least = getattr(self, name), 0 if name == "negative_tokens" else 1
            if value is not None and value < least:
                raise ValueError(f"{name}={value} must be at least {least}")
        check_fps(self.fps)
        if self.sound and not config.has_sound:
            raise ValueError("sound is asked for, but these weights have none: leave it out")
        if self.sound and self.num_frames == 1:
            raise ValueError(
                "num_frames=1 makes an image, which has no sound: ask for 5 frames or more"
            )


def jobs(
    config: Config,
    *,
    sizes: str | None = None,
    num_frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    fps: float | None = None,
    steps: int | None = None,
    **settings,
) -> dict[str, Job]:
    """The checked jobs that a command line asks for, by the names of their sizes.

    Smallest first: a device's peak memory never falls, so each size then shows its own.

    Args:
        config: the checkpoint's; what is left None comes from its recipe.
        sizes: names from `SIZES` with commas between them, instead of `height` and `width`.
        num_frames, height, width, fps, steps: see `Job`.
        **settings: the other fields of `Job`.

    Raises:
        ValueError: an unknown size, a size given twice over, or see `Job.check`.
    """
    recipe = config.recipe
    if sizes is None:
        height = recipe.height if height is None else height
        width = recipe.width if width is None else width
        name = next((n for n, size in SIZES.items() if size == (height, width)), None)
        chosen = {name or f"{height}x{width}": (height, width)}
    elif height is not None or width is not None:
        raise ValueError(f"size {sizes} sets height and width: give either those or the size")
    else:
        for name in sizes.split(","):
            if name not in SIZES:
                raise ValueError(f"size {name!r} is unknown; choose from {', '.join(SIZES)}")
        chosen = {name: SIZES[name] for name in sizes.split(",")}
    settings |= {
        "num_frames": recipe.num_frames if num_frames is None else num_frames,
        "fps": recipe.fps if fps is None else fps,
        "steps": recipe.num_inference_steps if steps is None else steps,
    }
    made = {
        name: Job(height=height, width=width, **settings)
        for name, (height, width) in sorted(chosen.items(), key=lambda item: math.prod(item[1]))
    }
    for job in made.values():
        job.check(config)
    return made


def silent(config: Config) -> Config:
    """The same sizes without sound, as a checkpoint is loaded for a video alone."""
    model = dataclasses.replace(config.transformer, sound_gen=False)
    return dataclasses.replace(config, transformer=model, sound_vae=None)


def weight_shapes(config: Config, dtype: jnp.dtype) -> dict:
    """What generation reads, as `jax.ShapeDtypeStruct`s: both towers and the decoders.

    As a checkpoint is loaded: the media tower's layers apart, the timestep embedding in float32
    and all else in `dtype`.
    """
    shapes = dict(transformer.param_shapes(config.transformer))
    shapes["gen"] = jax.eval_shape(transformer.unstack_layers, shapes["gen"])
    shapes["video_vae"] = {"decoder": video_vae.param_shapes(config.video_vae)["decoder"]}
    if config.has_sound:
        shapes["sound_vae"] = sound_vae.param_shapes(config.sound_vae, with_encoder=False)

    def typed(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        kept = any(key.key == "time_embedder" for key in path)
        return jax.ShapeDtypeStruct(leaf.shape, jnp.float32 if kept else dtype)

    return jax.tree.map_with_path(typed, shapes)


def random_params(config: Config, dtype: jnp.dtype) -> dict:
    """Normal weights in the tree of `weight_shapes`, made on the device.

    On a GPU this takes a few lots of `DRAW_VALUES` more than the weights: a device's peak memory
    never resets, and it is to be the generation's.

    Raises:
        ValueError: if the weights alone are more than the device can hold.
    """
    shapes = weight_shapes(config, dtype)
    check_fits(shapes)
    paths, tree = jax.tree.flatten_with_path(shapes)
    return tree.unflatten(
        [_random_leaf(seed, path[-1].key, leaf) for seed, (path, leaf) in enumerate(paths)]
    )


def check_fits(shapes: dict) -> None:
    """Raise ValueError if these leaves cannot be held, before the first of them is made."""
    device = default_device()
    limit = memory_limit()
    if device.platform == "cpu":
        limit = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    needed = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(shapes))
    if limit is not None and needed > limit:
        raise ValueError(
            f"the weights take {needed / GIB:.1f} GiB, {device.device_kind} has "
            f"{limit / GIB:.1f} GiB: use a larger device, --dtype bfloat16 or --checkpoint tiny"
        )


def _random_leaf(seed: int, name: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    """Normal values, `DRAW_VALUES` at a time, each lot rounded and written in place.

    The leading axes are merged into rows, none longer than a lot: a flat index of the largest leaf
    would overflow int32. Lots are drawn in powers of two, so that a few programs draw all leaves.
    """
    mean, spread = (1.0, 0.1) if name == "scale" else (0.0, 0.02)
    shape = leaf.shape
    split = next(i for i in range(len(shape) + 1) if math.prod(shape[i:]) <= DRAW_VALUES)
    rows, width = math.prod(shape[:split]), math.prod(shape[split:])
    lot = min(rows, DRAW_VALUES // width)
    count = 1 << (lot * width - 1).bit_length()
    values = jnp.zeros(shape, leaf.dtype)
    for start in range(0, rows, lot):
        start = min(start, rows - lot)  # the last lot starts where it fits
        drawn = _draw(seed, start, mean, spread, count=count)
        values = _write(values, drawn, start, rows=(rows, width), lot=lot)
    return values


@partial(jax.jit, static_argnames="count")
def _draw(seed: int, start: int, mean: float, spread: float, *, count: int) -> jax.Array:
    key = jax.random.fold_in(jax.random.key(seed), start)
    return mean + spread * jax.random.normal(key, count)


@partial(jax.jit, donate_argnums=0, static_argnames=("rows", "lot"))
def _write(values: jax.Array, drawn: jax.Array, start: int, *, rows: tuple[int, int], lot: int):
    """`values` as `rows` with `drawn` in the `lot` rows from `start` on, in the same buffer."""
    drawn = drawn[: lot * rows[1]].reshape(lot, rows[1]).astype(values.dtype)
    filled = jax.lax.dynamic_update_slice_in_dim(values.reshape(rows), drawn, start, 0)
    return filled.reshape(values.shape)


def random_request(config: Config, job: Job) -> T2VRequest:
    """A request of the job's sizes: random tokens, numpy noise, native schedule, guidance 6.

    Raises:
        ValueError: see `Job.check`.
    """
    job.check(config)
    shape = video_vae.pixel_to_latent_shape(config.video_vae, job.num_frames, job.height, job.width)
    rng = np.random.RandomState(0)

    def tokens(count: int) -> tuple[np.ndarray, np.ndarray]:
        padded = -(-count // TEXT_BUCKET) * TEXT_BUCKET
        ids = rng.randint(0, config.transformer.vocab_size, (1, padded)).astype(np.int32)
        return ids, np.arange(padded)[None] < count

    ids, mask = tokens(job.text_tokens)
    negative = tokens(job.negative_tokens) if job.negative_tokens else (None, None)
    frames = 0
    if job.sound:
        frames = sound_vae.sound_latent_length(config.sound_vae, job.num_frames, job.fps)
    channels, sound_channels = config.transformer.latent_channel, config.transformer.sound_dim
    return T2VRequest(
        text_ids=ids, text_mask=mask, neg_text_ids=negative[0], neg_text_mask=negative[1],
        video_shape=shape, fps=np.float32(job.fps), num_inference_steps=job.steps,
        guidance_scale=np.float32(6), sound_frames=frames,
        noise=initial_noise(0, (1, channels, *shape)),
        sound_noise=initial_noise(0, (1, sound_channels, frames)) if frames else None,
        sampler=unipc.tableau(unipc.sigmas("native", job.steps)),
    )  # fmt: skip
