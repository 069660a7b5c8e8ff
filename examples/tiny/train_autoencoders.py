"""Train an autoencoder of the tiny world, on clips that are drawn as they are needed.

    python -m examples.tiny.train_autoencoders --what video|sound --out FOLDER
        [--steps N] [--batch B] [--seed S] [--learning-rate R] [--kl W]
        [--dtype bfloat16|float32] [--algorithm muon|adam] [--clips 200]

FOLDER gets log.jsonl (losses and seconds), state.msgpack (a killed run goes on from there), and at
the end the weights in the public layout, report.json and a sheet of reconstructions. The video
autoencoder learns single pictures first, then parts of clips.

Axes: B batch, P scenes in the pool.
"""

import argparse
import dataclasses
import json
import time
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import serialization

from cosmos3_jax import guard
from cosmos3_jax.checkpoint import publish
from cosmos3_jax.training import autoencoders as ae
from cosmos3_jax.training import records
from examples.tiny import autoencoder_check, grammar, optimizers, running, world
from examples.tiny.autoencoder_models import AUTOENCODERS, Autoencoder, read_public, write_public

ADAM_SHARE = 1 / 3  # of the learning rate, for biases, scales and snakes
STATE_FILE, LOG_FILE, REPORT_FILE = "state.msgpack", "log.jsonl", "report.json"
State = dict[str, Any]
DEFAULTS = {
    "video": {
        "steps": 2000, "batch": 16, "learning_rate": 3e-3, "kl": 1e-4, "dtype": "bfloat16",
        "algorithm": "muon",
    },
    "sound": {
        "steps": 3000, "batch": 32, "learning_rate": 1e-3, "kl": 1e-3, "dtype": "bfloat16",
        "algorithm": "adam",
    },
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run is: with the same values, the same numbers.

    Attributes:
        steps: in all, the same number for each of the model's `lengths`.
        batch: clips of the last length; of shorter ones, as many as hold as much.
        learning_rate: the peak, after a twentieth of the steps; it falls to a hundredth (cosine).
        kl: the weight of the KL divergence, reached after a fifth of the steps: the more, the less
            noise in the latents matters, and the less exact is what comes back.
        dtype: of both passes. Parameters and optimizer are float32.
        algorithm: "muon" or "adam", see `optimizers`.
        pool: scenes that are made at first, and drawn from.
        every, save_every: steps from one line of the log, and one saved state, to the next.
    """

    what: str
    steps: int
    batch: int
    learning_rate: float
    kl: float
    dtype: str
    algorithm: str = "muon"
    seed: int = 0
    ema_decay: float = 0.999
    pool: int = 16_384
    every: int = 50
    save_every: int = 500


def optimizer(run: Run) -> optax.GradientTransformation:
    warmup = max(run.steps // 20, 1)
    rate = optax.warmup_cosine_decay_schedule(
        0.0, run.learning_rate, warmup, max(run.steps, warmup + 1), run.learning_rate / 100
    )
    algorithms = {
        "muon": partial(optimizers.optimizer, adam_share=ADAM_SHARE),
        "adam": optimizers.adam,
    }
    return algorithms[run.algorithm](rate)


def init_state(run: Run, model: Autoencoder) -> State:
    params = model.init(model.config, jax.random.key(run.seed))
    opt = optimizer(run).init(params)
    ema = jax.tree.map(jnp.copy, params)  # a buffer of its own: steps take theirs over
    return {"step": jnp.zeros((), jnp.int32), "params": params, "ema": ema, "opt": opt}


@partial(jax.jit, static_argnames=("run", "model", "length", "batch"), donate_argnums=0)
def train_step(
    state: State, pool: dict, run: Run, model: Autoencoder, length: int, batch: int
) -> tuple[State, dict]:
    """One step on clips that follow from the run's seed and the step's number."""
    key = jax.random.fold_in(jax.random.key(run.seed), state["step"])
    pool_key, clip_key, noise_key = jax.random.split(key, 3)
    chosen = jax.random.randint(pool_key, (batch,), 0, len(pool["radius"]))
    clips = model.clips(jax.tree.map(lambda x: x[chosen], pool), clip_key, length)

    # At first nothing is decoded yet that would hold against the pull towards empty latents.
    ramp = jnp.minimum(state["step"] / (0.2 * run.steps), 1.0)
    options = {"weights": model.weights(kl=run.kl * ramp), "dtype": jnp.dtype(run.dtype)}

    def loss(params):
        return model.loss(params, model.config, clips, noise_key, **options)

    (value, parts), gradient = jax.value_and_grad(loss, has_aux=True)(state["params"])
    updates, opt = optimizer(run).update(gradient, state["opt"], state["params"])
    params = optax.apply_updates(state["params"], updates)
    step = state["step"] + 1
    decay = jnp.minimum(run.ema_decay, (1 + step) / (10 + step))
    ema = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, state["ema"], params)
    log = {"loss": value, "gradient_norm": optax.global_norm(gradient)} | parts
    return {"step": step, "params": params, "ema": ema, "opt": opt}, log


def scene_pool(seed: int, count: int) -> dict[str, np.ndarray]:
    """Scenes of training, stacked: [P, ...] each."""
    return world.stack(grammar.training_batch(np.random.default_rng(seed), count)[0])


def train(run: Run, model: Autoencoder, out: Path) -> State:
    """Train, or go on training, until all steps are taken.

    Raises ValueError if `out` holds the state of another run.
    """
    out.mkdir(parents=True, exist_ok=True)
    state = restore(out, run, init_state(run, model))
    step = int(state["step"])
    lines = (out / LOG_FILE).read_text().splitlines() if (out / LOG_FILE).is_file() else []
    lines = [line for line in lines if json.loads(line)["step"] <= step]
    before = json.loads(lines[-1])["seconds"] if lines else 0.0
    (out / LOG_FILE).write_text("".join(line + "\n" for line in lines))
    pool = jax.device_put(scene_pool(run.seed, run.pool))
    began = time.monotonic()
    while step < run.steps:
        length = model.lengths[step * len(model.lengths) // run.steps]
        batch = run.batch * model.lengths[-1] // length
        state, log = train_step(state, pool, run, model, length, batch)
        step += 1
        if step % run.every == 0 or step in (1, 10, run.steps):
            values = {name: round(float(value), 6) for name, value in log.items()}
            if not np.isfinite(values["loss"]):
                raise FloatingPointError(f"the loss is {values['loss']} at step {step}: {values}")
            seconds = round(before + time.monotonic() - began, 2)
            running.log_line(out / LOG_FILE, {"step": step, "seconds": seconds} | values)
        if step % run.save_every == 0 or step == run.steps:
            save(out, run, state)
    return state


def save(out: Path, run: Run, state: State) -> None:
    """Write the state, whole or not at all. Raises FloatingPointError, and leaves the one before,
    if a number in it is NaN or infinite.
    """
    step, tree = state["step"], jax.device_get(serialization.to_state_dict(state))
    for path, leaf in records.leaves_of(tree).items():
        if not np.isfinite(leaf).all():
            raise FloatingPointError(f"the state of step {step} is not finite: {path}")
    checksum = zlib.crc32(serialization.msgpack_serialize(tree))
    content = {"run": json.dumps(dataclasses.asdict(run)), "state": tree, "checksum": checksum}
    with publish.file(out / STATE_FILE) as temporary:
        temporary.write_bytes(serialization.msgpack_serialize(content))


def restore(out: Path, run: Run, state: State) -> State:
    """The state in a folder, or `state` if there is none. Raises ValueError if it is damaged."""
    path = out / STATE_FILE
    if not path.is_file():
        return state
    with guard.parsing(path, "a state of this training", way_out="remove it to begin anew"):
        content = serialization.msgpack_restore(path.read_bytes())
        stored = json.loads(content["run"])
    if stored != dataclasses.asdict(run):
        raise ValueError(f"{path} is of {stored}, not of {run}; choose another folder or remove it")
    with guard.parsing(path, "a state of this training", way_out="remove it to begin anew"):
        found = serialization.from_state_dict(state, content["state"])
        checksum = zlib.crc32(serialization.msgpack_serialize(content["state"]))
        if checksum != content.get("checksum", checksum):  # earlier versions wrote none
            raise ValueError("it is not what was saved")
    return jax.tree.map(jnp.asarray, found)


def finish(run: Run, model: Autoencoder, params: dict, out: Path, scenes: int = 256) -> Autoencoder:
    """Give the latents unit scale, and write the folder in the public layout. Returns the model
    with its final configuration.

    The statistics are those of clips as training towers sees them: whole, and of the world's words.
    """
    pool = scene_pool(run.seed + 1, scenes)
    mean, deviation = autoencoder_check.posteriors(model, params, pool)
    centre, scale = ae.latent_statistics(mean, deviation)
    if run.what == "video":
        found = {"latents_mean": tuple(map(float, centre)), "latents_std": tuple(map(float, scale))}
        model = dataclasses.replace(model, config=dataclasses.replace(model.config, **found))
    else:
        params = ae.rescale_sound_latents(params, model.config, scale)
    write_public(out / model.folder, model, params)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--what", choices=AUTOENCODERS, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--kl", type=float)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"))
    parser.add_argument("--algorithm", choices=("muon", "adam"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--clips", type=int, default=200, help="held-out clips that are judged")
    args = parser.parse_args()
    given = {name: getattr(args, name) for name in DEFAULTS[args.what]}
    given = DEFAULTS[args.what] | {
        name: value for name, value in given.items() if value is not None
    }
    run, model = Run(what=args.what, seed=args.seed, **given), AUTOENCODERS[args.what]
    state = train(run, model, args.out)
    model = finish(run, model, state["ema"], args.out)
    model, params = read_public(args.out / model.folder, model)  # rounded, as anyone will read it
    report = autoencoder_check.report(args.what, model, params, args.clips, args.out)
    (args.out / REPORT_FILE).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
