"""Who the processes of a command are, by what the launcher's environment variables say: JAX's own,
those of SLURM's srun, and those of Open MPI's mpirun.
"""

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path

from cosmos3_jax import limits

PORTS = range(61440, 65536)  # of the coordinator; a job's number chooses one
MOST_NODES = 100_000
SLURM_INTERACTIVE_STEP = 0xFFFFFFFA  # slurm.h; the step of salloc's shell


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
    count = integer(env, "JAX_NUM_PROCESSES") if count is None else count
    index = integer(env, "JAX_PROCESS_ID") if index is None else index
    local: tuple = (1, 0)
    if count is None and index is None:
        # Of the step: a batch script has a SLURM_PROCID, too, and is alone.
        if (integer(env, "SLURM_STEP_NUM_TASKS") or 1) > 1 and not is_interactive_step(env):
            count, index = (integer(env, f"SLURM_{x}") for x in ("STEP_NUM_TASKS", "PROCID"))
            tasks = tasks_per_node(env.get("SLURM_STEP_TASKS_PER_NODE", "1"))
            node = min(integer(env, "SLURM_NODEID") or 0, len(tasks) - 1)
            local = (tasks[node], integer(env, "SLURM_LOCALID") or 0, True)
            nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", "")
            port = _port(integer(env, "SLURM_JOB_ID") or 0)
            coordinator = coordinator or f"{first_host(nodes)}:{port}"
        elif (integer(env, "OMPI_COMM_WORLD_SIZE") or 1) > 1:
            count, index = (integer(env, f"OMPI_COMM_WORLD_{x}") for x in ("SIZE", "RANK"))
            local = (
                integer(env, "OMPI_COMM_WORLD_LOCAL_SIZE") or 0,
                integer(env, "OMPI_COMM_WORLD_LOCAL_RANK") or 0,
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
    if integer(environment, "SLURM_STEP_ID") == SLURM_INTERACTIVE_STEP:
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


def count_gpus() -> int | None:
    """NVIDIA's, of this machine, without starting a driver."""
    folder = Path("/proc/driver/nvidia/gpus")
    return len(list(folder.iterdir())) if folder.is_dir() else None


def integer(environment: Mapping[str, str], name: str) -> int | None:
    """A variable that is a whole number; None if it is not there. Raises ValueError on another."""
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
