"""Several processes: how they find each other, that they make one video, and what a death does."""

import contextlib
import os
import queue
import re
import signal
import socket
import threading
import time
from pathlib import Path

import jax
import pytest
from several_processes import check_two_make_the_video_of_one, run_two

from cosmos3_jax.parallel import distributed, launchers, meeting
from cosmos3_jax.parallel.launchers import (
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


@pytest.mark.parametrize("name", ["JAX_PROCESS_ID", "JAX_COORDINATOR_ADDRESS"])
def test_a_long_value_is_said_short(name):
    others = {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}
    with pytest.raises(ValueError, match="aaa") as raised:
        find_processes(others | {name: "a" * 5000})
    assert len(str(raised.value)) < 300


def test_more_nodes_than_there_are():
    with pytest.raises(ValueError, match="of more than 100000 nodes"):
        tasks_per_node("8(x999999999)")


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


@pytest.mark.parametrize(
    ("host", "here"),
    [("127.0.0.1", {"127.0.0.1"}), ("localhost", {"127.0.0.1", "::1"}), ("0.0.0.0", {"0.0.0.0"})],
)
def test_the_coordinator_listens_where_it_is_told(host, here):
    """And not on every interface, where anybody could come."""
    listeners = meeting.bind(host, 0)
    assert {each.getsockname()[0] for each in listeners} <= here
    for each in listeners:
        each.close()


def listening(port: int) -> set[str]:
    """The addresses at which this machine listens at a port, as the system writes them."""
    rows = [
        line.split()
        for file in ("/proc/net/tcp", "/proc/net/tcp6")
        for line in Path(file).read_text().splitlines()[1:]
    ]
    local = (row[1].split(":") for row in rows if row[3] == "0A")
    return {address for address, number in local if int(number, 16) == port}


# 127.0.0.1, ::1, and the former as the latter's kind writes it.
LOOPBACK = {
    "0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F",
}  # fmt: skip


def test_a_process_that_is_started_again_is_let_in(monkeypatch):
    """While others are still awaited: the one that ended does not count."""
    [listener, *more] = meeting.bind("127.0.0.1", 0)
    port = listener.getsockname()[1]
    met, waiting = [], meeting.Waiting(20, lambda _: None)
    thread = threading.Thread(
        target=lambda: met.append(meeting.receive([listener, *more], 3, waiting, "here"))
    )
    thread.start()
    gone = socket.create_connection(("127.0.0.1", port))
    gone.sendall(f"{meeting.GREETING} 3 1\n".encode())
    time.sleep(0.2)
    gone.close()
    visitors = [
        threading.Thread(
            target=lambda index=index: met.append(
                meeting.visit("127.0.0.1", port, 3, index, waiting)
            )
        )
        for index in (1, 2)
    ]
    for each in visitors:
        each.start()
    for each in (thread, *visitors):
        each.join(20)
    assert len(met) == 3
    for peers in met:
        peers.close()


def test_an_address_of_another_machine_is_refused():
    """One of those that are kept for documentation (RFC 5737)."""
    with pytest.raises(ValueError, match="192.0.2.77 cannot be used.*JAX_COORDINATOR_BIND_ADDRESS"):
        distributed.start(Processes("192.0.2.77:61000", 2, 0))
    with pytest.raises(ValueError, match="does not know the host nohost.invalid"):
        distributed.start(Processes("nohost.invalid:61000", 2, 1))


INTERACTIVE = SRUN | {"SLURM_PROCID": "0", "SLURM_PTY_PORT": "34889", "SLURM_TASK_PID": "1"}


@pytest.mark.parametrize(
    ("environment", "terminal", "interactive"),
    [
        (SRUN | {"SLURM_STEP_ID": "4294967290"}, False, True),  # salloc's shell
        (INTERACTIVE, True, True),  # of srun --pty bash
        (INTERACTIVE, False, False),  # srun, in such a shell
        (INTERACTIVE | {"SLURM_TASK_PID": str(os.getpid())}, True, False),  # srun --pty itself
        (INTERACTIVE | {"SLURM_PROCID": "1"}, True, False),
        (SRUN | {"SLURM_STEP_ID": "0"}, True, False),
        ({}, True, False),
    ],
)
def test_a_shell_of_slurms_is_alone(environment, terminal, interactive):
    """It waited for tasks that were never to come."""
    assert launchers.is_interactive_step(environment, terminal) is interactive
    if environment.get("SLURM_STEP_ID") == "4294967290":
        assert find_processes(environment) is None


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def meet(count: int, told: dict[int, int], seconds: float = 20) -> tuple[dict, list[str]]:
    """Let processes meet in threads; `told` has the number of processes that each was told. What
    each got, its peers or its error, and what was said.
    """
    port, said, got = free_port(), [], {}
    waiting, longer = (meeting.Waiting(x * seconds, said.append) for x in (1, 1.5))

    def come(index: int) -> None:
        try:
            if index == 0:
                listeners = meeting.bind("127.0.0.1", port)
                got[0] = meeting.receive(listeners, count, longer, "here")
            else:
                got[index] = meeting.visit("127.0.0.1", port, told[index], index, waiting)
        except ValueError as error:
            got[index] = error

    threads = [threading.Thread(target=come, args=(index,)) for index in (0, *told)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return got, said


def test_who_has_not_come_is_named(monkeypatch):
    monkeypatch.setattr(meeting, "SAID_AFTER", 0)
    got, said = meet(4, {2: 4, 3: 5}, seconds=1)
    # Process 2 gives up after one second, and is then awaited again.
    who = "processes 1, (2, )?3 of 4 did not come to here after 1.5 s: start them"
    assert re.match(who, str(got[0]))
    assert "process 0 at" in str(got[2]) and "waits for others after 1 s" in str(got[2])
    assert "one of 5 processes, process 0 one of 4" in str(got[3])
    assert any("did not come to here after 0 of 1.5 s" in text for text in said)


def test_others_learn_that_one_has_ended():
    """Of one that says that it is done they do not."""
    got, _ = meet(3, {1: 3, 2: 3})
    ended = queue.Queue()
    for index, peers in got.items():
        peers.watch(lambda *what, index=index: ended.put((index, *what)))
    got[1].tell(meeting.DONE)
    got[1].close()
    got[2].tell(meeting.FAILED)
    assert ended.get(timeout=10) == (0, 2, True)
    got[0].close()
    assert ended.get(timeout=10) == (2, 0, False)
    got[0].wait_until_gone(10)
    assert ended.empty()


def test_another_program_at_the_port_does_no_harm():
    with contextlib.ExitStack() as stack:
        [listener] = meeting.bind("127.0.0.1", 0)
        address = listener.getsockname()
        stranger = stack.enter_context(socket.create_connection(address))
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
        with pytest.raises(ValueError, match="process 1 of 2 did not come"):
            meeting.receive([listener], 2, meeting.Waiting(0.5, print), "here")


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
    port = int(next(x for x in two[0].process.args if "localhost:" in str(x)).split(":")[1])
    assert listening(port) and listening(port) <= LOOPBACK  # JAX's service, too
    two[victim].process.send_signal(signal.SIGKILL)
    status = other.wait(60)
    aborts = victim == 0 and jax.__version_info__ >= (0, 11)  # where it sees first that 0 is gone
    if aborts and status == -signal.SIGABRT:
        assert "another task died" in other.log(), other.log()
        return
    assert status == 1, other.log()
    ended = f"cosmos3-jax: error: process {victim} has ended: this one cannot go on without it"
    # On a busy machine the devices' own error may be first, and JAX's own lines may follow ours.
    lines = other.log().splitlines()
    alone = lines[-1].endswith("one of them ended, see what the others say")
    assert ended in lines or alone, other.log()
    assert "Check failure stack trace" not in other.log(), other.log()
    assert not (other.folder / "out.mp4").exists()
