"""How a command ends in the middle of a program on the device: on a signal, and out of memory."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[1]
SECONDS = 1.0  # from the signal to the end of the process


def start(folder: Path, *options: str, program: tuple = ("-m", "cosmos3_jax.cli")):
    """`cosmos3-jax generate`, with its messages in `folder/log`."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        [
            sys.executable, *program, "generate", "A red ball.", "--checkpoint", "random",
            "--no-compilation-cache", "--out", "out.mp4", *options,
        ],
        cwd=folder, env=os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"},
        stdout=(folder / "log").open("w"), stderr=subprocess.STDOUT,
    )  # fmt: skip


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_program_on_the_device(tmp_path, dry, number, status):
    """One call to the device makes all steps, which take far longer than a second."""
    size = ("48", "32", "5") if dry else ("720", "1280", "189")
    steps = "1000"
    command = start(
        tmp_path, "--height", size[0], "--width", size[1], "--num-frames", size[2],
        "--steps", steps, "--steps-per-program", steps,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while "denoising" not in (tmp_path / "log").read_text():
            assert time.monotonic() < deadline and command.poll() is None, (
                tmp_path / "log"
            ).read_text()
            time.sleep(0.05)
        time.sleep(0 if dry else 20)  # compiled by then
        assert command.poll() is None, (tmp_path / "log").read_text()
        begun = time.monotonic()
        command.send_signal(number)
        assert command.wait(30) == status
        # Dry, on a busy machine, it is only tried that it ends.
        assert time.monotonic() - begun < (30 if dry else SECONDS)
        assert [path.name for path in tmp_path.iterdir()] == ["log"]
        assert "Traceback" not in (tmp_path / "log").read_text()
    finally:
        command.kill()
        command.wait()
