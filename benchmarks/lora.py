"""A LoRA at Nano's size: seconds, tokens and memory of a training step, and its share of the chips.

python benchmarks/lora.py --out FILE.json [--size 480p] [--num-frames 189] [--batch 1] [--rank 16]
    [--mesh data=2] [--apart] [--repeats 7] [--dry]

Random weights of the published sizes; no weights are read. The adapter is one pair of matrices for
each linear map of the media tower's layers; all else is frozen, in bfloat16. The rate of 8192^3
products is measured before and after, in the same process. `--dry` takes tiny sizes, to see that it
runs.
"""

import argparse
import json
import math
import statistics
import time
from functools import partial

import dry
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from scaling import NANO, meet

from cosmos3_jax.checkpoint import lora
from cosmos3_jax.cli import bench
from cosmos3_jax.config import Config, TransformerConfig
from cosmos3_jax.io.media import write_text
from cosmos3_jax.models import transformer
from cosmos3_jax.parallel import device, sharding
from cosmos3_jax.parallel.mesh import make_mesh, parse_mesh
from cosmos3_jax.runtime.job import Job
from cosmos3_jax.runtime.measure import GIB, device_peak_gib, environment
from cosmos3_jax.runtime.random_inputs import random_params
from cosmos3_jax.sampling.request import Request
from cosmos3_jax.training import placement
from cosmos3_jax.training.flow import Batch, NoiseLevels
from cosmos3_jax.training.step import TrainOptions, TrainState, init_state, make_train_step

WARM_UP = 3  # steps: B is zero in the first, and a zero costs less power
PRODUCT = 8192  # rows and columns of the products whose rate is the chip's
CHAIN = 200  # products of one sample: 0.3 s, in which clocks settle
# How often the backward pass runs attention's forward again: see `attention.keeps_attention`.
ATTENTION_AGAIN = 0


def step_flops(config: Config, request: Request, adapter: lora.Lora) -> dict[str, float]:
    """Arithmetic of one step of one example, by what it is for. A multiplication and an addition
    are two.

    A frozen product y = x W is run once forwards and once backwards, dx = dy W^T: there is no dW,
    so its backward pass costs 1 of its forward, not 2. Attention has no weights and gradients of
    all three arrays, four products for two: 2 of its forward. B (A x) has both: 2.

    Returns:
        `useful`, the sum of `forward`, `backward`, `text` and `lora`; and `again`, what the
        backward pass computes for a second time: of each layer all products but the MLP's last,
        whose result nothing reads; attention `ATTENTION_AGAIN` times, and its logits once more,
        half of it.
    """
    model = config.transformer
    forward = bench.denoise_flops(
        config, request.replace(neg_text_ids=None, neg_text_mask=None, num_inference_steps=1)
    )
    tokens = math.prod(transformer.patch_grid(model, request.video_shape)) + request.sound_frames
    text, depth = float(np.sum(request.text_mask)), model.num_hidden_layers
    heads = model.num_attention_heads * model.head_dim
    attention = depth * 4 * heads * tokens * (tokens + text)
    down = depth * tokens * 2 * model.hidden_size * model.intermediate_size
    layers = depth * tokens * products_of_a_layer(model)
    pairs = sum(x.size for pair in adapter.adapters.values() for x in pair.values())
    flops = {
        "forward": forward,
        "backward": forward + attention,
        "text": (depth - 1) * text * (products_of_a_layer(model) + 2 * heads * text),
        "lora": 3 * 2 * pairs * tokens,
    }
    again = layers - down + ATTENTION_AGAIN * attention + attention / 2 + 2 * pairs * tokens
    return flops | {"useful": sum(flops.values()), "again": again}


def products_of_a_layer(model: TransformerConfig) -> float:
    """Of one token, in either tower."""
    heads, kv_heads = model.num_attention_heads, model.num_key_value_heads
    attention = 2 * model.head_dim * (heads + kv_heads)
    return 2 * model.hidden_size * (attention + 3 * model.intermediate_size)


def random_towers(config: Config, dtype: jnp.dtype, apart: bool, mesh: Mesh) -> dict:
    """Both towers as training holds them: layers stacked, unless they are to be `apart`."""
    params = random_params(config, dtype, mesh)
    towers = {name: params[name] for name in ("und", "gen")}
    del params
    if not apart:
        layers = towers["gen"]["layers"]
        lists = [jax.tree.leaves(layers[str(i)]) for i in range(len(layers))]
        tree = jax.tree.structure(layers["0"])
        towers["gen"]["layers"] = layers = None
        stacked = []
        for j in range(tree.num_leaves):  # one kind at a time, so that little is there twice
            stacked.append(jax.block_until_ready(jnp.stack([leaves[j] for leaves in lists])))
            for leaves in lists:
                leaves[j] = None
        towers["gen"]["layers"] = tree.unflatten(stacked)
    return sharding.place_params(towers, mesh)


def make_batch(config: Config, request: Request, count: int) -> Batch:
    """Random latents, and one prompt for all, on the host."""
    shape = (count, *request.video_shape, config.transformer.latent_channel)
    video = np.random.RandomState(0).standard_normal(shape).astype(np.float32)
    ids, mask = (np.repeat(x, count, axis=0) for x in (request.text_ids, request.text_mask))
    return Batch(ids, mask, video, fps=request.fps)


def product_rate(size: int, dtype: jnp.dtype, repeats: int = 5) -> float:
    """TFLOP/s of products of random square matrices, each with the result of the one before."""

    @jax.jit
    def chain(x, w):
        return jax.lax.fori_loop(0, CHAIN, lambda _, x: x @ w, x)

    x, w = (jax.random.normal(jax.random.key(i), (size, size), dtype) for i in range(2))
    w = w * size**-0.5  # the values keep their spread
    samples = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        jax.block_until_ready(chain(x, w))
        samples.append(time.perf_counter() - start)
    return 2 * size**3 * CHAIN / statistics.median(samples[1:]) / 1e12


def run(
    config: Config, job: Job, options: argparse.Namespace, dtype: jnp.dtype, mesh: Mesh
) -> dict:
    """Compile a step, take a few, and say what they took; on the mesh, which is the ambient one."""
    request = bench.random_request(config, job)
    examples = options.batch * sharding.num_shards(sharding.PROMPTS)
    batch = placement.place_batch(make_batch(config, request, examples), mesh)
    size = 128 if options.dry else PRODUCT
    rates = [product_rate(size, dtype)]
    meet(mesh)
    frozen = random_towers(config, dtype, options.apart, mesh)
    adapter = lora.init(jax.random.key(0), config.transformer, rank=options.rank)
    flops = {k: examples * v for k, v in step_flops(config, request, adapter).items()}
    optimizer = optax.adamw(1e-4)
    settings = TrainOptions(levels=NoiseLevels(shift=3.0), dtype=str(dtype))
    combine = partial(lora.attach, config=config.transformer)
    step = make_train_step(config.transformer, optimizer, settings, combine)
    state = init_state(adapter, optimizer, jax.random.key(1))
    del adapter
    start = time.perf_counter()
    program = step.lower(state, frozen, batch).compile()
    compiling = time.perf_counter() - start
    state, losses, samples = take_steps(program, state, frozen, batch, WARM_UP + options.repeats)
    samples = samples[WARM_UP:]
    lora.check_changes(state.params)
    rates.append(product_rate(size, dtype))
    seconds, peak = statistics.median(samples), mesh.size * max(rates)
    analysis = program.memory_analysis()
    video = math.prod(transformer.patch_grid(config.transformer, request.video_shape))
    executed = flops["useful"] + flops["again"]
    return {
        "devices": mesh.size,
        "video_tokens": examples * video,
        "text_tokens": examples * job.text_tokens,
        "adapter_values": sum(x.size for x in jax.tree.leaves(state.params)),
        "compile_seconds": compiling,
        "seconds": seconds,
        "samples": samples,
        "losses": losses,
        "tokens_per_second": examples * video / seconds,
        "tflop": {name: value / 1e12 for name, value in flops.items()},
        "tflops_per_second": flops["useful"] / seconds / 1e12,
        "tflops_per_second_remat_counted": executed / seconds / 1e12,
        "product_tflops_per_second": rates,
        "share_of_products": flops["useful"] / seconds / 1e12 / peak,
        "share_of_products_remat_counted": executed / seconds / 1e12 / peak,
        "frozen_gib": sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(frozen))
        / GIB,
        "temporary_gib": analysis.temp_size_in_bytes / GIB,
        "peak_gib": device_peak_gib(),
    }


def take_steps(
    program, state: TrainState, frozen: dict, batch: Batch, count: int
) -> tuple[TrainState, list[float], list[float]]:
    """The state after `count` steps, and the loss and the seconds of each."""
    losses, samples = [], []
    for _ in range(count):
        start = time.perf_counter()
        state, metrics = jax.block_until_ready(program(state, frozen, batch))
        samples.append(time.perf_counter() - start)
        losses.append(float(metrics["loss"]))
        if not math.isfinite(losses[-1]):
            raise ValueError(f"the loss is {losses[-1]} after {len(losses)} steps")
    return state, losses, samples


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    dry.add_options(parser, "480p")
    parser.add_argument("--batch", type=int, default=1, help="examples; data=N takes N times them")
    parser.add_argument("--mesh", default="data=1", help="such as data=2 or fsdp=2")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--apart", action="store_true", help="layers one by one, not in a scan")
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args(arguments)
    config = dry.SILENT if options.dry else NANO
    job = dry.job(options, negative_tokens=0, steps=1)
    dtype = jnp.dtype("float32" if options.dry else device.default_dtype())
    settings = {k: v for k, v in vars(options).items() if k != "out"}
    record = environment() | {"options": settings, "job": bench.describe(job)}
    record |= {"dtype": str(dtype), "model": "dry" if options.dry else "nano"}
    mesh = make_mesh(parse_mesh(options.mesh))
    with jax.set_mesh(mesh):
        record |= run(config, job, options, dtype, mesh)
    rate = max(record["product_tflops_per_second"])
    print(
        f"{record['video_tokens']} tokens, rank {options.rank}: {record['seconds']:.3f} s a step, "
        f"{record['tflops_per_second']:.1f} TFLOP/s, {record['share_of_products']:.1%} of "
        f"{record['devices']} x {rate:.1f}; with what is computed twice "
        f"{record['share_of_products_remat_counted']:.1%}; compiled in "
        f"{record['compile_seconds']:.1f} s, peak {record['peak_gib']} GiB"
    )
    write_text(options.out, json.dumps(record, indent=2) + "\n", overwrite=True)


if __name__ == "__main__":
    main()
