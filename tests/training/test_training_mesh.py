"""Training on eight simulated devices."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import mesh_cases
import numpy as np
import pytest
import training_mesh_cases
from rounding import MARGIN
from training_run import make_batch

from cosmos3_jax.parallel import mesh
from cosmos3_jax.training import placement


@pytest.fixture(scope="module")
def on_meshes(tmp_path_factory):
    """Of every case, from one process that has eight devices."""
    root = Path(__file__).parents[2]
    flags = {"XLA_FLAGS": mesh_cases.XLA_FLAGS, "PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"}
    program = [sys.executable, "tests/training_mesh_cases.py", str(tmp_path_factory.mktemp("mesh"))]
    ran = subprocess.run(program, cwd=root, env=os.environ | flags, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


# Relative L2 distances from a step of one device: of losses and norms, of Adam's moments, and of
# how far weights and their averages moved. Adam divides a gradient by its size, so that where it is
# all rounding the weight still moves by a whole step.
MESH = {"metrics": 3e-6, "mu": 2e-5, "nu": 2e-5, "params": 2e-3, "ema": 2e-3}


def test_tolerances_of_a_step_on_a_mesh(on_meshes, record_property):
    for kind, moved in on_meshes["sensitivity"].items():
        for part, tolerance in MESH.items():
            record_property("sensitivity", (f"{kind}, {part}", moved[part], tolerance))
            assert 0 < MARGIN * moved[part] <= tolerance, (kind, part)


@pytest.mark.parametrize("name", training_mesh_cases.CASES)
def test_a_step_on_a_mesh_is_that_of_one_device(on_meshes, name):
    """With sound, given frames, texts dropped and weights that differ; two steps."""
    found = on_meshes[name]
    for metrics, expected in zip(found["metrics"], found["expected_metrics"], strict=True):
        assert metrics == pytest.approx(expected, rel=MESH["metrics"])
    for part, error in found["errors"].items():
        assert error <= MESH[part], part
    # and it was another step than the first
    assert abs(metrics["loss"] / found["metrics"][0]["loss"] - 1) > 1e-3


@pytest.mark.parametrize("name", training_mesh_cases.CASES)
def test_what_moves_between_devices_in_training(on_meshes, name):
    found = on_meshes[name]
    mesh_name, _, with_lora = training_mesh_cases.CASES[name]
    sizes = mesh.parse_mesh(mesh_name)
    data, fsdp = sizes["data"], sizes.get("fsdp", 1)
    within = fsdp * sizes.get("seq", 1)  # the devices that share an example
    assert found["batch"] == 1 / data
    for part, held in found["held"].items():
        assert held == pytest.approx(1 if with_lora else 1 / fsdp, rel=1e-4), part
    moves = [x for x in found["collectives"] if x["group"] != 1]  # a sum over nothing is not one
    gathers = [x for x in moves if x["kind"] == "all-gather"]
    # Examples never leave the devices that they were sent to: what is not a sum stays within them.
    # But for the text's embeddings: XLA looks them up in another order of devices.
    model = training_mesh_cases.MODEL
    own_text = training_mesh_cases.TEXT * training_mesh_cases.EXAMPLES // data * model.hidden_size
    for x in moves:
        if x["kind"] != "all-reduce" and x["group"] > within:
            assert x["kind"] == "collective-permute", x
            assert re.search(r"/embed/|\(TextTower\)+/sharding_constraint", x["origin"]), x
            assert x["size"] <= own_text, x
    # Weights are gathered by fsdp, a layer at a time, in both passes of both towers.
    kernels = mesh_cases.kernel_shapes()
    gathered = [x for x in gathers if x["shapes"][0] in [[1, *shape] for shape in kernels]]
    assert {x["group"] for x in gathered} == ({fsdp} if fsdp > 1 else set())
    passes = 3 if with_lora else 4  # a text tower that does not learn is not differentiated
    assert len(gathered) == passes * len(kernels) * (fsdp > 1)
    stacks = [[model.num_hidden_layers, *shape] for shape in kernels]
    assert not [x for x in gathers if x["shapes"][0] in stacks]
    # Gradients are summed over data, those of layers in the loop over layers.
    sums = [x for x in moves if x["kind"] == "all-reduce" and x["looped"] and x["group"] >= data]
    summed = [sorted(shape) for x in sums for shape in x["shapes"]]  # some lie transposed
    if with_lora:
        assert [6, 80] in summed and not [x for x in kernels if sorted(x) in summed]
    else:
        assert all(sorted(x) in summed for x in kernels)


def test_a_state_is_restored_onto_another_mesh(on_meshes):
    """From data=4,fsdp=2 onto data=2,fsdp=4, where its template has it, and onto one device."""
    found = on_meshes["restored"]
    assert found["equal"] == {"other": True, "one": True}
    assert found["placed"] and found["held"] == 0.25


@pytest.mark.parametrize(
    ("sizes", "count", "parts", "message"),
    [
        ({"data": 4}, 8, 4, "data=4: 2 examples at a time do not divide; give a multiple of 16"),
        ({"cfg": 2}, 8, 1, "cfg=2: training has no branches of guidance"),
        ({}, 6, 4, "a batch of 6 cannot go through in 4 equal parts; choose from 1, 2, 3, 6"),
    ],
)
def test_a_batch_that_does_not_divide(monkeypatch, sizes, count, parts, message):
    monkeypatch.setattr(placement.sharding, "mesh_sizes", lambda: sizes)
    with pytest.raises(ValueError, match=message):
        placement.check_examples(count, parts)


def test_a_batch_on_a_mesh_by_its_fields():
    """On one device; what it would be on more is in the shardings."""
    one = jax.sharding.Mesh(jax.devices()[:1], ("data",))
    batch = make_batch(count=3)  # as many examples as the prompt for none has ids
    placed = placement.place_batch(batch.replace(sound=None), one)
    divided = {name for name in vars(placed) if is_divided(getattr(placed, name))}
    assert divided == {"text_ids", "text_mask", "video", "fps", "frame_mask", "weight"}
    assert placed.sound is None
    rows = batch.replace(fps=24.0, uncond_ids=np.tile(batch.uncond_ids, (3, 1)))
    placed = placement.place_batch(rows, one)
    assert is_divided(placed.uncond_ids) and is_divided(placed.sound) and not is_divided(placed.fps)
    four = jax.sharding.AbstractMesh((4,), ("data",))
    with pytest.raises(ValueError, match="data=4: 3 examples at a time do not divide; give a mul"):
        placement.place_batch(batch, four)


def is_divided(x) -> bool:
    return x is not None and x.sharding.spec == jax.sharding.PartitionSpec(("data",))
