"""Teach the tiny model a colour or a pitch that it has never seen, with a LoRA, on a CPU.

    python -m examples.tiny.finetune_lora --checkpoint tiny --new orange --out DIR
        [--steps 160] [--batch 8] [--rank 8] [--clips 96] [--count 12]

`--new` is a kept word of the world, `orange` or `E6`, or both with a comma between. The sound
autoencoder of `tiny` does not give E6 back: that one needs a checkpoint with a better one. DIR gets
log.jsonl, the adapter as diffusers reads it, the judge's tables before and after on sentences of
combinations that were not trained on, and a sheet of the same sentences before and after.

Axes: B batch, N clips.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cosmos3_jax import Cosmos3
from cosmos3_jax.checkpoint import lora, lora_files
from cosmos3_jax.checkpoint.find import find_checkpoint, open_folder
from cosmos3_jax.config import Config
from cosmos3_jax.io import media
from cosmos3_jax.training.flow import LossWeights, NoiseLevels
from cosmos3_jax.training.params import load_towers
from cosmos3_jax.training.step import (
    TrainOptions,
    TrainState,
    check_finite,
    init_state,
    train_step,
)
from examples.tiny import data, evaluate, grammar, running, sheets
from examples.tiny import judge as jd
from examples.tiny import scenes as sc
from examples.tiny.scenes import Scene

# Every linear map of both towers' layers: a word is understood in one and drawn in the other.
PATTERNS = ("gen/layers/(attention|mlp)/", "und/layers/(attention|mlp)/", "und/last_layer/")
KNOWN_SHARE = 0.25  # of the clips, without a new word, so that the others are not forgotten


@dataclasses.dataclass(frozen=True)
class Tuning:
    """What a run is.

    Attributes:
        new: kept words: colours, pitches.
        steps, batch, learning_rate: of Adam; the rate falls to zero (cosine).
        rank: of the adapter.
        clips: that are drawn and encoded once, and learned from again and again.
        dtype: of both passes.
    """

    new: tuple[str, ...]
    steps: int = 160
    batch: int = 8
    learning_rate: float = 2e-3
    rank: int = 8
    clips: int = 96
    seed: int = 0
    dtype: str = "float32"

    def __post_init__(self):
        kept = [*sc.NEW_COLOURS, *sc.NEW_PITCHES]
        if not self.new or set(self.new) - set(kept):
            raise ValueError(f"new={self.new}: choose of the kept words, {', '.join(kept)}")


def with_new_words(
    rng: np.random.Generator, new: Sequence[str], count: int, held_out: bool
) -> list[Scene]:
    """Scenes with one of the new words each, of combinations that are held out or not."""
    found = []
    while len(found) < count:
        word = new[rng.integers(len(new))]
        words = _without_numbers(grammar.sample(rng, bool(rng.integers(2))))
        if word in sc.NEW_COLOURS:
            words = dataclasses.replace(words, colour=word)
        elif words.pitch:
            words = dataclasses.replace(words, pitch=word)
        else:
            continue  # a silent scene has no pitch
        if grammar.held_out(grammar.combination(words)) == held_out:
            found.append(sc.place(words, rng))
    return found


def _without_numbers(scene: Scene) -> Scene:
    numbers = {"radius": 0.0, "x": 0.0, "y": 0.0, "pace": 0.0, "meets": None}
    return dataclasses.replace(scene, **numbers)


def test_sentences(new: Sequence[str], count: int, seed: int = 5) -> list[tuple[Scene, str]]:
    """Sentences with a new word, of combinations that are not trained on."""
    rng = np.random.default_rng(seed)
    scenes = with_new_words(rng, new, count, held_out=True)
    return [(scene, grammar.sentence(scene, rng)) for scene in scenes]


def clips(tuning: Tuning, folder: Path, config: Config, vaes: dict) -> data.Bank:
    """Encoded clips to learn from, most with a new word."""
    rng = np.random.default_rng(tuning.seed)
    known = round(KNOWN_SHARE * tuning.clips)
    scenes = with_new_words(rng, tuning.new, tuning.clips - known, held_out=False)
    scenes += [grammar.sample(rng) for _ in range(known)]
    return data.encode_scenes(folder, config, vaes, scenes, rng, tuning.batch, tuning.dtype)


def optimizer(tuning: Tuning) -> optax.GradientTransformation:
    schedule = optax.cosine_decay_schedule(tuning.learning_rate, tuning.steps)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, b2=0.99))


def make_step(
    tuning: Tuning, config: Config, negatives: tuple[jax.Array, jax.Array]
) -> Callable[..., tuple[TrainState, dict]]:
    """(state, towers, bank) -> (state, metrics), compiled; the state is donated."""
    options = TrainOptions(
        levels=NoiseLevels(shift=config.recipe.flow_shift, std=1.2), weights=LossWeights(),
        text_dropout=0.1, remat=False, dtype=tuning.dtype,
    )  # fmt: skip

    @partial(jax.jit, donate_argnums=0)
    def step(state: TrainState, towers: dict, bank: data.Bank):
        key = jax.random.fold_in(jax.random.fold_in(state.key, 1 << 30), state.step)
        batch = data.draw_batch(bank, negatives, key, tuning.batch, config.recipe.fps)
        return train_step(
            state, towers, batch, config=config.transformer, optimizer=optimizer(tuning),
            options=options,
            combine=lambda adapter, towers: lora.attach(adapter, towers, config.transformer),
        )  # fmt: skip

    return step


def train(
    tuning: Tuning,
    towers: dict,
    bank: data.Bank,
    config: Config,
    step: Callable[..., tuple[TrainState, dict]],
    log: Callable[[dict], None],
    every: int = 10,
) -> lora.Lora:
    """Train an adapter of frozen towers; `step` is of `make_step`.

    Raises FloatingPointError if a step that is logged is not finite; the last one is.
    """
    key = jax.random.key(tuning.seed)
    adapter = lora.init(key, config.transformer, patterns=PATTERNS, rank=tuning.rank)
    state = init_state(adapter, optimizer(tuning), jax.random.key(tuning.seed + 1))
    began = time.monotonic()
    for done in range(1, tuning.steps + 1):
        state, metrics = step(state, towers, bank)
        if done % every == 0 or done == tuning.steps:
            check_finite(metrics, done)
            values = {name: round(float(value), 5) for name, value in metrics.items()}
            log({"step": done, **values, "seconds": round(time.monotonic() - began, 1)})
    return state.params


def main() -> None:
    parser = argparse.ArgumentParser(description="Teach the tiny model a new word with a LoRA.")
    parser.add_argument("--checkpoint", default="tiny")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--new",
        default="orange",
        help="orange; or, of a checkpoint whose sound autoencoder gives it back, E6",
    )
    parser.add_argument("--count", type=int, default=12, help="test sentences")
    parser.add_argument("--eval-batch", type=int, default=4)
    parser.add_argument("--sheet-rows", type=int, default=3, help="sentences on the sheet")
    running.add_options(parser, Tuning)
    args = parser.parse_args()
    tuning = running.chosen(Tuning, args, new=tuple(args.new.split(",")))
    args.out.mkdir(parents=True, exist_ok=True)
    log = partial(running.log_line, args.out / "log.jsonl")
    folder = find_checkpoint(args.checkpoint)
    config, tokenizer = open_folder(folder)
    log({"tuning": dataclasses.asdict(tuning)})
    began = time.monotonic()
    bank = clips(tuning, folder, config, data.load_vaes(folder, tuning.dtype))
    log({"clips_encoded_in": round(time.monotonic() - began, 1)})
    params, _ = load_towers(folder, tuning.dtype)
    negatives = jax.tree.map(jnp.asarray, data.negative_ids(tokenizer, config.recipe))
    step = make_step(tuning, config, negatives)
    adapter = train(tuning, params, bank, config, step, log)
    path = lora_files.save(adapter, args.out, config.transformer)
    log({"adapter": path.name, "bytes": path.stat().st_size})

    test, tables, kept = test_sentences(tuning.new, args.count), {}, {}
    for name, adapters in (("before", None), ("after", path)):
        model = Cosmos3.from_pretrained(folder, tuning.dtype, lora=adapters)
        rows, kept[name] = evaluate.evaluate(
            model, test, batch=min(args.eval_batch, args.count), keep=args.sheet_rows
        )
        tables[name] = rows
        log({name: evaluate.shares(rows)})
    table = jd.markdown(tables["after"], {"before": tables["before"]})
    media.write_text(args.out / "table.md", table, overwrite=True)
    report = {name: jd.report(rows) for name, rows in tables.items()}
    media.write_text(args.out / "table.json", json.dumps(report, indent=1) + "\n", overwrite=True)
    rows = [
        (*kept[name][i], f"{name.capitalize()}: {text}")
        for i, (_, text) in enumerate(test[: args.sheet_rows])
        for name in ("before", "after")
    ]
    sheets.sheet(rows).save(args.out / "sheet.png", optimize=True)
    print(table, end="")


if __name__ == "__main__":
    main()
