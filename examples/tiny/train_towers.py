"""Train both towers of the tiny Cosmos3 on clips that the autoencoders have encoded.

    python -m examples.tiny.train_towers --base BASE --out RUN --minutes 11
        [--steps N] [--batch 128] [--clips 20480] [--bank-minutes 2] [--bank FOLDER] ...

RUN gets log.jsonl (a line of losses every so often, and what the judge says of held-out sentences),
orbax states, and `checkpoint/`, the averaged towers in the public layout, written anew at each
evaluation. A run that was killed goes on from its last state.

With --minutes the number of steps is chosen when the first have been timed, within the warm-up of
the learning rate, and corrected if they turn out slower or faster: the schedule comes to its end.
With --steps a run is a function of its seed and its bank.

Axes: B batch.
"""

import argparse
import dataclasses
import json
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cosmos3_jax.checkpoint import publish
from cosmos3_jax.checkpoint.find import open_folder
from cosmos3_jax.config import Config
from cosmos3_jax.models.transformer import unstack_layers
from cosmos3_jax.training.checkpoints import Checkpoints
from cosmos3_jax.training.flow import LossWeights, NoiseLevels
from cosmos3_jax.training.params import join_params, load_towers
from cosmos3_jax.training.step import (
    TrainOptions,
    TrainState,
    check_finite,
    init_state,
    train_step,
)
from examples.tiny import assemble, data, model, optimizers, running
from examples.tiny.pacing import Pacer
from examples.tiny.watch import Watch

LOG_FILE, RUN_FILE = "log.jsonl", "run.json"
Step = Callable[..., tuple[TrainState, dict]]


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run is.

    Attributes:
        batch: examples a step, in so many `microbatches`.
        learning_rate: the peak, after `warmup` steps; it falls to a hundredth (cosine).
        adam_share, weight_decay: see `optimizers.optimizer`.
        shift, spread: of the noise levels, see `flow.NoiseLevels`.
        sound_weight: of the sound's loss beside the video's.
        text_dropout: share of examples that are learned without their prompt.
        ema_decay: of the average that is evaluated and kept.
        dtype: of both passes; parameters, optimizer and average are float32.
        unrolled: compile each layer of the media tower by itself: longer, for a faster step.
        seed: of parameters' use of noise and of the order of examples.
    """

    batch: int = 128
    microbatches: int = 1
    learning_rate: float = 3e-3
    warmup: int = 400
    adam_share: float = 0.5
    weight_decay: float = 0.02
    shift: float = 3.0
    spread: float = 1.2
    sound_weight: float = 1.0
    text_dropout: float = 0.1
    ema_decay: float = 0.999
    dtype: str = "bfloat16"
    remat: bool = False
    unrolled: bool = False
    seed: int = 0


def rate(run: Run, step: int, steps: int) -> float:
    """The learning rate of a step, of `steps` in all; before the end of the warm-up it does not
    depend on these.
    """
    if step < run.warmup:
        return run.learning_rate * (step + 1) / run.warmup
    done = min((step - run.warmup) / max(steps - run.warmup, 1), 1.0)
    return run.learning_rate * (0.01 + 0.99 * (1 + math.cos(math.pi * done)) / 2)


def optimizer(run: Run) -> optax.GradientTransformation:
    """Its learning rate is put into its state before each step."""

    def with_rate(learning_rate):
        return optimizers.optimizer(learning_rate, run.adam_share, run.weight_decay)

    return optax.inject_hyperparams(with_rate)(learning_rate=0.0)


def make_step(run: Run, config: Config, negatives: tuple[np.ndarray, np.ndarray]) -> Step:
    """(state, bank, learning rate) -> (state, metrics), compiled; the state is donated."""
    options = TrainOptions(
        levels=NoiseLevels(shift=run.shift, std=run.spread),
        weights=LossWeights(sound=run.sound_weight),
        text_dropout=run.text_dropout,
        microbatches=run.microbatches,
        remat=run.remat,
        dtype=run.dtype,
        ema_decay=run.ema_decay,
    )

    def combine(params: dict, frozen: dict) -> dict:
        params = join_params(params, frozen)
        return params | {"gen": unstack_layers(params["gen"])} if run.unrolled else params

    @partial(jax.jit, donate_argnums=0)
    def step(state: TrainState, bank: data.Bank, learning_rate: jax.Array):
        # Another key than those of noise and dropout, which the step folds in the same number for.
        key = jax.random.fold_in(jax.random.fold_in(state.key, 1 << 30), state.step)
        batch = data.draw_batch(bank, negatives, key, run.batch, config.recipe.fps)
        hyper = state.opt_state.hyperparams | {"learning_rate": learning_rate}
        state = state.replace(opt_state=state.opt_state._replace(hyperparams=hyper))
        return train_step(
            state, {}, batch, config=config.transformer, optimizer=optimizer(run), options=options,
            combine=combine,
        )  # fmt: skip

    return step


# The run
# --------------------------------------------------------------------------------------------------


def train(
    run: Run,
    base: Path,
    out: Path,
    bank: data.Bank,
    *,
    steps: int | None = None,
    seconds: float = math.inf,
    watch: Watch | None = None,
    evaluations: int = 4,
    every: int = 50,
    save_every: int = 1000,
) -> TrainState:
    """Train until `steps` are taken, or as many as fit into `seconds`; goes on where `out` is.

    Args:
        run: see `Run`.
        base: of `assemble.write_base`.
        out: a folder of this run alone.
        bank: examples.
        steps: of the whole run; None chooses them by the time.
        seconds: for everything from here on, over all processes that worked on this run.
        watch: what judges, or None.
        evaluations: how often, evenly; the last is at the end.
        every, save_every: steps from one line of the log, and one saved state, to the next.

    Raises:
        ValueError: neither steps nor seconds are given, or `out` holds another run.
        FloatingPointError: the loss or a gradient is not finite.
    """
    if steps is None and seconds == math.inf:
        raise ValueError("give a number of steps, or the seconds that they may take")
    out.mkdir(parents=True, exist_ok=True)
    params, config = load_towers(base, "float32")
    _, tokenizer = open_folder(base)
    negatives = data.negative_ids(tokenizer, config.recipe)
    state = init_state(params, optimizer(run), jax.random.key(run.seed), ema=True)
    about = {"base": data.digest(base), "asked": steps}
    record = _record(out, run, about)
    step = make_step(run, config, jax.tree.map(jnp.asarray, negatives))
    log = partial(running.log_line, out / LOG_FILE)
    text = int(np.asarray(bank.lengths[0, 0]))
    media = math.prod(bank.video.shape[1:4]) + bank.sound.shape[1]
    flops = run.batch * model.flops_per_example(config.transformer, media, text)

    def evaluate() -> None:
        """Write the average as a checkpoint, and have it watched."""
        nonlocal evaluated
        start = time.monotonic()
        made = f"Towers: {done} of {total} steps of {run.batch} clips: `{run}`."
        assemble.write_trained(out / "checkpoint", jax.device_get(state.ema), base, made)
        if watch is not None:
            watch.start(done, state.ema)
        pacer.paused(time.monotonic() - start)
        evaluated = max(_evaluations_due(evaluations, done, total), evaluated + 1)
        remember()

    def remember() -> None:
        values = {"steps": total, "seconds": pacer.used, "evaluated": evaluated}
        _write_record(out, {"run": dataclasses.asdict(run), **about, **values})

    with Checkpoints(out / "states", keep=2) as states:
        if states.last is not None:
            state = states.restore(state)
            _forget(out, int(state.step))
            log({"step": int(state.step), "resumed": True})
        done, total = int(state.step), steps or record.get("steps")
        pacer = Pacer(done, record.get("seconds", 0.0))
        # No more than were due by then: those after the last state are made again.
        evaluated = min(record.get("evaluated", 0), _evaluations_due(evaluations, done, total))
        while total is None or done < total:
            learning_rate = rate(run, done, total or 10**9)
            state, metrics = step(state, bank, jnp.float32(learning_rate))
            done += 1
            if done % every == 0 or done == total:
                values = {name: round(float(value), 5) for name, value in metrics.items()}
                check_finite(metrics, done)
                pace = pacer.interval(done)
                if steps is None:
                    total = pacer.plan(done, total, seconds, evaluations - evaluated)
                values |= {"steps": total, "learning_rate": round(learning_rate, 8)}
                values |= {"seconds": round(pacer.used, 1), "seconds_a_step": round(pace, 4)}
                log({"step": done, **values, "tflops": round(flops / pace / 1e12, 2)})
                remember()
                if watch is not None:
                    watch.finish()
            if done % save_every == 0 or done == total:
                states.save(state)
            if done != total and _evaluations_due(evaluations, done, total) > evaluated:
                evaluate()
        if evaluated < evaluations or not (out / "checkpoint").is_dir():
            evaluate()  # also if the run was killed after its last state
        if watch is not None:
            watch.finish(wait=True)
    return state


def _evaluations_due(evaluations: int, done: int, total: int | None) -> int:
    return evaluations * done // total if total else 0


def _record(out: Path, run: Run, about: dict[str, Any]) -> dict[str, Any]:
    """What a folder says of its run. Raises ValueError if it is another one."""
    path = out / RUN_FILE
    if not path.is_file():
        return {}
    found, wanted = json.loads(path.read_text()), {"run": dataclasses.asdict(run), **about}
    other = {name: found.get(name) for name in wanted if found.get(name) != wanted[name]}
    if other:
        asked = {name: wanted[name] for name in other}
        raise ValueError(f"{path} is of {other}, not of {asked}; choose another folder")
    return found


def _write_record(out: Path, values: dict) -> None:
    with publish.file(out / RUN_FILE) as temporary:
        temporary.write_text(json.dumps(values))


def _forget(out: Path, step: int) -> None:
    """Drop the log's lines of steps that a killed run took after its last state."""
    lines = (out / LOG_FILE).read_text().splitlines() if (out / LOG_FILE).is_file() else []
    kept = [line for line in lines if json.loads(line).get("step", 0) <= step]
    (out / LOG_FILE).write_text("".join(f"{line}\n" for line in kept))


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the towers of the tiny Cosmos3.")
    parser.add_argument("--base", type=Path, required=True, help="of `assemble base`")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, help="for training, the bank not included")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--clips", type=int, default=20_480, help="in the bank")
    parser.add_argument("--bank", type=Path, help="where the bank is kept (default: RUN/bank)")
    parser.add_argument("--bank-minutes", type=float, default=2.0)
    parser.add_argument("--chunk", type=int, default=data.CHUNK)
    parser.add_argument("--workers", type=int, default=12, help="processes; 0: none but this")
    parser.add_argument("--evaluations", type=int, default=4)
    parser.add_argument("--sentences", type=int, default=64, help="that an evaluation generates")
    parser.add_argument("--every", type=int, default=50)
    parser.add_argument("--save-every", type=int, default=1000)
    running.add_options(parser, Run)
    args = parser.parse_args()
    run = running.chosen(Run, args)
    if args.minutes is None and args.steps is None:
        parser.error("give --minutes or --steps")
    args.out.mkdir(parents=True, exist_ok=True)
    log = partial(running.log_line, args.out / LOG_FILE)
    log({"device": str(jax.devices()[0].device_kind), "jax": jax.__version__})
    pool = data.processes(args.workers) if args.workers else None
    try:
        vaes = data.load_vaes(args.base, run.dtype)
        bank = data.get_bank(
            args.base, args.bank or args.out / "bank", vaes, args.clips,
            seconds=60 * args.bank_minutes, chunk=args.chunk, dtype=run.dtype, seed=run.seed,
            pool=pool,
        )  # fmt: skip
        watch = None
        if args.sentences:
            watch = Watch(args.base, vaes, args.sentences, pool, log, run.dtype)
            watch.warm_up()
        train(
            run, args.base, args.out, bank, steps=args.steps,
            seconds=60 * args.minutes if args.minutes else math.inf, watch=watch,
            evaluations=args.evaluations, every=args.every, save_every=args.save_every,
        )  # fmt: skip
    finally:
        if pool is not None:
            pool.shutdown(cancel_futures=True)


if __name__ == "__main__":
    main()
