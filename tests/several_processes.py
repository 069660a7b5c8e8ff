"""The command line in several processes that make one video."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import quick
from rounding import relative_l2

from cosmos3_jax.io import media

ROOT = Path(__file__).parents[1]
# Relative L2 distance of latents of two steps in float32. Measured: one unit in the last place of
# the weights moves those of this model on one device by 9.5e-7.
SAME = 1e-5


class Command:
    """`cosmos3-jax generate` in a process of its own, with simulated devices or on GPUs."""

    def __init__(
        self, folder: Path, checkpoint: Path, devices: int | str, *options: str, heartbeat: int = 60
    ):
        """`devices`: how many to simulate, or the numbers of GPUs, "0,1". `heartbeat`: seconds of
        silence after which a process is given up; a living one may be silent on a busy machine.
        """
        folder.mkdir()
        self.folder = folder
        if isinstance(devices, int):
            environment = {"XLA_FLAGS": quick.simulated(devices)}
        else:
            environment = {"CUDA_VISIBLE_DEVICES": devices}
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        environment |= {"COSMOS3_JAX_HEARTBEAT_SECONDS": str(heartbeat), "PYTHONPATH": path}
        environment = os.environ | environment
        self.process = subprocess.Popen(
            [
                sys.executable, "-m", "cosmos3_jax.cli", "generate", "A red ball.",
                "--checkpoint", checkpoint,
                "--num-frames", "5", "--height", "48", "--width", "32", "--steps", "2",
                "--no-compilation-cache", "--out", "out.mp4", "--save-latents", "latents.npz",
                *options,
            ],
            cwd=folder, env=environment,
            stdout=(folder / "log").open("w"), stderr=subprocess.STDOUT,
        )  # fmt: skip

    def log(self) -> str:
        return (self.folder / "log").read_text()

    def wait(self, seconds: float = 240) -> int:
        return self.process.wait(seconds)


def run_two(run_command, *options: str, each: tuple = ((), ()), devices=(4, 4), **settings):
    """Two processes, by default of four devices each; with the same options, and `each` its own."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    together = ("--coordinator", f"localhost:{port}", "--processes", "2", *options)
    return [
        run_command(str(i), devices[i], *together, "--process-id", str(i), *each[i], **settings)
        for i in range(2)
    ]


def check_two_make_the_video_of_one(run_command, mesh: str, devices: tuple) -> None:
    """`devices` of the two processes, and of the one; the mesh divides weights by `fsdp=2`."""
    settings = ("--dtype", "float32", "--mesh")
    two = run_two(run_command, *settings, mesh, devices=devices[:2])
    assert [command.wait() for command in two] == [0, 0], two[0].log() + two[1].log()
    one = run_command("one", devices[2], *settings, "data=1")
    assert one.wait() == 0, one.log()
    written = [sorted(path.name for path in command.folder.iterdir()) for command in two]
    assert written == [["latents.npz", "log", "out.json", "out.mp4"], ["log"]]
    record = json.loads((two[0].folder / "out.json").read_text())
    assert record["processes"] == 2 and record["mesh"]["fsdp"] == 2
    ours, expected = (np.load(x.folder / "latents.npz")["video"] for x in (two[0], one))
    assert relative_l2(ours, expected) <= SAME
    pixels = [media.read_video(x.folder / "out.mp4")[0] for x in (two[0], one)]
    # The encoder's choices turn on roundings: frames like noise were seen up to 5 steps of 255 away
    # in places. Another video is 10 away and more, on average.
    assert pixels[0].shape[0] == 5 and np.abs(pixels[0].astype(int) - pixels[1]).mean() < 5
