"""Several processes: how they find each other, that they make one video, and what a death does."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import mesh_cases
import numpy as np
import pytest
import quick
from rounding import relative_l2

from cosmos3_jax.io import media
from cosmos3_jax.parallel import distributed
from cosmos3_jax.parallel.distributed import (
    Processes,
    find_processes,
    first_host,
    local_devices,
    tasks_per_node,
)

ROOT = Path(__file__).parents[1]
# Relative L2 distance of latents of two steps in float32. Measured: one unit in the last place of
# the weights moves those of this model on one device by 9.5e-7.
SAME = 1e-5
SRUN = {
    "SLURM_JOB_ID": "70001", "SLURM_STEP_NUM_TASKS": "16", "SLURM_PROCID": "11",
    "SLURM_LOCALID": "3", "SLURM_NODEID": "1", "SLURM_STEP_TASKS_PER_NODE": "12,4",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
}  # fmt: skip
MPIRUN = {
    "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "0",
}  # fmt: skip
HEAD = {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911"}


@pytest.mark.parametrize(
    "environment, arguments, expected",
    [
        ({}, {}, None),
        (SRUN, {}, Processes("gpu07:61809", 16, 11, 4, 3)),
        (SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, {}, None),
        # In a batch script, before srun.
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, {}, None),
        ({}, {"count": 1}, None),
        (MPIRUN | HEAD, {}, Processes("10.96.0.1:62728", 4, 2, 2, 0)),
        (MPIRUN, {"coordinator": "a:1"}, Processes("a:1", 4, 2, 2, 0)),
        (SRUN, {"coordinator": "a:1", "count": 2, "index": 1}, Processes("a:1", 2, 1)),
        (
            {"JAX_COORDINATOR_ADDRESS": "b:2", "JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": "0"},
            {},
            Processes("b:2", 3, 0),
        ),
    ],
)
def test_processes_are_found(environment, arguments, expected):
    found = find_processes(environment, **arguments)
    if "hnp" in str(environment):  # the job's number decides the port, and only that
        assert found.coordinator.startswith("10.96.0.1:")
        found = Processes(expected.coordinator, *list(vars(found).values())[1:])
    assert found == expected


@pytest.mark.parametrize(
    "environment, arguments, message",
    [
        ({}, {"coordinator": "a:1"}, "their number of processes, process id: give --coordinator"),
        ({}, {"count": 2, "index": 0}, "not their coordinator"),
        ({}, {"coordinator": "a:1", "count": 2, "index": 2}, "process id 2 must be from 0 to 1"),
        ({}, {"coordinator": "host", "count": 2, "index": 0}, "must be HOST:PORT"),
        ({}, {"coordinator": "host:99999", "count": 2, "index": 0}, "a port from 1 to 65535"),
        ({}, {"count": 0}, "0 processes are asked for"),
        (MPIRUN, {}, "not their coordinator"),
        (SRUN | {"SLURM_PROCID": "x"}, {}, "SLURM_PROCID='x', which is not a whole number"),
    ],
)
def test_what_is_missing_is_said(environment, arguments, message):
    with pytest.raises(ValueError, match=message):
        find_processes(environment, **arguments)


@pytest.mark.parametrize(
    "nodes, host",
    [("a1", "a1"), ("a1,b2", "a1"), ("n[001-004]", "n001"), ("n[3,5],m", "n3")],
)
def test_the_first_host(nodes, host):
    assert first_host(nodes) == host


@pytest.mark.parametrize(
    "text, tasks", [("8(x2),4", [8, 8, 4]), ("3", [3]), ("2,1(x2)", [2, 1, 1]), ("", [1])]
)
def test_tasks_of_each_machine(text, tasks):
    assert tasks_per_node(text) == tasks


@pytest.mark.parametrize(
    "here, visible, gpus, devices",
    [
        ((1, 0), None, 8, None),  # one process has all
        ((4, 3), None, 4, [3]),
        ((4, 3), None, 8, [6, 7]),
        ((4, 3), None, None, None),  # a machine without NVIDIA's driver
        # CUDA counts anew what is visible.
        ((2, 1), "4,5,6,7", 8, [2, 3]),
        ((2, 1), "GPU-00000000,GPU-11111111", 8, [1]),
        ((4, 3), "0", 8, None),  # the launcher gave each its own
    ],
)
def test_gpus_of_a_machine_are_shared_out(here, visible, gpus, devices):
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert local_devices(Processes("a:1", 8, 5, *here), environment, gpus) == devices


def test_gpus_that_cannot_be_shared_out_are_said():
    with pytest.raises(ValueError, match="4 processes on this machine cannot share 6 GPUs"):
        local_devices(Processes("a:1", 8, 5, 4, 1), {}, 6)


def test_an_address_where_processes_cannot_meet_is_said(monkeypatch):
    """Before JAX's service would end the process, or wait where nothing can interrupt it."""
    monkeypatch.setattr(distributed, "MEETING_SECONDS", 0)
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        address = f"localhost:{taken.getsockname()[1]}"
        with pytest.raises(ValueError, match="cannot be used .*give all processes --coordinator"):
            distributed.start(Processes(address, 2, 0))
    with pytest.raises(ValueError, match=f"nobody listens at {address}"):
        distributed.start(Processes(address, 2, 1))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("four") / "heads"
    mesh_cases.write_checkpoint(folder)
    return folder


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
        environment = os.environ | {"COSMOS3_JAX_HEARTBEAT_SECONDS": str(heartbeat)} | environment
        self.process = subprocess.Popen(
            [
                sys.executable, "-m", "cosmos3_jax.cli", "generate", "--checkpoint", checkpoint,
                "--num-frames", "5", "--height", "48", "--width", "32", "--steps", "2",
                "--no-compilation-cache", "--out", folder / "out.mp4",
                "--save-latents", folder / "latents.npz", *options,
            ],
            cwd=ROOT, env=environment, stdout=(folder / "log").open("w"), stderr=subprocess.STDOUT,
        )  # fmt: skip

    def log(self) -> str:
        return (self.folder / "log").read_text()

    def wait(self, seconds: float = 240) -> int:
        return self.process.wait(seconds)


@pytest.fixture
def run_command(tmp_path, checkpoint):
    """Start commands; whatever happens, they end with the test."""
    started = []

    def run(name: str, devices: int | str, *options: str, **settings) -> Command:
        started.append(Command(tmp_path / name, checkpoint, devices, *options, **settings))
        return started[-1]

    yield run
    for command in started:
        command.process.kill()
        command.process.wait()


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
    # The encoder's choices turn on roundings; another video is 10 steps of 255 away and more.
    assert pixels[0].shape[0] == 5 and np.abs(pixels[0].astype(int) - pixels[1]).mean() < 0.5


def test_two_processes_make_the_video_of_one(run_command):
    """Of weights that no device has whole, and tokens that are on both sides."""
    check_two_make_the_video_of_one(run_command, "cfg=2,seq=2,fsdp=2", devices=(4, 4, 1))


def test_processes_that_were_told_different_things_say_so(run_command):
    """Or their devices would make a video of two halves."""
    two = run_two(run_command, "--mesh", "seq=4,cfg=2", each=(("--seed", "1"), ("--seed", "2")))
    assert [command.wait() for command in two] == [2, 2], two[0].log() + two[1].log()
    assert all("not told the same: noise differ" in command.log() for command in two)


@pytest.mark.parametrize("victim", [0, 1])
def test_who_waits_for_a_dead_process_fails(run_command, victim):
    two = run_two(run_command, "--mesh", "cfg=2,seq=4", heartbeat=10)
    other = two[1 - victim]
    deadline = time.monotonic() + 120
    while not all("is connected" in command.log() for command in two):  # their devices have met
        assert time.monotonic() < deadline, two[0].log() + two[1].log()
        time.sleep(0.1)
    two[victim].process.send_signal(signal.SIGKILL)
    assert other.wait(60) != 0
    assert "another task died" in other.log() or "one of them ended" in other.log(), other.log()
    assert not (other.folder / "out.mp4").exists()
