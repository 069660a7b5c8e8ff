"""Several processes on one machine or many, each with some of the devices of one mesh.

Each runs the same command, and learns its number and the coordinator's address from the launcher's
environment variables. They meet at that address (see `meeting`), JAX's coordination service, in
process 0, connects their devices, and all end when one does: they would wait for its share for
ever.
"""

import atexit
import contextlib
import dataclasses
import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np

from cosmos3_jax import limits
from cosmos3_jax.parallel import meeting

PORTS = range(61440, 65536)  # of the coordinator; a job's number chooses one
# Seconds without a heartbeat after which a process counts as dead, unless
# COSMOS3_JAX_HEARTBEAT_SECONDS is set: of one that is stopped, or cut off. One that ends is seen at
# once.
HEARTBEAT_SECONDS = 60
# A process that has finished waits for the writer, which may encode for long. If the writer dies,
# its heartbeat stops.
SHUTDOWN_SECONDS = 24 * 3600
MEETING_SECONDS = 300
# A process that fails says so, and the others, which may fail for the same reason, have so many
# seconds to say why. Process 0 goes last, as JAX ends the others when its service does.
GRACE_SECONDS = 1.0
MOST_NODES = 100_000
SLURM_INTERACTIVE_STEP = 0xFFFFFFFA  # slurm.h; the step of salloc's shell
# Of what differs between processes: names in a message, and letters of a value.
MOST_NAMED, MOST_SHOWN = 8, 60


@dataclasses.dataclass(frozen=True)
class Processes:
    """Attributes:
    coordinator: host:port of process 0.
    count, index: how many processes there are, and which this is.
    local_count, local_index: the same of those on this machine, as far as it is known.
    launched: whether a launcher says how many are on this machine.
    """

    coordinator: str
    count: int
    index: int
    local_count: int = 1
    local_index: int = 0
    launched: bool = dataclasses.field(default=False, compare=False)


def find_processes(
    environment: Mapping[str, str],
    coordinator: str | None = None,
    count: int | None = None,
    index: int | None = None,
) -> Processes | None:
    """The processes of this command, or None if it is alone.

    They are looked for in the arguments, then in JAX's own variables (`JAX_COORDINATOR_ADDRESS`,
    `JAX_NUM_PROCESSES`, `JAX_PROCESS_ID`), then in those of SLURM's srun and Open MPI's mpirun.

    Args:
        environment: the environment variables.
        coordinator: host:port of process 0, reachable from all of them.
        count: how many processes.
        index: which this is.

    Raises:
        ValueError: if one of the three is missing or out of its range.
    """
    env = environment
    coordinator = coordinator or env.get("JAX_COORDINATOR_ADDRESS")
    count = _integer(env, "JAX_NUM_PROCESSES") if count is None else count
    index = _integer(env, "JAX_PROCESS_ID") if index is None else index
    local: tuple = (1, 0)
    if count is None and index is None:
        # Of the step: a batch script has a SLURM_PROCID, too, and is alone.
        if (_integer(env, "SLURM_STEP_NUM_TASKS") or 1) > 1 and not is_interactive_step(env):
            count, index = (_integer(env, f"SLURM_{x}") for x in ("STEP_NUM_TASKS", "PROCID"))
            tasks = tasks_per_node(env.get("SLURM_STEP_TASKS_PER_NODE", "1"))
            node = min(_integer(env, "SLURM_NODEID") or 0, len(tasks) - 1)
            local = (tasks[node], _integer(env, "SLURM_LOCALID") or 0, True)
            nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", "")
            port = _port(_integer(env, "SLURM_JOB_ID") or 0)
            coordinator = coordinator or f"{first_host(nodes)}:{port}"
        elif (_integer(env, "OMPI_COMM_WORLD_SIZE") or 1) > 1:
            count, index = (_integer(env, f"OMPI_COMM_WORLD_{x}") for x in ("SIZE", "RANK"))
            local = (
                _integer(env, "OMPI_COMM_WORLD_LOCAL_SIZE") or 0,
                _integer(env, "OMPI_COMM_WORLD_LOCAL_RANK") or 0,
                True,
            )
            coordinator = coordinator or _open_mpi_coordinator(env, local[0] == count)
    if coordinator is None and index is None and count in (None, 1):
        return None
    if count is not None and count < 1:
        raise ValueError(f"{count} processes are asked for; there must be 1 or more")
    if coordinator is None or count is None or index is None:
        given = {"coordinator": coordinator, "number of processes": count, "process id": index}
        missing = ", ".join(name for name, value in given.items() if value is None)
        raise ValueError(
            f"several processes are asked for, but not their {missing}: give --coordinator "
            "HOST:PORT, --processes N and --process-id I, or start them with srun or mpirun"
        )
    port = re.fullmatch(r".+:(\d+)", coordinator)
    if port is None or not 0 < int(port[1]) < 2**16:
        shown = limits.shown(coordinator, 80)
        raise ValueError(f"coordinator {shown} must be HOST:PORT, a port from 1 to 65535")
    if not 0 <= index < count:
        raise ValueError(f"process id {index} must be from 0 to {count - 1}, of {count} processes")
    return Processes(coordinator, count, index, *local) if count > 1 else None


def first_host(nodes: str) -> str:
    """Of a list as SLURM writes it: `node[003-004,7],gpu1` -> `node003`."""
    match = re.match(r"([^,\[]+)(?:\[([^,\-\]]+))?", nodes)
    if match is None:
        raise ValueError(
            f"SLURM's list of nodes {limits.shown(nodes, 80)} names none; give --coordinator "
            "HOST:PORT"
        )
    return match[1] + (match[2] or "")


def tasks_per_node(text: str) -> list[int]:
    """As SLURM writes it: `8(x2),4` -> [8, 8, 4]."""
    parts = re.findall(r"(\d{1,9})(?:\(x(\d{1,9})\))?", text)
    if sum(int(times or 1) for _, times in parts) > MOST_NODES:
        raise ValueError(f"SLURM's tasks per node {text!r:.80} are of more than {MOST_NODES} nodes")
    return [int(tasks) for tasks, times in parts for _ in range(int(times or 1))] or [1]


def local_devices(
    processes: Processes, environment: Mapping[str, str], gpus: int | None = None
) -> list[int] | None:
    """Which of the GPUs that it sees are this process's, counted from 0; None for all.

    Args:
        processes: how many share the machine.
        environment: whose `CUDA_VISIBLE_DEVICES` says how many GPUs each sees.
        gpus: of the machine, where it does not say.

    Raises:
        ValueError: if they cannot be shared out evenly.
    """
    count, visible = processes.local_count, environment.get("CUDA_VISIBLE_DEVICES")
    seen = gpus if visible is None else len(visible.split(","))
    if count == 1 or not seen or seen < count:  # alone, or no GPUs, or each sees its own already
        return None
    share, rest = divmod(seen, count)
    if rest:
        raise ValueError(
            f"{count} processes on this machine cannot share {seen} GPUs evenly: start one process "
            "a machine or one a GPU"
        )
    return list(range(share * processes.local_index, share * (processes.local_index + 1)))


def is_interactive_step(environment: Mapping[str, str], terminal: bool | None = None) -> bool:
    """Whether this is a command typed in the shell of an interactive step of SLURM's.

    Such a step may have many tasks, but the shell runs in one, and so does what is typed there.
    `salloc` numbers its shell's step `SLURM_INTERACTIVE_STEP` (slurm.h). `srun --pty` gives task 0
    a terminal and its own `SLURM_PTY_PORT` (srun's env.c and srun_pty.c), and closes the other
    tasks' input, which ends their shells (srun(1), --pty). An `srun` inside inherits the variable,
    but no terminal. What `srun --pty` itself started, its `SLURM_TASK_PID`, is no shell.

    Args:
        environment: the environment variables.
        terminal: whether this process has a controlling terminal; None looks.
    """
    if _integer(environment, "SLURM_STEP_ID") == SLURM_INTERACTIVE_STEP:
        return True
    if "SLURM_PTY_PORT" not in environment or environment.get("SLURM_PROCID", "0") != "0":
        return False
    if environment.get("SLURM_TASK_PID") == str(os.getpid()):
        return False
    return _has_terminal() if terminal is None else terminal


def _has_terminal() -> bool:
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
        return True
    except OSError:
        return False


def start(processes: Processes | None) -> None:
    """Meet the other processes; before JAX starts its backend.

    Process 0 listens at the coordinator's address, and at no other; with
    `JAX_COORDINATOR_BIND_ADDRESS`, which is for a machine behind a NAT, at that one. While they
    wait for each other they say so.

    Raises:
        ValueError: if they cannot meet at the coordinator's address.
    """
    global _peers
    if processes is None:
        return
    name = f"process {processes.index} of {processes.count}"
    _say(f"{name}: to meet at {processes.coordinator}")
    waiting = meeting.Waiting(MEETING_SECONDS, lambda text: _say(f"{name}: {text}"))
    own = processes.coordinator
    if processes.index == 0:
        own = _address_to_listen_at(processes, os.environ)
        listeners = meeting.bind(*_host_and_port(own))
        peers = meeting.receive(listeners, processes.count, waiting, processes.coordinator)
    else:
        where = _host_and_port(processes.coordinator)
        peers = meeting.visit(*where, processes.count, processes.index, waiting)
    peers.watch(_end_as_another_did)
    # It would take SIGTERM from this process, and speak up when process 0 ends.
    if hasattr(jax.config, "jax_enable_preemption_service"):
        jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        own.replace("0.0.0.0:", "127.0.0.1:").replace("[::]:", "[::1]:"),
        processes.count,
        processes.index,
        local_devices(processes, os.environ, _count_gpus()),
        cluster_detection_method="deactivate",
        coordinator_bind_address=own,
        heartbeat_timeout_seconds=_integer(os.environ, "COSMOS3_JAX_HEARTBEAT_SECONDS")
        or HEARTBEAT_SECONDS,
        initialization_timeout=MEETING_SECONDS,
        shutdown_timeout_seconds=SHUTDOWN_SECONDS,
    )
    _peers = peers
    atexit.register(peers.tell, meeting.DONE)  # called before JAX waits for the others


_peers: meeting.Peers | None = None
_before_leaving: list[Callable[[], None]] = []
_leaving = False


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _host_and_port(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def _address_to_listen_at(processes: Processes, environment: Mapping[str, str]) -> str:
    """The coordinator's, unless the environment has one or other machines cannot reach it."""
    address = environment.get("JAX_COORDINATOR_BIND_ADDRESS") or processes.coordinator
    if not re.fullmatch(r".+:\d{1,5}", address):
        raise ValueError(
            f"JAX_COORDINATOR_BIND_ADDRESS={limits.shown(address, 80)} must be HOST:PORT"
        )
    host, port = _host_and_port(address)
    found = {str(each[0]) for _, each in meeting.addresses(host, port)}
    if host in found or not all(_is_loopback(each) for each in found):
        return address
    # Some systems give a machine's own name an address of its own: 127.0.1.1.
    if processes.launched and processes.local_count < processes.count:
        _say(
            f"process 0: {host} is {', '.join(sorted(found))} on this machine, which others cannot "
            "reach: it listens at all of its addresses. To have it listen at one, give all "
            "processes --coordinator HOST:PORT with that"
        )
        return f"0.0.0.0:{port}"
    if host != "localhost":
        _say(
            f"process 0: {host} is {', '.join(sorted(found))} on this machine: only processes on "
            "it can come. For others give all processes --coordinator HOST:PORT with an address "
            "that they can reach"
        )
    return address


def _is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"


def _end_as_another_did(index: int, failed: bool) -> None:
    """Called by the thread that watches the others."""
    if failed:
        time.sleep(GRACE_SECONDS)
    if not _leaving:
        what = "failed" if failed else "has ended"
        _say(f"cosmos3-jax: error: process {index} {what}: this one cannot go on without it")
        leave(1)


def _count_gpus() -> int | None:
    """NVIDIA's, of this machine, without starting a driver."""
    folder = Path("/proc/driver/nvidia/gpus")
    return len(list(folder.iterdir())) if folder.is_dir() else None


def check_alike(values: Mapping[str, Any]) -> None:
    """Raise ValueError, naming what differs, unless all processes say the same.

    Each runs the program on its own inputs: with two seeds, a video would be put together from two,
    without an error.

    Args:
        values: arrays, numbers, texts, and lists and dicts of them, by name. The names may differ
            between the processes, too.
    """
    if not are_several():
        return
    mine = {name: _as_text(value) for name, value in values.items()}
    everyones = [json.loads(text) for text in _gather_texts(json.dumps(mine))]
    names = sorted({name for said in everyones for name in said})
    differ = [name for name in names if len({said.get(name) for said in everyones}) > 1]
    if differ:
        words = [_difference(name, [said.get(name) for said in everyones]) for name in differ]
        more = f" and {len(words) - MOST_NAMED} more" if len(words) > MOST_NAMED else ""
        raise ValueError(
            f"the processes were not told the same: {'; '.join(words[:MOST_NAMED])}{more}: start "
            "all with one command, on the same files, with the same packages"
        )


def _difference(name: str, said: list[str | None]) -> str:
    first, other = said[0], next(x for x in said if x != said[0])
    if max(len(str(first)), len(str(other))) > MOST_SHOWN:
        return f"{name} differ"
    return f"{name} is {first} in one, {other} in another"


def _gather_texts(text: str) -> list[str]:
    """What each process says, in their order; all of them have to ask."""
    from jax.experimental import multihost_utils

    mine = np.frombuffer(text.encode(), np.uint8)
    sizes = np.asarray(multihost_utils.process_allgather(np.array([mine.size]))).ravel()
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: mine.size] = mine
    everyones = np.asarray(multihost_utils.process_allgather(padded))
    return [row[:size].tobytes().decode() for row, size in zip(everyones, sizes, strict=True)]


def _as_text(value: Any) -> str:
    """An array by what it holds, all else as it is written; what is long by its digest."""
    if isinstance(value, np.ndarray | jax.Array):
        value = np.asarray(value)
        content = f"{value.dtype}{value.shape}".encode() + value.tobytes()
        return hashlib.sha256(content).hexdigest()
    text = repr(value)
    return text if len(text) <= MOST_SHOWN else hashlib.sha256(text.encode()).hexdigest()


def are_several() -> bool:
    """Whether this process has met others."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_writer() -> bool:
    """Whether this process writes files and speaks: one of them does."""
    return not are_several() or jax.process_index() == 0


def to_host(arrays: Any) -> Any:
    """Arrays that may lie on several processes' devices -> numpy's, whole, in each process. All of
    them have to ask.
    """
    if not are_several():
        return jax.tree.map(np.asarray, arrays)
    from jax.experimental import multihost_utils

    def fetch(x: Any) -> np.ndarray:
        if not isinstance(x, jax.Array) or x.is_fully_addressable:
            return np.asarray(x)
        return multihost_utils.process_allgather(x, tiled=True)

    return jax.tree.map(fetch, arrays)


def call_before_leaving(function: Callable[[], None]) -> None:
    """Have `leave` call it; it may be called in any thread."""
    if function not in _before_leaving:
        _before_leaving.append(function)


def leave(status: int) -> NoReturn:
    """End this process at once. An ordinary end waits for the others, which wait for this one.

    The others are told. Of a signal's status, 129 and more, they need not look for the reason.
    """
    global _leaving
    _leaving = True
    for function in _before_leaving:
        function()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or none
            stream.flush()
    if _peers is not None:
        if status < 128:
            _peers.tell(meeting.FAILED)
            seconds = 2 * GRACE_SECONDS
        else:
            _peers.close()
            seconds = 0.3
        if 0 not in _peers.connections:  # this is process 0
            _peers.wait_until_gone(seconds)
    os._exit(status)


def _integer(environment: Mapping[str, str], name: str) -> int | None:
    value = environment.get(name)
    if value is None:
        return None
    if not value.isdecimal():
        shown = limits.shown(value, 80)
        raise ValueError(f"the environment has {name}={shown}, which is not a whole number")
    return int(value)


def _port(job: int) -> int:
    return PORTS[job % len(PORTS)]


def _open_mpi_coordinator(environment: Mapping[str, str], one_machine: bool) -> str | None:
    """On the machine of mpirun, which Open MPI 4 names; on this one, if it is alone, with 5."""
    uri = environment.get("OMPI_MCA_orte_hnp_uri", "")
    match = re.match(r"(\d+)\..*?tcp6?://\[?([^,:\]]+)", uri)
    if match:
        return f"{match[2]}:{_port(int(match[1]) // 4096)}"
    job = sum(environment.get("PMIX_NAMESPACE", "").encode())
    return f"localhost:{_port(job)}" if one_machine else None
