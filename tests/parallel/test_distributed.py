"""Several processes: how they find each other, that they make one video, and what a death does."""

import signal
import socket
import time

import pytest
from several_processes import check_two_make_the_video_of_one, run_two

from cosmos3_jax.parallel import distributed
from cosmos3_jax.parallel.distributed import (
    Processes,
    find_processes,
    first_host,
    local_devices,
    tasks_per_node,
)

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
    "nodes, host", [("a1", "a1"), ("a1,b2", "a1"), ("n[001-004]", "n001"), ("n[3,5],m", "n3")]
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


def test_two_processes_make_the_video_of_one(run_command):
    """Of weights that no device has whole, and tokens that are on both sides."""
    check_two_make_the_video_of_one(run_command, "cfg=2,seq=2,fsdp=2", devices=(4, 4, 1))


def test_processes_that_were_told_different_things_say_so(run_command):
    """Or their devices would make a video of two halves."""
    each = (("--seed", "1", "--fps", "24"), ("--seed", "2", "--fps", "12"))
    two = run_two(run_command, "--mesh", "seq=4,cfg=2", each=each)
    assert [command.wait() for command in two] == [2, 2], two[0].log() + two[1].log()
    for command in two:
        assert "not told the same: --fps is '24.0' in one, '12.0' in another" in command.log()
        assert "--seed is '1' in one, '2' in another" in command.log()


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
