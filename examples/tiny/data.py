"""Training examples of the towers: a bank of encoded clips on the device, with several sentences
each.

A clip is encoded slower than it is learned from, so all are encoded once, at first, and drawn
again and again; each time with another phrasing of its sentence and other noise. Token ids come
from the functions that generation itself uses.

Axes: B batch, N clips, P phrasings, S text tokens; latents t frames, h rows, w columns, C channels;
s sound frames.
"""

import hashlib
import json
import multiprocessing
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from cosmos3_jax.checkpoint import load
from cosmos3_jax.checkpoint.find import open_folder
from cosmos3_jax.checkpoint.load import TOKENIZER_FOLDER
from cosmos3_jax.config import Config, Recipe
from cosmos3_jax.io.prompt import Tokenizer, encode_prompts, pad_token_ids, resolve_prompts
from cosmos3_jax.models import sound_vae, video_vae
from cosmos3_jax.training.flow import Batch
from examples.tiny import grammar, model, world
from examples.tiny.scenes import Scene

BANK_FILE = "bank.json"
CHUNK = 256  # clips that are made and encoded at a time
PHRASINGS = 4
# Shares of examples whose first latent frame is given, or the first two: what an image and a clip
# give. Latents of a beginning are the beginning of the latents.
GIVEN_ONE, GIVEN_TWO = 0.10, 0.05
# Of the examples without a prompt, the share that has the negative prompt of diffusers' style.
OTHER_NEGATIVE = 0.25


@struct.dataclass
class Bank:
    """Encoded clips.

    Attributes:
        video: float16 [N, t, h, w, C], normalised. sound: float16 [N, s, C_sound].
        ids: int16 [N, P, S]. lengths: int16 [N, P], how many of the S are real.
        count: int32, how many of the N are there.
    """

    video: Array
    sound: Array
    ids: Array
    lengths: Array
    count: Array


# Sentences
# --------------------------------------------------------------------------------------------------


def prompt_ids(
    tokenizer: Tokenizer, recipe: Recipe, sentence: str, style: str = "native"
) -> tuple[list[int], list[int]]:
    """Ids of a sentence and of the recipe's negative prompt, as `Cosmos3.prepare` makes them; in
    diffusers' style without a system prompt, as our `model_index.json` has it.
    """
    resolved = resolve_prompts(
        sentence, recipe.negative_prompt, style=style, num_frames=recipe.num_frames,
        height=recipe.height, width=recipe.width, fps=recipe.fps, system_prompt="",
    )  # fmt: skip
    return encode_prompts(tokenizer, resolved)


def pad_ids(rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """ids int16 [N, MAX_TOKENS] and lengths int16 [N]. Raises ValueError if one is longer."""
    lengths = np.array([len(row) for row in rows], np.int16)
    if lengths.max() > model.MAX_TOKENS:
        raise ValueError(f"a prompt has {lengths.max()} tokens, the limit is {model.MAX_TOKENS}")
    ids, _ = pad_token_ids(rows, model.MAX_TOKENS)
    return ids.astype(np.int16), lengths


def negative_ids(tokenizer: Tokenizer, recipe: Recipe) -> tuple[np.ndarray, np.ndarray]:
    """What stands for no prompt, [2, S]: the native style's negative prompt, and diffusers'."""
    both = [prompt_ids(tokenizer, recipe, "", style)[1] for style in ("native", "diffusers")]
    return pad_ids(both)


def make_clips(
    folder: str, recipe: Recipe, seed: tuple[int, ...], size: int
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Scenes of training for `world.render_batch`, and the ids and lengths of their sentences."""
    rng = np.random.default_rng(seed)
    scenes = [grammar.sample(rng) for _ in range(size)]
    return world.stack(scenes), *_phrasings(folder, recipe, scenes, rng)


def _phrasings(
    folder: str, recipe: Recipe, scenes: list[Scene], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    tokenizer = _tokenizer(folder)
    rows = [
        prompt_ids(tokenizer, recipe, grammar.sentence(scene, rng))[0]
        for scene in scenes
        for _ in range(PHRASINGS)
    ]
    ids, lengths = pad_ids(rows)
    return ids.reshape(len(scenes), PHRASINGS, -1), lengths.reshape(len(scenes), PHRASINGS)


@cache
def _tokenizer(folder: str) -> Tokenizer:
    return Tokenizer.from_folder(folder)


# Processes for what the host does
# --------------------------------------------------------------------------------------------------


def processes(count: int) -> ProcessPoolExecutor:
    """Workers that never touch the accelerator, whatever the parent process runs on."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(count, context, initializer=_stay_on_host)


def _stay_on_host() -> None:
    jax.config.update("jax_platforms", "cpu")


# The bank
# --------------------------------------------------------------------------------------------------


@partial(jax.jit, static_argnames=("config", "dtype"))
def encode_clips(
    vaes: dict, scenes: dict[str, Array], config: Config, dtype: str
) -> tuple[Array, Array]:
    """Draw clips and encode them as the pipeline does: normalised latents, channels last."""
    recipe = config.recipe
    videos, sounds = world.render_batch(scenes, recipe.num_frames, recipe.fps, recipe.height)
    pieces = (recipe.num_frames - 1) // config.video_vae.scale_factor_temporal
    video = video_vae.encode(
        vaes["video_vae"], config.video_vae, jnp.moveaxis(videos, -1, 1), chunk_size=pieces,
        dtype=dtype,
    )  # fmt: skip
    sound = sound_vae.encode(vaes["sound_vae"], config.sound_vae, sounds, dtype=jnp.dtype(dtype))
    return video, sound


def build_bank(
    base: str | Path,
    vaes: dict,
    count: int,
    *,
    seed: int = 0,
    seconds: float = float("inf"),
    chunk: int = CHUNK,
    dtype: str = "bfloat16",
    pool: Executor | None = None,
) -> Bank:
    """Draw and encode clips until there are `count`, or the time is over; prints how fast.

    Args:
        base: a checkpoint, for its tokenizer and recipe.
        vaes: parameters `{"video_vae", "sound_vae"}` with encoders.
        count: a multiple of `chunk`, or rounded up to one.
        seed: the first clips of one seed are the same whatever the count.
        seconds: to stop after, when at least one chunk is there.
        chunk: clips at a time.
        dtype: that the encoders compute in.
        pool: processes that make scenes and sentences; None makes them here.
    """
    config, _ = open_folder(Path(base))
    chunks = -(-count // chunk)
    made = _ahead(pool, _arguments(base, config.recipe, seed, chunk, chunks))
    bank, start, compiled = None, time.monotonic(), 0.0
    for i, (scenes, ids, lengths) in enumerate(made):
        video, sound = encode_clips(vaes, scenes, config, dtype)
        part = [video.astype(jnp.float16), sound.astype(jnp.float16), ids, lengths]
        if bank is None:
            bank = [jnp.zeros((chunks * chunk, *x.shape[1:]), x.dtype) for x in part]
        bank = _put(bank, part, i * chunk)
        if i % 16 == 0 or i == chunks - 1:
            jax.block_until_ready(bank)
            elapsed = time.monotonic() - start
            compiled = compiled or elapsed
            rate = i * chunk / max(elapsed - compiled, 1e-9)
            print(
                f"bank: {(i + 1) * chunk} clips, {elapsed:.0f} s, {rate:.0f} a second", flush=True
            )
            if elapsed > seconds:
                break
    return Bank(*bank, count=jnp.int32((i + 1) * chunk))


def encode_scenes(
    base: Path,
    config: Config,
    vaes: dict,
    scenes: list[Scene],
    rng: np.random.Generator,
    chunk: int,
    dtype: str,
) -> Bank:
    """A small bank of the scenes that are given."""
    ids, lengths = _phrasings(str(base / TOKENIZER_FOLDER), config.recipe, scenes, rng)
    padded = scenes + scenes[-1:] * (-len(scenes) % chunk)  # one program for all
    parts = [
        encode_clips(vaes, world.stack(padded[at : at + chunk]), config, dtype)
        for at in range(0, len(padded), chunk)
    ]
    video, sound = (jnp.concatenate(each)[: len(scenes)] for each in zip(*parts, strict=True))
    ids, lengths = jnp.asarray(ids), jnp.asarray(lengths)
    return Bank(video, sound, ids, lengths, jnp.int32(len(scenes)))


def _arguments(
    base: str | Path, recipe: Recipe, seed: int, chunk: int, chunks: int
) -> Iterator[tuple]:
    folder = str(Path(base) / TOKENIZER_FOLDER)
    return ((folder, recipe, (seed, i), chunk) for i in range(chunks))


def _ahead(pool: Executor | None, arguments: Iterator[tuple], depth: int = 48) -> Iterator[tuple]:
    """`make_clips` of each, in order, some of them ahead of time."""
    if pool is None:
        yield from (make_clips(*each) for each in arguments)
        return
    waiting: deque = deque()
    try:
        for each in arguments:
            waiting.append(pool.submit(make_clips, *each))
            if len(waiting) == depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


@partial(jax.jit, donate_argnums=0)
def _put(bank: list[Array], part: list[Array], at: Array) -> list[Array]:
    return [
        jax.lax.dynamic_update_slice_in_dim(whole, piece, at, axis=0)
        for whole, piece in zip(bank, part, strict=True)
    ]


def get_bank(
    base: Path, folder: Path, vaes: dict, count: int, *, pool: Executor | None = None, **options
) -> Bank:
    """The bank in a folder, if it was made so of these autoencoders; or made now, and kept there.

    Args as for `build_bank`.
    """
    about = {"of": digest(base), "asked": count, **options}
    bank = load_bank(folder, about)
    if bank is None:
        bank = build_bank(base, vaes, count, pool=pool, **options)
        save_bank(bank, folder, about)
    return bank


def digest(base: Path) -> str:
    """Of all that examples are made with: autoencoders, tokenizer and recipe."""
    found = hashlib.sha256()
    for name in ("vae", "sound_tokenizer", TOKENIZER_FOLDER, load.RECIPE_FILE):
        for path in sorted((base / name).rglob("*")) or [base / name]:
            found.update(path.read_bytes() if path.is_file() else b"")
    return found.hexdigest()


def load_vaes(base: Path, dtype: str) -> dict:
    """Parameters of both autoencoders, with their encoders."""
    components = load.open_components(base, load.load_config(base))
    return load.load_params(components, jnp.dtype(dtype), parts=("video_vae", "sound_vae"))


def save_bank(bank: Bank, folder: Path, about: dict) -> None:
    """Write a bank, and what it is of; `load_bank` finds it again."""
    folder.mkdir(parents=True, exist_ok=True)
    count = int(bank.count)
    for name in ("video", "sound", "ids", "lengths"):
        np.save(folder / f"{name}.npy", np.asarray(getattr(bank, name))[:count])
    (folder / BANK_FILE).write_text(json.dumps(about | {"count": count}))  # last: now it is whole


def load_bank(folder: Path, about: dict) -> Bank | None:
    """The bank in a folder, or None if there is none of that description."""
    path = folder / BANK_FILE
    if not path.is_file():
        return None
    found = json.loads(path.read_text())
    count = found.pop("count")
    if found != json.loads(json.dumps(about)):
        return None
    arrays = [np.load(folder / f"{name}.npy") for name in ("video", "sound", "ids", "lengths")]
    return Bank(*map(jnp.asarray, arrays), count=jnp.int32(count))


def draw_batch(bank: Bank, negatives: tuple[Array, Array], key: Array, size: int, fps) -> Batch:
    """`size` examples, with replacement: a phrasing each, and for some a given beginning.

    Args:
        bank: clips.
        negatives: see `negative_ids`.
        key: all randomness comes from it.
        size: B.
        fps: of the clips.
    """
    for_clip, for_phrasing, for_given, for_negative = jax.random.split(key, 4)
    chosen = jax.random.randint(for_clip, (size,), 0, bank.count)
    phrasing = jax.random.randint(for_phrasing, (size,), 0, bank.ids.shape[1])
    ids, lengths = bank.ids[chosen, phrasing], bank.lengths[chosen, phrasing]
    other = jax.random.bernoulli(for_negative, OTHER_NEGATIVE, (size,)).astype(jnp.int32)
    uncond_ids, uncond_lengths = (x[other] for x in negatives)
    u = jax.random.uniform(for_given, (size,))
    given = jnp.where(u < GIVEN_TWO, 2, jnp.where(u < GIVEN_ONE + GIVEN_TWO, 1, 0))
    video = bank.video[chosen]
    return Batch(
        text_ids=ids.astype(jnp.int32),
        text_mask=_mask(ids, lengths),
        video=video,
        sound=bank.sound[chosen],
        fps=jnp.float32(fps),
        frame_mask=jnp.arange(video.shape[1]) < given[:, None],
        uncond_ids=uncond_ids.astype(jnp.int32),
        uncond_mask=_mask(uncond_ids, uncond_lengths),
    )


def _mask(ids: Array, lengths: Array) -> Array:
    return jnp.arange(ids.shape[-1]) < lengths[:, None]
