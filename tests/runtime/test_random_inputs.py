"""Random weights to measure with: what generation reads, of the spread that is said, and no more
memory than they take.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rounding
from small_config import CONFIG

from cosmos3_jax.models import sound_vae, transformer, video_vae
from cosmos3_jax.parallel.mesh import make_mesh
from cosmos3_jax.runtime import random_inputs

FLOAT32 = jnp.dtype(jnp.float32)


@pytest.fixture(scope="module")
def params():
    return random_inputs.random_params(CONFIG, FLOAT32)


def test_random_weights_are_those_that_generation_reads(params):
    expected = transformer.param_shapes(CONFIG.transformer)
    expected["gen"] = jax.eval_shape(transformer.unstack_layers, expected["gen"])
    expected["video_vae"] = {"decoder": video_vae.param_shapes(CONFIG.video_vae)["decoder"]}
    expected["sound_vae"] = sound_vae.param_shapes(CONFIG.sound_vae, with_encoder=False)
    assert jax.tree.structure(params) == jax.tree.structure(expected)
    for (path, leaf), shape in zip(
        jax.tree.leaves_with_path(params), jax.tree.leaves(expected), strict=True
    ):
        assert (leaf.shape, leaf.dtype) == (shape.shape, jnp.float32)
        values = np.asarray(leaf).ravel()
        mean, spread = (1, 0.1) if path[-1].key == "scale" else (0, 0.02)
        # Five standard errors and more, of the mean and of the spread.
        assert abs(values.mean() - mean) < 6 * spread / math.sqrt(values.size), path
        assert abs(values.std() / spread - 1) < 5 / math.sqrt(values.size), path
        assert np.unique(values).size > 0.9 * values.size, path
    firsts = [float(leaf.ravel()[0]) for leaf in jax.tree.leaves(params)]
    assert len(set(firsts)) == len(firsts)  # each leaf has a seed of its own


def test_weights_without_sound_and_in_bfloat16():
    shapes = random_inputs.weight_shapes(CONFIG.silent(), jnp.dtype(jnp.bfloat16))
    assert shapes.keys() == {"und", "gen", "video_vae"}
    assert not any("sound" in name for name in shapes["gen"])
    for path, leaf in jax.tree.leaves_with_path(shapes):
        kept = any(key.key == "time_embedder" for key in path)
        assert leaf.dtype == (jnp.float32 if kept else jnp.bfloat16)


@pytest.mark.parametrize("shape", [(), (1001,), (5, 3, 100), (3, 2, 999, 1), (7, 1000)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_no_row_repeats_another(shape, dtype):
    block = jax.random.normal(jax.random.key(0), 2**random_inputs.BLOCK_BITS)
    leaf = random_inputs.leaf_program(shape, jnp.dtype(dtype), None)(block, 3, 0.0, 0.02)
    assert (leaf.shape, leaf.dtype) == (shape, dtype)
    values = np.asarray(leaf, np.float32)
    if len(shape) > 1:
        rows = values.reshape(shape[0], -1)
        likeness = np.corrcoef(rows) - np.eye(len(rows))
        assert np.abs(likeness).max() < 6 / math.sqrt(rows.shape[1])


def test_a_leaf_takes_nothing_beside_itself():
    """Or the peak of making them would hide the generation's."""
    shape, block = (6, 512, 2, 1024), jax.ShapeDtypeStruct((2**random_inputs.BLOCK_BITS,), FLOAT32)
    program = random_inputs.leaf_program(shape, FLOAT32, None).lower(block, 5, 0.0, 0.02).compile()
    analysis = program.memory_analysis()
    assert analysis.output_size_in_bytes == 4 * math.prod(shape)
    assert analysis.temp_size_in_bytes < analysis.output_size_in_bytes / 8


def test_a_mesh_changes_no_weight(params):
    """One product and one sum to a value, whoever makes it."""
    mesh = make_mesh({}, jax.devices()[:1])
    placed = random_inputs.random_params(CONFIG, FLOAT32, mesh)
    assert all(leaf.sharding.mesh == mesh for leaf in jax.tree.leaves(placed))
    assert rounding.farthest(placed, params) <= 1e-6


def test_weights_that_cannot_fit_are_refused_before_they_are_made(monkeypatch):
    monkeypatch.setattr(random_inputs.os, "sysconf", lambda _: 1024)
    monkeypatch.setattr(random_inputs, "leaf_program", lambda *_: pytest.fail("weights were made"))
    with pytest.raises(ValueError, match="the weights take .* GiB, cpu has 0.0 GiB: use a larger"):
        random_inputs.random_params(CONFIG, FLOAT32)
