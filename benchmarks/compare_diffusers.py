"""The same text-to-video job here and through diffusers' pipeline, one after the other on one GPU.

python benchmarks/compare_diffusers.py --out FILE.json [--sizes 256p,480p,720p] [--skip-compiled]
    [--only diffusers|ours] [--ours BENCH.json] [--tiny]

Full-size random weights, 189 frames, 300 text tokens in either branch, guidance 6, 35 steps. Each
side has a process of its own, so that each has the whole GPU. The file is rewritten after every
result: a run that is cut short keeps what it has.
"""

import argparse
import dataclasses
import json
import math
import multiprocessing
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import jax
import jax.numpy as jnp

from cosmos3_jax import bench, tiny, transformer
from cosmos3_jax.bench import Job
from cosmos3_jax.bench_measure import device_peak_gib, environment, measure
from cosmos3_jax.config import Config, TransformerConfig, VideoVAEConfig
from cosmos3_jax.generate import decode, encode_conditions, sample_latents
from cosmos3_jax.video_vae import pixel_to_latent_shape

TINY_JOB = Job(num_frames=9, height=64, width=96, steps=2, text_tokens=40, negative_tokens=40)
WHOLE = ("256p", "tiny")  # sizes whose loop is timed from end to end
FEW = 3  # steps timed at the other sizes, after one to warm up
TOTALS = {
    "whole": "ours: condition + the loop of all steps + decode; diffusers: all steps of one call "
    "+ decode; every program warm",
    "few": f"ours: condition + steps * (a loop of {FEW} steps / {FEW}) + decode; diffusers: steps "
    f"* the median of {FEW} steps after one to warm up + decode; the whole video is decoded",
    "preparation": "diffusers also encodes a video of zeros before the loop, of which text-to-video"
    " uses the shape alone; total_seconds leaves that out, total_with_preparation_seconds has it",
    "text": "diffusers runs its text tower in every pass; ours runs once, in `condition`",
    "ours": "with --ours, every step of our loop was run, at each size, just before",
    "best": "of eager and compiled (blocks compiled, cuDNN searching for its convolutions) the one "
    "with the smaller total",
}


def tiny_config() -> Config:
    """The embedded checkpoint's sizes: for a look at the whole path in seconds."""
    return Config(
        transformer=TransformerConfig.from_dict(tiny.TRANSFORMER | {"vocab_size": 512}),
        video_vae=VideoVAEConfig.from_dict(tiny.VIDEO_VAE),
    )


def timed_steps(size: str, job: Job) -> int:
    return job.steps if size in WHOLE else min(FEW, job.steps)


def measure_ours(config: Config, params: dict, job: Job, run_steps: int) -> dict:
    """Measure one job here, warm; `run_steps` of its steps, in one loop."""
    request = bench.random_request(config, dataclasses.replace(job, steps=run_steps))
    request, compiling = jax.device_put(request), 0.0

    def run(function: Callable, *arguments) -> tuple:
        nonlocal compiling
        start = time.perf_counter()
        program = jax.jit(partial(function, config=config)).lower(*arguments).compile()
        compiling += time.perf_counter() - start
        return measure(program, *arguments, repeats=1)

    conditions, condition = run(encode_conditions, params["und"], request)
    (latents, _), loop = run(sample_latents, params["gen"], conditions, request)
    result, decoding = run(decode, params, latents)
    video = result["video"]
    return {
        "condition_seconds": condition["seconds"],
        "step_samples": [loop["seconds"] / run_steps],  # one program: its steps have no clock
        "decode_samples": decoding["samples"],
        "compile_seconds": compiling,
        "finite": bool(jnp.isfinite(video).all() & jnp.isfinite(latents.video).all()),
        "peak_gib": device_peak_gib(),
        "work": work(config, job, run_steps),
    }


def work(config: Config, job: Job, run_steps: int) -> dict:
    """What both sides have to do for a job."""
    shape = pixel_to_latent_shape(config.video_vae, job.num_frames, job.height, job.width)
    return {
        "text_tokens": job.text_tokens,
        "negative_tokens": job.negative_tokens,
        "video_tokens": math.prod(transformer.patch_grid(config.transformer, shape)),
        "video": [job.num_frames, job.height, job.width],
        "passes": 2 * run_steps,
    }


def read_ours(path: Path, config: Config, jobs: dict[str, Job]) -> Iterator[dict]:
    """Events (see `merge`) of our side from a file of `cosmos3-jax bench`: whole jobs."""
    report = json.loads(path.read_text())
    yield {"side": "ours", "environment": {k: v for k, v in report.items() if k != "results"}}
    for size, job in jobs.items():
        found = report["results"][size]
        same = ("num_frames", "height", "width", "steps", "sound", "text_tokens", "negative_tokens")
        if any(found["job"][name] != getattr(job, name) for name in same):
            raise ValueError(f"{path}: {size} was measured on another job: {found['job']}")
        stages = found["stages"]
        yield {"size": size, "side": "ours", "found": {
            "condition_seconds": stages["condition"]["seconds"],
            "step_samples": [stages["one step"]["seconds"]] * job.steps,
            "decode_samples": stages["video decode"]["samples"],
            "peak_gib": found["peak_gib"],
            # Every step was run, and as many as these are compared with.
            "work": work(config, job, timed_steps(size, job)),
        }}  # fmt: skip


def summed(found: dict, steps: int) -> dict:
    """The seconds of the whole job, from what was measured of it; see `TOTALS`."""
    samples = found["step_samples"]
    step, decoding = statistics.median(samples), statistics.median(found["decode_samples"])
    denoise = sum(samples) if len(samples) == steps else steps * step
    total = found.get("condition_seconds", 0.0) + denoise + decoding
    before = found.get("encode_seconds", 0.0) + found.get("preparation_seconds", 0.0)
    return {
        "step_median_seconds": step,
        "denoise_seconds": denoise,
        "decode_seconds": decoding,
        "total_seconds": total,
        "total_with_preparation_seconds": total + before,
    }


def ratios(here: dict, variants: dict[str, dict]) -> dict:
    """diffusers' seconds over ours, of each variant that ran and of the one with the least total.

    `ratio` is the headline: denoising and decoding alone on their side, everything on ours.
    """
    ran = {name: found for name, found in variants.items() if "error" not in found}
    if "error" in here or not ran:
        return {}
    pairs = {
        "ratio": "total_seconds",
        "ratio_with_preparation": "total_with_preparation_seconds",
        "ratio_step": "step_median_seconds",
        "ratio_decode": "decode_seconds",
    }
    found = {
        name: {ratio: variant[key] / here[key] for ratio, key in pairs.items()}
        for name, variant in ran.items()
    }
    best = min(ran, key=lambda name: ran[name]["total_seconds"])
    same = all(variant["work"] == here["work"] for variant in ran.values())
    return {**found, "compared_with": best, "same_work": same, **found[best]}


def run_ours(config: Config, jobs: dict[str, Job], dtype: str, compiled: bool) -> Iterator[dict]:
    """Events (see `merge`) of our side, smallest size first: peak memory never falls."""
    yield {"side": "ours", "environment": environment()}
    params = jax.block_until_ready(bench.random_params(config, jnp.dtype(dtype)))
    for size, job in jobs.items():
        found = _try(partial(measure_ours, config, params, job, timed_steps(size, job)))
        yield {"size": size, "side": "ours", "found": found}


def run_diffusers(
    config: Config, jobs: dict[str, Job], dtype: str, compiled: bool
) -> Iterator[dict]:
    """Events (see `merge`) of diffusers: every size eager, then every size compiled."""
    # Here, not above: our side's process must not load torch's copies of the CUDA libraries.
    import oracle_model

    yield {"side": "diffusers", "environment": oracle_model.environment()}
    pipeline = oracle_model.build_pipeline(config, dtype, next(iter(jobs.values())))
    for variant in ("eager", "compiled") if compiled else ("eager",):
        if variant == "compiled":
            oracle_model.compile_blocks(pipeline)
        for size, job in jobs.items():
            steps = timed_steps(size, job)
            attempt = partial(oracle_model.measure_job, pipeline, job, steps)
            found = _try(attempt)
            if variant == "compiled" and "error" in found:
                oracle_model.compile_blocks(pipeline, fullgraph=False)
                found = _try(attempt) | {"fullgraph": False}
            yield {"size": size, "side": variant, "found": found}


def _try(measure: Callable[[], dict]) -> dict:
    # One variant that fails (no memory, no compiler) must not cost what comes after it.
    try:
        return measure()
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}


def _send(connection: Connection, run: Callable, *arguments) -> None:
    for event in run(*arguments):
        connection.send(event)


def in_child(run: Callable, *arguments) -> Iterator[dict]:
    """What `run` yields in a fresh process, as it comes; ends when that process does."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, run, *arguments))
    process.start()
    sender.close()
    try:
        while True:
            yield receiver.recv()
    except EOFError:
        process.join()
    if process.exitcode:
        yield {"failed": f"{run.__name__} ended with exit code {process.exitcode}"}


def merge(report: dict, event: dict) -> None:
    """Put an event in its place, and form the ratios anew.

    Events are `{side, environment}`, `{size, side, found}` and `{failed}`.
    """
    if "failed" in event:
        report["failed"].append(event["failed"])
    elif "environment" in event:
        report["environment"][event["side"]] = event["environment"]
    else:
        entry, side, found = report["sizes"][event["size"]], event["side"], event["found"]
        if "error" in found:
            report["failed"].append(f"{event['size']} {side}: {found['error']}")
        else:
            found |= summed(found, entry["job"]["steps"])
        (entry if side == "ours" else entry["diffusers"])[side] = found
        if "ours" in entry:
            entry["ratios"] = ratios(entry["ours"], entry["diffusers"])


def new_report(jobs: dict[str, Job], flags: dict) -> dict:
    """What the file holds, before anything is measured."""
    sizes = {
        size: {
            "job": dataclasses.asdict(job),
            "steps_timed": timed_steps(size, job),
            "total_formed_by": TOTALS["whole" if size in WHOLE else "few"],
            "diffusers": {},
        }
        for size, job in jobs.items()
    }
    notes = {name: TOTALS[name] for name in ("preparation", "text", "ours", "best")}
    return {"sizes": sizes, "notes": notes, "environment": {}, "flags": flags, "failed": []}


def table(report: dict) -> str:
    """A line for each size and side: step, decode, encode, total, peak memory and ratios."""
    lines = [
        "size  side        step s  decode s  encode s   total s  peak GiB  ratio (with encode)"
    ]
    for size, entry in report["sizes"].items():
        rows = {"ours": entry["ours"]} if "ours" in entry else {}
        rows |= entry["diffusers"]
        for name, row in rows.items():
            if "error" in row:
                continue
            columns = ("step_median_seconds", "decode_seconds", "encode_seconds", "total_seconds")
            values = [row.get(column, 0.0) for column in columns] + [row["peak_gib"] or 0.0]
            line = f"{size:5} {name:9} " + " ".join(f"{value:9.3f}" for value in values)
            if name in entry.get("ratios", {}):
                found = entry["ratios"][name]
                line += f"  {found['ratio']:.2f} ({found['ratio_with_preparation']:.2f})"
                if name == entry["ratios"]["compared_with"]:
                    line += " <- compared with"
            lines.append(line)
        if not entry.get("ratios", {}).get("same_work", True):
            lines.append(f"{size:5} THE TWO SIDES DID NOT DO THE SAME WORK")
        lines += [
            f"{size:5} {n}: NOT ALL FINITE" for n, r in rows.items() if not r.get("finite", 1)
        ]
    return "\n".join(lines + report["failed"])


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", default=",".join(bench.SIZES))
    parser.add_argument("--skip-compiled", action="store_true")
    parser.add_argument("--only", choices=("diffusers", "ours"))
    parser.add_argument(
        "--ours", type=Path, help="our side from this file, which `cosmos3-jax bench` just wrote"
    )
    parser.add_argument("--tiny", action="store_true", help="a small job, in place of the sizes")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    config = bench.silent(tiny_config() if options.tiny else Config())
    jobs = {"tiny": TINY_JOB} if options.tiny else bench.jobs(config, sizes=options.sizes)
    report = new_report(jobs, {name: str(value) for name, value in vars(options).items()})
    start = time.perf_counter()
    for name, run in (("ours", run_ours), ("diffusers", run_diffusers)):
        events = in_child(run, config, jobs, "bfloat16", not options.skip_compiled)
        if name == "ours" and options.ours:
            events = read_ours(options.ours, config, jobs)
        elif options.only not in (None, name):
            continue
        if name == "diffusers":
            os.environ["JAX_PLATFORMS"] = "cpu"  # it reads our sizes, and must not take the GPU
        for event in events:
            merge(report, event)
            report["wall_seconds"] = time.perf_counter() - start
            options.out.write_text(json.dumps(report, indent=2) + "\n")
            what = event.get("size", "has started")
            print(f"{report['wall_seconds']:.0f} s: {event.get('side')} {what}", flush=True)
    print(table(report))
    return report


if __name__ == "__main__":
    sys.exit(bool(main()["failed"]))
