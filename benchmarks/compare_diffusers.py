"""The same text-to-video job here and through diffusers' pipeline, one after the other on one GPU.

python benchmarks/compare_diffusers.py --out FILE.json [--sizes 256p,480p,720p] [--skip-compiled]
    [--only diffusers|ours] [--ours BENCH.json] [--dry]

Full-size random weights, 189 frames, 300 text tokens in either branch, guidance 6, 35 steps. Each
side has a process of its own, so that each has the whole GPU. The file is rewritten after every
result: a run that is cut short keeps what it has.
"""

import argparse
import json
import math
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import jax
import jax.numpy as jnp
from compare_report import VARIANTS, merge, new_report, table

from cosmos3_jax.checkpoint import random_checkpoint
from cosmos3_jax.cli import bench
from cosmos3_jax.config import Config, TransformerConfig, VideoVAEConfig
from cosmos3_jax.models import transformer
from cosmos3_jax.models.video_vae import pixel_to_latent_shape
from cosmos3_jax.runtime.job import Job
from cosmos3_jax.runtime.measure import Measure, device_peak_gib, environment
from cosmos3_jax.runtime.random_inputs import random_params
from cosmos3_jax.sampling import stages

TINY = "64x96"  # as `cosmos3-jax bench` names the size
TINY_JOB = Job(num_frames=9, height=64, width=96, steps=2, text_tokens=41, negative_tokens=37)
WHOLE = ("256p", TINY)  # sizes whose loop is timed from end to end
FEW = 3  # steps timed at the other sizes; diffusers' after one to warm up
DTYPE = "bfloat16"


def tiny_config() -> Config:
    """The sizes of `random`: for a look at the whole path in seconds."""
    return Config(
        transformer=TransformerConfig.from_dict(
            random_checkpoint.TRANSFORMER | {"vocab_size": 512}
        ),
        video_vae=VideoVAEConfig.from_dict(random_checkpoint.VIDEO_VAE),
    )


def timed_steps(size: str, job: Job) -> int:
    return job.steps if size in WHOLE else min(FEW, job.steps)


def measure_ours(config: Config, params: dict, job: Job, run_steps: int) -> dict:
    """Measure one job here, warm; `run_steps` of its steps, in one loop."""
    request = bench.random_request(config, job.replace(steps=run_steps))
    measure = Measure(params, config, repeats=1)
    values = stages.walk(stages.initial_values(jax.device_put(request)), measure)
    found, made = measure.stages, (values["video"], values["latents"]["video"])
    return {
        "condition_seconds": found["condition"]["seconds"],
        "loop_samples": found["denoise"]["samples"],
        "decode_samples": found["video decode"]["samples"],
        "compile_seconds": sum(stage["compile_seconds"] for stage in found.values()),
        "finite": all(bool(jnp.isfinite(x).all()) for x in made),
        "peak_gib": device_peak_gib(),
        **passes_run(config, job, run_steps),
    }


def passes_run(config: Config, job: Job, run_steps: int) -> dict:
    """What our side does in `run_steps` steps of a job; `work` is what both have to do alike."""
    shape = pixel_to_latent_shape(config.video_vae, job.num_frames, job.height, job.width)
    branches = 1 + (job.negative_tokens > 0)
    return {
        "steps_timed": run_steps,
        "passes": run_steps * branches,
        "work": {
            "text_tokens": job.text_tokens,
            "negative_tokens": job.negative_tokens,
            "video_tokens": math.prod(transformer.patch_grid(config.transformer, shape)),
            "video": [job.num_frames, job.height, job.width],
            "passes_per_step": branches,
        },
    }


def bench_options(jobs: dict[str, Job]) -> str:
    """The options by which `cosmos3-jax bench` runs the same jobs, on weights of the same sizes."""
    if TINY not in jobs:
        return f"--random nano --dtype {DTYPE} --size {','.join(jobs)}"
    names = ("num_frames", "height", "width", "fps", "steps", "text_tokens", "negative_tokens")
    sizes = (f"--{name.replace('_', '-')} {getattr(jobs[TINY], name)}" for name in names)
    return f"--checkpoint {random_checkpoint.NAME} --dtype {DTYPE} {' '.join(sizes)}"


def read_ours(path: Path, config: Config, jobs: dict[str, Job]) -> Iterator[dict]:
    """Events (see `compare_report`) of our side from a file of `cosmos3-jax bench`: whole jobs.

    Raises:
        ValueError: other weights, another dtype or another job than diffusers will have.
    """
    report = json.loads(path.read_text())

    def require(name: str, found, wanted) -> None:
        if found != wanted:
            raise ValueError(
                f"{path}: {name} is {found!r}, must be {wanted!r}: make a file by "
                f"`cosmos3-jax bench {bench_options(jobs)} --out FILE.json`"
            )

    require(
        "weights", report.get("weights"), random_checkpoint.NAME if TINY in jobs else "random nano"
    )
    require("dtype", report.get("dtype"), DTYPE)
    results = report.get("results", {})
    require("the list of sizes", [size for size in jobs if size in results], list(jobs))
    yield {"side": "ours", "environment": {k: v for k, v in report.items() if k != "results"}}
    for size, job in jobs.items():
        found = results[size]
        for name, wanted in bench.describe(job).items():
            require(f"{name} at {size}", found["job"].get(name), wanted)
        stages = found["stages"]
        yield {"size": size, "side": "ours", "found": {
            "condition_seconds": stages["condition"]["seconds"],
            "loop_samples": stages["denoise"]["samples"],
            "decode_samples": stages["video decode"]["samples"],
            "peak_gib": found["peak_gib"],
            **passes_run(config, job, job.steps),
        }}  # fmt: skip


def run_ours(config: Config, jobs: dict[str, Job], dtype: str, compiled: bool) -> Iterator[dict]:
    """Events (see `compare_report`) of our side, smallest size first: peak memory never falls."""
    yield {"side": "ours", "environment": environment()}
    params = jax.block_until_ready(random_params(config, jnp.dtype(dtype)))
    for size, job in jobs.items():
        found = or_error(partial(measure_ours, config, params, job, timed_steps(size, job)))
        yield {"size": size, "side": "ours", "found": found}


def run_diffusers(
    config: Config, jobs: dict[str, Job], dtype: str, compiled: bool
) -> Iterator[dict]:
    """Events (see `compare_report`) of diffusers: every size eager, then every size compiled."""
    # Here, not above: our side's process must not load torch's copies of the CUDA libraries.
    import oracle_model

    yield {"side": "diffusers", "environment": oracle_model.environment()}
    pipeline = oracle_model.build_pipeline(config, dtype, next(iter(jobs.values())))
    for variant in VARIANTS if compiled else VARIANTS[:1]:
        if variant == "compiled":
            oracle_model.compile_blocks(pipeline)
        for size, job in jobs.items():
            steps = timed_steps(size, job)
            attempt = partial(oracle_model.measure_job, pipeline, job, steps)
            found = or_error(attempt)
            if variant == "compiled" and "error" in found:
                oracle_model.compile_blocks(pipeline, fullgraph=False)
                found = or_error(attempt) | {"fullgraph": False}
            yield {"size": size, "side": variant, "found": found}


def or_error(measure: Callable[[], dict]) -> dict:
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


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", default=",".join(bench.SIZES))
    parser.add_argument("--skip-compiled", action="store_true")
    parser.add_argument("--only", choices=("diffusers", "ours"))
    parser.add_argument(
        "--ours", type=Path, help="our side from this file of `cosmos3-jax bench`, from this device"
    )
    parser.add_argument("--dry", action="store_true", help="a tiny job, in place of the sizes")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    config = (tiny_config() if options.dry else Config()).silent()
    jobs = {TINY: TINY_JOB} if options.dry else bench.jobs(config, sizes=options.sizes)
    flags = {k: v.name if isinstance(v, Path) else str(v) for k, v in vars(options).items()}
    report = new_report(jobs, flags)
    start = time.perf_counter()
    for name, run in (("ours", run_ours), ("diffusers", run_diffusers)):
        events = in_child(run, config, jobs, DTYPE, not options.skip_compiled)
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
