"""`convert.verify` itself: what passes, what is refused, what it writes and how little it holds."""

import dataclasses
import importlib.util
import json
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from checkpoint_files import link_checkpoint, update_json

from convert.verify import cli, reference, report, transformer_ours
from convert.verify.compare import FLOAT32, NONSENSE, RATIO, Outcome, Place, Pool, relative_l2
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


@pytest.mark.parametrize("component", ["transformer", "sound_vae"])
def test_a_rounded_conversion_passes_in_both_dtypes(
    public_checkpoint, half, tmp_path, monkeypatch, component
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
    assert cli.main([*map(str, arguments), "--report", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "verify.json").read_text())
    by_dtype = {dtype: [] for dtype in ("float32", "bfloat16")}
    for row in found["rows"]:
        by_dtype[row["dtype"]].append(row)
    assert [row["case"] for row in by_dtype["float32"]] == [
        row["case"] for row in by_dtype["bfloat16"]
    ]
    for row in by_dtype["float32"]:
        assert row["relative_l2"] <= row["bar"] == FLOAT32[component]
        assert row["reference_error"] is None
    for row in by_dtype["bfloat16"]:
        assert 1e-3 < row["reference_error"] < 0.1  # really rounded, and no nonsense
        assert row["relative_l2"] <= row["bar"] == RATIO * row["reference_error"]
    if component == "transformer":
        assert read["theirs"] == [set(), {"0"}, {"1"}, {"2"}]
        assert read["ours"] == [set(), {(0,)}, {(1,)}, {(2,)}]
        assert len(found["details"]["transformer"]["layers"]) == 2 * (2 * 3 - 1)


def test_layers_limit_both_sides_and_are_said(public_checkpoint, tmp_path):
    arguments = [public_checkpoint, "--component", "transformer", "--dtype", "float32"]
    status = cli.main([*map(str, arguments), "--layers", "1", "--report", str(tmp_path)])
    found = json.loads((tmp_path / "verify.json").read_text())
    assert status == 0
    assert found["skipped"] == ["transformer: layers 1 to 2, by --layers 1"]
    operations = [name for name, _ in found["details"]["transformer"]["operations"]]
    assert any(name.startswith("layers.0.mlp") for name in operations)
    assert not any(name.startswith("layers.1.mlp") for name in operations)


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
    assert relative_l2(np.zeros(2), np.zeros(2)) == 0
    assert relative_l2(np.ones(2), np.zeros(2)) == np.inf


@pytest.mark.parametrize(
    ("error", "reference_error", "passed"),
    [
        (1.1e-2, 1e-2, True),
        (1.3e-2, 1e-2, False),
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


def test_what_was_compared_stays_when_the_rest_fails(public_checkpoint, tmp_path, monkeypatch):
    compared = []

    def compare(name, *_):
        if compared:
            raise MemoryError
        compared.append(name)
        return Outcome()

    monkeypatch.setattr(cli, "_compare", compare)
    with pytest.raises(MemoryError):
        cli.main([str(public_checkpoint), "--report", str(tmp_path)])
    found = json.loads((tmp_path / "verify.json").read_text())
    assert found["unfinished"] == ["video_vae", "sound_vae", "sampler", "pipeline"]


def test_markdown_puts_dtypes_side_by_side():
    pool = Pool()
    pool.add(np.ones(3) + 1e-7, np.ones(3), np.ones(3) + 1e-2)
    rows = [pool.row("video_vae", "decode", "bfloat16", picture=True)]
    rows.insert(0, dataclasses.replace(rows[0], dtype="float32", relative_l2=2e-7, passed=False))
    outcome = Outcome(rows=rows)
    made = report.make({"video_vae": outcome}, "x")
    [line] = report.markdown(json.loads(json.dumps(made))).splitlines()[2:]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[:4] == ["video vae: decode", "2.0e-07", "1.0e-07", "1.0e-02"]
    assert cells[-1] == "**FAIL**"


def test_what_json_cannot_hold_becomes_text(tmp_path):
    outcome = Outcome(places=[Place("sampler", "x", (), "", np.inf, 0.0)])
    path = report.write(report.make({"sampler": outcome}, "x"), tmp_path)
    assert json.loads(path.read_text())["places"][0]["relative_l2"] == "inf"
    assert [entry.name for entry in tmp_path.iterdir()] == ["verify.json"]


def test_the_readmes_table_is_the_reports():
    """Made by the script, not by hand."""
    root = Path(__file__).parents[1]
    made = json.loads((root / "benchmarks/results/verify_tiny.json").read_text("utf-8"))
    assert made["passed"] and made["checkpoint"] == "tiny" and not made["unfinished"]
    assert {row["component"] for row in made["rows"]} == set(cli.COMPONENTS)
    assert {row["dtype"] for row in made["rows"]} >= {"float32", "bfloat16"}
    assert report.markdown(made) in (root / "README.md").read_text("utf-8")
