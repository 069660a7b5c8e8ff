"""How many steps one program of the loop should hold: seconds and results of several block lengths.

python benchmarks/blocks.py --out FILE.json [--size 256p] [--lengths 1,5,35]

Nano's sizes, random weights. The last length is what the others are compared with: all steps as one
scan. The file is written after every length. `--dry` takes tiny sizes, on any machine.
"""

import argparse
import json

import dry
import jax
import jax.numpy as jnp
import numpy as np

from convert.verify.compare import relative_l2
from cosmos3_jax.cli import bench
from cosmos3_jax.config import Config
from cosmos3_jax.io.media import write_text
from cosmos3_jax.parallel import device
from cosmos3_jax.runtime.measure import Measure, environment
from cosmos3_jax.runtime.random_inputs import random_params
from cosmos3_jax.sampling import stages


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    dry.add_options(parser, "256p")
    parser.add_argument("--steps", type=int, default=35)
    parser.add_argument("--lengths", default="1,5,35", help="%(default)s")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args(arguments)
    config = dry.SILENT if options.dry else Config().silent()
    job = dry.job(options, steps=options.steps)
    dtype = jnp.dtype(device.default_dtype())
    params = jax.block_until_ready(random_params(config, dtype))
    request = jax.device_put(bench.random_request(config, job))
    before, loop = stages.up_to_the_loop()
    values = stages.initial_values(request, output="latents")
    values = stages.walk(values, Measure(params, config, repeats=1), before)
    described = bench.describe(job) | {"repeats": options.repeats}
    record = environment() | {"job": described, "dtype": str(dtype), "lengths": {}}
    latents = {}
    for length in map(int, options.lengths.split(",")):
        measure = Measure(params, config, repeats=options.repeats, block_steps=length)
        latents[length] = np.asarray(measure(loop, values)["latents"]["video"])
        record["lengths"][length] = measure.stages[loop.name]
        for other in latents:
            distance = relative_l2(latents[other], latents[length])
            record["lengths"][other][f"from_{length}"] = distance
        print(length, record["lengths"][length], flush=True)
        write_text(options.out, json.dumps(record, indent=2) + "\n", overwrite=True)


if __name__ == "__main__":
    main()
