"""What a checkpoint makes of held-out sentences, judged by eye and ear alone.

    python -m examples.tiny.evaluate --checkpoint FOLDER --out DIR [--count 200] [--batch 25]
        [--beside NAME=FOLDER] [--steps K] [--guidance G] [--shift S] [--workers 8] [--clips 6]
        [--tune [--apply]]

DIR gets table.json, table.md, sheet.png and a few clips as mp4. `--beside` judges another
checkpoint on the same sentences and seeds, for a column of its own. `--tune` tries settings of the
sampler on sentences of *training* combinations, so that nothing is chosen by the test, and writes
tune.json; `--apply` puts the best into the checkpoint's recipe.

Axes: B batch, T frames, H rows, W columns, S samples.
"""

import argparse
import dataclasses
import json
import math
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cosmos3_jax import Cosmos3
from cosmos3_jax.io import media
from examples.tiny import assemble, data, grammar, sheets
from examples.tiny import clips as cl
from examples.tiny import judge as jd
from examples.tiny.scenes import Scene

SEED = 1000  # of the first clip's noise; each has its own, whatever the batch
TUNE_SEED = 77
GUIDANCE, SHIFTS, STEPS = (1.5, 2.0, 3.0, 4.5), (2.0, 3.0, 5.0), (16, 35)


class Clip(NamedTuple):
    """What was made: uint8 [T, H, W, 3], and float32 [2, S] at 48 kHz."""

    video: np.ndarray
    sound: np.ndarray


def generate(
    model: Cosmos3, sentences: Sequence[str], *, batch: int = 25, seed: int = SEED, **settings
) -> Iterator[Clip]:
    """A clip for each sentence, at the checkpoint's recipe unless `settings` say otherwise."""
    sentences = list(sentences)
    for start in range(0, len(sentences), batch):
        chosen = sentences[start : start + batch]
        padded = chosen + chosen[-1:] * (batch - len(chosen))  # one program for all
        seeds = [seed + start + i for i in range(batch)]
        made = model.generate(padded, seed=seeds, sound=True, **settings)
        videos, sounds = np.asarray(made["video"]), np.asarray(made["sound"])
        for video, sound in list(zip(videos, sounds, strict=True))[: len(chosen)]:
            yield Clip(media.to_uint8(np.moveaxis(video, 0, -1)), sound)


def submit(pool: Executor | None, clips: Iterator[Clip]) -> list[Future | jd.Verdict]:
    """Judge clips as they come, in other processes if there are any."""
    return [pool.submit(jd.judge, *clip) if pool else jd.judge(*clip) for clip in clips]


def collect(judged: Sequence[Future | jd.Verdict]) -> list[jd.Verdict]:
    """Wait for the verdicts of `submit`."""
    return [one.result() if isinstance(one, Future) else one for one in judged]


def shares(rows: Sequence[jd.Row]) -> dict[str, float]:
    """The share of each attribute, for a log; those of nothing are left out."""
    return {row.attribute: round(row.share, 4) for row in rows if not math.isnan(row.share)}


def merit(rows: Sequence[jd.Row]) -> float:
    """The mean share of the attributes with a bar."""
    found = [row.share for row in rows if row.bar is not None and not math.isnan(row.share)]
    return float(np.mean(found)) if found else math.nan


def evaluate(
    model: Cosmos3,
    test: Sequence[tuple[Scene, str]],
    *,
    batch: int = 25,
    pool: Executor | None = None,
    keep: int = 0,
    **settings,
) -> tuple[list[jd.Row], list[Clip]]:
    """Generate, judge and score. Returns the table, and the first `keep` clips."""
    kept = []

    def watched() -> Iterator[Clip]:
        for clip in generate(model, [text for _, text in test], batch=batch, **settings):
            if len(kept) < keep:
                kept.append(clip)
            yield clip

    verdicts = collect(submit(pool, watched()))
    return jd.score([scene for scene, _ in test], verdicts), kept


def training_sentences(count: int, seed: int = TUNE_SEED) -> list[tuple[Scene, str]]:
    """Sentences of combinations that training has seen, to choose settings by."""
    return list(zip(*grammar.training_batch(np.random.default_rng(seed), count), strict=True))


def tune(model: Cosmos3, count: int, batch: int, pool: Executor | None) -> list[dict]:
    """Tables for settings of the sampler, the best first: guidance, then shift, then steps."""
    test, found = training_sentences(count), []
    recipe = model.config.recipe
    best = {name: getattr(recipe, name) for name in ("guidance_scale", "flow_shift")}
    for name, values in (("guidance_scale", GUIDANCE), ("flow_shift", SHIFTS)):
        tried = []
        for value in values:
            settings = best | {name: value}
            rows, _ = evaluate(model, test, batch=batch, pool=pool, **settings)
            tried.append({"settings": settings, "merit": merit(rows), "shares": shares(rows)})
            print(json.dumps(tried[-1]), flush=True)
        best = max(tried, key=lambda one: one["merit"])["settings"]
        found += tried
    for steps in STEPS:
        settings = best | {"num_inference_steps": steps}
        rows, _ = evaluate(model, test, batch=batch, pool=pool, **settings)
        found.append({"settings": settings, "merit": merit(rows), "shares": shares(rows)})
        print(json.dumps(found[-1]), flush=True)
    return sorted(found, key=lambda one: -one["merit"])


def save_clips(
    folder: Path, test: Sequence[tuple[Scene, str]], clips: Sequence[Clip], fps: float
) -> None:
    """Write clips as mp4 with their scenes, as `judge --folder` and `sheets --folder` read them."""
    scenes, sentences = zip(*test[: len(clips)], strict=True)
    for path, clip in zip(cl.save_scenes(folder, scenes, sentences), clips, strict=True):
        whole = {"video": np.moveaxis(clip.video, -1, 0) / np.float32(255), "sound": clip.sound}
        media.save_mp4(whole | {"sample_rate": 48_000}, path, fps=fps, overwrite=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Judge what a checkpoint makes of sentences.")
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--batch", type=int, default=25)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--beside", action="append", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--steps", dest="num_inference_steps", type=int)
    parser.add_argument("--guidance", dest="guidance_scale", type=float)
    parser.add_argument("--shift", dest="flow_shift", type=float)
    parser.add_argument("--workers", type=int, default=8, help="judges; 0: in this process")
    parser.add_argument("--clips", type=int, default=6, help="on the sheet, and as mp4")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--apply", action="store_true", help="the best of --tune to the recipe")
    args = parser.parse_args()
    names = ("num_inference_steps", "guidance_scale", "flow_shift")
    settings = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    args.out.mkdir(parents=True, exist_ok=True)
    pool = data.processes(args.workers) if args.workers else None
    batch = min(args.batch, args.count)
    try:
        model = Cosmos3.from_pretrained(args.checkpoint, args.dtype)
        if args.tune:
            tried = tune(model, args.count, batch, pool)
            if args.apply:
                assemble.change_recipe(Path(args.checkpoint), tried[0]["settings"])
            _write(args.out / "tune.json", tried)
            return
        test, began = grammar.held_out_sentences(args.count), time.monotonic()
        shape = {name: getattr(model.config.recipe, name) for name in ("height", "width")}
        shape["num_frames"] = model.config.recipe.num_frames
        rows, clips = evaluate(model, test, batch=batch, pool=pool, keep=args.clips, **settings)
        seconds = time.monotonic() - began
        beside = {}
        for name, folder in (each.split("=", 1) for each in args.beside):
            other = Cosmos3.from_pretrained(folder, args.dtype)
            beside[name], _ = evaluate(other, test, batch=batch, pool=pool, **shape | settings)
    finally:
        if pool is not None:
            pool.shutdown()
    recipe = dataclasses.asdict(model.config.recipe) | settings
    report = {
        "checkpoint": str(args.checkpoint), "count": args.count, "dtype": args.dtype,
        "seed": SEED, "recipe": recipe, "seconds": round(seconds, 1), "merit": merit(rows),
        "table": jd.report(rows),
        "beside": {name: jd.report(other) for name, other in beside.items()},
    }  # fmt: skip
    _write(args.out / "table.json", report)
    table = jd.markdown(rows, beside)
    media.write_text(args.out / "table.md", table, overwrite=True)
    save_clips(args.out / "clips", test, clips, model.config.recipe.fps)
    sheet = [(*clip, text) for clip, (_, text) in zip(clips, test, strict=False)]
    sheets.sheet(sheet).save(args.out / "sheet.png", optimize=True)
    print(table, end="")


def _write(path: Path, values) -> None:
    media.write_text(path, json.dumps(values, indent=1) + "\n", overwrite=True)


if __name__ == "__main__":
    main()
