"""The command line in a terminal, and its compilation cache."""

import contextlib
import os
import pty
import subprocess
import sys
import termios

import pytest
from command_line import SMALL

from cosmos3_jax import Cosmos3
from cosmos3_jax.cli import main as cli

pytestmark = pytest.mark.usefixtures("own_cache", "no_compilation_cache")


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_gets_a_progress_bar(tmp_path, monkeypatch, terminal):
    """The bar itself is tested in test_pipeline_run.py."""
    asked = []

    def run(self, request, *, progress, **_):
        asked.append(progress)
        raise KeyboardInterrupt

    monkeypatch.setattr(Cosmos3, "run", run)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    assert cli.main([*SMALL, "--out", str(tmp_path / "a.mp4")]) == 130
    assert asked == [terminal]


def test_a_terminals_programs_are_kept_too(tmp_path):
    """The loop under a progress bar, as the command line runs it in a terminal."""
    arguments = [*SMALL, "--out", str(tmp_path / "a.mp4")]
    command = [sys.executable, "-m", "cosmos3_jax.cli", *arguments]
    environment = dict(os.environ, JAX_COMPILATION_CACHE_DIR=str(tmp_path / "xla"))
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"  # a step compiles fast
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))  # a bar in no columns is not drawn
    with open(ours, "rb", buffering=0) as terminal:
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=theirs, env=environment
        )
        os.close(theirs)
        said = b""
        with contextlib.suppress(OSError):  # the end of a terminal, on Linux
            while chunk := terminal.read(4096):
                said += chunk
    assert process.wait() == 0, said
    assert b"denoise" in said and b"2/2" in said
    names = [path.name for path in (tmp_path / "xla").iterdir()]
    assert sum("advance" in name for name in names) == 1  # a block of two steps


@pytest.mark.parametrize(
    "given, expected",
    [
        ({}, "True {home}/cosmos3_jax/xla 0.5"),
        ({"JAX_ENABLE_COMPILATION_CACHE": "0"}, "False None 1.0"),
        ({"JAX_COMPILATION_CACHE_DIR": "gs://bucket/x"}, "True gs://bucket/x 0.5"),
        ({"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "7"}, "True {home}/cosmos3_jax/xla 7.0"),
    ],
    ids=str,
)
def test_what_jax_is_told_goes_before_our_cache_settings(tmp_path, given, expected):
    script = (
        "import jax; from cosmos3_jax.parallel import device; device.use_compilation_cache(); "
        "config = jax.config; print(config.jax_enable_compilation_cache, "
        "config.jax_compilation_cache_dir, config.jax_persistent_cache_min_compile_time_secs)"
    )
    environment = {k: v for k, v in os.environ.items() if "CACHE" not in k}
    environment |= {"XDG_CACHE_HOME": str(tmp_path / "home")} | given
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == expected.format(home=tmp_path / "home")
    assert not done.stderr and not (tmp_path / "gs:").exists()
