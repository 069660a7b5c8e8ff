"""Device memory of a generation, by arithmetic: what it needs, whether it fits, and what would.

A generation runs in stages, each a compiled program of its own: the video encoder if pixels are
given, the text tower, the loop over steps, the video decoder, the sound decoder. Weights, inputs
and outputs of a stage are exact; what its program needs beside them was measured on a GPU
(benchmarks/NOTES.md) and is explained here in terms of the model's sizes, within 5% at the three
sizes measured. So a generation that does not fit is refused before any long work starts.
"""

import bisect
import functools
import math
from collections.abc import Generator, Mapping
from contextlib import contextmanager

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from cosmos3_jax.checkpoint.rules import leaf_shapes
from cosmos3_jax.config import Config, check_fps
from cosmos3_jax.models import sound_vae, transformer, video_vae
from cosmos3_jax.models.attention import check_logits, fused_obstacle, logit_bytes
from cosmos3_jax.parallel import device
from cosmos3_jax.parallel.mesh import Meshes
from cosmos3_jax.parallel.sharding import ROWS, TOKENS
from cosmos3_jax.runtime.job import Job
from cosmos3_jax.runtime.words import PARTS
from cosmos3_jax.sampling.denoise import is_one_batch

STAGES = {  # by the part of the weights that they read
    "und": "text stage",
    "gen": "denoising stage",
    "video_vae": "video decoding stage",
    "sound_vae": "sound decoding stage",
}
ENCODING = "video encoding stage"  # before them, of what is given as pixels
STAGEPARTS = (ENCODING, *STAGES.values())
# Where attention is XLA's: logits, their exponentials, and most of a third. Measured, 2.0 to 2.7.
LOGIT_COPIES = 3
GATHERED_LAYERS = 2  # where `fsdp` divides the weights: one that computes, one that arrives
ENCODER_TENSORS = 8  # of the encoder's first stage; measured, 7.8 to 8.0, for one video at a time

PUBLISHED_SIZES = ((720, 1280), (480, 832), (192, 320))
LONG_PROMPT = 2048  # tokens; a longer one is named as what to shorten


# Of what `generation_bytes` names, what there is whatever the device computes with.
ARRAYS = ("condition", "latents", "trajectory", "pixels", "waveform", "clean pixels")


class OutOfDeviceMemory(ValueError):
    """A generation does not fit the device. The message says what does."""


def parameter_counts(config: Config) -> dict[str, int]:
    """Parameters that are loaded, by part: text tower, media tower, the autoencoders."""
    return {
        PARTS[part]: sum(map(math.prod, leaf_shapes(tree).values()))
        for part, tree in _trees(config).items()
    }


@functools.lru_cache
def _trees(config: Config) -> dict[str, dict]:
    """Shapes of all that is loaded. Found by tracing, which takes a second."""
    towers = transformer.param_shapes(config.transformer)
    trees = {"und": towers["und"], "gen": towers["gen"]}
    trees["video_vae"] = video_vae.param_shapes(config.video_vae)
    if config.has_sound:
        trees["sound_vae"] = sound_vae.param_shapes(config.sound_vae, with_encoder=True)
    return trees


def _attention(config: Config, job: Job, shape: tuple, sound_frames: int) -> tuple[int, ...]:
    """Of the media tower on one device: batch, with those branches that are run as one, heads,
    queries and keys.
    """
    mesh = job.mesh
    queries = math.prod(transformer.patch_grid(config.transformer, shape)) + sound_frames
    prompts = -(-job.batch // mesh.get("data", 1))
    as_one = job.guidance and is_one_batch(job.batch * queries, mesh)
    at_once = 2 // mesh.get("cfg", 1) if as_one else 1
    heads = config.transformer.num_attention_heads // ways(mesh, TOKENS)
    return at_once * prompts, heads, queries, queries + job.longest_text


def generation_bytes(config: Config, job: Job) -> dict[str, int]:
    """Memory of one generation on each device in bytes: what needs it, each stage's sum, and the
    `peak`.

    Args:
        config: the checkpoint's, as loaded: the weights of its sound count whether or not the job
            has sound.
        job: on more than one device this is arithmetic alone, and nothing of it was measured.

    Returns:
        `und`, `gen`, `video_vae`[, `sound_vae`]: weights. `condition`, `latents`, `trajectory`,
        `pixels`, `waveform`, `clean pixels`: arrays that go from stage to stage. `logits`: of one
        attention, where no kernel does without. `... work`: what a stage's program needs for
        itself. `... stage`: all that is on the device in it. `peak`: of the stages.

    Raises:
        ValueError: on a size that no video can have.
    """
    itemsize, model, vae = jnp.dtype(job.dtype).itemsize, config.transformer, config.video_vae
    num_frames, height, width, mesh = job.num_frames, job.height, job.width, job.mesh
    shape = video_vae.pixel_to_latent_shape(vae, num_frames, height, width)
    check_fps(job.fps)
    sound = config.sound_vae if job.sound else None
    sound_frames = sound_vae.sound_latent_length(sound, num_frames, job.fps) if sound else 0
    attention = _attention(config, job, shape, sound_frames)
    by_tokens, by_rows = ways(mesh, TOKENS), ways(mesh, ROWS)
    fused = fused_obstacle(jnp.dtype(job.dtype), model.head_dim, job.device) is None
    logits = 0 if fused else logit_bytes(*attention)
    batch = -(-job.batch // mesh.get("data", 1))
    at_once, tokens = attention[0] // batch, batch * -(-attention[2] // by_tokens)
    branches = max(at_once, (1 + job.guidance) // mesh.get("cfg", 1))
    sizes = _weight_bytes(config, itemsize)
    weights = {part: sizes[part] for part in _trees(config)}
    gathered = 0
    if (fsdp := mesh.get("fsdp", 1)) > 1:
        gathered = GATHERED_LAYERS * sizes["media layers"] // model.num_hidden_layers
        weights |= {part: weights[part] // fsdp for part in ("und", "gen")}

    key_value = 2 * model.num_key_value_heads * model.head_dim
    keys_values = (
        itemsize * model.num_hidden_layers * batch * job.longest_text * key_value // by_tokens
    )
    video_latents = 4 * batch * math.prod(shape) * model.latent_channel
    latents = video_latents + 4 * batch * sound_frames * (model.sound_dim or 0)
    condition = keys_values + 4 * tokens * model.head_dim + video_latents
    samples = batch * sound_frames * (sound.samples_per_latent if sound else 0)
    arrays = {
        "condition": branches * condition,
        "latents": latents,
        "trajectory": 2 * job.trajectory_steps * latents,
        "pixels": 4 * 3 * batch * num_frames * height * width // by_rows,
        "waveform": 4 * (sound.dec_out_channels if sound else 0) * samples,
        "clean pixels": 4 * 3 * batch * job.clean_frames * height * width,
        "logits": logits,
    }

    # A token at the end of the SwiGLU: residual, gate and up, their product. On Hopper gate and up
    # are not written: the estimate is too large there by what they take.
    token = itemsize * (model.hidden_size + 3 * model.intermediate_size)
    layer, decoder = sizes["text layers"], sizes["video decoder"]
    chunk = job.decode_chunk_size or video_vae.decode_chunk_size(*shape[1:], job.device)
    frames, chunk = min(vae.scale_factor_temporal, num_frames), min(chunk, shape[0])
    rows = vae.scale_factor_spatial * -(-height // vae.scale_factor_spatial // by_rows)
    pixel_features = itemsize * batch * rows * width // vae.patch_size**2  # of one frame
    last_stage = pixel_features * frames * vae.decoder_base_dim
    first_stage = pixel_features * min(vae.scale_factor_temporal, job.clean_frames) * vae.base_dim
    work = {
        # Tensors of the first stage, one frame or four at a time.
        "video encoding work": ENCODER_TENSORS * first_stage,
        # One layer's weights, and both prompts in it.
        "text work": layer // model.num_hidden_layers + branches * batch * job.longest_text * token,
        # Beside the SwiGLU two more residuals, and one for a branch that waits for the other. Six
        # latents are the sampler's state and its update. As one batch, the branches' conditions
        # are joined, which copies them.
        "denoising work": at_once * tokens * (token + 2 * itemsize * model.hidden_size)
        + (branches - at_once) * tokens * itemsize * model.hidden_size
        + 6 * latents
        + (branches * condition if at_once == 2 else 0)
        + LOGIT_COPIES * logits
        + gathered
        + arrays["trajectory"],
        # The kernels with time folded into their channels, and tensors of the last stage.
        "video decoding work": decoder + (7 + 10 * chunk) * last_stage,
        # Not measured, never the largest: four tensors of the waveform's length.
        "sound decoding work": 4 * itemsize * samples * (sound.dec_dim if sound else 0),
    }
    noise, trajectory = latents, arrays["trajectory"]
    beside = {
        "und": arrays["condition"] + work["text work"],
        "gen": arrays["condition"] + noise + latents + trajectory + work["denoising work"],
    }
    kept = latents + trajectory + arrays["pixels"]
    if job.decode:
        beside["video_vae"] = kept + work["video decoding work"]
    if job.decode and job.sound:
        beside["sound_vae"] = kept + arrays["waveform"] + work["sound decoding work"]

    def held(part: str) -> int:
        return weights[part] if job.offload else sum(weights.values())

    stages = {STAGES[part]: size + held(part) for part, size in beside.items()}
    if job.clean_frames:
        encoding = arrays["clean pixels"] + video_latents + work["video encoding work"]
        stages[ENCODING] = held("video_vae") + encoding
    return weights | arrays | work | stages | {"peak": max(stages.values())}


def ways(mesh: Mapping[str, int], axes: tuple[str, ...]) -> int:
    """Into how many parts these axes of a mesh divide an array."""
    return math.prod(mesh.get(name, 1) for name in axes)


@functools.lru_cache
def _weight_bytes(config: Config, itemsize: int) -> dict[str, int]:
    """Bytes of the weights of each part, and of some of their branches."""
    trees = _trees(config)
    branches = trees | {
        "media layers": {"layers": trees["gen"]["layers"]},
        "text layers": {name: x for name, x in trees["und"].items() if name != "embed"},
        "video decoder": trees["video_vae"]["decoder"],
    }
    return {name: _tree_bytes(tree, itemsize) for name, tree in branches.items()}


def _tree_bytes(tree: dict, itemsize: int) -> int:
    """Bytes of a part's weights; the timestep embedding stays float32."""
    return sum(
        math.prod(shape) * (4 if "time_embedder" in path else itemsize)
        for path, shape in leaf_shapes(tree).items()
    )


def should_offload(config: Config, limit_bytes: int | None, job: Job) -> bool:
    """Whether a generation does not fit the device with all weights on it."""
    if limit_bytes is None:
        return False
    needed = generation_bytes(config, job.replace(offload=False))
    # Logits are left out: offloading does not lessen them.
    needed[STAGES["gen"]] -= LOGIT_COPIES * needed["logits"]
    return max(needed.get(stage, 0) for stage in STAGEPARTS) > limit_bytes


def choose_devices(
    config: Config,
    limit_bytes: int | None,
    asked: Mesh | str | None,
    offload: bool | None,
    job: Job,
) -> tuple[Meshes, bool]:
    """The mesh of devices for a job, and whether to offload.

    Where nobody says: weights whole on each device if that fits, else divided, else offloaded.

    Args:
        config, limit_bytes, job: as in `check_fits`; the job's own mesh and offload are not read.
        asked: the mesh, if somebody says.
        offload: whether to, if somebody says.

    Raises:
        ValueError: the mesh does not fit the devices, the model or the job.
    """
    heads = config.transformer.num_key_value_heads
    whole, divided = (Meshes(asked, heads, shard_weights=shard) for shard in (False, True))
    if offload:
        return whole, True
    for meshes in (whole, divided):
        mesh = meshes.sizes(job.batch, job.guidance)
        if not should_offload(config, limit_bytes, job.replace(mesh=mesh)):
            return meshes, False
    return (whole, True) if offload is None else (divided, False)


def check_fits(config: Config, limit_bytes: int | None, job: Job) -> None:
    """Raise unless a generation fits the device.

    Args:
        config: the checkpoint's.
        limit_bytes: see `device.memory_limit`; None, as on a CPU, judges `ARRAYS` by the host's
            memory, and nothing else.
        job: the generation.

    Raises:
        OutOfDeviceMemory: the message names need, limit, stage, and the largest settings that fit.
        ValueError: without a limit, too; see `generation_bytes` and `attention.check_logits`.
    """
    needed = generation_bytes(config, job)
    if needed["logits"]:
        head_dim = config.transformer.head_dim
        check_logits(needed["logits"], fused_obstacle(jnp.dtype(job.dtype), head_dim, job.device))
    if limit_bytes is None:
        arrays, memory = sum(needed[name] for name in ARRAYS), device.host_memory()
        if memory is not None and arrays > memory:
            raise OutOfDeviceMemory(
                f"{job} need {_gib(arrays)} for latents and pixels alone, and this machine has "
                f"{_gib(memory)}. Take fewer num_frames, a smaller size or fewer prompts"
            )
        return
    if needed["peak"] <= limit_bytes:
        return
    stage = max(STAGEPARTS, key=lambda name: needed.get(name, 0))
    weights = "one part of the weights at a time" if job.offload else "all weights on the device"
    raise OutOfDeviceMemory(
        f"{job} need {_gib(needed['peak'])} of device memory ({stage}, {weights}), and "
        f"JAX may use {_gib(limit_bytes)}. {what_fits(config, limit_bytes, job)}"
    )


@contextmanager
def exhaustion_explained(
    config: Config, limit_bytes: int | None, job: Job
) -> Generator[None, None, None]:
    """Turn JAX's error that the device's memory is exhausted into one like `check_fits`'s.

    It comes in spite of `check_fits` where the limit is not known, or not all of it is free.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not str(error).startswith("RESOURCE_EXHAUSTED:"):  # the status, as XLA puts it
            raise
        needed = generation_bytes(config, job)["peak"]
        less = min(needed, limit_bytes or needed) - 1
        reason = str(error).partition("\n")[0]
        raise OutOfDeviceMemory(
            f"the device ran out of memory, where {job} should need {_gib(needed)} "
            f"({reason}). If another process holds some of it, end that; or take less. "
            f"{what_fits(config, less, job)}"
        ) from error


def what_fits(config: Config, limit_bytes: int, job: Job) -> str:
    """A sentence: what to do to get this video, or the largest settings near it that fit."""

    def need(**change) -> float:
        try:
            return generation_bytes(config, job.replace(**change))["peak"]
        except ValueError:  # a change that no video can have
            return math.inf

    # Without another video coming out, or hardly.
    slight = []
    if (job.decode_chunk_size or 1) > 1:
        slight.append(("with decode_chunk_size=1", {"decode_chunk_size": 1}))
    if job.trajectory_steps:
        slight.append(("without the trajectory", {"trajectory_steps": 0}))
    if job.longest_text > LONG_PROMPT:
        shorter = {"text_tokens": LONG_PROMPT, "negative_tokens": job.guidance * LONG_PROMPT}
        slight.append((f"with prompts of at most {LONG_PROMPT} tokens", shorter))
    offloading = [] if job.offload else [("with offload=True (--offload yes)", {"offload": True})]
    pairs = [_both(change, *offloading) for change in slight if offloading]
    for phrase, change in [*slight, *offloading, *pairs]:
        if (size := need(**change)) <= limit_bytes:
            return f"It fits {phrase}, which needs {_gib(size)}."

    phrase, changes = _both(*slight, *offloading)
    sizes = [size for size in PUBLISHED_SIZES if math.prod(size) < job.height * job.width]
    upright = job.height > job.width
    smaller = (  # ascending
        [{"batch": n} for n in range(1, job.batch)],
        [{"num_frames": n} for n in range(5 if job.sound else 1, job.num_frames, 4)],
        [{"height": b if upright else a, "width": a if upright else b} for a, b in reversed(sizes)],
    )

    def largest(kind: list[dict]) -> dict | None:
        count = bisect.bisect_right(kind, limit_bytes, key=lambda size: need(**changes | size))
        return kind[count - 1] if count else None

    fitting = map(largest, smaller)
    listed = ", or ".join(str(job.replace(**size)) for size in fitting if size is not None)
    if not listed:
        return "Nothing smaller fits either: use a device with more memory."
    return f"What fits{phrase and ' ' + phrase}: {listed}."


def _both(*changes: tuple[str, dict]) -> tuple[str, dict]:
    """Several changes as one."""
    phrases = " and ".join(phrase for phrase, _ in changes)
    return phrases, {key: value for _, change in changes for key, value in change.items()}


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"
