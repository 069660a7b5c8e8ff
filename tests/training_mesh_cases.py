"""What `training/test_training_mesh.py` asks of eight simulated devices, in a process with them.

It prints one JSON object: the result of each case, by its name. `training_mesh_cases.py FOLDER`
keeps states in the folder.
"""

import functools
import json
import math
import re
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from mesh_cases import COLLECTIVE, MODEL, collectives, random_params
from rounding import SEEDS, nudged, relative_l2
from training_run import compiled

from cosmos3_jax.checkpoint import lora
from cosmos3_jax.models.transformer import param_shapes
from cosmos3_jax.parallel import sharding
from cosmos3_jax.parallel.mesh import make_mesh, parse_mesh
from cosmos3_jax.training import flow, placement
from cosmos3_jax.training.checkpoints import Checkpoints
from cosmos3_jax.training.params import join_params, split_params
from cosmos3_jax.training.step import TrainOptions, TrainState, init_state, train_step

EXAMPLES, TEXT, STEPS = 8, 8, 2
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
CASES = {  # mesh, microbatches, whether a LoRA learns
    "data8": ("data=8", 1, False),
    "data4 x fsdp2": ("data=4,fsdp=2", 2, False),
    "data2 x seq2 x fsdp2": ("data=2,seq=2,fsdp=2", 2, False),
    "data4 x fsdp2, LoRA": ("data=4,fsdp=2", 1, True),
}
# All but biases and norms, of both towers, inside the layers and outside.
LEARNS = ["/kernel$", "/embedding$"]


def make_batch() -> flow.Batch:
    """Prompts and weights that differ, sound, and given frames in every second example."""
    random = np.random.RandomState(3)

    def normal(*shape: int) -> np.ndarray:
        return random.standard_normal((EXAMPLES, *shape)).astype(np.float32)

    frame_mask = np.zeros((EXAMPLES, 3), bool)
    frame_mask[::2, 0] = True
    return flow.Batch(
        text_ids=random.randint(0, MODEL.vocab_size, (EXAMPLES, TEXT)).astype(np.int32),
        text_mask=np.arange(TEXT) < 1 + np.arange(EXAMPLES)[:, None],
        video=normal(3, 4, 4, MODEL.latent_channel),
        sound=normal(4, MODEL.sound_dim),
        frame_mask=frame_mask,
        uncond_ids=np.array([3, 1], np.int32),
        uncond_mask=np.ones(2, bool),
        weight=np.linspace(0.5, 2, EXAMPLES, dtype=np.float32),
    )


@functools.cache
def start(with_lora: bool) -> tuple[dict, dict]:
    """What learns and what does not."""
    params = random_params(param_shapes(MODEL))
    if not with_lora:
        return split_params(params, LEARNS)
    adapter = lora.init(jax.random.key(0), MODEL, rank=2)
    random = np.random.RandomState(4)  # B as after training, so that A has a gradient at once
    adapters = {
        name: pair | {"b": np.float32(0.1 * random.standard_normal(pair["b"].shape))}
        for name, pair in adapter.adapters.items()
    }
    return adapter.replace(adapters=adapters), params


def step_of(with_lora: bool, microbatches: int):
    options = TrainOptions(
        levels=flow.NoiseLevels(shift=3.0), weights=flow.LossWeights(sound=0.5), text_dropout=0.3,
        dtype="float32", remat=True, ema_decay=0.9, microbatches=microbatches,
    )  # fmt: skip
    combine = partial(lora.attach, config=MODEL) if with_lora else join_params
    step = partial(train_step, config=MODEL, optimizer=OPTIMIZER, options=options, combine=combine)
    return compiled(step, donate_argnums=0)


def train(with_lora: bool, microbatches: int, mesh=None, change=lambda inputs: inputs):
    """The state after some steps, what they did, their metrics, and the program.

    It is compiled once: a state that came out lying otherwise than it went in would be refused.
    `change` is made to weights and batch.
    """
    learns, frozen, batch = change((*start(with_lora), make_batch()))
    before = learns
    if mesh is not None:
        frozen = sharding.place_params(frozen, mesh)
        batch = placement.place_batch(batch, mesh)
        learns = learns if with_lora else sharding.place_params(learns, mesh)
    init = compiled(partial(init_state, optimizer=OPTIMIZER, ema=True))
    state = init(learns, key=jax.random.key(7))
    step = compiled_step(with_lora, microbatches, mesh, state, frozen, batch)
    metrics = []
    for _ in range(STEPS):
        state, found = step(state, frozen, batch)
        metrics.append({name: float(value) for name, value in found.items()})
    return state, moved(state, before), metrics, step.as_text()


PROGRAMS = {}


def compiled_step(with_lora: bool, microbatches: int, mesh, *arguments):
    key = with_lora, microbatches, mesh
    if key not in PROGRAMS:
        PROGRAMS[key] = step_of(with_lora, microbatches).lower(*arguments).compile()
    return PROGRAMS[key]


def moved(state: TrainState, before) -> dict:
    """What a run has done: by how far weights and averages moved, and the optimizer's state."""

    def change(tree) -> dict:
        return jax.tree.map(lambda new, old: np.asarray(new) - np.asarray(old), tree, before)

    moments = state.opt_state[1][0]
    mu, nu = (jax.tree.map(np.asarray, x) for x in (moments.mu, moments.nu))
    return {"params": change(state.params), "ema": change(state.ema), "mu": mu, "nu": nu}


def largest(ours, expected) -> float:
    errors = jax.tree.map(lambda a, b: relative_l2(a, b) if b.any() else 0.0, ours, expected)
    return float(np.max(jax.tree.leaves(errors)))


def sensitivity(with_lora: bool, done: dict, metrics: list) -> dict:
    """How far each part of a run's result moves if every input moves by one unit."""
    found = []
    for seed in SEEDS:
        change = functools.partial(nudged, seed=seed)
        _, other, others, _ = train(with_lora, 1, change=change)
        parts = {part: largest(other[part], done[part]) for part in done}
        found.append(parts | {"metrics": largest(*jax.tree.map(np.float64, (others, metrics)))})
    return {part: float(np.max([x[part] for x in found])) for part in found[0]}


def grouped(text: str) -> list[dict]:
    """The collectives of a program, each with how many devices take part together."""
    sizes = [_group(line) for line in text.splitlines() if COLLECTIVE.search(line)]
    return [x | {"group": n} for x, n in zip(collectives(text), sizes, strict=True)]


def _group(line: str) -> int:
    """In any of XLA's notations. Of a permutation, how many neighbours it stays within."""
    if lists := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return len(lists[1].split(","))
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(iota[1])
    if named := re.search(r"replica_groups=mesh\[(.*?)\].*?\{('.*?)\}", line):
        axes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        return math.prod(int(axes[name]) for name in re.findall(r"'(\w+)'", named[2]))
    pairs = re.findall(r"\{(\d+),(\d+)\}", line.partition("source_target_pairs=")[2])
    return next(n for n in (1, 2, 4, 8) if all(int(a) // n == int(b) // n for a, b in pairs))


def share(tree) -> float:
    """The part of all numbers that one device holds."""
    leaves = jax.tree.leaves(tree)
    return sum(x.addressable_shards[0].data.size for x in leaves) / sum(x.size for x in leaves)


def restored(state: TrainState, folder: Path) -> dict:
    """A state read onto another mesh, and onto one device: does it lie there, is it the same?

    Of its weights and Adam's moments those of one tower's MLPs, for orbax compiles something for
    each leaf.
    """
    moments = state.opt_state[1][0]
    params, mu = (
        {"gen": {"layers": {"mlp": x["gen"]["layers"]["mlp"]}}} for x in (state.params, moments.mu)
    )
    state = state.replace(params=params, opt_state=(moments._replace(mu=mu, nu=None),), ema=None)
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(state)
        other = make_mesh(parse_mesh("data=2,fsdp=4"))
        template = placement.state_template(jax.eval_shape(lambda x: x, state), other)
        found = {"other": checkpoints.restore(template)}
        one = jax.tree.map(lambda x: jax.device_put(x, jax.devices()[0]), state)
        found["one"] = checkpoints.restore(one)
        placed = jax.tree.map(lambda x, like: x.sharding == like.sharding, found["other"], template)
    equal = {name: are_equal(x, state) for name, x in found.items()}
    return {"equal": equal, "placed": all(jax.tree.leaves(placed)), "held": share(
        found["other"].params)}  # fmt: skip


def are_equal(ours, theirs) -> bool:
    """Whether two states have the same numbers, wherever they lie."""
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    return all(np.array_equal(*map(np.asarray, map(_numbers, pair))) for pair in pairs)


def _numbers(x: jax.Array) -> jax.Array:
    return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x


def main(folder: Path) -> dict:
    results, alone = {"sensitivity": {}}, {}
    for name, (mesh_name, microbatches, with_lora) in CASES.items():
        if with_lora not in alone:
            _, done, metrics, _ = train(with_lora, 1)
            alone[with_lora] = done, metrics
            kind = "LoRA" if with_lora else "all weights"
            results["sensitivity"][kind] = sensitivity(with_lora, done, metrics)
        theirs, expected_metrics = alone[with_lora]
        mesh = make_mesh(parse_mesh(mesh_name))
        with jax.set_mesh(mesh):
            state, ours, metrics, text = train(with_lora, microbatches, mesh)
        results[name] = {
            "errors": {part: largest(ours[part], theirs[part]) for part in theirs},
            "metrics": metrics,
            "expected_metrics": expected_metrics,
            "collectives": grouped(text),
            "held": {part: share(getattr(state, part)) for part in ("params", "opt_state", "ema")},
            "batch": share(placement.place_batch(make_batch(), mesh).video),
        }
        if name == "data4 x fsdp2":
            results["restored"] = restored(state, folder)
    return results


if __name__ == "__main__":
    found = main(Path(sys.argv[1]))
    json.dump(found, sys.stdout)
