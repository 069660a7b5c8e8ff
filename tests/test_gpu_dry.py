"""The GPU tests run on a CPU, at tiny sizes and with two simulated devices, so that they cannot
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


# test_distributed.py runs the same check on simulated devices.
OTHERS = "not two_processes"


@pytest.mark.parametrize("file", FILES)
def test_gpu_tests_run_dry(file):
    flags = f"--xla_force_host_platform_device_count=2 {quick.FLAGS}"
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--dry", "-k", OTHERS, file],
        cwd=TESTS, env=os.environ | {"XLA_FLAGS": flags}, capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    summary = ran.stdout.strip().splitlines()[-1]
    assert re.search(r"\d+ passed", summary) and "skipped" not in summary, summary
