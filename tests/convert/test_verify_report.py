"""`convert.verify`: its numbers and verdicts, and the report that it writes."""

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from convert.verify import cli, report
from convert.verify.compare import (
    FLOAT32,
    NONSENSE,
    RATIO,
    Mismatch,
    Outcome,
    Pool,
    relative_l2,
)


def refused(capsys, *arguments) -> str:
    """The one line that says why."""
    assert cli.main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("convert.verify: error: ") and error.count("\n") == 1
    return error


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


def test_a_mismatch_fails_an_outcome_and_says_what_to_look_at():
    place = Mismatch("transformer", "layers.1.mlp.up_proj.weight", ("layers.1.mlp.up_proj.weight",),
                  "und/layers/mlp/gate_up/kernel[1]", 0.5, 1e-5, "ours holds another")  # fmt: skip
    assert Outcome("x").passed and not Outcome("x", mismatches=[place]).passed
    for part in (*place.tensors, place.leaf, place.hint, "5.0e-01"):
        assert part in str(place)
    assert (
        Outcome("x", mismatches=[place]).first_failure == str(place)
        and Outcome("x").first_failure == ""
    )
    pool = Pool()
    pool.add(np.ones(2), np.zeros(2))
    between = Outcome("video_vae", rows=[pool.row("video_vae", "decode", "float32")])
    assert between.first_failure.startswith(
        "video_vae: decode in float32, every tensor and step in its bar"
    )


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
    compared, first = [], Outcome("transformer", skipped=["a part"])

    def compare(name, *_):
        if compared:
            raise MemoryError
        compared.append(name)
        return first

    monkeypatch.setattr(cli, "compare_component", compare)
    arguments = [str(public_checkpoint), "--report", str(tmp_path)]
    error = refused(capsys, *arguments)
    assert "MemoryError (test_verify_report.py:" in error
    found = json.loads((tmp_path / "verify.json").read_text())
    assert found["unfinished"] == ["video_vae", "sound_vae", "sampler", "pipeline"]

    # A verdict that has failed by then outweighs the error, and its skips are said.
    compared.clear()
    first.mismatches.append(Mismatch("transformer", "x"))
    assert cli.main(arguments) == 1
    printed = capsys.readouterr()
    assert "skipped: a part" in printed.out and "an earlier verdict failed" in printed.err
    assert not json.loads((tmp_path / "verify.json").read_text())["passed"]


def test_an_error_after_a_failed_verdict_keeps_it():
    outcome = Outcome("vae")
    with pytest.raises(RuntimeError), outcome.keeping_failures():
        raise RuntimeError("nothing has failed")
    with outcome.keeping_failures():
        outcome.add("x")
        raise RuntimeError("two\nlines")
    assert outcome.skipped == ["vae: the rest, stopped by RuntimeError: two lines"]


def test_markdown_puts_dtypes_side_by_side():
    pool = Pool()
    pool.add(np.ones(3) + 1e-7, np.ones(3), np.ones(3) + 1e-2)
    rows = [pool.row("video_vae", "decode", "bfloat16", picture=True)]
    rows.insert(0, dataclasses.replace(rows[0], dtype="float32", relative_l2=2e-7, passed=False))
    outcome = Outcome("video_vae", rows=rows)
    made = report.make({"video_vae": outcome}, "x")
    failed, _, *table = report.markdown(json.loads(json.dumps(made))).splitlines()
    assert failed.startswith("**FAILED**: video_vae: decode in float32")
    [line] = table[2:]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[:4] == ["video vae: decode", "2.0e-07", "1.0e-07", "1.0e-02"]
    assert cells[-1] == "**FAIL**"


def test_what_json_cannot_hold_becomes_text(tmp_path, capsys):
    outcome = Outcome("sampler", mismatches=[Mismatch("sampler", "x")])
    path = report.write(report.make({"sampler": outcome}, "x"), tmp_path)
    assert json.loads(path.read_text())["places"][0]["relative_l2"] == "inf"
    pool = Pool()
    pool.add(np.float32([np.nan, 1]), np.ones(2, np.float32))
    outcome = Outcome("video_vae", rows=[pool.row("video_vae", "decode", "float32", picture=True)])
    report.write(report.make({"video_vae": outcome}, "x"), tmp_path)
    assert cli.main(["--markdown", str(path)]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert "| nan |" in line and "**FAIL**" in line
    path.write_text('{"passed": true, "rows": [{"component": 1}]}')
    assert "is no report" in refused(capsys, "--markdown", path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["verify.json"]


def test_the_documented_table_is_the_reports():
    """Made by the script, not by hand."""
    root = Path(__file__).parents[2]
    made = json.loads((root / "benchmarks/results/verify_tiny.json").read_text("utf-8"))
    assert made["passed"] and made["checkpoint"] == "tiny" and not made["unfinished"]
    assert {row["component"] for row in made["rows"]} == set(cli.COMPONENTS)
    assert {row["dtype"] for row in made["rows"]} >= {"float32", "bfloat16"}
    assert report.markdown(made) in (root / "docs/verification.md").read_text("utf-8")


def test_the_plot_of_a_report(tmp_path):
    """Errors by layer, a picture that opens."""
    root = Path(__file__).parents[2]
    made = json.loads((root / "benchmarks/results/verify_tiny.json").read_text("utf-8"))
    with Image.open(report.plot(made, tmp_path)) as image:
        assert min(image.size) > 200 and len(image.getcolors(2**24)) > 10
    del made["details"]["transformer"]
    assert report.plot(made, tmp_path) is None
