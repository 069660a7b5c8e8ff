"""Write a checkpoint of Nano's sizes with random weights, in the converted layout: 29 GiB of it.

python benchmarks/random_checkpoint.py FOLDER [--dry]

For what needs files rather than arrays: loading, `--offload`, the whole command line. The tokenizer
is that of `random`. Weights repeat a block of normal values: a GPU cannot tell, and to draw
16 billion would take minutes. It needs no GPU.
`--dry` writes tiny sizes, for the dry runs of `loading.py` and `image_to_video.py`.
"""

import argparse
import dataclasses
import json
import math
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import dry
import ml_dtypes
import numpy as np

from cosmos3_jax.checkpoint.files import CONVERTED_STEM, plan_shards, write_index, write_shard
from cosmos3_jax.checkpoint.layouts import layouts
from cosmos3_jax.checkpoint.load import TOKENIZER_FOLDER, converted_layout
from cosmos3_jax.checkpoint.rules import Layout
from cosmos3_jax.checkpoint.tiny_tokenizer import write_tokenizer
from cosmos3_jax.config import Config
from cosmos3_jax.runtime.random_inputs import distribution

WRITERS = 8
BLOCK = np.random.RandomState(0).standard_normal(2**22 + 1).astype(np.float32)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dry", action="store_true", help="tiny sizes")
    options, start = parser.parse_args(arguments), time.perf_counter()
    folder = options.folder
    size = write_random_checkpoint(folder, dry.CONFIG if options.dry else Config())
    seconds = time.perf_counter() - start
    print(f"wrote {size / 2**30:.1f} GiB to {folder} in {seconds:.0f} s")


def write_random_checkpoint(folder: Path, config: Config) -> int:
    """Write configurations, tokenizer and weights; the bytes of the weights."""
    configs = {
        "transformer": config.transformer,
        "vae": config.video_vae,
        "sound_tokenizer": config.sound_vae,
    }
    size = 0
    # Not forked: JAX has threads by now.
    with ProcessPoolExecutor(WRITERS, multiprocessing.get_context("spawn")) as pool:
        for name, (layout, leaves) in layouts(config).items():
            (folder / name).mkdir(parents=True)
            text = json.dumps(dataclasses.asdict(configs[name]), indent=2)
            (folder / name / "config.json").write_text(text + "\n")
            size += _write_component(pool, folder / name, layout, leaves)
    write_tokenizer(folder / TOKENIZER_FOLDER)
    return size


def _write_component(
    pool: ProcessPoolExecutor, folder: Path, public: Layout, leaves: dict[str, tuple[int, ...]]
) -> int:
    shapes = {
        rule.keys[0]: leaves[rule.leaf][len(rule.index) :]
        for rule in converted_layout(public, leaves).rules
    }
    dtypes = {
        key: np.dtype(np.float32 if key.startswith(public.float32) else ml_dtypes.bfloat16)
        for key in shapes
    }
    sizes = {key: math.prod(shape) * dtypes[key].itemsize for key, shape in shapes.items()}
    shards = plan_shards(CONVERTED_STEM, sizes)
    list(pool.map(partial(_write, folder, shapes, dtypes), *zip(*shards.items(), strict=True)))
    write_index(folder, CONVERTED_STEM, shards, sizes)
    return sum(sizes.values())


def _write(folder: Path, shapes: dict, dtypes: dict, name: str, keys: list[str]) -> None:
    tensors = {}
    for key in keys:
        mean, spread = distribution(key)
        block = (mean + spread * BLOCK).astype(dtypes[key])
        tensors[key] = np.resize(block, shapes[key])
    write_shard(folder / name, tensors)


if __name__ == "__main__":
    main()
