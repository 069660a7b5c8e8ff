"""What can be known of the Hopper kernel without the chip: it lowers, and where it cannot run."""

import dataclasses
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import mosaic
import numpy as np
import pytest
from hopper import Hopper
from rounding import check, farthest

from cosmos3_jax.cli import bench
from cosmos3_jax.config import Config
from cosmos3_jax.models import attention as attention_module
from cosmos3_jax.models import flash_attention
from cosmos3_jax.models.attention import attention
from cosmos3_jax.parallel import device
from cosmos3_jax.runtime import random_inputs
from cosmos3_jax.sampling import denoise, stages

TOLERANCE = 5e-6  # relative L2 distance of gradients; the test that uses it measures what it is of


def arrays(queries, keys, dtype=jnp.bfloat16, head_dim=128):
    shapes = [(2, queries, 8, head_dim), *[(2, keys, 2, head_dim)] * 2]
    return *(jax.ShapeDtypeStruct(x, dtype) for x in shapes), jax.ShapeDtypeStruct((2,), jnp.int32)


@pytest.mark.parametrize("queries, keys", [(256, 384), (45, 301)], ids=["whole blocks", "odd"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_kernel_lowers_for_cuda(queries, keys, dtype):
    """On any machine: layouts, barriers and registers are settled before a GPU is needed."""
    traced = jax.jit(flash_attention.flash_attention).trace(*arrays(queries, keys, dtype))
    assert traced.out_info.shape == (2, queries, 8, 128)
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("queries", [45, 128, 200])
@pytest.mark.parametrize("lengths", [(128, 131), (256, 400), (399, 384)])
def test_the_kernels_own_code_attends(monkeypatch, queries, lengths):
    """Its blocks, slots, barriers and masks, on a CPU.

    It is at most 1.2 times as far from float64 as JAX's attention in the same dtype, which rounds
    the probabilities too.
    """
    shapes = [(2, queries, 4, 128), *[(2, 400, 2, 128)] * 2]
    query, key, value = (
        jax.random.normal(jax.random.key(i), shape, jnp.bfloat16) for i, shape in enumerate(shapes)
    )
    length = jnp.asarray(lengths, jnp.int32)
    key, value = (  # what is finite behind the last key changes nothing
        jnp.where((jnp.arange(400) < length[:, None])[..., None, None], x, 1e4).astype(x.dtype)
        for x in (key, value)
    )
    found = on_cpu(monkeypatch, query, key, value, length)
    assert found.shape == query.shape and found.dtype == query.dtype
    exact = attention_in_float64(query, key, value, lengths)
    library = attention_module.xla_attention(query, key, value, length)
    assert distance(found, exact) < 1.2 * distance(library, exact)


class Untraced:
    """`custom_vmap` of a function that is called with values."""

    def __init__(self, function):
        self.function = function

    def __call__(self, *arguments):
        return self.function(*arguments)

    def def_vmap(self, rule):
        return rule


def on_cpu(monkeypatch, *arrays):
    """The kernel's result, by its own code."""
    with monkeypatch.context() as patch:
        mosaic.on_cpu(patch, flash_attention)
        patch.setattr(jax.custom_batching, "custom_vmap", Untraced)
        patch.setattr(flash_attention, "run_tiles", flash_attention.run_tiles.__wrapped__)
        return flash_attention.flash_attention(*arrays)


@pytest.mark.parametrize("tokens", [37, 130])
def test_queries_are_normed_and_rotated_within(monkeypatch, tokens):
    """As far from float64 as those that come ready; heads behind the queries are not read."""
    product = 3 * jax.random.normal(jax.random.key(0), (2, tokens, 6, 128), jnp.bfloat16)
    product = product.at[:, :, 2:].set(jnp.nan)
    key, value = (
        jax.random.normal(jax.random.key(i), (2, 136, 1, 128), jnp.bfloat16) for i in (1, 2)
    )
    length, scale = jnp.array([128, 135]), jnp.linspace(0.5, 2, 128, dtype=jnp.bfloat16)
    angles = 50 * jax.random.normal(jax.random.key(3), (2, tokens, 64))
    queries = attention_module.RawHeads(
        product,
        jnp.stack([scale, scale[::-1]]),
        (jnp.cos(angles), jnp.sin(angles)),
        heads=2,
        epsilon=1e-3,
    )
    found = on_cpu(monkeypatch, product, key, value, length, queries.turn())
    assert found.shape == (2, tokens, 2, 128)
    in_float32 = queries.replace(
        product=product.astype(jnp.float32), scale=queries.scale.astype(jnp.float32)
    )
    exact = attention_in_float64(in_float32.turned(), key, value, length.tolist())
    apart = on_cpu(monkeypatch, queries.turned(), key, value, length)
    assert distance(found, exact) < 1.1 * distance(apart, exact)


def attention_in_float64(query, key, value, lengths) -> np.ndarray:
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    key, value = (np.repeat(x, query.shape[2] // key.shape[2], axis=2) for x in (key, value))
    logits = np.einsum("bsnh,btnh->bnst", query, key) / np.sqrt(query.shape[-1])
    for example, length in zip(logits, lengths, strict=True):
        example[..., length:] = -np.inf
    shares = np.exp(logits - logits.max(-1, keepdims=True))
    return np.einsum("bnst,btnh->bsnh", shares / shares.sum(-1, keepdims=True), value)


def distance(found, exact: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(found, np.float64) - exact) / np.linalg.norm(exact))


@pytest.mark.parametrize("turned", [False, True])
def test_vmap_is_one_kernel_over_a_larger_batch(turned):
    query, key, value, length = arrays(256, 384)
    query, length = (jax.ShapeDtypeStruct((3, *x.shape), x.dtype) for x in (query, length))

    def attend(query, key, value, length):
        turn = None
        if turned:
            scale, table = jnp.ones((2, 128), query.dtype), jnp.ones((2, 256, 128), query.dtype)
            turn = flash_attention.Turn(scale, table, 1e-6, 8)
        return flash_attention.flash_attention(query, key, value, length, turn)

    mapped = jax.vmap(attend, in_axes=(0, None, None, 0))
    traced = jax.jit(mapped).trace(query, key, value, length)
    assert traced.out_info.shape == (3, 2, 256, 8, 128)
    assert traced.lower(lowering_platforms=("cuda",)).as_text().count("@mosaic_gpu") == 1


def test_layers_share_a_kernel():
    """A program of many layers holds, and compiles, one for each size."""
    query, key, value, length = arrays(256, 384)

    def layers_of_two_sizes(query, key, value, length):
        for keys in (384, 384, 256):
            query = flash_attention.flash_attention(query, key[:, :keys], value[:, :keys], length)
        return query

    lowered = jax.jit(layers_of_two_sizes).trace(query, key, value, length)
    text = lowered.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu") == 2
    assert all(f"flash_attention_2x256x8x128x{keys}x2" in text for keys in (384, 256))


class Ampere:
    platform, compute_capability = "gpu", "8.0"


@pytest.mark.parametrize(
    "device, change, reason",
    [
        (Hopper, {}, None),
        (Ampere, {}, "compute capability 9.0"),
        (Hopper, {"dtype": jnp.float32}, "the dtype is float32"),
        (Hopper, {"head_dim": 64}, "the head dimension is 64"),
        (Hopper, {"keys": 127}, "127 keys, fewer than a block of 128"),
    ],
)
def test_obstacles(device, change, reason):
    query, key, *_ = arrays(**{"queries": 128, "keys": 128} | change)
    found = flash_attention.obstacle(query, key, device)
    assert found is None if reason is None else reason in found


@pytest.mark.parametrize("media, taken", [(60, False), (127, False), (128, True)])
def test_padding_makes_no_keys(monkeypatch, media, taken):
    """60 media tokens and 30 of text are 90 keys, however far the text is padded."""
    monkeypatch.setattr(device, "default_device", Hopper)
    monkeypatch.setattr(attention_module, "cudnn_attention", lambda query, *_: query)
    seen = []

    def kernel(query, key, value, length):
        seen.append(key.shape[1])
        return query

    monkeypatch.setattr(flash_attention, "flash_attention", kernel)
    query, key, value, length = arrays(media, media)
    text = (*(jax.ShapeDtypeStruct((2, 128, 2, 128), jnp.bfloat16) for _ in range(2)), length)
    jax.eval_shape(lambda *x: attention(*x[:3], text=x[3:]), query, key, value, *text)
    assert seen == [media + 128] * taken


@pytest.mark.parametrize("queries, causal", [(5, False), (6, False), (5, True), (6, True)])
def test_gradients_ask_the_library_for_even_numbers_of_tokens(
    monkeypatch, record_property, queries, causal
):
    """What stands for cuDNN here is XLA's; the padding changes no gradient."""
    seen, library = [], attention_module.xla_attention

    def even_alone(query, key, *others):
        seen.append((query.shape[1], key.shape[1]))
        return library(query, key, *others)

    monkeypatch.setattr(attention_module, "cudnn_attention", even_alone)
    monkeypatch.setattr(attention_module, "fused_obstacle", lambda *_: None)
    keys = queries if causal else 9
    query, key, value, weights = (
        jax.random.normal(jax.random.key(i), (2, tokens, 4 if i in (0, 3) else 2, 16))
        for i, tokens in enumerate((queries, keys, keys, queries))
    )
    settings = (
        {"causal": True} if causal else {"text": (key[:, :4], value[:, :4], np.array([1, 3]))}
    )
    gradients = jax.grad(lambda *x: jnp.sum(weights * attention(*x, **settings)), range(3))
    ours = gradients(query, key, value)
    assert seen[-1] == (queries + queries % 2, (keys + (0 if causal else 4) + 1) // 2 * 2)
    monkeypatch.undo()
    assert farthest(ours, gradients(query, key, value)) <= TOLERANCE
    check(record_property, TOLERANCE, gradients, query, key, value)


LOWER_A_LOOP = """
import hashlib, sys
sys.path[:0] = ["tests", "tests/models"]
import pytest, test_flash_attention
text = test_flash_attention.lowered_loop(pytest.MonkeyPatch())
print(text.count("@mosaic_gpu"), hashlib.sha256(text.encode()).hexdigest())
"""


def lowered_loop(monkeypatch) -> str:
    """The denoising loop for a Hopper GPU, as the compilation cache sees it."""
    monkeypatch.setattr(device, "default_device", Hopper)
    monkeypatch.setattr(attention_module, "cudnn_attention", lambda query, *_: query)  # the text's
    model = dataclasses.replace(Config().transformer, num_hidden_layers=2, vocab_size=512)
    config = dataclasses.replace(Config(), transformer=model).silent()
    shapes = random_inputs.weight_shapes(config, jnp.bfloat16)
    (job,) = bench.jobs(config, sizes="256p").values()
    request = bench.random_request(config, job)
    encode = partial(stages.encode_text, config=config)
    handed_on = jax.eval_shape(encode, shapes["und"], request)
    traced = jax.jit(partial(denoise.advance, config=config), donate_argnums=2).trace(
        shapes["gen"], *handed_on.values(), denoise.all_steps(request)
    )
    return traced.lower(lowering_platforms=("cuda",)).as_text()


def test_two_processes_lower_the_same_program():
    """Or the second would not find it in the compilation cache."""
    root, said = Path(__file__).parents[2], []
    for seed in ("1", "2"):  # of Python's hashes, and so of the order of sets
        ran = subprocess.run(
            [sys.executable, "-c", LOWER_A_LOOP],
            cwd=root, env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, text=True,
            check=True,
        )  # fmt: skip
        said.append(ran.stdout.split()[-2:])
    assert said[0] == said[1] and said[0][0] == "2"


def test_a_cpu_takes_the_other_way():
    query, key, value, _ = arrays(16, 24)
    text = (key, value, jax.ShapeDtypeStruct((2,), jnp.int32))
    assert "Hopper" in flash_attention.obstacle(query, key, jax.devices("cpu")[0])
    jaxpr = jax.make_jaxpr(lambda *x: attention(*x[:3], text=x[3:]))(query, key, value, *text)
    assert "mosaic" not in str(jaxpr) and np.prod(jaxpr.out_avals[0].shape) == 2 * 16 * 8 * 128
