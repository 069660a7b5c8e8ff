"""Whether a generation fits a device, and if not, what would: asked before any long work starts."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from cosmos3_jax.config import Config
from cosmos3_jax.models.attention import check_logits, fused_obstacle
from cosmos3_jax.parallel.mesh import Meshes
from cosmos3_jax.runtime import memory
from cosmos3_jax.runtime.job import Job

PUBLISHED_SIZES = ((720, 1280), (480, 832), (192, 320))
LONG_PROMPT = 2048  # tokens; a longer one is named as what to shorten


class OutOfDeviceMemory(ValueError):
    """A generation does not fit the device. The message says what does."""


def should_offload(config: Config, limit_bytes: int | None, job: Job) -> bool:
    """Whether a generation does not fit the device with all weights on it."""
    if limit_bytes is None:
        return False
    needed = memory.generation_bytes(config, job.replace(offload=False))
    # Logits are left out: offloading does not lessen them.
    needed[memory.STAGES["gen"]] -= memory.LOGIT_COPIES * needed["logits"]
    return max(needed.get(stage, 0) for stage in memory.STAGE_NAMES) > limit_bytes


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
        limit_bytes: see `device.memory_limit`; None checks nothing.
        job: the generation.

    Raises:
        OutOfDeviceMemory: the message names need, limit, stage, and the largest settings that fit.
        ValueError: without a limit, too; see `memory.generation_bytes` and
            `attention.check_logits`.
    """
    needed = memory.generation_bytes(config, job)
    if needed["logits"]:
        head_dim = config.transformer.head_dim
        check_logits(needed["logits"], fused_obstacle(jnp.dtype(job.dtype), head_dim, job.device))
    if limit_bytes is None or needed["peak"] <= limit_bytes:
        return
    stage = max(memory.STAGE_NAMES, key=lambda name: needed.get(name, 0))
    weights = "one part of the weights at a time" if job.offload else "all weights on the device"
    raise OutOfDeviceMemory(
        f"{job} need {_gib(needed['peak'])} of device memory ({stage}, {weights}), and "
        f"JAX may use {_gib(limit_bytes)}. {what_fits(config, limit_bytes, job)}"
    )


@contextmanager
def exhaustion_explained(config: Config, limit_bytes: int | None, job: Job) -> Iterator[None]:
    """Turn JAX's error that the device's memory is exhausted into one like `check_fits`'s.

    It comes in spite of `check_fits` where the limit is not known, or not all of it is free.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        needed = memory.generation_bytes(config, job)["peak"]
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
            return memory.generation_bytes(config, job.replace(**change))["peak"]
        except ValueError:  # a change that no video can have
            return math.inf

    slight = _slight_changes(job)
    offloading = [] if job.offload else [("with offload=True (--offload yes)", {"offload": True})]
    pairs = [[change, *offloading] for change in slight] if offloading else []
    for changes in [*([change] for change in slight + offloading), *pairs]:
        phrase, change = _join(changes)
        if (size := need(**change)) <= limit_bytes:
            return f"It fits {phrase}, which needs {_gib(size)}."
    phrase, all_changes = _join(slight + offloading)
    found = []
    for sizes in (_fewer_videos(job), _fewer_frames(job), _smaller_pictures(job)):
        found += [size for size in sizes if need(**all_changes | size) <= limit_bytes][:1]
    if not found:
        return "Nothing smaller fits either: use a device with more memory."
    listed = ", or ".join(str(job.replace(**size)) for size in found)
    return f"What fits{phrase and ' ' + phrase}: {listed}."


def _join(changes: list[tuple[str, dict]]) -> tuple[str, dict]:
    """Several changes as one."""
    together = {key: value for _, change in changes for key, value in change.items()}
    return " and ".join(phrase for phrase, _ in changes), together


def _slight_changes(job: Job) -> list[tuple[str, dict]]:
    """What could be changed without another video coming out, or hardly: in words, and itself."""
    found = []
    if (job.decode_chunk_size or 1) > 1:
        found.append(("with decode_chunk_size=1", {"decode_chunk_size": 1}))
    if job.trajectory_steps:
        found.append(("without the trajectory", {"trajectory_steps": 0}))
    if job.text_tokens > LONG_PROMPT:
        shorter = {"text_tokens": LONG_PROMPT}
        found.append((f"with prompts of at most {LONG_PROMPT} tokens", shorter))
    return found


def _fewer_videos(job: Job) -> list[dict]:
    return [{"batch": n} for n in range(job.batch - 1, 0, -1)]


def _fewer_frames(job: Job) -> list[dict]:
    fewest = 5 if job.sound else 1
    return [{"num_frames": n} for n in range(job.num_frames - 4, fewest - 1, -4)]


def _smaller_pictures(job: Job) -> list[dict]:
    """The published sizes, upright for an upright video."""
    height, width = job.height, job.width
    smaller = [size for size in PUBLISHED_SIZES if math.prod(size) < height * width]
    names = ("width", "height") if height > width else ("height", "width")
    return [dict(zip(names, size, strict=True)) for size in smaller]


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"
