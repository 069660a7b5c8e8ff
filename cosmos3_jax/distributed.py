"""Several processes on one machine or many, each with some of the devices of one mesh.

Each runs the same command. Who they are is what the launcher says in the environment; JAX's
coordination service, in process 0, then introduces them to each other, and ends them all when one
dies: whoever waits for a dead process's share would wait for ever.
"""

import dataclasses
import os
import re
import sys
from collections.abc import Mapping
from typing import Any, NoReturn

import jax
import numpy as np

PORTS = range(61440, 65536)  # for the coordinator; which of them, the job's number decides
# Seconds of silence after which a process is given up: COSMOS3_JAX_HEARTBEAT_SECONDS, or these.
HEARTBEAT_SECONDS = 60
SHUTDOWN_SECONDS = 60  # that who has finished waits for the others: the writer encodes meanwhile


@dataclasses.dataclass(frozen=True)
class Processes:
    """Attributes:
    coordinator: host:port of process 0.
    count, index: how many processes there are, and which this is.
    local_count, local_index: the same of those on this machine, as far as it is known.
    """

    coordinator: str
    count: int
    index: int
    local_count: int = 1
    local_index: int = 0


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
        ValueError: if what is said is not all that is needed, or cannot be.
    """
    env = environment
    coordinator = coordinator or env.get("JAX_COORDINATOR_ADDRESS")
    count = _integer(env, "JAX_NUM_PROCESSES") if count is None else count
    index = _integer(env, "JAX_PROCESS_ID") if index is None else index
    local = (1, 0)
    if count is None and index is None:
        if (_integer(env, "SLURM_NTASKS") or 1) > 1 and "SLURM_PROCID" in env:
            count, index = _integer(env, "SLURM_NTASKS"), _integer(env, "SLURM_PROCID")
            tasks = re.match(r"\d+", env.get("SLURM_STEP_TASKS_PER_NODE", "1"))
            local = (int(tasks[0]) if tasks else 1, _integer(env, "SLURM_LOCALID") or 0)
            nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", "")
            port = _port(_integer(env, "SLURM_JOB_ID") or 0)
            coordinator = coordinator or f"{first_host(nodes)}:{port}"
        elif (_integer(env, "OMPI_COMM_WORLD_SIZE") or 1) > 1:
            count, index = (_integer(env, f"OMPI_COMM_WORLD_{x}") for x in ("SIZE", "RANK"))
            local = tuple(
                _integer(env, f"OMPI_COMM_WORLD_LOCAL_{x}") or 0 for x in ("SIZE", "RANK")
            )
            coordinator = coordinator or _open_mpi_coordinator(env, local[0] == count)
    if count is None and index is None and coordinator is None:
        return None
    if None in (coordinator, count, index):
        said = {"coordinator": coordinator, "number of processes": count, "process id": index}
        missing = ", ".join(name for name, value in said.items() if value is None)
        raise ValueError(
            f"several processes are asked for, but not their {missing}: give --coordinator "
            "HOST:PORT, --processes N and --process-id I, or start them with srun or mpirun"
        )
    if not re.fullmatch(r".+:\d+", coordinator):
        raise ValueError(f"coordinator {coordinator!r} must be HOST:PORT")
    if not 0 <= index < count:
        raise ValueError(f"process id {index} must be from 0 to {count - 1}, of {count} processes")
    return Processes(coordinator, count, index, *local) if count > 1 else None


def first_host(nodes: str) -> str:
    """Of a list as SLURM writes it: `node[003-004,7],gpu1` -> `node003`."""
    match = re.match(r"([^,\[]+)(?:\[([^,\-\]]+))?", nodes)
    if match is None:
        raise ValueError(
            f"SLURM's list of nodes {nodes!r} names none; give --coordinator HOST:PORT"
        )
    return match[1] + (match[2] or "")


def local_devices(processes: Processes, environment: Mapping[str, str]) -> list[int] | None:
    """Which of the machine's GPUs are this process's, if it shares them; None for all it sees."""
    if processes.local_count == 1:
        return None
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return [processes.local_index]
    share, rest = divmod(len(visible.split(",")), processes.local_count)
    if share == 0 or rest:  # each sees its own already
        return None
    ids = [int(i) for i in visible.split(",")] if re.fullmatch(r"[\d,]+", visible) else None
    start = share * processes.local_index
    return ids and ids[start : start + share]


def start(processes: Processes | None) -> None:
    """Meet the other processes; before JAX starts its backend."""
    if processes is None:
        return
    jax.distributed.initialize(
        processes.coordinator,
        processes.count,
        processes.index,
        local_devices(processes, os.environ),
        cluster_detection_method="deactivate",
        heartbeat_timeout_seconds=_integer(os.environ, "COSMOS3_JAX_HEARTBEAT_SECONDS")
        or HEARTBEAT_SECONDS,
        shutdown_timeout_seconds=SHUTDOWN_SECONDS,
    )


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


def leave(status: int) -> NoReturn:
    """End this process at once. An ordinary end waits for the others, which wait for this one."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _integer(environment: Mapping[str, str], name: str) -> int | None:
    value = environment.get(name)
    if value is None:
        return None
    if not value.isdecimal():
        raise ValueError(f"the environment has {name}={value!r}, which is not a whole number")
    return int(value)


def _port(job: int) -> int:
    return PORTS[job % len(PORTS)]


def _open_mpi_coordinator(environment: Mapping[str, str], one_machine: bool) -> str | None:
    """Where mpirun runs, as Open MPI 4 says; 5 does not, and on one machine nobody need."""
    uri = environment.get("OMPI_MCA_orte_hnp_uri", "")
    match = re.match(r"(\d+)\..*?tcp6?://\[?([^,:\]]+)", uri)
    if match:
        return f"{match[2]}:{_port(int(match[1]) // 4096)}"
    job = sum(environment.get("PMIX_NAMESPACE", "").encode())
    return f"localhost:{_port(job)}" if one_machine else None
