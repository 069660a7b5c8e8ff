"""`convert.verify` itself: what passes, what is refused, what it writes and how little it holds."""

import importlib.util
import json
import runpy
import shutil
import sys
from types import SimpleNamespace

import jax
import ml_dtypes
import numpy as np
import pytest
from checkpoint_files import (
    link_checkpoint,
    read_tensors,
    replace_file,
    update_json,
    write_tensors,
)
from safetensors.numpy import save

from convert.verify import autoencoders, cli, pipeline, reference
from convert.verify.compare import (
    FLOAT32,
    RATIO,
    Outcome,
)
from convert.verify.our_transformer import OurTransformer
from cosmos3_jax.checkpoint.convert import convert_checkpoint


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """Most of the time here is compilation, which takes a third as long without optimisations."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def half(public_checkpoint, tmp_path_factory):
    """The checkpoint in our layout, rounded to bfloat16."""
    return convert_checkpoint(public_checkpoint, tmp_path_factory.mktemp("half") / "checkpoint")


# ---------------------------------------------------------------- what passes


@pytest.mark.parametrize("component, dtype", [("transformer", "float32"), ("sound_vae", "both")])
def test_a_rounded_conversion_passes(
    public_checkpoint, half, tmp_path, monkeypatch, component, dtype
):
    """Its weights are bfloat16, the public ones float32: the reference is rounded alike, and the
    float32 bars hold. No more than a layer of the transformer is read at a time, by either side.
    """
    layers = []
    read = OurTransformer.read_layer
    monkeypatch.setattr(
        OurTransformer,
        "read_layer",
        lambda ours, index: layers.append(index) or read(ours, index),
    )
    arguments = [public_checkpoint, "--converted", half, "--component", component]
    assert cli.main([*map(str, arguments), "--dtype", dtype, "--report", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "verify.json").read_text())
    by_dtype = {name: [] for name in ("float32", "bfloat16")}
    for row in found["rows"]:
        by_dtype[row["dtype"]].append(row)
    assert by_dtype["float32"] and bool(by_dtype["bfloat16"]) == (dtype == "both")
    for row in by_dtype["float32"]:
        assert row["relative_l2"] <= row["bar"] == FLOAT32[component]
        assert row["reference_error"] is None
    for row in by_dtype["bfloat16"]:
        assert 1e-3 < row["reference_error"] < 0.1  # really rounded, and no nonsense
        assert row["relative_l2"] <= row["bar"] == RATIO * row["reference_error"]
    if component == "transformer":
        assert layers == [0, 1, 2]
        assert len(found["details"]["transformer"]["layers"]) == 2 * 3 - 1


def test_layers_limit_both_sides_and_are_said(public_checkpoint, tmp_path):
    arguments = [public_checkpoint, "--component", "transformer", "--dtype", "float32"]
    status = cli.main([*map(str, arguments), "--layers", "1", "--report", str(tmp_path)])
    found = json.loads((tmp_path / "verify.json").read_text())
    assert status == 0
    assert found["skipped"] == [
        "transformer: layers 1 to 2, by --layers 1",
        "transformer: how the towers combine their layers, which takes two",
    ]
    operations = [name for name, _ in found["details"]["transformer"]["operations"]]
    assert any(name.startswith("layers.0, media tower") for name in operations)
    assert not any(name.startswith("layers.1") for name in operations)


def test_the_whole_command_passes(public_checkpoint, tmp_path, monkeypatch):
    """Every component, both dtypes, our weights from the public files; by `python -m`."""
    monkeypatch.setattr(pipeline, "SETTINGS", pipeline.SETTINGS | {"num_inference_steps": 3})
    command = ["convert.verify", str(public_checkpoint), "--report", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("convert.verify", run_name="__main__")
    assert stopped.value.code == 0
    found = json.loads((tmp_path / "verify.json").read_text())
    assert found["passed"] and not found["unfinished"] and not found["places"]
    kinds = {(row["component"], row["dtype"]) for row in found["rows"]}
    assert kinds == {
        *((c, d) for c in cli.COMPONENTS if c != "sampler" for d in ("float32", "bfloat16")),
        ("sampler", "float32"), ("pipeline", "int32"),
    }  # fmt: skip


def test_other_tokens_fail_their_row(monkeypatch):
    """Equal prompts beside them do not make it pass."""
    ids = [1, 2, 3]
    monkeypatch.setattr(pipeline, "resolve_prompts", lambda *_, **__: None)
    monkeypatch.setattr(pipeline, "encode_prompts", lambda *_: (ids, ids[:2]))
    pipe = SimpleNamespace(
        tokenize_prompt=lambda *_, **__: (ids, ids),
        config=SimpleNamespace(default_use_system_prompt=True),
    )
    outcome = Outcome("pipeline")
    pipeline.compare_token_ids(outcome, pipe, None, None)
    assert not outcome.rows[0].passed
    assert outcome.mismatches[0].operation.startswith("token 2 of the negative")


def test_the_pipelines_own_system_prompt_is_ours():
    """None is the style's default, an empty one is none at all."""
    for theirs, ours in ((True, None), (False, "")):
        config = SimpleNamespace(default_use_system_prompt=theirs)
        assert reference.system_prompt(SimpleNamespace(config=config)) == ours


def test_how_weights_are_stored_decides_what_is_rounded(
    public_checkpoint, half, tmp_path, monkeypatch
):
    """Public files in bfloat16 against public float32: the difference is rounding alone."""
    stored = link_checkpoint(public_checkpoint, tmp_path / "stored")
    tensors = read_tensors(stored / "vae")
    write_tensors(stored / "vae", {k: v.astype(ml_dtypes.bfloat16) for k, v in tensors.items()})
    seen = []
    monkeypatch.setattr(
        autoencoders, "compare", lambda _, sides: seen.append(sides.rounded("video_vae"))
    )
    for folder in (public_checkpoint, stored, half):
        arguments = [public_checkpoint, "--converted", folder, "--component", "video_vae"]
        assert cli.main([str(argument) for argument in arguments]) == 0
    assert seen == ["", "stored", "folded"]


def test_only_folded_weights_may_round_to_the_other_side(public_checkpoint, half, tmp_path):
    """Two libraries fold weight norm apart by a rounding of float32, which bfloat16 may widen in
    one value of hundreds. What is not folded is equal.
    """
    folder = link_checkpoint(half, tmp_path / "rounded") / "sound_tokenizer"
    tensors = read_tensors(folder)
    [shard] = folder.glob("params-*.safetensors")

    def status(key: str) -> int:
        values = tensors[key].copy()
        smallest = np.unravel_index(np.argmin(np.abs(values.astype(np.float32))), values.shape)
        values[smallest] = np.nextafter(values[smallest], values.dtype.type(1))
        replace_file(shard, save(tensors | {key: values}, {"format": "pt"}))
        arguments = [public_checkpoint, "--converted", folder.parent, "--component", "sound_vae"]
        return cli.main([*map(str, arguments), "--dtype", "float32"])

    assert status("decoder/block_0/conv_t1/kernel") == 0
    assert status("decoder/block_0/snake1/alpha") == 1


def test_free_memory_is_what_a_container_leaves(tmp_path):
    assert pipeline.free_gib("cpu", tmp_path) > 0.5  # no limit there
    (tmp_path / "memory.current").write_text(str(2**29))
    for limit, free in (("max", None), (str(2**30), 0.5), (str(2**28), 0)):
        (tmp_path / "memory.max").write_text(limit)
        found = pipeline.free_gib("cpu", tmp_path)
        assert found > 0.5 if free is None else found == free


# ---------------------------------------------------------------- what is refused


def refused(capsys, *arguments) -> str:
    """The one line that says why."""
    assert cli.main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("convert.verify: error: ") and error.count("\n") == 1
    return error


@pytest.fixture
def no_work(monkeypatch):
    """Whoever begins to compare fails."""

    def fail(*_, **__):
        raise AssertionError("compared before the input was refused")

    monkeypatch.setattr(cli, "compare_component", fail)


def test_bad_options_are_refused(public_checkpoint, silent_checkpoint, capsys, tmp_path, no_work):
    assert "no checkpoint" in refused(capsys)
    assert "there is no folder" in refused(capsys, tmp_path / "nowhere")
    assert "has no transformer/config.json" in refused(capsys, tmp_path)
    for layers in ("0", "4"):
        error = refused(capsys, public_checkpoint, "--layers", layers)
        assert f"--layers {layers} is not between 1 and 3" in error
    error = refused(capsys, silent_checkpoint, "--component", "sound_vae")
    assert "has no sound" in error and "choose another component" in error
    file = tmp_path / "file"
    file.touch()
    assert f"--report {file} cannot be written" in refused(
        capsys, public_checkpoint, "--report", file
    )
    assert "is no report" in refused(capsys, "--markdown", file)
    with pytest.raises(SystemExit) as stopped:
        cli.main([str(public_checkpoint), "--component", "eyes"])
    assert stopped.value.code == 2


def test_other_checkpoints_are_refused(
    public_checkpoint, silent_checkpoint, half, capsys, tmp_path, no_work
):
    error = refused(capsys, half)
    assert "converted layout" in error and f"--converted {half}" in error
    other = link_checkpoint(half, tmp_path / "other")
    update_json(other / "transformer" / "config.json", rope_theta=1e4)
    error = refused(capsys, public_checkpoint, "--converted", other)
    assert "belongs to another checkpoint" in error and "rope_theta=10000.0" in error
    error = refused(capsys, silent_checkpoint, "--converted", half)
    assert "belongs to another checkpoint" in error
    shutil.rmtree(other / "vae")
    assert "vae/config.json" in refused(capsys, public_checkpoint, "--converted", other)


def test_missing_libraries_are_named(public_checkpoint, capsys, monkeypatch, no_work):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "diffusers" else find(name)
    )
    error = refused(capsys, public_checkpoint)
    assert "diffusers not installed" in error and 'pip install ".[convert]"' in error


def test_sound_is_left_out_where_a_conversion_has_none(
    public_checkpoint, capsys, tmp_path, monkeypatch
):
    silent = convert_checkpoint(public_checkpoint, tmp_path / "silent", sound=False)
    monkeypatch.setattr(cli, "compare_component", lambda name, _: Outcome(name))
    assert cli.main([str(public_checkpoint), "--converted", str(silent)]) == 0
    said = capsys.readouterr().out
    assert f"skipped: sound: {silent} has none" in said and "sound_vae" not in said
