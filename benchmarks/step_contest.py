"""Which evaluations to keep of a grid of steps: a contest of rules on `tiny`, by `quality.py`.

python -m benchmarks.step_contest --out FILE.json [--sentences 200] [--beside 50] [--batch 50]
    [--cases grid35/t2v,...] [--rules native,...] [--search 16] [--workers N] [--dtype float32]
    [--dry]

A rule makes the sigmas of K evaluations from the exact grid and K, and UniPC steps on them; or it
steps on the whole grid and extrapolates the velocity where it is not computed. Every rule starts
from the same noise, of held-out sentences; the spacing by dynamic programming is searched for on
sentences of training. On the first `--beside` sentences stand besides: another seed, bfloat16, and
the distance of everything to 105 steps. A row is written as soon as it is there, and a file that is
there is gone on with. `--dry` takes a checkpoint of tiny sizes, whose figures mean nothing.
"""

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import quality_clips as clips
from benchmarks import quality_measures as measures
from benchmarks.quality import CONVERGED, DRY, write
from benchmarks.quality_clips import Clips, Inputs
from benchmarks.quality_measures import Marks
from benchmarks.step_rules import (
    RULES,
    SEACACHE,
    SIMPLEST,
    Grid,
    Rows,
    at_rows,
    even_rows,
    sample,
    search,
)
from cosmos3_jax import Cosmos3
from cosmos3_jax.checkpoint import digests
from cosmos3_jax.runtime.measure import device_peak_gib, environment
from cosmos3_jax.sampling import unipc
from examples.tiny import grammar
from examples.tiny.scenes import Scene

SEED, OTHER_SEED, SEARCH_SEED = 1000, 500_000, 77
AHEAD = 3  # rows that wait to be measured, 0.4 GB each of 200 clips
PER_CLIP = ("latents", "sound_latents", "flicker")  # what is kept of every clip
MARKS = {True: "1", False: "0", None: "-"}


class Case(NamedTuple):
    """A grid, its guidance, from text or with a first frame, and the evaluations to get by with."""

    grid: Grid
    guidance: float
    mode: str
    evaluations: tuple[int, ...]


GRID35, OWN, GUIDANCE = Grid(35, 10.0), Grid(24, 3.0), 2.5
CASES = {
    "grid35/t2v": Case(GRID35, GUIDANCE, "t2v", (18, 12)),
    "grid35/i2v": Case(GRID35, GUIDANCE, "i2v", (18, 12)),
    "own/t2v": Case(OWN, GUIDANCE, "t2v", (18, 12)),
    "own/i2v": Case(OWN, GUIDANCE, "i2v", (18, 12)),
    "guidance6/t2v": Case(GRID35, 6.0, "t2v", (18,)),  # a stress test: far outside of its recipe
}
DRY_CASES = {"dry/t2v": Case(Grid(5, 10.0), GUIDANCE, "t2v", (3,))}


class Against(NamedTuple):
    """What the rows of a case are compared with: all clips of the exact grid, the first clips of a
    converged run; scenes, and the judge's marks of the exact clips, where it is asked.
    """

    exact: Clips
    truth: Clips
    scenes: list[Scene] | None
    marks: list[Marks] | None


class Contest:
    """All rows of all cases: made, measured, written."""

    def __init__(self, options: argparse.Namespace, record: dict):
        self.options, self.record = options, record
        self.pool = measures.processes(options.workers)
        self.models: dict[str, Cosmos3] = {}
        self.began = time.perf_counter()

    def model(self, dtype: str) -> Cosmos3:
        if dtype not in self.models:
            self.models[dtype] = Cosmos3.from_pretrained(
                self.options.checkpoint, dtype, progress=False
            )
        return self.models[dtype]

    def make(
        self, case: Case, inputs: Inputs, sigmas: np.ndarray, *, dtype: str | None = None,
        computed: Rows | None = None,
    ) -> Clips:  # fmt: skip
        model = self.model(dtype or self.options.dtype)
        return clips.generate(
            model, inputs, self.options.batch, partial(sample, computed=computed),
            **self.settings(sigmas, case.guidance),
        )  # fmt: skip

    def settings(self, sigmas: np.ndarray, guidance: float) -> dict[str, Any]:
        settings = {"sigmas": sigmas.tolist(), "guidance_scale": guidance, "sound": True}
        return settings | (DRY if self.options.dry else {})

    def run(self, name: str, case: Case) -> None:
        """The rows of a case that are not there yet; what they are compared with is made anew.

        While a row is measured, the device makes the next.
        """
        jobs = self.jobs(case)
        wanted = [title for title in jobs if f"{name}/{title}" not in self.record["rows"]]
        if not wanted:
            return
        options = self.options
        inputs = clips.sentences_of_tiny(options.sentences, SEED, case.mode)
        few = inputs.first(options.beside)
        exact = self.make(case, inputs, case.grid.sigmas())
        steps = 7 if options.dry else CONVERGED
        truth = self.make(case, few, unipc.sigmas("native", steps, case.grid.shift))
        marks = None if options.dry else clips.judge(inputs.scenes, exact, self.pool)
        against = Against(exact, truth, None if options.dry else inputs.scenes, marks)
        with ThreadPoolExecutor(1) as measuring:
            waiting = []
            for title in wanted:
                start = time.perf_counter()
                beside, make = jobs[title]
                made = make(few if beside else inputs)
                seconds = time.perf_counter() - start
                key = f"{name}/{title}"
                waiting.append(measuring.submit(self.measure, key, made, against, seconds))
                if len(waiting) > AHEAD:
                    waiting.pop(0).result()
            for one in waiting:
                one.result()

    def measure(self, key: str, made: Clips, against: Against, seconds: float) -> None:
        """Compare, write and print a row."""
        start, count = time.perf_counter(), len(made.video)
        scenes, marks = (x and x[:count] for x in (against.scenes, against.marks))
        compared = clips.compare(against.exact.first(count), made, scenes, self.pool)
        truth = against.truth.latents["video"]
        to_converged = measures.relative_l2(truth, made.latents["video"][: len(truth)])
        row: dict[str, Any] = {
            "sentences": count, "seconds_to_make": seconds,
            "measures": clips.summarise(compared, marks),
            "to_converged": measures.summary(to_converged),
            "clips": {name: compared[name] for name in PER_CLIP},
        }  # fmt: skip
        if marks:
            row["marks"] = {
                name: "".join(MARKS[one[name]] for one in compared["marks"]) for name in marks[0]
            }
        row["seconds_to_measure"] = time.perf_counter() - start
        self.record["rows"][key] = row
        self.record["peak_gib"] = device_peak_gib()
        write(self.options.out, self.record)
        error = row["measures"]["latents"]
        print(
            f"{key}: {error['mean']:.3%} ({error['median']:.3%}), {seconds:.1f} s to make, "
            f"{row['seconds_to_measure']:.1f} to measure; {time.perf_counter() - self.began:.0f} s "
            "so far",
            flush=True,
        )

    def jobs(self, case: Case) -> dict[str, tuple[bool, Callable[[Inputs], Clips]]]:
        """Every row of a case: whether it is of the first sentences alone, and what makes it."""
        grid, sigmas = case.grid, case.grid.sigmas()
        other = "bfloat16" if self.options.dtype == "float32" else "float32"

        def reseeded(inputs: Inputs) -> Clips:
            seeds = [seed + OTHER_SEED for seed in inputs.seeds]
            return self.make(case, inputs._replace(seeds=seeds), sigmas)

        made: dict[str, tuple[bool, Callable[[Inputs], Clips]]] = {}
        for count in case.evaluations:
            lists = {rule: function(grid, count) for rule, function in RULES.items()}
            if "searched" in self.options.rules:
                lists["searched"] = at_rows(grid, self.searched(grid, case.evaluations)[count])
            for rule, chosen in lists.items():
                if chosen is not None and rule in self.options.rules:
                    make = partial(self.make, case, sigmas=chosen)
                    made[f"{count}/{rule}"] = False, make
            rows = {"order1": even_rows(grid, count)}
            if lists["seacache"] is not None:
                rows["order1 seacache"] = SEACACHE
            for rule, computed in rows.items():
                if rule not in self.options.rules:
                    continue
                make = partial(self.make, case, sigmas=sigmas, computed=computed)
                made[f"{count}/{rule}"] = False, make
        made["another seed"] = True, reseeded
        if not self.options.dry:  # a CPU takes long to compile bfloat16
            made[other] = True, partial(self.make, case, sigmas=sigmas, dtype=other)
        return made | {"exact": (False, partial(self.make, case, sigmas=sigmas))}

    def searched(self, grid: Grid, counts: Sequence[int]) -> dict[int, Rows]:
        """The lists of `search`, on sentences of training: one for a grid, whatever the mode."""
        lists, key = self.record["searched"], f"{grid.steps} steps, shift {grid.shift:g}"
        if key not in lists:
            start, count = time.perf_counter(), self.options.search
            _, texts = grammar.training_batch(np.random.default_rng(SEARCH_SEED), count)
            inputs = Inputs(list(texts), [SEARCH_SEED + i for i in range(count)])
            settings = self.settings(grid.sigmas(), GUIDANCE)
            model = self.model(self.options.dtype)
            request = next(clips.requests(model, inputs, count, **settings))
            found = search(model, request, grid, max(counts))
            lists[key] = {str(n): list(found[n]) for n in counts}
            print(f"searched {key}: {time.perf_counter() - start:.1f} s, {lists[key]}", flush=True)
            write(self.options.out, self.record)
        return {int(n): tuple(rows) for n, rows in lists[key].items()}


def conclude(rows: dict[str, dict]) -> dict[str, dict]:
    """Of each case and number of evaluations: every rule's errors, as shares of native's too; the
    best in the mean; and the simplest that is not worse than it by more than its interval, of the
    paired differences.
    """
    groups: dict[str, dict[str, dict]] = {}
    for key, row in rows.items():
        group, rule = key.rsplit("/", 1)
        if group.rsplit("/", 1)[-1].isdecimal():
            groups.setdefault(group, {})[rule] = row
    found = {}
    for group, rules in groups.items():
        errors = {rule: np.asarray(row["clips"]["latents"]) for rule, row in rules.items()}
        best = min(errors, key=lambda rule: errors[rule].mean())
        entries, as_good = {}, []
        for rule, row in rules.items():
            worse = measures.summary(errors[rule] - errors[best])
            # Attributes that few sentences speak of have an interval that says nothing.
            judged = row["measures"].get("judge", [])
            judged = [x for x in judged if x["clips"] > row["sentences"] / 2]
            worst = min(judged, key=lambda x: x["low"], default=None)
            entries[rule] = {
                "mean": float(errors[rule].mean()), "median": float(np.median(errors[rule])),
                "worse_than_best": {key: worse[key] for key in ("mean", "low", "high")},
                "flicker": row["measures"]["flicker"]["mean"],
                "to_converged": row["to_converged"]["mean"],
                "judge_at_worst": worst and {
                    key: worst[key] for key in ("attribute", "difference", "low", "high")
                },
            }  # fmt: skip
            if "native" in errors:
                for name, of in (("mean", np.mean), ("median", np.median)):
                    entries[rule][f"{name}_of_natives"] = of(errors[rule]) / of(errors["native"])
            if worse["low"] <= 0:
                as_good.append(rule)
        kept = min(as_good, key=SIMPLEST.index)
        found[group] = {"best": best, "simplest_as_good": kept, "rules": entries}
    return found


def begin_record(options: argparse.Namespace) -> dict:
    """What is there of the same options, or nothing yet."""
    kept = ("checkpoint", "sentences", "beside", "search", "dtype", "dry")
    asked = {name: getattr(options, name) for name in kept}
    if options.out.is_file():
        record = json.loads(options.out.read_text(encoding="utf-8"))
        if record["options"] != asked:
            raise ValueError(f"{options.out} is of {record['options']}: choose another --out")
        return record
    folder = Cosmos3.open(options.checkpoint).folder()
    files = digests.of_folder(folder)
    return environment() | {"options": asked, "files": files, "searched": {}, "rows": {}}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", default="tiny")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sentences", type=int, default=200)
    parser.add_argument("--beside", type=int, default=50, help="for seeds, precision, convergence")
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--search", type=int, default=16, help="sentences of training")
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--rules", default=",".join(SIMPLEST))
    parser.add_argument("--workers", type=int, default=max(0, (os.cpu_count() or 1) - 2))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--dry", action="store_true", help="tiny sizes")
    options = parser.parse_args(arguments)
    cases = DRY_CASES if options.dry else {name: CASES[name] for name in options.cases.split(",")}
    if options.dry:
        options.sentences = options.beside = options.batch = options.search = 2
        options.workers = 0
    options.rules = options.rules.split(",")
    options.beside = min(options.beside, options.sentences)
    record = begin_record(options)
    contest = Contest(options, record)
    for name, case in cases.items():
        contest.run(name, case)
    record["conclusions"] = conclude(record["rows"])
    write(options.out, record)
    for group, one in record["conclusions"].items():
        print(group, "best", one["best"], "kept", one["simplest_as_good"])
        for rule, x in sorted(one["rules"].items(), key=lambda entry: entry[1]["mean"]):
            shares = [x.get(f"{name}_of_natives", math.nan) for name in ("mean", "median")]
            print(
                f"  {rule:16} {x['mean']:.3%} ({x['median']:.3%}), of native's {shares[0]:.2f} "
                f"({shares[1]:.2f}), flicker {x['flicker']:.3f}, converged {x['to_converged']:.2%},"
                f" judge {x['judge_at_worst']}"
            )


if __name__ == "__main__":
    main()
