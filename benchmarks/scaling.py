"""One video on 1, 2, 4 devices and several at once: seconds, memory, bytes between devices.

python benchmarks/scaling.py --out FILE.json [--size 256p,480p,720p] [--speed exact,fast]
    [--meshes "one;one@1;cfg=2;cfg=2,seq=2;data=4"] [--steps 35] [--num-frames 189]
    [--model nano|super] [--dry]

Random weights of the published sizes; no weights are read. `one@1` is one device, the second.
Of an axis `data`, there are as many prompts. A row is written as soon as it is there, and a file
that is there is gone on with. What a mesh gains is told against the slowest single device of the
same machine. Bytes are what each device sends, counted in the compiled programs, and beside it what
the arithmetic of `sent_on_paper` says. `--dry` takes tiny sizes, to see that it runs:
XLA_FLAGS=--xla_force_host_platform_device_count=4 simulates devices.
"""

import argparse
import dataclasses
import json
import math
import re

import dry
import jax
import jax.numpy as jnp
import numpy as np

from cosmos3_jax.cli import bench
from cosmos3_jax.config import Config
from cosmos3_jax.io.media import write_text
from cosmos3_jax.models import transformer
from cosmos3_jax.parallel import device
from cosmos3_jax.parallel.mesh import make_mesh, parse_mesh
from cosmos3_jax.runtime.job import Job
from cosmos3_jax.runtime.measure import GIB, Measure, environment
from cosmos3_jax.runtime.programs import block_length
from cosmos3_jax.runtime.random_inputs import random_params
from cosmos3_jax.sampling import stages
from cosmos3_jax.sampling.denoise import is_one_batch
from cosmos3_jax.sampling.request import Request, initial_noise

NANO = Config().silent()
SUPER = dataclasses.replace(
    NANO,
    transformer=dataclasses.replace(
        NANO.transformer, hidden_size=5120, num_hidden_layers=64, num_attention_heads=64,
        intermediate_size=25600,
    ),
)  # fmt: skip
MODELS = {"nano": NANO, "super": SUPER}
ITEM_BYTES = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "pred": 1, "u8": 1}
KINDS = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(")
ALONE = re.compile(r"one(@(?P<first>\d+))?")  # a device alone, by its number
CALLED = re.compile(r"(body|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")


def sent_bytes(text: str, ways: int) -> dict[str, int]:
    """Bytes that a device sends in a compiled program, by kind of collective.

    Args:
        text: of the program. What a loop holds counts as often as it runs.
        ways: devices in a group of a gather. Of what it ends with, each sent its share to every
            other.
    """
    computations: dict[str, list[str]] = {}
    name = entry = ""
    for line in text.splitlines():
        if match := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
            name = match[2]
            entry = name if match[1] else entry
            computations[name] = []
        elif name:
            computations[name].append(line)
    sent = dict.fromkeys(KINDS, 0)

    def visit(name: str, times: int) -> None:
        for line in computations.get(name, []):
            trips = re.search(r"known_trip_count[^\d]*(\d+)", line)
            for how, called in CALLED.findall(line):
                visit(called, times * (int(trips[1]) if how == "body" and trips else 1))
            if match := COLLECTIVE.search(line):
                kind, arrays = match[2], re.findall(r"(\w+)\[([\d,]*)\]", match[1])
                sizes = [
                    ITEM_BYTES.get(dtype, 4) * math.prod(map(int, filter(None, shape.split(","))))
                    for dtype, shape in arrays
                ]
                size = sum(sizes)
                if match[3]:  # begun and ended apart, it also names what it starts from
                    size = size / 2 if kind == "all-to-all" else max(sizes)
                n = group_size(line) or ways
                share = 1 if kind == "collective-permute" else (n - 1) / max(n, 1)
                sent[kind] += int(times * size * share * (2 if kind == "all-reduce" else 1))

    visit(entry, 1)
    return sent


def group_size(line: str) -> int | None:
    """How many devices take part in a collective together, in any of XLA's three notations."""
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return len(match[1].split(","))
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]", line):
        return int(match[2])
    if match := re.search(r"replica_groups=mesh\[(.*?)\][^{]*\{(.*?)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        return math.prod(int(sizes[name]) for name in re.findall(r"'(\w+)'", match[2]))
    return None


def sent_on_paper(config: Config, request: Request, sizes: dict, itemsize: int) -> dict:
    """The same for the loop over steps, by arithmetic: what tokens, branches and weights cost."""
    model, steps = config.transformer, request.num_inference_steps
    grid = transformer.patch_grid(model, request.video_shape)
    ways = sizes.get("seq", 1) * sizes.get("fsdp", 1)
    prompts = len(request.text_ids) // sizes.get("data", 1)
    branches = 2 // sizes.get("cfg", 1)
    tokens = -(-math.prod(grid) // ways)  # on each device
    heads = 2 * model.num_attention_heads + 2 * model.num_key_value_heads  # q and mixed; k and v
    moved = branches * prompts * tokens * heads * model.head_dim * itemsize
    velocity = branches * prompts * tokens * ways * model.patch_latent_dim * itemsize
    latents = 2 * prompts * math.prod(request.video_shape) * model.latent_channel * itemsize
    gathered = latents / 2 if sizes.get("cfg", 1) == 2 else 0
    weights, fsdp = 0, sizes.get("fsdp", 1)
    if fsdp > 1:
        shapes = transformer.param_shapes(model)["gen"]
        passes = 1 if is_one_batch(len(request.text_ids) * math.prod(grid), sizes) else 2
        weights = passes * itemsize * sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))
    return {
        "all-to-all": int(steps * model.num_hidden_layers * moved * (ways - 1) / ways),
        "all-gather": int(
            steps * (velocity * (ways - 1) / ways + gathered + weights * (fsdp - 1) / fsdp)
        ),
    }


def meet(mesh: jax.sharding.Mesh) -> None:
    """Let the devices find each other: what a first collective does, and no later one."""
    each, all_of_it = (
        jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(axes))
        for axes in (mesh.axis_names, None)
    )
    numbers = jax.device_put(np.arange(mesh.size), each)
    jax.block_until_ready(jax.jit(jnp.copy, out_shardings=all_of_it)(numbers))


def several(config: Config, request: Request, batch: int) -> Request:
    """A request for one prompt -> for as many, each with noise of its own."""
    repeat = {
        name: np.repeat(value, batch, axis=0)
        for name in ("text_ids", "text_mask", "neg_text_ids", "neg_text_mask")
        if (value := getattr(request, name)) is not None
    }
    noise = [initial_noise(seed, request.noise.shape[1:]) for seed in range(batch)]
    return request.replace(**repeat, noise=np.stack(noise))


def run(config: Config, job: Job, name: str, dtype: jnp.dtype, repeats: int) -> dict:
    """Every stage of a generation on one mesh, compiled and warm."""
    sizes, first = {}, 0
    if alone := ALONE.fullmatch(name):
        first = int(alone["first"] or 0)
    else:
        sizes = parse_mesh(name)
    mesh = make_mesh(sizes, jax.devices()[first : first + math.prod(sizes.values())])
    request = several(config, bench.random_request(config, job), sizes.get("data", 1))

    def sent(stage: stages.Stage, programs: list[jax.stages.Compiled]) -> dict:
        [program] = programs
        times = job.steps // block_length(job.steps) if stage.loop else 1
        found = sent_bytes(program.as_text(), mesh.size)
        return {"sent_bytes": {kind: times * size for kind, size in found.items()}}

    meet(mesh)
    with jax.set_mesh(mesh):
        params = jax.block_until_ready(random_params(config, dtype, mesh))
        measure = Measure(params, config, repeats=repeats, inspect=sent)
        values = stages.initial_values(request, decode_chunk_size=job.decode_chunk_size)
        stages.walk(values, measure)
    found = {"devices": mesh.size, "prompts": len(request.text_ids), "stages": measure.stages}
    found["stages"]["denoise"]["sent_bytes_on_paper"] = sent_on_paper(
        config, request, sizes, jnp.dtype(dtype).itemsize
    )
    found["seconds"] = sum(x["seconds"] for x in found["stages"].values())
    peaks = [(d.memory_stats() or {}).get("peak_bytes_in_use", 0) for d in mesh.devices.flat]
    found["peak_gib_so_far"] = max(peaks) / GIB
    leaves = jax.tree.leaves(params)
    found["weights_gib"] = sum(x.addressable_shards[0].data.nbytes for x in leaves) / GIB
    return found


def compare(runs: dict[str, dict]) -> None:
    """Write into every run what it gains on the slowest device alone, of the same job and machine:
    videos in the same time, of each stage and of all.
    """
    for run in runs.values():
        alone = [
            x for key, x in runs.items()
            if ALONE.fullmatch(key.rpartition(" ")[2])
            and (x["job"], x["machine"]) == (run["job"], run["machine"])
        ]  # fmt: skip
        if alone and run["devices"] > 1:
            slowest = max(alone, key=lambda x: x["seconds"])
            speed = run["prompts"] * slowest["seconds"] / run["seconds"]
            run |= {"speed_up": speed, "efficiency": speed / run["devices"]}
            for name, stage in run["stages"].items():
                before = slowest["stages"][name]["seconds"]
                stage["speed_up"] = run["prompts"] * before / stage["seconds"]


def begin_record(options: argparse.Namespace, dtype: str) -> dict:
    """What is there of the same options, or nothing yet."""
    kept = ("steps", "num_frames", "repeats", "dry")
    asked = {name: getattr(options, name) for name in kept}
    asked |= {"model": "dry" if options.dry else options.model, "dtype": dtype}
    if options.out.is_file():
        record = json.loads(options.out.read_text(encoding="utf-8"))
        if record["options"] != asked:
            raise ValueError(f"{options.out} is of {record['options']}: choose another --out")
        return record
    return {"options": asked, "machines": {}, "runs": {}}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    dry.add_options(parser, "720p", several=True)
    parser.add_argument("--speed", default="exact", help="exact, fast or exact,fast")
    parser.add_argument("--steps", type=int, default=35)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--meshes", default="one;cfg=2;cfg=2,seq=2;seq=4;data=4", help="%(default)s"
    )
    parser.add_argument("--model", choices=MODELS, default="nano")
    options = parser.parse_args(arguments)
    config = dry.SILENT if options.dry else MODELS[options.model]
    sizes = dry.SIZE if options.dry else {"sizes": options.size, "num_frames": options.num_frames}
    jobs = bench.jobs(config, speeds=options.speed, steps=options.steps, **sizes)
    dtype = jnp.dtype(device.default_dtype())
    record, here = begin_record(options, str(dtype)), environment()
    record["machines"][str(here["machine"])] = here
    for size, job in jobs.items():
        for name in options.meshes.split(";"):
            key = f"{size} {name}"
            if key in record["runs"]:
                continue
            found = run(config, job, name, dtype, options.repeats)
            found |= {"job": bench.describe(job), "machine": str(here["machine"])}
            record["runs"][key] = found
            compare(record["runs"])
            write_text(options.out, json.dumps(record, indent=2) + "\n", overwrite=True)
            sent = {k: v for k, v in found["stages"]["denoise"]["sent_bytes"].items() if v}
            paper = found["stages"]["denoise"]["sent_bytes_on_paper"]
            gained = found.get("speed_up", math.nan)
            print(
                f"{key}: {found['seconds']:.2f} s, {gained:.2f} of one, sent {sent}, on paper "
                f"{paper}",
                flush=True,
            )


if __name__ == "__main__":
    main()
