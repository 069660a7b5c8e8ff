"""`convert.verify` itself: what passes, what is refused, what it writes and how little it holds."""

import dataclasses
import importlib.util
import json
import os
import runpy
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import ml_dtypes
import numpy as np
import pytest
from checkpoint_files import link_checkpoint, read_tensors, update_json, write_tensors
from PIL import Image

from convert.verify import autoencoders, cli, pipeline, reference, report, transformer_ours
from convert.verify.compare import (
    FLOAT32,
    NONSENSE,
    RATIO,
    Outcome,
    Place,
    Pool,
    keeping,
    relative_l2,
)
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
    read = {"theirs": [], "ours": []}
    theirs, ours = reference.PublicTensors.read, transformer_ours.Parameters._tree

    def read_theirs(self, pattern, rounded):
        tensors = theirs(self, pattern, rounded)
        read["theirs"].append({name.split(".")[1] for name in tensors if "layers." in name})
        return tensors

    def read_ours(self, chosen):
        read["ours"].append({piece.place for piece, _ in chosen if "/layers/" in piece.leaf})
        return ours(self, chosen)

    monkeypatch.setattr(reference.PublicTensors, "read", read_theirs)
    monkeypatch.setattr(transformer_ours.Parameters, "_tree", read_ours)
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
        assert read["theirs"] == [set(), {"0"}, {"1"}, {"2"}]
        assert read["ours"] == [set(), {(0,)}, {(1,)}, {(2,)}]
        assert len(found["details"]["transformer"]["layers"]) == 2 * 3 - 1


def test_layers_limit_both_sides_and_are_said(public_checkpoint, tmp_path):
    arguments = [public_checkpoint, "--component", "transformer", "--dtype", "float32"]
    status = cli.main([*map(str, arguments), "--layers", "1", "--report", str(tmp_path)])
    found = json.loads((tmp_path / "verify.json").read_text())
    assert status == 0
    assert found["skipped"] == [
        "transformer: layers 1 to 2, by --layers 1",
        "transformer: how the towers put their layers together, which takes two",
    ]
    operations = [name for name, _ in found["details"]["transformer"]["operations"]]
    assert any(name.startswith("layers.0.mlp") for name in operations)
    assert not any(name.startswith("layers.1.mlp") for name in operations)


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
    outcome = Outcome()
    pipeline._compare_ids(outcome, pipe, None, None)
    assert not outcome.rows[0].passed
    assert outcome.places[0].operation.startswith("token 2 of the negative")


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
    monkeypatch.setattr(autoencoders, "compare", lambda *_, rounded, **__: seen.append(rounded))
    for folder in (public_checkpoint, stored, half):
        arguments = [public_checkpoint, "--converted", folder, "--component", "video_vae"]
        assert cli.main([str(argument) for argument in arguments]) == 0
    assert seen == ["", "stored", "folded"]


def test_free_memory_is_what_a_container_leaves(tmp_path):
    assert cli._free_gib("cpu", tmp_path) > 0.5  # no limit there
    (tmp_path / "memory.current").write_text(str(2**29))
    for limit, free in (("max", None), (str(2**30), 0.5), (str(2**28), 0)):
        (tmp_path / "memory.max").write_text(limit)
        found = cli._free_gib("cpu", tmp_path)
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

    monkeypatch.setattr(cli, "_compare", fail)


def test_bad_options_are_refused(public_checkpoint, silent_checkpoint, capsys, tmp_path, no_work):
    assert "no checkpoint" in refused(capsys)
    assert "is not a folder" in refused(capsys, tmp_path / "nowhere")
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
    monkeypatch.setattr(cli, "_compare", lambda *_, **__: Outcome())
    assert cli.main([str(public_checkpoint), "--converted", str(silent)]) == 0
    said = capsys.readouterr().out
    assert f"skipped: sound: {silent} has none" in said and "sound_vae" not in said


# ---------------------------------------------------------------- numbers and verdicts


def test_metrics_by_hand():
    pool = Pool()
    pool.add(np.float32([3, 0]), np.float32([3, 4]), np.float32([3, 3]))
    pool.add(np.float32([0, 0]), np.float32([0, 0]), np.float32([0, 0]))
    row = pool.row("pipeline", "x", "bfloat16", picture=True)
    assert (row.shape, row.inputs, row.max_abs) == ((2,), 2, 4)
    assert row.relative_l2 == pytest.approx(4 / 5) and row.reference_error == pytest.approx(1 / 5)
    assert row.cosine == pytest.approx(9 / 15) and row.psnr == pytest.approx(-10 * np.log10(16 / 4))
    assert row.bar == pytest.approx(RATIO / 5) and not row.passed
    nothing, wrong = Pool(), Pool()
    nothing.add(np.zeros(2), np.zeros(2))
    wrong.add(np.zeros(2), np.ones(2))
    assert nothing.row("pipeline", "x", "float32").cosine == 1
    assert wrong.row("pipeline", "x", "float32").cosine == 0
    wrong.add(np.zeros(3), np.ones(2))
    row = wrong.row("pipeline", "x", "float32")
    assert not row.passed and row.relative_l2 == np.inf and "shape is (3,) here, (2,)" in row.note
    assert relative_l2(np.zeros(2), np.zeros(2)) == 0
    assert relative_l2(np.ones(2), np.zeros(2)) == np.inf


@pytest.mark.parametrize(
    ("error", "reference_error", "passed"),
    [
        (1.1e-2, 1e-2, True),
        (1.3e-2, 1e-2, False),
        (2.9e-3, 1e-2, False),  # too good to be bfloat16
        (3.1e-3, 1e-2, True),
        (0.5, 1.1 * NONSENSE, False),  # a broken reference excuses nothing
        (np.nan, 1e-2, False),
        (0.9e-5, None, True),
        (1.1e-5, None, False),
        (np.nan, None, False),
    ],
)
def test_verdicts(error, reference_error, passed):
    pool, exact = Pool(), np.float64([1, 0])
    low = None if reference_error is None else exact + [0, reference_error]
    pool.add(exact + [0, error], exact, low)
    assert pool.row("transformer", "x", "any").passed is passed


def test_a_place_fails_an_outcome_and_says_what_to_look_at():
    place = Place("transformer", "layers.1.mlp.up_proj", ("layers.1.mlp.up_proj.weight",),
                  "und/layers/mlp/gate_up[1]", 0.5, 1e-5, "ours holds another")  # fmt: skip
    assert Outcome().passed and not Outcome(places=[place]).passed
    for part in (*place.tensors, place.leaf, place.hint, "5.0e-01"):
        assert part in str(place)
    assert Outcome(places=[place]).parting == str(place) and Outcome().parting == ""
    pool = Pool()
    pool.add(np.ones(2), np.zeros(2))
    between = Outcome(rows=[pool.row("video_vae", "decode", "float32")])
    assert between.parting.startswith("video_vae: decode in float32, with every operation in")


# ---------------------------------------------------------------- what is written


def test_the_report_has_everything_and_is_written_whole(
    public_checkpoint, tmp_path, capsys, monkeypatch
):
    folder = tmp_path / "new" / "folder"
    arguments = [str(public_checkpoint), "--component", "sampler", "--report", str(folder)]
    assert cli.main(arguments) == 0
    path = folder / "verify.json"
    before = path.read_text()
    found = json.loads(before)
    assert found["passed"] and found["checkpoint"] == str(public_checkpoint)
    assert {"jax", "torch", "diffusers"} <= found["versions"].keys()
    assert found["options"]["component"] == "sampler" and found["converted"] is None
    assert found["peak_memory_gib"] > 0 and found["seconds"] > 0
    assert found["bars"]["float32"] == FLOAT32 and found["unfinished"] == []
    assert len(found["rows"]) == 3
    capsys.readouterr()
    assert cli.main(["--markdown", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 3 and all(line.count("|") == lines[0].count("|") for line in lines)
    assert "sampler: native schedule" in lines[2] and "pass" in lines[2]

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full)
    assert cli.main(arguments) == 2
    assert path.read_text() == before


def test_what_was_compared_stays_when_the_rest_fails(
    public_checkpoint, tmp_path, capsys, monkeypatch
):
    compared, first = [], Outcome(skipped=["a part"])

    def compare(name, *_):
        if compared:
            raise MemoryError
        compared.append(name)
        return first

    monkeypatch.setattr(cli, "_compare", compare)
    arguments = [str(public_checkpoint), "--report", str(tmp_path)]
    error = refused(capsys, *arguments)
    assert "MemoryError (test_verify.py:" in error
    found = json.loads((tmp_path / "verify.json").read_text())
    assert found["unfinished"] == ["video_vae", "sound_vae", "sampler", "pipeline"]

    # A verdict that has failed by then outweighs the error, and its skips are said.
    compared.clear()
    first.places.append(Place("transformer", "x", (), "", 1.0, 0.0))
    assert cli.main(arguments) == 1
    printed = capsys.readouterr()
    assert "skipped: a part" in printed.out and "an earlier verdict failed" in printed.err
    assert not json.loads((tmp_path / "verify.json").read_text())["passed"]


def test_an_error_after_a_failed_verdict_keeps_it():
    outcome = Outcome()
    with pytest.raises(RuntimeError), keeping(outcome, "vae"):
        raise RuntimeError("nothing has failed")
    with keeping(outcome, "vae"):
        outcome.places.append(Place("vae", "x", (), "", 1.0, 0.0))
        raise RuntimeError("two\nlines")
    assert outcome.skipped == ["vae: the rest, stopped by RuntimeError: two lines"]


def test_markdown_puts_dtypes_side_by_side():
    pool = Pool()
    pool.add(np.ones(3) + 1e-7, np.ones(3), np.ones(3) + 1e-2)
    rows = [pool.row("video_vae", "decode", "bfloat16", picture=True)]
    rows.insert(0, dataclasses.replace(rows[0], dtype="float32", relative_l2=2e-7, passed=False))
    outcome = Outcome(rows=rows)
    made = report.make({"video_vae": outcome}, "x")
    failed, _, *table = report.markdown(json.loads(json.dumps(made))).splitlines()
    assert failed.startswith("**FAILED**: video_vae: decode in float32")
    [line] = table[2:]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[:4] == ["video vae: decode", "2.0e-07", "1.0e-07", "1.0e-02"]
    assert cells[-1] == "**FAIL**"


def test_what_json_cannot_hold_becomes_text(tmp_path, capsys):
    outcome = Outcome(places=[Place("sampler", "x", (), "", np.inf, 0.0)])
    path = report.write(report.make({"sampler": outcome}, "x"), tmp_path)
    assert json.loads(path.read_text())["places"][0]["relative_l2"] == "inf"
    pool = Pool()
    pool.add(np.float32([np.nan, 1]), np.ones(2, np.float32))
    outcome = Outcome(rows=[pool.row("video_vae", "decode", "float32", picture=True)])
    report.write(report.make({"video_vae": outcome}, "x"), tmp_path)
    assert cli.main(["--markdown", str(path)]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert "| nan |" in line and "**FAIL**" in line
    path.write_text('{"passed": true, "rows": [{"component": 1}]}')
    assert "is no report" in refused(capsys, "--markdown", path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["verify.json"]


def test_the_readmes_table_is_the_reports():
    """Made by the script, not by hand."""
    root = Path(__file__).parents[1]
    made = json.loads((root / "benchmarks/results/verify_tiny.json").read_text("utf-8"))
    assert made["passed"] and made["checkpoint"] == "tiny" and not made["unfinished"]
    assert {row["component"] for row in made["rows"]} == set(cli.COMPONENTS)
    assert {row["dtype"] for row in made["rows"]} >= {"float32", "bfloat16"}
    assert report.markdown(made) in (root / "README.md").read_text("utf-8")


def test_plots_of_a_report(tmp_path):
    """Errors by layer and by operation, each a picture that opens."""
    root = Path(__file__).parents[1]
    made = json.loads((root / "benchmarks/results/verify_tiny.json").read_text("utf-8"))
    paths = report.plot(made, tmp_path)
    names = ["transformer_operations", "video_vae_operations", "sound_vae_operations"]
    assert [path.stem for path in paths] == ["layers", *names]
    for path in paths:
        with Image.open(path) as image:
            assert min(image.size) > 200 and len(image.getcolors(2**24)) > 10
