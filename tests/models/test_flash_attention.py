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
from cosmos3_jax.models import flash_attention, turned_heads
from cosmos3_jax.models.attention import attention
from cosmos3_jax.parallel import device as devices
from cosmos3_jax.runtime import random_inputs
from cosmos3_jax.sampling import denoise, stages

TOLERANCE = 5e-6  # relative L2 distance of gradients; the test that uses it measures what it is of


def arrays(queries, media, text=64, dtype=jnp.bfloat16, head_dim=128):
    shapes = [(2, queries, 8), *[(2, media, 2)] * 2, *[(2, text, 2)] * 2]
    return (
        *(jax.ShapeDtypeStruct((*x, head_dim), dtype) for x in shapes),
        jax.ShapeDtypeStruct((2,), jnp.int32),
    )


@pytest.mark.parametrize("queries, media", [(256, 384), (45, 301)], ids=["whole blocks", "odd"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_kernel_lowers_for_cuda(queries, media, dtype):
    """On any machine: layouts, barriers and registers are settled before a GPU is needed."""
    traced = jax.jit(flash_attention.flash_attention).trace(*arrays(queries, media, dtype=dtype))
    assert traced.out_info.shape == (2, queries, 8, 128)
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


def normal(*shapes):
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [
        jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True)
    ]


@pytest.mark.parametrize("queries", [45, 128, 300])
@pytest.mark.parametrize("media, lengths", [(128, (0, 1)), (256, (129, 128)), (301, (200, 256))])
def test_the_kernels_own_code_attends(monkeypatch, queries, media, lengths):
    """Its blocks, slots, barriers and masks, on a CPU.

    It is at most 1.2 times as far from float64 as JAX's attention in the same dtype, which rounds
    the probabilities too.
    """
    query, key, value, *text = normal((2, queries, 4, 128), *[(2, media, 2, 128)] * 2,
                                      *[(2, 260, 2, 128)] * 2)  # fmt: skip
    length = jnp.asarray(lengths, jnp.int32)
    text = [  # what is finite behind the last key changes nothing
        jnp.where((jnp.arange(260) < length[:, None])[..., None, None], x, 1e4).astype(x.dtype)
        for x in text
    ]
    found = on_cpu(monkeypatch, flash_attention.flash_attention, query, key, value, *text, length)
    assert found.shape == query.shape and found.dtype == query.dtype
    key, value = (jnp.concatenate(x, 1) for x in zip((key, value), text, strict=True))
    exact = attention_in_float64(query, key, value, media + length)
    library = attention_module.xla_attention(query, key, value, media + length)
    assert distance(found, exact) < 1.2 * distance(library, exact)


class Untraced:
    """`custom_vmap` of a function that is called with values."""

    def __init__(self, function):
        self.function = function

    def __call__(self, *arguments):
        return self.function(*arguments)

    def def_vmap(self, rule):
        return rule


def on_cpu(monkeypatch, function, *arrays):
    """What kernels make, by their own code."""
    with monkeypatch.context() as patch:
        patch.setattr(jax.custom_batching, "custom_vmap", Untraced)
        for module in (flash_attention, turned_heads):
            mosaic.on_cpu(patch, module)
        for name in ("run_tiles", "turned_heads"):
            patch.setattr(flash_attention, name, getattr(flash_attention, name).__wrapped__)
        return function(*arrays)


def projected(tokens, heads=2, key_heads=1):
    """Of large numbers, so that a norm that is missing shows."""
    [product] = normal((2, tokens, heads + 2 * key_heads, 128))
    scale = jnp.linspace(0.5, 2, 128, dtype=jnp.bfloat16)
    scales = jnp.stack([scale, scale[::-1]]), jnp.stack([scale[::-1], scale])
    angles = 50 * jax.random.normal(jax.random.key(3), (2, tokens, 64))
    table = jnp.cos(angles), jnp.sin(angles)
    return attention_module.Projected(3 * product, *scales, table, key_heads, epsilon=1e-3)


@pytest.mark.parametrize("tokens, heads, key_heads", [(130, 2, 1), (133, 4, 2), (260, 2, 2)])
def test_queries_and_keys_are_normed_and_rotated_within(monkeypatch, tokens, heads, key_heads):
    """As far from float64 as those that come ready."""
    media = projected(tokens, heads, key_heads)
    text = *normal(*[(2, 40, key_heads, 128)] * 2), jnp.array([3, 40])
    found = on_cpu(
        monkeypatch, flash_attention.attention_of_product, media.product, key_heads,
        media.turns(), *text,
    )  # fmt: skip
    assert found.shape == (2, tokens, heads, 128)
    in_float32 = jax.tree.map(lambda x: x.astype(jnp.float32), media)
    query, key, value = in_float32.parts()
    key, value = (jnp.concatenate(x, 1) for x in ((key, text[0]), (value, text[1])))
    exact = attention_in_float64(query, key, value, tokens + text[2])
    apart = on_cpu(monkeypatch, flash_attention.flash_attention, *media.parts(), *text)
    assert distance(found, exact) < 1.1 * distance(apart, exact)


def test_heads_are_turned(monkeypatch):
    """Those that were asked for, and no others; rounded three times, as `parts` does."""
    media = projected(136)
    turns = media.turns()
    with monkeypatch.context() as patch:
        mosaic.on_cpu(patch, turned_heads)
        found = turned_heads.turned_heads.__wrapped__(
            media.product, turns.key_scale, turns.table, first=2, heads=1, epsilon=1e-3
        )
    key = media.parts()[1]
    in_float32 = jax.tree.map(lambda x: x.astype(jnp.float32), media).parts()[1]
    assert found.shape == key.shape and found.dtype == key.dtype
    assert distance(found, np.asarray(in_float32)) < 1.1 * distance(key, np.asarray(in_float32))


def attention_in_float64(query, key, value, lengths) -> np.ndarray:
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    key, value = (np.repeat(x, query.shape[2] // key.shape[2], axis=2) for x in (key, value))
    logits = np.einsum("bsnh,btnh->bnst", query, key) / np.sqrt(query.shape[-1])
    for example, length in zip(logits, np.asarray(lengths), strict=True):
        example[..., length:] = -np.inf
    shares = np.exp(logits - logits.max(-1, keepdims=True))
    return np.einsum("bnst,btnh->bsnh", shares / shares.sum(-1, keepdims=True), value)


def distance(found, exact: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(found, np.float64) - exact) / np.linalg.norm(exact))


def test_vmap_is_one_kernel_over_a_larger_batch():
    query, *others, length = arrays(256, 384)
    query, length = (jax.ShapeDtypeStruct((3, *x.shape), x.dtype) for x in (query, length))
    mapped = jax.vmap(flash_attention.flash_attention, in_axes=(0, *[None] * 4, 0))
    traced = jax.jit(mapped).trace(query, *others, length)
    assert traced.out_info.shape == (3, 2, 256, 8, 128)
    assert traced.lower(lowering_platforms=("cuda",)).as_text().count("@mosaic_gpu") == 1


def test_vmap_of_a_product_is_one_kernel_each_for_keys_and_attention():
    media = jax.eval_shape(lambda: projected(256))
    text = *[jax.ShapeDtypeStruct((2, 40, 1, 128), jnp.bfloat16)] * 2, arrays(1, 1)[-1]
    product = jax.ShapeDtypeStruct((3, *media.product.shape), media.product.dtype)

    def attend(product, media, text):
        media = media.replace(product=product)
        return flash_attention.attention_of_product(product, 1, media.turns(), *text)

    traced = jax.jit(jax.vmap(attend, in_axes=(0, None, None))).trace(product, media, text)
    assert traced.out_info.shape == (3, 2, 256, 2, 128)
    assert traced.lower(lowering_platforms=("cuda",)).as_text().count("@mosaic_gpu") == 2


def test_layers_share_a_kernel():
    """A program of many layers holds, and compiles, one for each size."""
    query, key, value, *text = arrays(256, 384)

    def layers_of_two_sizes(query, key, value, *text):
        for keys in (384, 384, 256):
            query = flash_attention.flash_attention(query, key[:, :keys], value[:, :keys], *text)
        return query

    lowered = jax.jit(layers_of_two_sizes).trace(query, key, value, *text)
    text = lowered.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu") == 2
    assert all(f"flash_attention_2x256x8x128x{keys}x64x2" in text for keys in (384, 256))


class Ampere:
    platform, compute_capability = "gpu", "8.0"


@pytest.mark.parametrize(
    "device, change, reason",
    [
        (Hopper, {}, None),
        (Ampere, {}, "compute capability 9.0"),
        (Hopper, {"dtype": jnp.float32}, "the dtype is float32"),
        (Hopper, {"head_dim": 64}, "the head dimension is 64"),
        (Hopper, {"media": 127}, "127 keys of media, fewer than a block of 128"),
    ],
)
def test_obstacles(device, change, reason):
    _, key, *_ = arrays(**{"queries": 128, "media": 128} | change)
    found = flash_attention.obstacle(key, device)
    assert found is None if reason is None else reason in found


@pytest.mark.parametrize("media, taken", [(60, False), (127, False), (128, True)])
def test_padding_makes_no_keys(monkeypatch, media, taken):
    """60 media tokens and 30 of text are 90 keys, however far the text is padded."""
    monkeypatch.setattr(devices, "default_device", Hopper)
    monkeypatch.setattr(attention_module, "cudnn_attention", lambda query, *_: query)
    seen = []

    def kernel(query, key, *others):
        seen.append(key.shape[1])
        return query

    monkeypatch.setattr(flash_attention, "flash_attention", kernel)
    query, key, value, *text = arrays(media, media, text=128)
    jax.eval_shape(lambda *x: attention(*x[:3], text=x[3:]), query, key, value, *text)
    assert seen == [media] * taken


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
    monkeypatch.setattr(devices, "default_device", Hopper)
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
    assert said[0] == said[1] and said[0][0] == "3"


def test_a_cpu_takes_the_other_way():
    query, key, value, *text = arrays(16, 24)
    assert "Hopper" in flash_attention.obstacle(key, jax.devices("cpu")[0])
    jaxpr = jax.make_jaxpr(lambda *x: attention(*x[:3], text=x[3:]))(query, key, value, *text)
    assert "mosaic" not in str(jaxpr) and np.prod(jaxpr.out_avals[0].shape) == 2 * 16 * 8 * 128
