"""LoRAs loaded into a model, and unloaded: bit for bit a model that was opened with them."""

import os
import subprocess
import sys
import weakref
from pathlib import Path

import jax
import numpy as np
import pytest
import quick
from checkpoint_files import assert_same_tree, link_checkpoint
from training_run import CONFIG

from cosmos3_jax import Cosmos3
from cosmos3_jax.checkpoint import load, lora, lora_files
from cosmos3_jax.checkpoint.rules import CheckpointError, leaf_shapes

TESTS = Path(__file__).parents[1]


def write_lora(path: Path, patterns: list[str], seed: int) -> Path:
    """An adapter with a B that is not zero."""
    adapter = lora.init(jax.random.key(seed), CONFIG, patterns=patterns, rank=2, alpha=5)
    random = np.random.RandomState(seed)
    adapters = {
        name: pair | {"b": np.float32(random.standard_normal(pair["b"].shape))}
        for name, pair in adapter.adapters.items()
    }
    return lora_files.save(adapter.replace(adapters=adapters), path, CONFIG)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[Path, Path]:
    """Two LoRAs of both towers that share some kernels and not others."""
    folder = tmp_path_factory.mktemp("loras")
    first = write_lora(folder / "a.safetensors", ["mlp.*gate_proj", r"\.to_k$", "^proj_out"], 1)
    second = write_lora(folder / "b.safetensors", [r"layers\.1\.mlp", "add_q_proj"], 2)
    return first, second


def parts(model: Cosmos3) -> dict:
    """The towers on the host; with offload they are read for it, and leave the device again."""
    found = {}
    for part in ("und", "gen"):
        with model.weights.borrow(part) as tree:
            found[part] = jax.device_get(tree)
    return found


def check_steps(checkpoint, files, dtype: str, **options) -> None:
    """One LoRA, another in its place, both, and none, beside models opened with them."""

    def fresh(loras) -> dict:
        return parts(Cosmos3.from_pretrained(checkpoint, dtype, lora=loras, **options))

    first, second = files
    plain = fresh(None)
    model = Cosmos3.from_pretrained(checkpoint, dtype, **options)
    both = [(first, 0.5), second]
    for loras in (first, second, both):
        model.load_lora(loras)
        assert_same_tree(parts(model), fresh(loras))
        assert leaf_shapes(parts(model)) == leaf_shapes(plain)
        assert any(np.any(x != y) for x, y in pairs(parts(model), plain))
    model.unload_lora()
    assert_same_tree(parts(model), plain)
    model.unload_lora()  # there is none
    assert_same_tree(parts(model), plain)


def pairs(one: dict, other: dict):
    return zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)


@pytest.mark.parametrize(
    ("dtype", "offload"), [("float32", False), ("bfloat16", False), ("bfloat16", True)]
)
def test_on_one_device(public_checkpoint, files, dtype, offload):
    check_steps(public_checkpoint, files, dtype, offload=offload)


def test_of_a_converted_checkpoint(converted, files):
    check_steps(converted, files, "bfloat16", offload=False)


def test_on_a_mesh(public_checkpoint, files):
    """Of two devices that divide the weights, in a process of its own."""
    words = [str(public_checkpoint), *map(str, files)]
    code = (
        "import sys, jax, test_lora_loading as cases; assert jax.device_count() == 2;"
        "cases.check_steps(sys.argv[1], sys.argv[2:], 'float32', offload=False, mesh='fsdp=2')"
    )
    path = os.pathsep.join([str(TESTS), str(TESTS / "checkpoint"), str(TESTS.parent), *sys.path])
    flags = {"XLA_FLAGS": quick.simulated(2), "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", code, *words], env=os.environ | flags, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr


def test_only_what_changes_is_read_and_nothing_is_compiled(public_checkpoint, files, compiled):
    first, _ = files
    model = Cosmos3.from_pretrained(public_checkpoint, "float32", offload=False)
    settings = dict(
        num_frames=1, height=32, width=32, num_inference_steps=1, guidance_scale=1.0,
        output="latents",
    )  # fmt: skip

    def latents() -> np.ndarray:
        return np.asarray(model.generate("A ball", seed=3, **settings)["video"])

    plain, before = latents(), model.params
    assert compiled
    compiled.clear()
    model.load_lora(first)
    adapted = latents()
    kept = sum(x is y for x, y in pairs(model.params, before))
    model.unload_lora()
    again = latents()
    assert compiled == []
    assert np.any(adapted != plain) and np.array_equal(again, plain)
    # the kernels that it adapts, a layer each in the media tower, and no others
    changed = [
        *("und/layers/attention/qkv", "und/layers/mlp/gate_up", "und/last_layer/kv"),
        *(f"gen/layers/{layer}/mlp/gate_up" for layer in range(3)), "gen/proj_out",
    ]  # fmt: skip
    assert kept == len(jax.tree.leaves(before)) - len(changed)


def test_kernels_leave_the_device_before_others_come(public_checkpoint, files, monkeypatch):
    model = Cosmos3.from_pretrained(public_checkpoint, "float32", offload=False, lora=files[0])
    kernels = [leaf["mlp"]["gate_up"]["kernel"] for leaf in model.params["gen"]["layers"].values()]
    before = [weakref.ref(kernel) for kernel in kernels]
    del kernels
    held = []

    def watched(component, piece, index=None, read=load.Component.read):
        held.append(sum(kernel() is not None for kernel in before))
        return read(component, piece, index)

    monkeypatch.setattr(load.Component, "read", watched)
    model.unload_lora()
    assert len(before) == 3 and held and not any(held)


def test_errors_leave_the_model_as_it_was(public_checkpoint, files, tmp_path, monkeypatch):
    first, second = files
    folder = link_checkpoint(public_checkpoint, tmp_path / "checkpoint")
    model = Cosmos3.from_pretrained(folder, "bfloat16", offload=False, lora=first)
    before = parts(model)

    def check_refused(act, error, message):
        with pytest.raises(error, match=message):
            act()
        assert model.weights.resident
        assert_same_tree(parts(model), before)

    missing = tmp_path / "missing.safetensors"
    check_refused(lambda: model.load_lora(missing), CheckpointError, "is missing")
    check_refused(lambda: model.load_lora([(second, 0.0)]), ValueError, "its scale is 0")
    lost = [(second, 1e-12)]
    check_refused(lambda: model.load_lora(lost), ValueError, "nothing: .* weight of bfloat16")

    # reading fails half way, after some kernels have left the device
    reads = []

    def failing(component, piece, index=None, read=load.Component.read):
        reads.append(piece)
        if len(reads) == 6:
            raise CheckpointError("the disk is gone")
        return read(component, piece, index)

    monkeypatch.setattr(load.Component, "read", failing)
    check_refused(lambda: model.load_lora(second), CheckpointError, "the disk is gone")
    assert len(reads) > 6
    reads.clear()
    check_refused(model.unload_lora, CheckpointError, "the disk is gone")
    monkeypatch.undo()
    model.load_lora(second)
    assert_same_tree(parts(model), parts(Cosmos3.from_pretrained(folder, "bfloat16", lora=second)))


def test_models_without_weights_or_without_a_checkpoint(public_checkpoint, files):
    first, second = files
    model = Cosmos3.open(public_checkpoint, lora=second)
    model.load_lora(first)
    model.load("float32", offload=False)
    assert_same_tree(
        parts(model), parts(Cosmos3.from_pretrained(public_checkpoint, "float32", lora=first))
    )
    made = Cosmos3(model.config, model.params, model.tokenizer)
    model.params = dict(made.params)
    for each in (made, model):
        for act in (each.unload_lora, lambda each=each: each.load_lora(first)):
            with pytest.raises(ValueError, match="made from parameters: .*lora.merge"):
                act()
