"""How fast a checkpoint reaches the device, part by part, and beside what the machine can do; and
what it costs to look whether its numbers are finite.

python benchmarks/loading.py FOLDER --out FILE.json [--dry]

The files are read once before, so that they come from memory if there is enough of it: what is
timed is our own work and the link to the device, not the disk. (A cold disk is slower than both.)
`--dry` is for a tiny folder: it sends little over the link.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from unittest import mock

import jax
import numpy as np

from cosmos3_jax.checkpoint import files
from cosmos3_jax.checkpoint.find import open_folder
from cosmos3_jax.parallel import device
from cosmos3_jax.runtime.measure import GIB, environment
from cosmos3_jax.runtime.weights import Weights

LINK_BYTES = GIB
DRY_LINK_BYTES = 2**20
READ_BYTES = 2**24
LOOKS = 3  # loads of all parts with and without a look at the numbers, in turn


def read_all(folder: Path) -> dict[str, float]:
    """Read each weight file in one thread; the rate, which is the disk's or the page cache's."""
    start, size = time.perf_counter(), 0
    for path in sorted(folder.rglob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while block := file.read(READ_BYTES):
                size += len(block)
    return rate(size, time.perf_counter() - start)


def link(size: int) -> dict[str, float]:
    """The rate of one large array from ordinary host memory to the device, after one to warm up."""
    values = np.ones(size, np.uint8)
    for _ in range(2):
        start = time.perf_counter()
        jax.device_put(values).block_until_ready()
        seconds = time.perf_counter() - start
    return rate(size, seconds)


def rate(size: int, seconds: float) -> dict[str, float]:
    return {"gib": size / GIB, "seconds": seconds, "gib_per_second": size / GIB / seconds}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="a checkpoint")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dry", action="store_true", help="little over the link")
    options = parser.parse_args(arguments)
    found = {"first read": read_all(options.folder), "second read": read_all(options.folder)}
    config, _ = open_folder(options.folder)
    found["link"] = link(DRY_LINK_BYTES if options.dry else LINK_BYTES)
    weights = Weights.of_checkpoint(options.folder, config, "bfloat16", offload=True)
    for part in weights.parts:
        start = time.perf_counter()
        with weights.borrow(part) as tree:
            size = sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
            found[part] = rate(size, time.perf_counter() - start)
        del tree
    alone = device.memory_peak()
    seconds: dict[str, list[float]] = {"all": [], "all, not looked at": []}
    for _ in range(LOOKS):
        for name, looks in (("all", files.is_finite), ("all, not looked at", lambda values: True)):
            weights = Weights.of_checkpoint(options.folder, config, "bfloat16", offload=True)
            start = time.perf_counter()
            with mock.patch.object(files, "is_finite", looks):
                leaves = jax.tree.leaves(weights.all())
            seconds[name].append(time.perf_counter() - start)
            size = sum(leaf.nbytes for leaf in leaves)
            del weights, leaves
    found |= {name: rate(size, statistics.median(all_of)) for name, all_of in seconds.items()}
    peaks = {"one part at a time": alone, "all": device.memory_peak()}
    record = environment() | {
        "rates": found,
        "peak_gib": {k: v and v / GIB for k, v in peaks.items()},
    }
    options.out.write_text(json.dumps(record, indent=2) + "\n")
    for name, values in found.items():
        print(
            f"{name:18} {values['gib']:7.2f} GiB {values['seconds']:7.2f} s "
            f"{values['gib_per_second']:7.2f} GiB/s"
        )
    print(record["peak_gib"])


if __name__ == "__main__":
    main()
