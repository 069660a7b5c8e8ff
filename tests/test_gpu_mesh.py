"""What only several GPUs can show: our attention kernel under a mesh, and NCCL's sums."""

import dataclasses
import math
from collections.abc import Iterable
from functools import partial

import jax
import jax.numpy as jnp
import mesh_cases
import numpy as np
import pytest
import training_mesh_cases
from rounding import farthest
from several_processes import check_two_make_the_video_of_one

from cosmos3_jax import generate
from cosmos3_jax.config import Config
from cosmos3_jax.models import transformer, video_vae
from cosmos3_jax.parallel import sharding
from cosmos3_jax.parallel.mesh import make_mesh, parse_mesh
from cosmos3_jax.training import placement
from cosmos3_jax.training.checkpoints import Checkpoints

pytestmark = pytest.mark.gpu(count=2)

# Heads of 128, which our attention kernel takes in bfloat16.
MODEL = dataclasses.replace(mesh_cases.MODEL, head_dim=128, rope_axes_dim=(24, 20, 20))
VAE = dataclasses.replace(mesh_cases.VAE, base_dim=16, decoder_base_dim=16)
# prompts, sound latents, latent grid: 3,105 tokens are not whole blocks of keys on any device.
GENERATE = {
    "cfg=2": (1, 0, (5, 40, 60)), "seq=2": (1, 5, (5, 41, 60)), "fsdp=2": (1, 5, (5, 40, 60)),
    "data=2": (2, 0, (5, 40, 60)), "cfg=2,seq=2": (1, 5, (5, 41, 60)), "seq=4": (1, 5, (5, 41, 60)),
}  # fmt: skip
DRY = {
    "cfg=2": (1, 0, (2, 4, 4)), "seq=2": (1, 5, (2, 5, 6)), "fsdp=2": (1, 5, (2, 4, 4)),
    "data=2": (2, 0, (2, 4, 4)), "cfg=2,seq=2": (1, 5, (2, 5, 6)), "seq=4": (1, 5, (2, 5, 6)),
}  # fmt: skip
# Of two training steps against those of one device: losses, and Adam's moments. On a CPU they may
# differ as in `training/test_training_mesh.py`, which measures what rounding makes of them.
LOSSES, MOMENTS = 1e-6, 1e-5
DRY_LOSSES, DRY_MOMENTS = 3e-6, 2e-5
# Other orders of summation. `parallel/test_sharding.py` has the same programs on simulated devices.
FLOAT32 = 1e-5


def on(meshes: Iterable[str]) -> list:
    """The meshes as parameters, each for machines with as many GPUs."""
    sizes = {mesh: math.prod(parse_mesh(mesh).values()) for mesh in meshes}
    return [pytest.param(mesh, marks=pytest.mark.gpu(count=n)) for mesh, n in sizes.items()]


def run(function, params: dict, inputs, mesh: str) -> dict:
    """A function on a mesh of the first devices, as arrays of float32."""
    sizes = parse_mesh(mesh)
    placed = make_mesh(sizes, jax.devices()[: math.prod(sizes.values())])
    with jax.set_mesh(placed):
        result = jax.jit(function)(sharding.place_params(params, placed), inputs)
    return jax.tree.map(lambda x: np.asarray(x, np.float32), result)


def agree(function, params: dict, inputs, mesh: str) -> None:
    """Several devices compute what one does: exactly in float32, as closely as one in bfloat16."""
    exact = run(function, params, inputs, "data=1")
    assert farthest(run(function, params, inputs, mesh), exact) <= FLOAT32
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    alone, together = (farthest(run(function, half, inputs, m), exact) for m in ("data=1", mesh))
    assert together <= 1.2 * alone and 1e-4 < alone < 0.2


@pytest.fixture(scope="module")
def media_tower():
    params = mesh_cases.random_params(transformer.param_shapes(MODEL))
    params["gen"] = jax.tree.map(np.asarray, transformer.unstack_layers(params["gen"]))
    return params


@pytest.mark.parametrize("mesh", on(GENERATE))
def test_several_devices_generate_what_one_does(media_tower, mesh, dry):
    request = mesh_cases.request(*(DRY if dry else GENERATE)[mesh])
    function = partial(generate, config=Config(transformer=MODEL), output="latents")
    agree(function, media_tower, request, mesh)


@pytest.mark.parametrize("way", ["decode", "encode"])
@pytest.mark.parametrize("mesh", on(["seq=2", "cfg=2,seq=2"]))
def test_several_devices_decode_and_encode_what_one_does(way, mesh, dry):
    """Of an odd number of rows, in the dtype of the weights."""
    params = mesh_cases.random_params(video_vae.param_shapes(VAE))
    random = np.random.RandomState(3)
    frames, rows, columns = (2, 3, 2) if dry else (3, 7, 6)
    if way == "decode":
        inputs = random.standard_normal((1, frames, rows, columns, VAE.z_dim))
    else:
        inputs = random.uniform(size=(1, 3, 4 * frames - 3, 16 * rows, 16 * columns))

    def function(params, inputs):
        dtype = jax.tree.leaves(params)[0].dtype
        return {"video": getattr(video_vae, way)(params, VAE, inputs, dtype=dtype)}

    agree(function, params, inputs.astype(np.float32), mesh)


@pytest.fixture(scope="module")
def trained_alone():
    """What two training steps do on one device, in float32; of all weights, or of a LoRA."""
    return {with_lora: training_mesh_cases.train(with_lora, 1)[1:3] for with_lora in (False, True)}


@pytest.mark.parametrize("with_lora", [False, True], ids=["all weights", "LoRA"])
@pytest.mark.parametrize("mesh", on(["data=2", "fsdp=2"]))
def test_several_devices_train_as_one_does(mesh, with_lora, trained_alone, tmp_path, capsys, dry):
    """And one reads the state that they save."""
    alone, expected = trained_alone[with_lora]
    sizes = parse_mesh(mesh)
    placed = make_mesh(sizes, jax.devices()[: math.prod(sizes.values())])
    with jax.set_mesh(placed):
        state, together, found, _ = training_mesh_cases.train(with_lora, 1, placed)
    losses = max(
        abs(ours["loss"] / theirs["loss"] - 1) for ours, theirs in zip(found, expected, strict=True)
    )
    moments = max(training_mesh_cases.largest(together[x], alone[x]) for x in ("mu", "nu"))
    with capsys.disabled():
        print(f"\n{mesh}, LoRA {with_lora}: losses {losses:.1e}, moments {moments:.1e} apart")
    assert losses <= (DRY_LOSSES if dry else LOSSES)
    assert moments <= (DRY_MOMENTS if dry else MOMENTS)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state)
        one = make_mesh({}, jax.devices()[:1])
        restored = checkpoints.restore(placement.state_template(state, one))
    assert all(x.devices() == {jax.devices()[0]} for x in jax.tree.leaves(restored))
    assert training_mesh_cases.are_equal(restored, state)


def test_two_processes_make_the_video_of_one(run_command, dry):
    """By the command line, each process with a GPU of its own; NCCL joins them."""
    devices = (1, 1, 1) if dry else ("0", "1", "0")
    check_two_make_the_video_of_one(run_command, "fsdp=2", devices)
