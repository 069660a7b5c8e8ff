"""The GPU tests run on a CPU, at tiny sizes and with four simulated devices, so that they cannot
rot. What they show there is that they run: exactness on GPUs is `make gpu-check`.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import quick

TESTS = Path(__file__).parent
FILES = sorted(path.name for path in TESTS.glob("test_gpu_*.py")) + ["test_gpu.py"]
FILES.remove(Path(__file__).name)


@pytest.mark.dry
@pytest.mark.parametrize("file", FILES)
def test_gpu_tests_run_dry(file):
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--dry", file],
        cwd=TESTS, env=os.environ | {"XLA_FLAGS": quick.simulated(4)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    summary = ran.stdout.strip().splitlines()[-1]
    assert re.search(r"\d+ passed", summary) and "skipped" not in summary, summary
