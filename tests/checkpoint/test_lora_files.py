"""LoRA files: exchanged with diffusers' own loader both ways, and refused."""

import jax
import numpy as np
import pytest
import torch
from checkpoint_files import update_json
from lora_cases import KERNELS, TOLERANCE, oracles, trained, velocity
from peft import LoraConfig, get_peft_model
from rounding import farthest, relative_l2
from safetensors.numpy import load_file, save_file
from training_cases import new_oracle, params
from training_run import CONFIG

from cosmos3_jax.checkpoint import lora, lora_files
from cosmos3_jax.checkpoint.rules import CheckpointError


def test_diffusers_reads_what_we_write(tmp_path):
    """By its real loader; every kind of linear map, a scale other than 1, one layer left out."""
    adapter = trained()
    key = "layers.*.self_attn.to_add_out"
    pair = jax.tree.map(lambda x: x.at[1].set(0), adapter.adapters[key])
    adapter = adapter.replace(adapters=adapter.adapters | {key: pair})
    file = lora_files.save(adapter, tmp_path / "file.safetensors", CONFIG)
    names = load_file(file).keys()
    assert "transformer.layers.0.self_attn.to_add_out.lora_A.weight" in names
    assert "transformer.layers.1.self_attn.to_add_out.lora_A.weight" not in names
    model = new_oracle()
    model.load_lora_adapter(str(file))
    merged, _ = lora.merge(adapter, params(), CONFIG)
    assert relative_l2(velocity(merged), oracles(model)) <= TOLERANCE
    assert relative_l2(velocity(params()), oracles(model)) > 0.05
    again, _ = lora.merge(lora_files.load(file, CONFIG), params(), CONFIG)
    assert farthest(again, merged) <= KERNELS
    # a reader that knows nothing of our metadata sees the same model
    model = new_oracle()
    model.load_lora_adapter({k: torch.tensor(x) for k, x in load_file(file).items()})
    assert relative_l2(velocity(merged), oracles(model)) <= TOLERANCE


def test_we_read_what_diffusers_writes(tmp_path):
    """Ranks and alphas that differ between modules and layers, as PEFT's patterns say them."""
    model = new_oracle()
    modules = ["to_q", "add_v_proj", "to_add_out", "down_proj", "audio_proj_in", "linear_2"]
    model.add_adapter(
        LoraConfig(
            r=2, lora_alpha=6, target_modules=modules, init_lora_weights=False,
            rank_pattern={"layers.1.self_attn.add_v_proj": 4}, alpha_pattern={"linear_2": 1},
        )
    )  # fmt: skip
    model.save_lora_adapter(tmp_path, weight_name=lora_files.FILE_NAME)
    file = tmp_path / lora_files.FILE_NAME
    adapter = lora_files.load(file, CONFIG)
    merged, _ = lora.merge(adapter, params(), CONFIG)
    found = oracles(model)
    assert relative_l2(velocity(merged), found) <= TOLERANCE
    assert relative_l2(velocity(params()), found) > 0.05
    # it adapts modules of the text tower's last layer, which nobody reads; alone they are no LoRA
    assert "layers.2.self_attn.to_q.lora_A.weight" in load_file(file)
    unread = {key: x for key, x in load_file(file).items() if key.startswith("layers.2.mlp.")}
    save_file(unread, tmp_path / "unread.safetensors")
    with pytest.raises(CheckpointError, match="adapts only what is not read"):
        lora_files.load(tmp_path / "unread.safetensors", CONFIG)


@pytest.mark.parametrize("rslora", [False, True])
def test_we_read_peft_s_folder(tmp_path, rslora):
    """As PEFT itself applies it, with its scale, patterns and names."""
    model = new_oracle()
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=["to_q", "add_v_proj", "up_proj", "proj_out"],
        init_lora_weights=False, use_rslora=rslora, rank_pattern={"add_v_proj": 2},
        alpha_pattern={r"layers\.\d\.mlp_moe_gen\.up_proj": 1},
    )  # fmt: skip
    get_peft_model(model, config).save_pretrained(tmp_path)  # and the model has it from now on
    merged, _ = lora.merge(lora_files.load(tmp_path, CONFIG), params(), CONFIG)
    assert relative_l2(velocity(merged), oracles(model)) <= TOLERANCE
    update_json(tmp_path / "adapter_config.json", use_rslora=not rslora)
    other, _ = lora.merge(lora_files.load(tmp_path, CONFIG), params(), CONFIG)
    assert relative_l2(velocity(other), oracles(model)) > 0.01


def test_a_file_that_does_not_fit_is_told_from_end_to_end(tmp_path):
    file = lora_files.save(trained(["gen/layers/mlp"]), tmp_path, CONFIG)
    tensors = load_file(file)
    first = "transformer.layers.0.mlp_moe_gen.gate_proj"
    del tensors[f"{first}.lora_A.weight"]
    tensors["transformer.layers.9.mlp_moe_gen.up_proj.lora_A.weight"] = np.ones((3, 64), "f")
    tensors["transformer.layers.1.mlp_moe_gen.up_proj.lora_B.weight"] = np.ones((96, 4), "f")
    save_file(tensors, file)
    with pytest.raises(CheckpointError) as caught:
        lora_files.load(file, CONFIG)
    message = str(caught.value)
    assert "layers.0.mlp_moe_gen.gate_proj: only lora_B" in message
    assert "layers.9.mlp_moe_gen.up_proj.lora_A.weight; near: layers.0.mlp_moe_gen" in message
    assert "layers.1.mlp_moe_gen.up_proj: A (3, 64) and B (96, 4), expected (R, 64)" in message
    save_file({"lora_te.weight": np.ones(3, "f")}, file)
    with pytest.raises(CheckpointError, match="lora_te.weight"):
        lora_files.load(file, CONFIG)
    with pytest.raises(CheckpointError, match="missing.safetensors is missing"):
        lora_files.load(tmp_path / "missing.safetensors", CONFIG)
