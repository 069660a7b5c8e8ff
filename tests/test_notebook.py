"""The parity notebook runs from the top in a clean kernel, once, and is committed as such a run
left it.

Its cells assert their numbers themselves.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parent.parent
COMMITTED = ROOT / "notebooks" / "parity.ipynb"
TEXT = ("text/plain", "text/markdown", "text/html")
# Paths of one machine, and what a kernel says about its own installation.
LOCAL = re.compile(r"(?<![\w.])/(home|root|tmp|usr|work|opt|Users)/|site-packages|Warning")


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(cell) -> str:
    """What a cell shows in words."""
    parts = []
    for output in cell.outputs:
        parts.append(output.get("text", "") + "\n".join(output.get("traceback", [])))
        parts += [output.get("data", {}).get(kind, "") for kind in TEXT]
    return "\n".join(parts)


def assert_executed(notebook) -> None:
    """Each code cell ran once, in order, and shows something, which is no error and no warning."""
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        kinds = [output.output_type for output in cell.outputs]
        assert kinds and "error" not in kinds, cell.source
        assert not any(output.get("name") == "stderr" for output in cell.outputs), printed(cell)
        assert not LOCAL.search(printed(cell)), printed(cell)


def execute(folder: Path, notebook) -> tuple[subprocess.CompletedProcess, Path]:
    """Run a notebook in `folder`, offline and with a cache of its own."""
    folder.mkdir(exist_ok=True)
    shutil.copy(COMMITTED.parent / "parity_tools.py", folder)
    source, result = folder / "parity.ipynb", folder / "executed.ipynb"
    nbformat.write(notebook, source)
    command = [sys.executable, str(ROOT / "scripts" / "run_notebook.py"), str(source)]
    alone = {"XDG_CACHE_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [*command, "--out", str(result)], env=os.environ | alone, capture_output=True, text=True
    )
    return run, result


@pytest.fixture
def committed():
    return nbformat.read(COMMITTED, as_version=4)


def test_the_committed_notebook_is_whole(committed):
    nbformat.validate(committed)
    assert_executed(committed)
    pictures = [
        output for cell in code_cells(committed) for output in cell.outputs
        if "image/png" in output.get("data", {})
    ]  # fmt: skip
    assert len(pictures) >= 12
    assert COMMITTED.stat().st_size < 2.5e6  # it is in every clone


# What the copy ends with: the checks must be able to fail. Here of a velocity, by its timestep.
MISTAKE = """
wrong, _ = run_ours("float32", requests[0], TIMESTEPS[0] - 1)
add("a mistake", "float32", wrong["video"], theirs["float32", 0][0]["video"], None)
try:
    check("a mistake", BARS["velocity"])
except AssertionError:
    print("\\nit is noticed")
"""


@pytest.mark.dry
def test_it_runs_from_the_top(committed, tmp_path):
    """Without network, and as it is committed: the outputs of the copy are all new."""
    before = COMMITTED.read_bytes()
    committed.cells.append(nbformat.v4.new_code_cell(MISTAKE))
    for cell in code_cells(committed):
        cell.outputs, cell.execution_count = [], None
    run, result = execute(tmp_path / "run", committed)
    assert run.returncode == 0, run.stderr[-3000:]
    executed = nbformat.read(result, as_version=4)
    assert_executed(executed)
    assert "it is noticed" in printed(executed.cells[-1])
    assert COMMITTED.read_bytes() == before


def test_a_failure_stops_it(tmp_path):
    failing = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("assert not 'a number'")])
    run, result = execute(tmp_path / "run", failing)
    assert run.returncode != 0 and "AssertionError" in run.stderr, run.stderr[-3000:]
    assert not result.exists()
