"""The loop over steps: what it starts from, its guided velocity, its steps. Pure functions.

Axes: B batch, S text tokens; latents t frames, h rows, w columns, C channels; s sound frames; K
steps, G branches of guidance.
"""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import einops
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from cosmos3_jax.config import Config
from cosmos3_jax.models.transformer import Condition, Latents, encode_condition, velocity
from cosmos3_jax.parallel import sharding
from cosmos3_jax.sampling import unipc
from cosmos3_jax.sampling.request import AnyArray, Request, draw_noise

# Media tokens up to which both guidance branches run as one batch. Beyond, each fills a GPU alone,
# and one after the other is faster and takes half the memory; measured in benchmarks/NOTES.md.
ONE_BATCH_TOKENS = 32768
CHANNELS_FIRST = {"video": "b t h w c -> b c t h w", "sound": "b s c -> b c s"}


@struct.dataclass
class Steps:
    """Consecutive steps of the loop, stacked on a leading axis K.

    Attributes:
        solver: rows of the tableau.
        weights: float32 [K, G] or [K, G, B], of the branches of guidance: the velocity is the sum
            of theirs, times these.
        noise: fresh unit noise of each step, like the latents, where the tableau asks for any.
    """

    solver: unipc.Tableau
    weights: AnyArray
    noise: Latents | None = None


def all_steps(request: Request) -> Steps:
    """The steps of a request: its tableau, or the one that stands for None, and its guidance.

    Classifier-free guidance (Ho & Salimans, 2022) weighs the prompt by the scale s, the negative
    prompt by 1 - s.
    """
    solver = request.sampler
    if solver is None:
        solver = unipc.tableau(unipc.sigmas("native", request.num_inference_steps))
    xp = jnp if isinstance(request.guidance_scale, jax.Array) else np  # numpy compiles nothing
    scale = xp.asarray(request.guidance_scale, xp.float32)
    weights = [xp.ones_like(scale)]
    if request.neg_text_ids is not None:
        weights = [scale, 1 - scale]
    weights = xp.stack(weights)
    return Steps(solver, xp.broadcast_to(weights, (len(solver.timestep), *weights.shape)))


def encode_conditions(params: dict, request: Request, config: Config) -> list[Condition]:
    """The condition of each branch of guidance: the prompt's and, if there is one, the negative's.

    Where no frame is given, a mask says so: one program of the loop serves with and without.

    Args:
        params: the text tower's.
    """
    batch, (frames, *size) = len(request.text_ids), request.video_shape
    clean = jnp.zeros((batch, frames, *size, config.transformer.latent_channel), jnp.float32)
    given = jnp.zeros((batch, frames), bool)
    if request.clean_latents is not None and request.frame_mask is not None:
        clean = channels_last({"video": request.clean_latents})["video"]
        given = request.frame_mask

    def encode(ids: AnyArray, mask: AnyArray) -> Condition:
        return encode_condition(
            params, config.transformer, ids, mask, video_shape=request.video_shape,
            fps=request.fps, sound_frames=request.sound_frames,
            clean={"video": clean}, given={"video": given},
        )  # fmt: skip

    conditions = [encode(request.text_ids, request.text_mask)]
    if request.neg_text_ids is not None and request.neg_text_mask is not None:
        conditions.append(encode(request.neg_text_ids, request.neg_text_mask))
    return conditions


def start(
    conditions: list[Condition], request: Request, config: Config
) -> tuple[list[Condition], unipc.State]:
    """What the loop starts from: its conditions, and the state that holds the initial latents.

    Where that is faster, the conditions of both guidance branches become one, of batch 2 B; and
    where a mesh divides the branches.
    """
    noise = _divided(conditions[0].keep_given(_initial_latents(request, config)))
    tokens = len(noise["video"]) * conditions[0].rope[0].shape[1]
    if len(conditions) == 2 and is_one_batch(tokens, sharding.mesh_sizes()):
        conditions = [_concatenate(*conditions)]
    # Divided as `advance` leaves it: one program then serves the first step and all others.
    return conditions, _divided(unipc.initial_state(noise))


def is_one_batch(tokens: int, mesh: Mapping[str, int]) -> bool:
    """Whether both guidance branches run as one batch.

    Args:
        tokens: media tokens of all prompts.
        mesh: sizes of the axes of the mesh.
    """
    each = -(-tokens // math.prod(mesh.get(name, 1) for name in ("data", *sharding.TOKENS)))
    return mesh.get("cfg", 1) > 1 or each <= ONE_BATCH_TOKENS


def advance(
    params: dict,
    conditions: list[Condition],
    state: unipc.State,
    steps: Steps,
    *,
    config: Config,
    trajectory: bool = False,
) -> dict:
    """Go on from `state` by these steps.

    Args:
        params: the media tower's.
        conditions: see `start`.
        state: of `start`, or of the steps before these.
        steps: how many there are is static; all else in them is arrays.
        config: the checkpoint's.
        trajectory: whether to keep every step's latents and clean predictions.

    Returns:
        `state` after the last of the steps; its `latents`, and the prediction of the clean latents
        that the step was made with, `clean`, both channels first; and, if asked for, `trajectory`:
        `latents` and `clean` of all steps, stacked on a leading axis.
    """
    keep_given = _first_branch(conditions, len(state.latents["video"])).keep_given

    def view(state: unipc.State) -> dict[str, dict[str, Array]]:
        trees = {"latents": state.latents, "clean": state.clean}
        return {name: channels_first(_divided(keep_given(x))) for name, x in trees.items()}

    state, kept = unipc.advance(
        partial(guided_velocity, params, config, conditions), state, steps.solver, steps.weights,
        noise=steps.noise, collect=view if trajectory else None,
    )  # fmt: skip
    return {"state": _divided(state), **view(state)} | ({"trajectory": kept} if trajectory else {})


def guided_velocity(
    params: dict,
    config: Config,
    conditions: list[Condition],
    latents: Latents,
    timestep: Array,
    weights: Array,
) -> Latents:
    """The velocity of one step: the weighted sum of its branches'; see `Steps` and `start`."""
    branches = []
    for condition in conditions:
        count = len(condition.text_length) // len(latents["video"])
        batch = jax.tree.map(lambda x, count=count: sharding.join(*[x] * count), latents)
        velocities = velocity(params, config.transformer, condition, batch, timestep)
        leaves, tree = jax.tree.flatten(velocities)
        split = [sharding.part(leaf, count) for leaf in leaves]
        branches += [tree.unflatten(branch) for branch in zip(*split, strict=True)]
    return _divided(jax.tree.map(partial(weighted_sum, weights), *branches))


def weighted_sum(weights: Array, *branches: Array) -> Array:
    """sum_k w_k v_k in float32, for weights [G] or [G, B] and branches [B, ...].

    It is taken as the last branch, times the sum of the weights, and the others' differences from
    it. Guided branches are alike and their weights large and of both signs: so little cancels.
    """
    weights = weights.reshape(*weights.shape, *[1] * (branches[0].ndim + 1 - weights.ndim))
    if weights.ndim != branches[0].ndim + 1 or len(weights) != len(branches):
        raise ValueError(f"weights {weights.shape} for {len(branches)} branches")
    *others, last = (branch.astype(jnp.float32) for branch in branches)
    total = jnp.sum(weights, axis=0) * last
    return total + sum(w * (v - last) for w, v in zip(weights, others, strict=False))


def _first_branch(conditions: list[Condition], batch: int) -> Condition:
    """What is given, of one branch: it is the same in all."""
    condition = conditions[0]
    count = len(condition.text_length) // batch
    take = (
        (lambda x: sharding.part(x, count)[0]) if sharding.mesh_sizes() else (lambda x: x[:batch])
    )
    return condition.replace(
        **jax.tree.map(take, {"clean": condition.clean, "given": condition.given})
    )


def _divided(latents: Any) -> Any:
    """Latents, or the sampler's state: each device has its prompts' whole, which is little."""
    return jax.tree.map(
        lambda x: sharding.constrain(x, sharding.PROMPTS, *[None] * (x.ndim - 1)), latents
    )


def channels_first(latents: Latents) -> dict[str, Array]:
    """Latents as they leave the package: `video` [B, C, t, h, w] and, where there is sound, `sound`
    [B, C, s].
    """
    return {name: einops.rearrange(x, CHANNELS_FIRST[name]) for name, x in latents.items()}


def channels_last(latents: Mapping[str, AnyArray]) -> Latents:
    """The inverse of `channels_first`."""
    return {
        name: einops.rearrange(x, " -> ".join(reversed(CHANNELS_FIRST[name].split(" -> "))))
        for name, x in latents.items()
    }


def _concatenate(first: Condition, second: Condition) -> Condition:
    """Two conditions as one batch; the shorter text is padded, which its length masks."""
    longest = max(first.key.shape[2], second.key.shape[2])

    def join(a: Array, b: Array) -> Array:  # [L, B, S, K, H]
        padded = [
            jnp.pad(x, [(0, 0), (0, 0), (0, longest - x.shape[2]), (0, 0), (0, 0)]) for x in (a, b)
        ]
        joined = sharding.join(*padded, axis=1)
        return sharding.constrain(joined, None, sharding.BRANCHES, None, sharding.HEADS, None)

    batched = jax.tree.map(
        sharding.join,
        first.replace(key=None, value=None),
        second.replace(key=None, value=None),
    )
    return batched.replace(key=join(first.key, second.key), value=join(first.value, second.value))


def _initial_latents(request: Request, config: Config) -> Latents:
    """The request's noise, or what its seed draws."""
    batch, model = request.text_ids.shape[0], config.transformer
    shapes: dict[str, tuple[int, ...]] = {"video": (model.latent_channel, *request.video_shape)}
    if request.sound_frames and model.sound_dim:
        shapes["sound"] = (model.sound_dim, request.sound_frames)
    given = {"video": request.noise, "sound": request.sound_noise}
    noise = {
        name: draw_noise(request.seed, batch, shape) if (x := given[name]) is None else x
        for name, shape in shapes.items()
    }
    return channels_last(noise)
