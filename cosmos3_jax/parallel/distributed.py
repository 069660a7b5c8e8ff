"""Several processes on one machine or many, each with some of the devices of one mesh.

Each runs the same command, and learns its number and the coordinator's address (see `launchers`).
They meet at that address (see `meeting`), JAX's coordination service, in process 0, connects their
devices, and all end when one does: they would wait for its share for ever.
"""

import atexit
import contextlib
import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import jax
import numpy as np

from cosmos3_jax import limits
from cosmos3_jax.parallel import launchers, meeting
from cosmos3_jax.parallel.launchers import Processes

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
# Of what differs between processes: names in a message, and letters of a value.
MOST_NAMED, MOST_SHOWN = 8, 60


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
        launchers.local_devices(processes, os.environ, launchers.count_gpus()),
        cluster_detection_method="deactivate",
        coordinator_bind_address=own,
        heartbeat_timeout_seconds=launchers.integer(os.environ, "COSMOS3_JAX_HEARTBEAT_SECONDS")
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
