"""Weights that are not finite are refused as they are read, by the names of tensor and file."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_files import PUBLIC, link_checkpoint, open_checkpoint, read_tensors, write_tensors

from cosmos3_jax import Cosmos3
from cosmos3_jax.checkpoint import load, lora, lora_files
from cosmos3_jax.checkpoint.convert import convert_checkpoint
from cosmos3_jax.checkpoint.finite import BLOCK_BYTES, is_finite
from cosmos3_jax.checkpoint.rules import CheckpointError
from cosmos3_jax.config import TransformerConfig

DTYPES = [np.dtype(jnp.bfloat16), np.dtype(np.float16), np.dtype(np.float32), np.dtype(np.float64)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_kind_of_number_is_told_from_those_that_are_none(dtype):
    info = jnp.finfo(dtype)
    count = 2 * BLOCK_BYTES // dtype.itemsize + 3
    good = np.resize(np.array([info.max, info.min, info.tiny, -info.tiny, 0.0, -0.0], dtype), count)
    assert is_finite(good) and is_finite(good[:0]) and is_finite(good[0].reshape(()))
    for bad in (np.inf, -np.inf, np.nan, -np.nan):
        for place in (0, count // 2, count - 1):
            values = good.copy()
            values[place] = bad
            assert not is_finite(values), (bad, place)
    turned = good[: count // 2 * 2].reshape(2, -1).T
    assert is_finite(turned)
    turned[5, 1] = np.nan
    assert not is_finite(turned)


def test_all_numbers_of_two_bytes():
    for dtype in DTYPES[:2]:
        values = np.arange(2**16, dtype=np.uint16).view(dtype)
        found = [is_finite(values[i : i + 1]) for i in range(0, 2**16, 7)]
        with np.errstate(invalid="ignore"):
            assert found == np.isfinite(values[::7]).tolist()


@pytest.fixture
def folder(public_checkpoint, tmp_path):
    return link_checkpoint(public_checkpoint, tmp_path / "checkpoint")


def spoil(folder, component, key, value=np.nan, dtype=None):
    tensors = read_tensors(folder / component)
    tensors[key] = tensors[key].astype(dtype or tensors[key].dtype)
    tensors[key].flat[-1] = value
    write_tensors(folder / component, tensors)


def read_all(folder, component, dtype=jnp.float32):
    [opened] = [x for x in open_checkpoint(folder) if x.name == component]
    for piece in opened.pieces(jnp.dtype(dtype)):
        opened.read(piece)


# A tensor of each part of the weights; the text tower's, of layers that are stacked, is one layer.
TENSORS = [
    ("transformer", "layers.1.self_attn.to_k.weight", np.nan),
    ("transformer", "layers.1.mlp_moe_gen.down_proj.weight", -np.inf),
    ("transformer", "norm_moe_gen.weight", np.inf),
    ("vae", "decoder.conv_in.bias", np.nan),
]


@pytest.mark.parametrize(("component", "key", "value"), TENSORS, ids=lambda x: str(x)[:40])
def test_the_tensor_and_its_file_are_named(folder, component, key, value):
    spoil(folder, component, key, value)
    said = re.escape(f"{folder / component / PUBLIC}.safetensors: {key} holds NaN or infinity; ")
    with pytest.raises(CheckpointError, match=said + "download the checkpoint again") as caught:
        read_all(folder, component)
    assert "\n" not in str(caught.value)


def test_with_offload_they_are_looked_at_when_they_are_used(folder):
    spoil(folder, "vae", "decoder.conv_in.bias")
    with pytest.raises(CheckpointError, match="decoder.conv_in.bias holds NaN"):
        Cosmos3.from_pretrained(folder, "float32", offload=False)
    model = Cosmos3.from_pretrained(folder, "float32", offload=True)  # nothing is read yet
    with pytest.raises(CheckpointError, match="decoder.conv_in.bias holds NaN"):
        with model.weights.borrow("video_vae"):
            pass


def test_a_conversion_writes_none(folder, tmp_path):
    spoil(folder, "vae", "decoder.conv_in.bias")
    with pytest.raises(CheckpointError, match="decoder.conv_in.bias holds NaN"):
        convert_checkpoint(folder, tmp_path / "converted")
    assert not (tmp_path / "converted").exists()


def test_numbers_are_judged_in_the_dtype_that_they_will_have(folder):
    key = "layers.1.self_attn.to_k.weight"
    spoil(folder, "transformer", key, 3.4e38, np.float32)
    [transformer, *_] = open_checkpoint(folder)
    for dtype in (jnp.bfloat16, jnp.float32):
        [piece] = [
            piece for piece in transformer.pieces(jnp.dtype(dtype))
            if any(rule.key == key for rule, _ in piece.parts)
        ]  # fmt: skip
        if dtype == jnp.float32:
            assert np.max(transformer.read(piece)) == np.float32(3.4e38)
        else:
            with pytest.raises(CheckpointError, match=f"{key}.* is not finite in bfloat16: "):
                transformer.read(piece)


def test_a_direction_of_zero_is_no_weight(folder):
    tensors = read_tensors(folder / "sound_tokenizer")
    key = next(key for key in tensors if key.endswith("weight_v"))
    tensors[key] = np.zeros_like(tensors[key])
    write_tensors(folder / "sound_tokenizer", tensors)
    with pytest.raises(CheckpointError, match=f"{re.escape(key)}.* is not finite in float32"):
        read_all(folder, "sound_tokenizer")


def test_a_part_of_a_tensor_is_looked_at_too(folder):
    """As a device of several reads it."""
    key = "layers.1.mlp_moe_gen.down_proj.weight"
    spoil(folder, "transformer", key)
    [transformer, *_] = open_checkpoint(folder)
    [piece] = [x for x in transformer.pieces(jnp.dtype(jnp.float32)) if x.parts[0][0].key == key]
    rows, columns = piece.shape
    first, last = (slice(0, rows // 2), slice(rows // 2, rows))
    assert np.isfinite(transformer.read(piece, (first, slice(0, columns)))).all()
    with pytest.raises(CheckpointError, match=key):
        transformer.read(piece, (last, slice(0, columns)))


def test_a_lora_that_is_too_large_is_named(public_checkpoint):
    [transformer, *_] = open_checkpoint(public_checkpoint)
    config = load.load_config(public_checkpoint).transformer
    drawn = lora.init(jax.random.key(0), config, rank=1, patterns=["gen/layers/mlp/down"])
    pairs = {name: x | {"b": x["b"] + 1e30} for name, x in drawn.adapters.items()}
    for scale, finite in ((1.0, True), (1e12, False), (1e39, False)):
        addition = lora.merge_on_read([lora.Lora(pairs, scale)], config)
        merged = dataclasses.replace(transformer, addition=addition)
        [piece, *_] = [
            x for x in merged.pieces(jnp.dtype(jnp.float32)) if "gen/layers/mlp/down" in x.key
        ]
        if finite:
            assert np.isfinite(merged.read(piece)).all()
        else:
            said = "down_proj.weight with the LoRA merged is not finite in float32: give a smaller"
            with pytest.raises(CheckpointError, match=said):
                merged.read(piece)


@pytest.mark.parametrize("factor", [1e39, -1e39, 1e-300, float("inf"), 0.0])
def test_a_factor_is_judged_as_float32_before_the_file_is_read(tmp_path, factor):
    with pytest.raises(ValueError, match=f"its scale is {re.escape(str(factor))}; give a factor"):
        lora_files.load_scaled([(tmp_path / "none.safetensors", factor)], TransformerConfig())
