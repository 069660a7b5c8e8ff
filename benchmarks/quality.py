"""What a setting costs in quality: clips of two settings, of the same prompts and seeds, compared.

python -m benchmarks.quality --checkpoint tiny --b num_inference_steps=18 --out FILE.json
    [--a exact] [--settings KEY=VALUE ...] [--mode t2v|i2v] [--prompts FILE] [--count 8]
    [--seeds 1000,2000] [--batch 4] [--sheet FILE.png] [--workers 0] [--skip precision ...] [--dry]

A and B are settings of `Cosmos3.prepare` (`sigmas=[0.9,0.5,0]` is read as JSON), and `dtype`;
`exact` and `fast` are the speeds of the checkpoint's recipe. Beside B against A stands what else
the same clips differ by: two seeds, either setting against a converged run, float32 against
bfloat16. A row is written as soon as it is there; one that the device has no memory for says so.
The judge of `examples/tiny` has its say where it can: of `tiny`, or with `--judge` of another
checkpoint of that world.

Where more than the steps differs, B's guided velocity is compared with A's, at the latents and
noise levels of A's trajectory, of the first batch. `--dry` takes tiny sizes. Its figures mean
nothing.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image, ImageDraw

from benchmarks import quality_measures as measures
from benchmarks.quality_clips import (
    Clips,
    Inputs,
    compare,
    generate,
    judge,
    requests,
    sentences_of_tiny,
    summarise,
    trajectory,
    velocity_errors,
)
from cosmos3_jax import Cosmos3, Request
from cosmos3_jax.checkpoint import digests
from cosmos3_jax.io import media
from cosmos3_jax.parallel import device
from cosmos3_jax.runtime.measure import environment
from cosmos3_jax.runtime.memory import OutOfDeviceMemory

PROMPTS = (
    "A red sports car drives along a coastal road at sunset, the camera follows from behind.",
    "A robot arm sorts coloured blocks on a white table, seen from above.",
    "Waves break on black rocks, spray rises, seagulls cry in the wind.",
    "A woman in a blue coat walks through a crowded market and buys oranges.",
    "A dog runs over a snowy field and catches a yellow ball.",
    "Rain falls on a street at night, neon signs are reflected in puddles.",
    "A barista pours milk into a cup of coffee, close up, steam rises.",
    "A train crosses a stone bridge over a valley in autumn, seen from a drone.",
)
SEEDS, OTHER_SEEDS = (1000, 2000), 500_000  # the other clip's seed is so much larger
CONVERGED = 105
DRY = {
    "num_frames": 5, "height": 32, "width": 48,
    "negative_prompt": "", "system_prompt": "", "prompt_metadata": False,  # thousands of bytes
}  # fmt: skip
ROWS = ("seeds", "converged", "precision")
STEPS = ("num_inference_steps", "sigmas", "speed", "evaluations")  # what says where steps are
FRAMES_SHOWN, TILE = 6, 160  # of each clip on the sheet, and the pixels of their width


def table(rows: dict[str, dict]) -> str:
    """Of each row the mean (median; worst) of every measure, for a page."""
    there = {name for row in rows.values() for name in row.get("measures", ())}
    names = [name for name in measures.WORST if name in there]
    lines = ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for title, row in rows.items():
        if "measures" not in row:
            lines.append(f"| {title} | not run: {row['not_run']} |" + " |" * (len(names) - 1))
            continue
        found = [row["measures"].get(name) for name in names]
        cells = (
            "-" if x is None else f"{x['mean']:.4g} ({x['median']:.4g}; {x['worst']:.4g})"
            for x in found
        )
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def sheet(videos: dict[str, np.ndarray], titles: Sequence[str]) -> Image.Image:
    """Frames of the same clips side by side: a line for each clip and setting.

    Args:
        videos: of each setting, uint8 [B, T, H, W, 3].
        titles: of the clips.
    """
    first = next(iter(videos.values()))
    height, line = round(TILE * first.shape[2] / first.shape[3]), 16
    chosen = np.linspace(0, first.shape[1] - 1, FRAMES_SHOWN).round().astype(int)
    block = line + len(videos) * (height + line)
    picture = Image.new("RGB", (FRAMES_SHOWN * TILE, len(titles) * block), "white")
    pen = ImageDraw.Draw(picture)
    for i, title in enumerate(titles):
        pen.text((2, i * block + 2), title, "black")
        for j, (name, video) in enumerate(videos.items()):
            top = i * block + line + j * (height + line)
            pen.text((2, top + 2), name, "gray")
            for column, t in enumerate(chosen):
                tile = Image.fromarray(video[i, t]).resize((TILE, height))
                picture.paste(tile, (column * TILE, top + line))
    return picture


def read_given(given: Sequence[str]) -> dict[str, Any]:
    """`exact`, `fast` or KEY=VALUE texts -> settings; a value is JSON, or else text."""
    found = {}
    for text in given:
        if text in ("exact", "fast"):
            text = f"speed={text}"
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"{text!r} is no setting: write exact, fast or KEY=VALUE")
        try:
            found[name] = json.loads(value)
        except json.JSONDecodeError:
            found[name] = value
    return found


class Harness:
    """The rows of a comparison: clips as they are needed, one model at a time."""

    def __init__(self, options: argparse.Namespace, inputs: Inputs, common: dict, record: dict):
        self.options, self.inputs, self.common, self.record = options, inputs, common, record
        self.pool = measures.processes(options.workers)
        self.lpips, record["lpips"] = measures.lpips()
        self.model: Cosmos3 | None = None

    def of(self, settings: dict) -> tuple[Cosmos3, dict]:
        """The model for these settings, and them without its dtype."""
        dtype = settings.get("dtype", device.default_dtype())
        if self.model is None or self.model.dtype != dtype:
            self.model = None  # first, so that there is room for the other
            self.model = Cosmos3.from_pretrained(self.options.checkpoint, dtype, progress=False)
        return self.model, self.common | {k: v for k, v in settings.items() if k != "dtype"}

    def clips(self, settings: dict, inputs: Inputs | None = None) -> Clips:
        model, settings = self.of(settings)
        return generate(model, inputs or self.inputs, self.options.batch, **settings)

    def request(self, settings: dict) -> tuple[Cosmos3, Request]:
        model, settings = self.of(settings)
        batch = self.options.batch
        return model, next(requests(model, self.inputs.first(batch), batch, **settings))

    def row(self, title: str, make: Callable[[], tuple[Clips, Clips]], **more: Callable) -> None:
        """Make and compare two settings' clips, add what `more` says, and write it down."""
        start = time.perf_counter()
        row: dict[str, Any] = {}
        try:
            a, b = make()
            clips = compare(a, b, self.inputs.scenes, self.pool, self.lpips)
            marks = judge(self.inputs.scenes, a, self.pool) if self.inputs.scenes else None
            row["measures"] = summarise(clips, marks)
            clips.pop("marks", None)
            row |= {"clips": clips, "seconds": time.perf_counter() - start}
            for name, function in more.items():
                row[name] = function()
        except (OutOfDeviceMemory, jax.errors.JaxRuntimeError) as error:
            row["not_run"] = str(error).partition("\n")[0]  # what was measured before it stays
        self.record["rows"][title] = row
        write(self.options.out, self.record)
        said = f", not run: {row['not_run']}" if "not_run" in row else ""
        print(f"{title} {time.perf_counter() - start:.1f} s{said}", flush=True)


def write(path: Path, record: dict) -> None:
    media.write_text(path, json.dumps(measures.plain(record), indent=1) + "\n", overwrite=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", default="tiny")
    parser.add_argument("--a", nargs="+", default=["exact"], metavar="KEY=VALUE")
    parser.add_argument("--b", nargs="+", required=True, metavar="KEY=VALUE")
    parser.add_argument("--settings", nargs="+", default=[], help="of both", metavar="KEY=VALUE")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sheet", type=Path, help="frames side by side, as PNG")
    parser.add_argument("--mode", choices=("t2v", "i2v"), default="t2v", help="i2v: of tiny alone")
    parser.add_argument("--prompts", type=Path, help="one a line; default: eight of our own")
    parser.add_argument("--count", type=int, default=8, help="prompts, at most")
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)), help="of the first prompt")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--workers", type=int, default=0, help="processes that measure")
    parser.add_argument("--judge", action="store_true", help="the world of tiny")
    parser.add_argument("--skip", nargs="+", choices=ROWS, default=[])
    parser.add_argument("--dry", action="store_true", help="tiny sizes")
    options = parser.parse_args(arguments)
    a, b, common = (read_given(x) for x in (options.a, options.b, options.settings))
    if steps := common.keys() & {*STEPS}:
        parser.error(f"--settings {steps.pop()} would change the converged run too: use --a, --b")
    converged = {k: v for k, v in a.items() if k not in STEPS}
    converged["num_inference_steps"] = 3 if options.dry else CONVERGED
    if options.dry:
        common |= DRY
        a = {"num_inference_steps": 2} | a
    config = Cosmos3.open(options.checkpoint)
    common = {"sound": config.config.has_sound} | common
    of_tiny = options.judge or options.checkpoint == "tiny"
    inputs = _inputs(options, of_tiny)
    other = {"float32": "bfloat16", "bfloat16": "float32"}
    dtype = a.get("dtype", device.default_dtype())
    record = environment() | {
        "checkpoint": options.checkpoint, "files": digests.of_folder(config.folder()),
        "a": {"dtype": dtype} | a, "b": {"dtype": dtype} | b, "common": common,
        "mode": options.mode, "prompts": inputs.prompts, "seeds": inputs.seeds, "rows": {},
    }  # fmt: skip
    a, b = record["a"], record["b"]
    harness = Harness(options, inputs, common, record)
    of_a = cache(lambda: harness.clips(a))
    of_b = cache(lambda: harness.clips(b))
    points = cache(lambda: trajectory(*harness.request(a)))

    def along(settings: dict) -> dict[str, Callable]:
        """The row's velocity errors, unless nothing but the steps differs: then there are none."""
        changed = {key for key in {*a, *settings} if a.get(key) != settings.get(key)}
        if changed <= {*STEPS}:
            return {}
        return {"velocity_errors": lambda: velocity_errors(points(), *harness.request(settings))}

    harness.row("b against a", lambda: (of_a(), of_b()), **along(b))
    if options.sheet and "measures" in record["rows"]["b against a"]:
        shown = {"a": of_a().video, "b": of_b().video}
        sheet(shown, inputs.prompts).save(options.sheet, optimize=True)
    if "seeds" not in options.skip:
        reseeded = inputs._replace(seeds=[seed + OTHER_SEEDS for seed in inputs.seeds])
        harness.row("a, another seed", lambda: (of_a(), harness.clips(a, reseeded)))
    if "converged" not in options.skip:
        truth = cache(lambda: harness.clips({"dtype": dtype} | converged))
        steps = converged["num_inference_steps"]
        harness.row(f"a against {steps} steps", lambda: (truth(), of_a()))
        harness.row(f"b against {steps} steps", lambda: (truth(), of_b()))
    if "precision" not in options.skip:
        rounded = a | {"dtype": other[dtype]}
        harness.row(
            f"a in {other[dtype]}", lambda: (of_a(), harness.clips(rounded)), **along(rounded)
        )  # fmt: skip
    print(table(record["rows"]))


def _inputs(options: argparse.Namespace, of_tiny: bool) -> Inputs:
    """Prompts times seeds; held-out sentences with one seed each if they are judged."""
    first, *_ = seeds = [int(seed) for seed in options.seeds.split(",")]
    if of_tiny and options.prompts is None:
        return sentences_of_tiny(options.count, first, options.mode)
    if options.mode == "i2v":
        raise ValueError("only sentences of tiny have images; add --settings image=FILE instead")
    texts = list(PROMPTS)
    if options.prompts is not None:
        lines = options.prompts.read_text(encoding="utf-8").splitlines()
        texts = [line for line in lines if line.strip()]
    pairs = [(text, seed + i) for seed in seeds for i, text in enumerate(texts[: options.count])]
    return Inputs([text for text, _ in pairs], [seed for _, seed in pairs])


if __name__ == "__main__":
    main()
