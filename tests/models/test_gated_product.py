"""The MLP's first product as a Hopper kernel: its own code on a CPU, and that it lowers."""

import jax
import jax.numpy as jnp
import mosaic
import numpy as np
import pytest
from hopper import Hopper

from cosmos3_jax.models import gated_product


def arrays(tokens, depth, features, dtype=jnp.bfloat16):
    x = jax.random.normal(jax.random.key(0), (tokens, depth), dtype)
    kernel = jax.random.normal(jax.random.key(1), (depth, 2, features), dtype)
    return x, kernel / np.sqrt(depth).astype(dtype)


@pytest.mark.parametrize(
    "tokens, depth, features, multiprocessors",
    [(256, 64, 128, 2), (72, 320, 128, 132), (520, 128, 384, 4), (4360, 64, 128, 6)],
    ids=["one tile", "part of one", "several a block", "groups of rows"],
)
def test_the_kernels_own_code_multiplies(monkeypatch, tokens, depth, features, multiprocessors):
    """No further from float64 than what is rounded where XLA rounds it."""
    x, kernel = arrays(tokens, depth, features)
    with monkeypatch.context() as patch:
        mosaic.on_cpu(patch, gated_product)
        found = gated_product.run_tiles.__wrapped__(x, kernel, multiprocessors)
    exact = np.einsum("td,dif->tif", *(np.asarray(a, np.float64) for a in (x, kernel)))
    exact = exact[:, 0] / (1 + np.exp(-exact[:, 0])) * exact[:, 1]
    both = jnp.einsum("td,dif->tif", x, kernel)
    library = jax.nn.silu(both[:, 0]) * both[:, 1]
    assert found.shape == exact.shape and found.dtype == x.dtype
    assert distance(found, exact) < distance(library, exact)


def distance(found, exact: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(found, np.float64) - exact) / np.linalg.norm(exact))


def test_every_tile_is_made_once():
    rows, columns = 35, 3  # two whole groups of rows, and a part of one
    made = {tuple(map(int, gated_product.place(jnp.int32(i), rows, columns))) for i in range(105)}
    assert made == {(row, column) for row in range(rows) for column in range(columns)}


@pytest.mark.parametrize("tokens", [256, 45])
def test_kernel_lowers_for_cuda(tokens):
    shapes = jax.eval_shape(lambda: arrays(tokens, 128, 256))
    traced = jax.jit(lambda *x: gated_product.gated_product(*x, Hopper)).trace(*shapes)
    assert traced.out_info.shape == (tokens, 256)
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


def test_vmap_is_one_kernel_over_more_tokens():
    x, kernel = jax.eval_shape(lambda: arrays(256, 128, 256))
    x = jax.ShapeDtypeStruct((3, *x.shape), x.dtype)
    mapped = jax.vmap(lambda *x: gated_product.gated_product(*x, Hopper), in_axes=(0, None))
    text = jax.jit(mapped).trace(x, kernel).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu") == 1 and "gated_product_768x128x256" in text


@pytest.mark.parametrize(
    "change, reason",
    [
        ({}, None), ({"dtype": jnp.float32}, "the dtype is float32"),
        ({"depth": 96}, "96 x 256 weights are not whole blocks"),
        ({"features": 192}, "128 x 192 weights are not whole blocks"),
    ],
)  # fmt: skip
def test_obstacles(change, reason):
    shapes = jax.eval_shape(lambda: arrays(**{"tokens": 8, "depth": 128, "features": 256} | change))
    found = gated_product.obstacle(*shapes, Hopper)
    assert found is None if reason is None else reason in found
    assert "Hopper" in gated_product.obstacle(*shapes, jax.devices("cpu")[0])
