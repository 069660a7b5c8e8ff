"""Meshes of eight simulated devices: the numbers of one device, and what moves between them."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import rounding

from cosmos3_jax.checkpoint import load, random_checkpoint
from cosmos3_jax.parallel import mesh, sharding

import mesh_cases  # isort: skip

ROOT = Path(__file__).parents[2]
# Relative L2 distance of two programs for the same arithmetic, as in test_generate.py.
# `test_tolerance` has what mesh_cases.py measured.
SAME = 1.5e-5
MODEL = mesh_cases.MODEL


@pytest.fixture(scope="module")
def results():
    """Of every case, from one process that has eight devices."""
    flags = {"XLA_FLAGS": mesh_cases.XLA_FLAGS, "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(
        [sys.executable, "tests/mesh_cases.py"],
        cwd=ROOT, env=os.environ | flags, capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


def test_tolerance(results, record_property):
    found = {name: x["sensitivity"] for name, x in results.items() if "sensitivity" in x}
    cases = (mesh_cases.GENERATE, mesh_cases.VIDEO, mesh_cases.VIDEO, mesh_cases.DIFFERENTIATED)
    assert len(found) == sum(map(len, cases)) + 2
    for name, moved in found.items():
        record_property("sensitivity", (name, moved, SAME))
        assert 0 < rounding.MARGIN * moved <= SAME, name


def of_kind(result: dict, kind: str, origin: str = "") -> list[dict]:
    return [x for x in result["collectives"] if x["kind"] == kind and origin in x["origin"]]


@pytest.mark.parametrize("name", mesh_cases.GENERATE)
def test_a_mesh_generates_what_one_device_does(results, name):
    result, sizes = results[f"generate {name}"], mesh.parse_mesh(mesh_cases.GENERATE[name][0])
    assert result["error"] <= SAME
    # The media tower's attention: queries, keys, values and what comes of them, in each layer.
    exchanged = of_kind(result, "all-to-all", "MediaTower/layers/")
    divided = sizes.get("seq", 1) * sizes.get("fsdp", 1) > 1
    assert len(exchanged) == 4 * MODEL.num_hidden_layers * divided
    if divided:
        ways = sizes.get("seq", 1) * sizes.get("fsdp", 1)
        assert all(len(x["shapes"]) == ways for x in exchanged)
    # What is gathered is a weight, or as narrow as latents: nothing of the model's width.
    for x in result["collectives"]:
        if x["kind"] in ("all-gather", "all-reduce") and "embed/" not in x["origin"]:
            weights = [shape for shape in x["shapes"] if in_kernel_shapes(shape)]
            assert sizes.get("fsdp", 1) > 1 or not weights, x
            others = [shape for shape in x["shapes"] if shape not in weights]
            assert not {MODEL.hidden_size, MODEL.intermediate_size, MODEL.head_dim} & {
                shape[-1] for shape in others if shape
            }, x
    assert not of_kind(result, "collective-permute") and not of_kind(result, "reduce-scatter")


def in_kernel_shapes(shape: list[int]) -> bool:
    """Whether it is a matrix of either tower, of one layer if of layers."""
    width, kv = MODEL.hidden_size, 2 * MODEL.num_key_value_heads
    ends = [[192, width], [256, width], [width, width], [64, width], [width, 192], [width, 64]]
    ends.append([width, kv, MODEL.head_dim])
    one = shape[1:] if len(shape) > 2 and shape[0] == 1 else shape  # the text tower's are stacked
    return one in [*ends, *mesh_cases.kernel_shapes()]


def test_fsdp_holds_a_share_and_gathers_a_layer_at_a_time(results):
    result = results["generate fsdp4, sound"]
    # Matrices are divided; norms, biases and the sound's embedding are whole everywhere.
    assert result["held"] <= 0.27 * result["weights"]
    assert results["generate seq4"]["held"] == results["generate seq4"]["weights"]
    gathered = [(x["shapes"][0], x["looped"]) for x in of_kind(result, "all-gather")]
    for shape in mesh_cases.kernel_shapes():
        # Inside the loop over steps: gathered before it, all layers would be there at once.
        assert gathered.count((shape, True)) == MODEL.num_hidden_layers
        assert (shape, False) not in gathered
        assert [MODEL.num_hidden_layers, *shape] not in [found for found, _ in gathered]


def test_branches_meet_once_a_step_and_prompts_never(results):
    assert not results["generate data2"]["collectives"]
    looped = [x for x in results["generate cfg2"]["collectives"] if x["looped"]]
    assert [x["kind"] for x in looped] == ["all-gather"]
    assert looped[0]["size"] == 2 * 48 * math.prod(mesh_cases.GENERATE["cfg2"][3])


@pytest.mark.parametrize("name", mesh_cases.VIDEO)
@pytest.mark.parametrize("way", ["decode", "encode"])
def test_rows_of_pictures_are_divided_exactly(results, way, name):
    result = results[f"{way} {name}"]
    assert result["error"] <= SAME
    _, batch, rows = mesh_cases.VIDEO[name]
    halos = of_kind(result, "collective-permute", "coder/")
    # One row up and one down, of each convolution that is wider than a pixel.
    rows_moved = [shape[-3] for x in halos for shape in x["shapes"]]
    assert len(halos) > 30 and set(rows_moved) == {1}
    # And once, outside: from rows that divide evenly to those that the picture has, or back.
    others = [x for x in of_kind(result, "collective-permute") if x not in halos]
    assert len(others) <= 8 and not any(x["looped"] for x in others)
    assert not of_kind(result, "all-to-all")
    # The encoder's latents may also be put together so, where few of the rows are real.
    reduced = of_kind(result, "all-reduce")
    assert not any("coder/" in x["origin"] or x["looped"] for x in reduced)
    for x in of_kind(result, "all-gather"):
        # Keys and values of the attention at the coarsest scale; and the encoder's latents.
        ends = "attentions_0" in x["origin"] or "Encoder" not in x["origin"]
        assert ends and "conv" not in x["origin"], x
        assert x["size"] <= batch * (rows + 3) * 2 * max(32, 3 * 48), x
    if way == "decode":
        sizes = mesh.parse_mesh(mesh_cases.VIDEO[name][0])
        assert all(axis in result["shards"][0] for axis in sizes)


@pytest.mark.parametrize("way", ["decode", "encode"])
def test_two_devices_swap_rows_in_one_exchange(results, way):
    exchanges = {
        name: len(of_kind(results[f"{way} {name}"], "collective-permute", "ppermute"))
        for name in mesh_cases.VIDEO
    }
    swaps = exchanges.pop(mesh_cases.SWAP)
    assert swaps > 20 and set(exchanges.values()) == {2 * swaps}


@pytest.mark.parametrize("name", mesh_cases.DIFFERENTIATED)
def test_gradients_cross_the_borders_of_rows(results, name):
    result = results[f"gradient of decode {name}"]
    assert result["error"] <= SAME
    assert of_kind(result, "collective-permute", "transpose")


@pytest.mark.parametrize("transform", ["gradient", "vmap"])
def test_transforms_compose_with_a_mesh(results, transform):
    """A gradient sums over what every device has, both branches and all layers."""
    assert results[transform]["error"] <= SAME
    assert of_kind(results[transform], "all-to-all")


def test_a_model_on_a_mesh(results):
    """`from_pretrained(..., mesh=)`: warmed up, nothing is compiled; the result is one device's."""
    found = results["model"]
    assert found["compiled_after_warmup"] == 0
    assert found["error"] <= SAME


@pytest.mark.parametrize(
    "text, sizes",
    [("cfg=2,seq=2", {"cfg": 2, "seq": 2}), ("fsdp=4", {"fsdp": 4}), (" data = 2 ", {"data": 2})],
)
def test_meshes_are_read(text, sizes):
    assert mesh.parse_mesh(text) == sizes


@pytest.mark.parametrize(
    "text, message",
    [
        ("tensor=2", "'tensor' is none of data, cfg, seq, fsdp; write for example cfg=2,seq=2"),
        ("seq=2,seq=2", "'seq' is there twice"),
        ("seq=0", "seq=0 must be a whole number from 1 on"),
        ("seq", "seq= must be a whole number"),
        ("seq=2;cfg=2", "separate its axes with commas"),
        ("", "names no axis"),
    ],
)
def test_a_mesh_that_cannot_be_read_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        mesh.parse_mesh(text)


@pytest.mark.parametrize(
    "sizes, job, message",
    [
        ({"seq": 3}, {}, "seq=3: 8 key/value heads do not divide; choose seq x fsdp from 1, 2, 4"),
        ({"seq": 4, "fsdp": 4}, {}, "seq=4 x fsdp=4: 8 key/value heads do not divide"),
        ({"cfg": 3}, {}, "cfg=3: guidance has two branches; choose cfg from 1, 2"),
        ({"cfg": 2}, {"guidance": False}, "cfg=2: with guidance_scale=1 there is one branch"),
        ({"data": 4}, {"batch": 6}, "data=4: 6 prompts do not divide; choose data from 1, 2, 3, 6"),
        ({"data": 2}, {}, "data=2: one prompt does not divide; .* in Python, give a list"),
    ],
)
def test_a_job_that_does_not_divide_is_refused(sizes, job, message):
    with pytest.raises(ValueError, match=message):
        mesh.check_mesh(sizes, **{"kv_heads": 8, "batch": 1, "guidance": True} | job)


def test_devices_must_be_there():
    with pytest.raises(ValueError, match="mesh cfg=2,seq=2 has 4 devices, and there are 1"):
        mesh.make_mesh({"cfg": 2, "seq": 2})


@pytest.mark.parametrize(
    "devices, job, sizes",
    [
        (4, {}, {"data": 1, "cfg": 2, "seq": 2}),
        (8, {}, {"data": 1, "cfg": 2, "seq": 4}),
        (4, {"guidance": False}, {"data": 1, "cfg": 1, "seq": 4}),
        (4, {"batch": 4}, {"data": 4, "cfg": 1, "seq": 1}),
        (8, {"batch": 6}, {"data": 2, "cfg": 2, "seq": 2}),
        (4, {"shard_weights": True}, {"data": 1, "cfg": 1, "fsdp": 4}),
        (16, {"shard_weights": True}, {"data": 1, "cfg": 2, "fsdp": 8}),
        (3, {}, None),
        (32, {}, None),
    ],
)
def test_the_default_mesh(devices, job, sizes):
    found = mesh.default_sizes(devices, kv_heads=8, **job)
    if sizes is not None and sizes["data"] == 4:
        assert found["data"] == 4 and math.prod(found.values()) == 4
    else:
        assert found == sizes


def test_a_job_that_divides_over_fewer_devices_leaves_the_others_idle(results):
    """Nobody asked for a mesh: what works on one device works on many."""
    assert results["default meshes"] == [
        ["3 devices", {"data": 1, "cfg": 2, "seq": 1, "fsdp": 1}],
        ["8 devices, 2 heads", {"data": 1, "cfg": 2, "seq": 2, "fsdp": 1}],
        ["8 devices, 2 heads, no guidance", {"idle": 2, "data": 1, "cfg": 1, "seq": 2, "fsdp": 1}],
    ]


def test_what_is_no_mesh_is_refused():
    with pytest.raises(ValueError, match="give a jax.sharding.Mesh, or a text"):
        mesh.Meshes({"cfg": 2}, 8)


def test_a_part_of_the_weights_is_read_and_no_more(monkeypatch):
    """By a process that holds the second quarter of each matrix, from the public layout."""
    folder = random_checkpoint.cached()
    components = load.open_components(folder, load.load_config(folder))
    component = components[0]
    read, files = [], component.files
    original = type(files).read

    def counted(self, key, index=None):
        values = original(self, key, index)
        read.append(values.nbytes)
        return values

    monkeypatch.setattr(type(files), "read", counted)
    pieces = component.pieces(np.dtype(np.float32), unstacked=True)
    shares = []
    for piece in pieces:
        leaf_shape = component.leaves[piece.leaf] if piece.place else piece.shape
        axes = sharding.weight_axes(piece.leaf, leaf_shape, 4)[len(piece.place) :]
        if not any(axes):
            continue
        index = tuple(
            slice(n // 4, n // 2) if axis else slice(0, n)
            for n, axis in zip(piece.shape, axes, strict=True)
        )
        read.clear()
        part = component.read(piece, index)
        shares.append(sum(read))
        read.clear()
        np.testing.assert_array_equal(part, component.read(piece)[index])
        assert 4 * shares[-1] == sum(read), piece.key
    assert len(shares) > 30


def test_one_device_has_no_trace_of_a_mesh():
    """On a mesh of size one, too."""
    one = mesh.make_mesh({}, jax.devices()[:1])
    x = np.ones((2, 3, 4), np.float32)
    with jax.set_mesh(one):
        text = str(jax.make_jaxpr(lambda x: sharding.constrain(x, ("data",), ("seq",), None))(x))
        assert "sharding" not in text and sharding.mesh_sizes() == {}
