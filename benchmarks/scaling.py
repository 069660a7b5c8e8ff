"""One video on 1, 2, 4 devices and several at once: seconds, memory, bytes between devices.

python benchmarks/scaling.py --out FILE.json [--size 720p] [--steps 35] [--num-frames 189]
    [--meshes "one;cfg=2;cfg=2,seq=2;data=4"] [--model nano|super] [--dry]

Random weights of the published sizes; no weights are read.
Of an axis `data`, there are as many prompts. Bytes are what each device sends, counted in the
compiled programs, and beside it what the arithmetic of `sent_on_paper` says. `--dry` takes tiny
sizes, to see that it runs: XLA_FLAGS=--xla_force_host_platform_device_count=4 simulates devices.
"""

import argparse
import dataclasses
import functools
import json
import math
import re
import time
from pathlib import Path

import dry
import jax
import jax.numpy as jnp
import numpy as np

from cosmos3_jax import bench, bench_inputs, sharding, startup, transformer
from cosmos3_jax.bench_measure import GIB, environment, measure
from cosmos3_jax.config import Config
from cosmos3_jax.generate import is_one_batch
from cosmos3_jax.media import write_text
from cosmos3_jax.mesh import make_mesh, parse_mesh
from cosmos3_jax.programs import decode_video, encode_conditions, sample_latents
from cosmos3_jax.request import T2VRequest, initial_noise

NANO = bench_inputs.silent(Config())
SUPER = dataclasses.replace(
    NANO,
    transformer=dataclasses.replace(
        NANO.transformer, hidden_size=5120, num_hidden_layers=64, num_attention_heads=64,
        intermediate_size=25600,
    ),
)  # fmt: skip
MODELS = {"nano": NANO, "super": SUPER}
BLOCK_BITS = 22  # 4 million random weights, which all are taken from
ITEM_BYTES = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "pred": 1, "u8": 1}
KINDS = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(")
weight_shapes = functools.cache(bench_inputs.weight_shapes)  # the same on every mesh
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


def sent_on_paper(config: Config, request: T2VRequest, sizes: dict, itemsize: int) -> dict:
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


def random_params(config: Config, dtype: jnp.dtype, mesh: jax.sharding.Mesh) -> dict:
    """Normal weights, each device's part made by itself: values of one block, in scattered order.

    Drawing 64 billion would take longer than what is measured, and a GPU cannot tell.
    """

    @functools.cache
    def drawing(shape: tuple[int, ...], dtype: jnp.dtype, placed: jax.sharding.Sharding):
        def draw(block: jax.Array, seed: int, mean: float, spread: float) -> jax.Array:
            index = jnp.uint32(seed)
            for axis in range(len(shape)):
                place = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
                index = (index ^ (index >> 15)) * jnp.uint32(0x9E3779B1) + place
            index = (index ^ (index >> 13)) * jnp.uint32(0x85EBCA6B)
            return (mean + spread * block[index >> (32 - BLOCK_BITS)]).astype(dtype)

        return jax.jit(draw, out_shardings=placed)

    block = jax.random.normal(jax.random.key(0), 2**BLOCK_BITS)
    block = jax.device_put(block, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    leaves, tree = jax.tree.flatten_with_path(weight_shapes(config, dtype))
    made = []
    for seed, (path, leaf) in enumerate(leaves):
        name = "/".join(key.key for key in path)
        mean, spread = (1.0, 0.1) if path[-1].key == "scale" else (0.0, 0.02)
        placed = sharding.weight_sharding(mesh, name, leaf.shape)
        made.append(drawing(leaf.shape, leaf.dtype, placed)(block, seed, mean, spread))
    return tree.unflatten(made)


def meet(mesh: jax.sharding.Mesh) -> None:
    """Let the devices find each other: what a first collective does, and no later one."""
    each, all_of_it = (
        jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(axes))
        for axes in (mesh.axis_names, None)
    )
    numbers = jax.device_put(np.arange(mesh.size), each)
    jax.block_until_ready(jax.jit(jnp.copy, out_shardings=all_of_it)(numbers))


def several(config: Config, request: T2VRequest, batch: int) -> T2VRequest:
    """A request for one prompt -> for as many, each with noise of its own."""
    repeat = {
        name: np.repeat(value, batch, axis=0)
        for name in ("text_ids", "text_mask", "neg_text_ids", "neg_text_mask")
        if (value := getattr(request, name)) is not None
    }
    noise = [initial_noise(seed, request.noise.shape[1:]) for seed in range(batch)]
    return request.replace(**repeat, noise=np.stack(noise))


def run(config: Config, job: bench.Job, name: str, dtype: jnp.dtype) -> dict:
    """Every stage of a generation on one mesh, compiled and warm."""
    sizes = {} if name == "one" else parse_mesh(name)
    mesh = make_mesh(sizes, jax.devices()[: math.prod(sizes.values())])
    batch, ways = sizes.get("data", 1), mesh.size
    request = several(config, bench_inputs.random_request(config, job), batch)
    found: dict = {"devices": mesh.size, "prompts": batch, "stages": {}}
    meet(mesh)
    with jax.set_mesh(mesh):
        params = jax.block_until_ready(random_params(config, dtype, mesh))

        def stage(stage_name: str, program, *arguments, **options):
            start = time.perf_counter()
            compiled = program.lower(*arguments, **options).compile()
            compiling = time.perf_counter() - start
            result, ran = measure(compiled, *arguments, repeats=job.repeats)
            sent = sent_bytes(compiled.as_text(), ways)
            found["stages"][stage_name] = ran | {"compile_seconds": compiling, "sent_bytes": sent}
            return result

        conditions = stage("condition", encode_conditions, params["und"], request, config=config)
        latents, _ = stage(
            "denoise", sample_latents, params["gen"], conditions, request, config=config
        )
        options = {"config": config.video_vae, "chunk_size": job.decode_chunk_size}
        stage("decode", decode_video, params["video_vae"], latents["video"], **options)
    found["stages"]["denoise"]["sent_bytes_on_paper"] = sent_on_paper(
        config, request, sizes, jnp.dtype(dtype).itemsize
    )
    found["seconds"] = sum(x["seconds"] for x in found["stages"].values())
    peaks = [(d.memory_stats() or {}).get("peak_bytes_in_use", 0) for d in mesh.devices.flat]
    found["peak_gib_so_far"] = max(peaks) / GIB
    leaves = jax.tree.leaves(params)
    found["weights_gib"] = sum(x.addressable_shards[0].data.nbytes for x in leaves) / GIB
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", choices=bench.SIZES, default="720p")
    parser.add_argument("--num-frames", type=int, default=189)
    parser.add_argument("--steps", type=int, default=35)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--meshes", default="one;cfg=2;cfg=2,seq=2;seq=4;data=4", help="%(default)s"
    )
    parser.add_argument("--model", choices=MODELS, default="nano")
    parser.add_argument("--dry", action="store_true", help="tiny sizes")
    options = parser.parse_args(arguments)
    height, width = (dry.HEIGHT, dry.WIDTH) if options.dry else bench.SIZES[options.size]
    config = dry.SILENT if options.dry else MODELS[options.model]
    job = bench.Job(
        num_frames=dry.FRAMES if options.dry else options.num_frames, height=height, width=width,
        steps=options.steps, repeats=options.repeats,
    )  # fmt: skip
    dtype = jnp.dtype(startup.default_dtype())
    record = environment() | {"job": dataclasses.asdict(job), "dtype": str(dtype)}
    record |= {"model": "dry" if options.dry else options.model, "runs": {}}
    for name in options.meshes.split(";"):
        found = run(config, job, name, dtype)
        alone = record["runs"].get("one")
        if alone:
            speed = found["prompts"] * alone["seconds"] / found["seconds"]
            found |= {"speed_up": speed, "efficiency": speed / found["devices"]}
        record["runs"][name] = found
        sent = {k: v for k, v in found["stages"]["denoise"]["sent_bytes"].items() if v}
        paper = found["stages"]["denoise"]["sent_bytes_on_paper"]
        print(f"{name}: {found['seconds']:.2f} s, sent {sent}, on paper {paper}", flush=True)
        write_text(options.out, json.dumps(record, indent=2) + "\n", overwrite=True)


if __name__ == "__main__":
    main()
