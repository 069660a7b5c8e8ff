"""Nano's real sizes on one GPU, random weights: whole jobs at three sizes, and what sound adds.

python benchmarks/full_size.py --out FILE.json [--sizes 256p,480p,720p]
"""

import argparse
import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp

from cosmos3_jax import bench
from cosmos3_jax.config import Config
from cosmos3_jax.generate import encode_conditions, sample_latents

SIZES = {"256p": (192, 320), "480p": (480, 832), "720p": (720, 1280)}
TEXT = {"text_tokens": 300, "negative_tokens": 300}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", default="256p,480p,720p")
    parser.add_argument("--steps", type=int, default=35)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    config = Config()
    params = jax.block_until_ready(bench.random_params(config, jnp.dtype(jnp.bfloat16), True))
    results = {}
    for size in options.sizes.split(","):
        height, width = SIZES[size]
        job = {"num_frames": 189, "height": height, "width": width, "steps": options.steps, **TEXT}
        repeats = 3 if size == "256p" else 1
        results[size] = bench.run_bench(config, params, repeats=repeats, sound=False, **job)
        results[size]["step_seconds_with_sound"] = step_seconds(config, params, job)
        report(size, results[size])
        options.out.write_text(json.dumps(results, indent=2) + "\n")


def step_seconds(config: Config, params: dict, job: dict) -> float:
    """One step of video and sound, warm, from a loop of two."""
    request = bench.random_request(config, **job | {"steps": 2, "sound": True})
    conditions = jax.jit(partial(encode_conditions, config=config))(params["und"], request)
    sample = partial(sample_latents, config=config)
    _, found = bench.measure(sample, params["gen"], conditions, request, repeats=2)
    return found["samples"][-1] / 2


def report(size: str, result: dict) -> None:
    for name, stage in result["stages"].items():
        print(
            f"{size} {name:14} "
            + " ".join(f"{k}={v:.3f}" for k, v in stage.items() if k != "samples")
        )
    print(
        f"{size} whole job {result['seconds']:.2f} s, denoise "
        f"{result['denoise_tflops_per_second']:.0f} TFLOP/s, peak {result['peak_gib']:.1f} GiB "
        f"(estimated {result['estimated_gib']:.1f}), one step with sound "
        f"{result['step_seconds_with_sound']:.3f} s",
        flush=True,
    )


if __name__ == "__main__":
    main()
