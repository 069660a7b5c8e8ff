"""What only several GPUs can show: our attention kernel under a mesh, and NCCL's sums. Run with -m
gpu; the meshes are of two devices.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import mesh_cases
import numpy as np
import pytest
from rounding import relative_l2

from cosmos3_jax import generate, sharding, transformer, video_vae
from cosmos3_jax.config import Config
from cosmos3_jax.mesh import make_mesh, parse_mesh

pytestmark = pytest.mark.gpu

# With heads of 128, which our attention kernel takes in bfloat16.
MODEL = dataclasses.replace(mesh_cases.MODEL, head_dim=128, rope_axes_dim=(24, 20, 20))
# prompts, sound latents, latent grid: 3,008 tokens are not whole blocks of keys on either device.
JOBS = {"cfg=2": (1, 0, (5, 40, 60)), "seq=2": (1, 5, (5, 41, 60)), "fsdp=2": (1, 5, (5, 40, 60)),
        "data=2": (2, 0, (5, 40, 60))}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def two_gpus():
    if jax.default_backend() != "gpu" or len(jax.devices()) < 2:
        pytest.skip("no two GPUs")


def run(function, params, inputs, mesh: str = ""):
    made = make_mesh(parse_mesh(mesh), jax.devices()[: 2 if mesh else 1])
    with jax.set_mesh(made):
        result = jax.jit(function)(sharding.place_params(params, made), inputs)
    return jax.tree.map(lambda x: np.asarray(x, np.float32), result)


@pytest.fixture(scope="module")
def media_tower():
    params = mesh_cases.random_params(transformer.param_shapes(MODEL))
    params["gen"] = jax.tree.map(np.asarray, transformer.unstack_layers(params["gen"]))
    return params


def error(ours: dict, expected: dict) -> float:
    return max(relative_l2(ours[name], expected[name]) for name in expected)


@pytest.mark.parametrize("mesh", JOBS)
def test_two_gpus_generate_what_one_does(media_tower, mesh):
    request = mesh_cases.request(*JOBS[mesh])
    function = partial(generate, config=Config(transformer=MODEL), output="latents")
    exact = run(function, media_tower, request)
    # Other orders of summation, as on simulated devices.
    assert error(run(function, media_tower, request, mesh), exact) <= 1e-5
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), media_tower)
    alone, together = (error(run(function, half, request, m), exact) for m in ("", mesh))
    assert together <= 1.2 * alone and alone > 1e-4


def test_two_gpus_decode_and_encode_what_one_does():
    config = mesh_cases.VAE
    params = mesh_cases.random_params(video_vae.param_shapes(config))
    random = np.random.RandomState(3)
    latents = random.standard_normal((1, 3, 7, 6, 48)).astype(np.float32)
    pixels = random.uniform(size=(1, 3, 9, 112, 96)).astype(np.float32)
    for function, inputs in (
        (lambda p, x: {"video": video_vae.decode(p, config, x)}, latents),
        (lambda p, x: {"video": video_vae.encode(p, config, x)}, pixels),
    ):
        expected = run(function, params, inputs)
        # cuDNN's choice of convolution for half the rows may sum in another order.
        assert error(run(function, params, inputs, "seq=2"), expected) <= 1e-5
