"""What can be known of the Hopper kernel without the chip: it lowers, and where it cannot run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cosmos3_jax import flash_attention, layers


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


def test_vmap_is_one_kernel_over_a_larger_batch():
    query, key, value, length = arrays(256, 384)
    query, length = (jax.ShapeDtypeStruct((3, *x.shape), x.dtype) for x in (query, length))
    mapped = jax.vmap(flash_attention.flash_attention, in_axes=(0, None, None, 0))
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
    assert "flash_attention_2x8x256x384" in text and "flash_attention_2x8x256x256" in text


class Hopper:
    platform, compute_capability = "gpu", "9.0"


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
def test_obstacles(monkeypatch, device, change, reason):
    monkeypatch.setattr(jax, "devices", lambda: [device])
    query, key, *_ = arrays(**{"queries": 128, "keys": 128} | change)
    found = flash_attention.obstacle(query, key)
    assert found is None if reason is None else reason in found


def test_a_cpu_takes_the_other_way():
    query, key, value, _ = arrays(16, 24)
    text = (key, value, jax.ShapeDtypeStruct((2,), jnp.int32))
    assert "Hopper" in flash_attention.obstacle(query, key)
    jaxpr = jax.make_jaxpr(lambda *x: layers.attention(*x[:3], text=x[3:]))(
        query, key, value, *text
    )
    assert "mosaic" not in str(jaxpr) and np.prod(jaxpr.out_avals[0].shape) == 2 * 16 * 8 * 128
