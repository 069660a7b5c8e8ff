"""Clips of prompts, seeds and settings, and the guided velocity along their trajectories: what
`quality.py` compares.

Axes: B clips, T frames, H rows, W columns, C channels, S samples; K steps, G branches of guidance.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from benchmarks import quality_measures as measures
from benchmarks.quality_measures import Clip, Marks
from cosmos3_jax import Cosmos3, Request
from cosmos3_jax.models.transformer import Condition, Latents
from cosmos3_jax.runtime import programs
from cosmos3_jax.sampling import denoise, stages, unipc
from examples.tiny import grammar, world
from examples.tiny.scenes import Scene


class Clips(NamedTuple):
    """What was made: final latents, channels first, uint8 [B, T, H, W, 3] and float [B, C, S]."""

    latents: dict[str, np.ndarray]
    video: np.ndarray
    sound: np.ndarray | None

    def clip(self, i: int) -> Clip:
        return Clip(self.video[i], None if self.sound is None else self.sound[i])

    def first(self, count: int) -> "Clips":
        return jax.tree.map(lambda x: x[:count], self)


class Inputs(NamedTuple):
    """What the clips are of: as many prompts, seeds and, for I2V, images; scenes, if judged."""

    prompts: list[str]
    seeds: list[int]
    images: list[np.ndarray] | None = None
    scenes: list[Scene] | None = None

    def first(self, count: int) -> "Inputs":
        return Inputs(*(x if x is None else x[:count] for x in self))


# Making clips
# --------------------------------------------------------------------------------------------------


def requests(model: Cosmos3, inputs: Inputs, batch: int, **settings) -> Iterator[Request]:
    """A request for each batch; the last one is filled up, so that one program serves all."""
    count = len(inputs.prompts)
    for start in range(0, count, batch):
        chosen = [min(i, count - 1) for i in range(start, start + batch)]
        given = {"image": [inputs.images[i] for i in chosen]} if inputs.images else {}
        yield model.prepare(
            [inputs.prompts[i] for i in chosen],
            seed=[inputs.seeds[i] for i in chosen], **given | settings,
        )  # fmt: skip


def generate(model: Cosmos3, inputs: Inputs, batch: int, **settings) -> Clips:
    """A clip for each input."""
    made = []
    for request in requests(model, inputs, batch, **settings):
        latents, _ = model.denoise(request, progress=False)
        shown = model.decode(latents)
        made.append(jax.device_get((latents, _pixels(shown["video"]), shown.get("sound"))))
    clips = Clips(*jax.tree.map(lambda *parts: np.concatenate(parts), *made))
    return clips.first(len(inputs.prompts))


@jax.jit
def _pixels(video: Array) -> Array:
    return jnp.round(255 * jnp.clip(jnp.moveaxis(video, 1, -1), 0, 1)).astype(jnp.uint8)


def compare(
    a: Clips,
    b: Clips,
    scenes: Sequence[Scene] | None = None,
    pool: Executor | None = None,
    lpips: Callable[[Clip, Clip], float] | None = None,
) -> dict[str, list]:
    """Every measure of every clip; see `measures.compare`. `marks` are the judge's of b."""
    count = len(a.video)
    pairs = [a.clip(i) for i in range(count)], [b.clip(i) for i in range(count)]
    each = map if pool is None else partial(pool.map, chunksize=2)
    found = list(each(measures.compare, *pairs, scenes if scenes is not None else [None] * count))
    names = {"video": "latents", "sound": "sound_latents"}
    clips: dict[str, list] = {
        names[name]: measures.relative_l2(a.latents[name], b.latents[name]).tolist()
        for name in a.latents
    }
    clips |= {name: [one[name] for one in found] for name in found[0]}
    if lpips is not None:
        clips["lpips"] = [lpips(*pair) for pair in zip(*pairs, strict=True)]
    return clips


def judge(scenes: Sequence[Scene], clips: Clips, pool: Executor | None = None) -> list[Marks]:
    """What the judge says of each clip."""
    made = [clips.clip(i) for i in range(len(scenes))]
    return list(
        map(measures.marks, scenes, made)
        if pool is None
        else pool.map(measures.marks, scenes, made, chunksize=2)
    )


def summarise(clips: dict[str, list], marks_of_a: list[Marks] | None = None) -> dict[str, Any]:
    """Of the clips of `compare`, each measure's `measures.summary`, and the judge's differences."""
    found: dict[str, Any] = {
        name: measures.summary(clips[name], worst)
        for name, worst in measures.WORST.items()
        if name in clips
    }
    if marks_of_a is not None and "marks" in clips:
        found["judge"] = measures.judged(marks_of_a, clips["marks"])
    return found


# Velocities
# --------------------------------------------------------------------------------------------------


class Start(NamedTuple):
    """What the loop over steps starts from, and its steps."""

    conditions: list[Condition]
    state: unipc.State
    rows: list[unipc.Tableau]
    weights: np.ndarray  # [K, G, ...]


def begin(model: Cosmos3, request: Request) -> Start:
    """Run the stages before the loop."""
    before, _ = stages.up_to_the_loop()
    values = stages.initial_values(request, output="latents")
    values = stages.walk(values, programs.Run(model.weights, model.config), before)
    steps = values["steps"]
    return Start(
        values["conditions"], values["state"], list(unipc.rows(steps.solver)),
        np.asarray(steps.weights),
    )  # fmt: skip


_velocity = jax.jit(denoise.guided_velocity, static_argnames=("config",))


def velocity(model: Cosmos3, start: Start, latents: Latents, k: int, timestep: Any) -> Latents:
    """The guided velocity at these latents, weighted as in step k."""
    with model.weights.borrow("gen") as params:
        weights = start.weights[min(k, len(start.weights) - 1)]
        return _velocity(
            params, conditions=start.conditions, latents=latents, timestep=timestep,
            weights=weights, config=model.config,
        )  # fmt: skip


@jax.jit
def solve(state: unipc.State, made: Latents, row: unipc.Tableau) -> unipc.State:
    """A step of the solver with a velocity that is there."""
    return unipc.step(lambda *_: made, state, row)


class Point(NamedTuple):
    """A step of a trajectory: latents before it, the timestep, and the guided velocity."""

    latents: Latents
    timestep: np.ndarray
    velocity: Latents


def trajectory(model: Cosmos3, request: Request) -> list[Point]:
    """Every step of a request, on the host."""
    start = begin(model, request)
    state, points = start.state, []
    for k, row in enumerate(start.rows):
        made = velocity(model, start, state.latents, k, row.timestep)
        points.append(jax.device_get(Point(state.latents, row.timestep, made)))
        state = solve(state, made, row)
    return points


def velocity_errors(points: Sequence[Point], model: Cosmos3, request: Request) -> dict[str, list]:
    """Relative L2 of a model's velocity along another's trajectory: of each step, the mean over
    clips, by modality.
    """
    start, found = begin(model, request), []
    for k, point in enumerate(points):
        made = velocity(model, start, point.latents, k, point.timestep)
        found.append({
            name: float(np.mean(measures.relative_l2(point.velocity[name], np.asarray(x))))
            for name, x in made.items()
        })  # fmt: skip
    return {name: [one[name] for one in found] for name in found[0]}


def sentences_of_tiny(count: int, seed: int, mode: str) -> Inputs:
    """Held-out sentences, and in `i2v` the first frames of true clips of them."""
    scenes, texts = zip(*grammar.held_out_sentences(count), strict=True)
    images = None
    if mode == "i2v":
        images = [world.render(scene, frames=1)[0][0] for scene in scenes]
    return Inputs(list(texts), [seed + i for i in range(count)], images, list(scenes))
