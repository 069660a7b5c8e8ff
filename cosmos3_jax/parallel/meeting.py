"""Processes meet before JAX connects them, and notice at once when one of them ends.

Process 0 listens at the coordinator's address until all others have come, then JAX's service does.
Their connections stay open: one that closes is a process that has ended. JAX's service takes a
minute to see that, and ends the others, as it does when it waits in vain, with a stack of C++.
"""

import contextlib
import dataclasses
import errno
import select
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterable

from cosmos3_jax.guard import reason

SAID_AFTER = 15  # seconds of waiting until it says what for, and again
DONE, FAILED = b"done\n", b"failed\n"
GO = "go"
GREETING = "cosmos3-jax"
LONGEST_LINE = 200  # bytes
# A machine that is gone closes no connection: it is asked, and has 40 s to answer, less than until
# JAX gives it up.
KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}

Say = Callable[[str], None]


def addresses(host: str, port: int) -> list[tuple[socket.AddressFamily, tuple]]:
    """Where a host and a port are, as this machine resolves them.

    Raises:
        ValueError: it does not know the host.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:  # a label of a name may be too long to be encoded
        raise ValueError(
            f"this machine does not know the host {host} ({reason(error)}): give all processes "
            "--coordinator HOST:PORT with another name, or the address of process 0"
        ) from error
    return list(dict.fromkeys((family, address) for family, _, _, _, address in found))


def bind(host: str, port: int) -> list[socket.socket]:
    """Sockets that listen at the address, and at no other; a name may have several.

    Raises:
        ValueError: another program has the port, or the address is not this machine's.
    """
    sockets: list[socket.socket] = []
    absent: OSError | None = None
    for family, address in addresses(host, port):
        listener = socket.socket(family, socket.SOCK_STREAM)
        sockets.append(listener)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        try:
            listener.bind(address)
            listener.listen()
        except OSError as error:
            sockets.pop().close()
            absent = error
            if error.errno == errno.EADDRNOTAVAIL:  # of several, one need not be here
                continue
            for each in sockets:
                each.close()
            sockets = []
            break
    if sockets:
        return sockets
    assert absent is not None
    raise ValueError(
        f"port {port} of {host} cannot be used ({absent.strerror}): give all processes "
        "--coordinator HOST:PORT with another, where HOST is an address of process 0's machine. "
        f"Behind a NAT, set JAX_COORDINATOR_BIND_ADDRESS=0.0.0.0:{port} for process 0, which then "
        "listens at every address"
    ) from absent


class Peers:
    """The connections of process 0 to all others, or of another one to process 0."""

    def __init__(self, connections: dict[int, socket.socket]):
        self.connections = connections
        for connection in connections.values():
            connection.setblocking(True)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for name, value in KEEPALIVE.items():
                if hasattr(socket, name):
                    connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self._all_gone, self._closed = threading.Event(), False

    def watch(self, ended: Callable[[int, bool], None]) -> None:
        """Begin to watch the others, in a thread.

        Args:
            ended: called once when one has gone without a word that it is done, with its number and
                whether it said that it fails: the others then find the reason themselves.
        """
        threading.Thread(target=self._watch, args=(ended,), daemon=True).start()

    def tell(self, word: bytes) -> None:
        """Say `DONE` or `FAILED` to them."""
        for connection in self.connections.values():
            with contextlib.suppress(OSError):
                connection.sendall(word)

    def wait_until_gone(self, seconds: float) -> None:
        """Until all connections are closed by the others, at most so long."""
        self._all_gone.wait(seconds)

    def close(self) -> None:
        """To the others, as if this process had ended."""
        self._closed = True
        for connection in self.connections.values():
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def _watch(self, ended: Callable[[int, bool], None]) -> None:
        selector = selectors.DefaultSelector()
        for index, connection in self.connections.items():
            selector.register(connection, selectors.EVENT_READ, index)
        done: set[int] = set()
        told = False
        while selector.get_map():
            for key, _ in selector.select():
                try:
                    word = key.fileobj.recv(LONGEST_LINE)
                except OSError:
                    word = b""
                failed = FAILED.strip() in word
                if DONE.strip() in word:
                    done.add(key.data)
                if not word:
                    selector.unregister(key.fileobj)
                if (failed or not word) and key.data not in done and not (told or self._closed):
                    told = True
                    # In a thread of its own, as this one goes on to see who leaves.
                    threading.Thread(target=ended, args=(key.data, failed), daemon=True).start()
        self._all_gone.set()


@dataclasses.dataclass(frozen=True)
class Waiting:
    """A wait that has a limit, and says now and then what it is for."""

    seconds: float
    say: Say

    def until(self, attempt: Callable[[], bool], what: Callable[[], str], way_out: str) -> None:
        """Call `attempt`, which itself waits a little, until it is true.

        Raises:
            ValueError: "{what} after {seconds} s: {way_out}".
        """
        start = last = time.monotonic()
        while not attempt():
            now = time.monotonic()
            if now - start >= self.seconds:
                raise ValueError(f"{what()} after {self.seconds:g} s: {way_out}")
            if now - last >= SAID_AFTER:
                last = now
                self.say(f"{what()} after {now - start:.0f} of {self.seconds:g} s")


def receive(listeners: list[socket.socket], count: int, waiting: Waiting, where: str) -> Peers:
    """Process 0: wait at `where` until the others, of `count` in all, have come; they may go on.

    Raises:
        ValueError: not all have come in time.
    """
    come: dict[int, socket.socket] = {}
    selector = selectors.DefaultSelector()
    for listener in listeners:
        listener.setblocking(False)
        selector.register(listener, selectors.EVENT_READ)

    def attempt() -> bool:
        for key, _ in selector.select(0.5):
            with contextlib.suppress(OSError):
                connection, _ = key.fileobj.accept()
                _forget_ended(come)  # one may have been started again
                _greet(connection, count, come)
        _forget_ended(come)
        return len(come) == count - 1

    def missing() -> str:
        names = [str(index) for index in range(1, count) if index not in come]
        return f"{_listed('process', 'processes', names)} of {count} did not come to {where}"

    try:
        way_out = "start them too, with the same --coordinator and --processes"
        waiting.until(attempt, missing, way_out)
        # Before they look for JAX's service at the same port, which is free now.
        for listener in listeners:
            listener.close()
        peers = Peers(come)
        peers.tell(f"{GO}\n".encode())
        return peers
    except BaseException:
        for connection in come.values():
            connection.close()
        raise
    finally:
        selector.close()
        for listener in listeners:
            listener.close()


def _greet(connection: socket.socket, count: int, come: dict[int, socket.socket]) -> None:
    """Read who has come; keep the connection, or say what is wrong with it."""
    # Another program does not speak like ours, and not at once.
    greeting, *numbers = _read_line(connection, seconds=2).split() or [""]
    if greeting != GREETING or len(numbers) != 2 or not all(x.isdecimal() for x in numbers):
        return connection.close()
    theirs, index = map(int, numbers)
    if theirs != count:
        wrong = f"it is one of {theirs} processes, process 0 one of {count}"
    elif not 0 < index < count or index in come:
        wrong = f"there is another process {index}"
    else:
        come[index] = connection
        return None
    connection.sendall(f"{wrong}\n".encode())
    return connection.close()


def _forget_ended(come: dict[int, socket.socket]) -> None:
    """Drop the connections that the others have closed while they waited.

    They say nothing before they are let in: what there is to read is the end.
    """
    ready, _, _ = select.select(list(come.values()), [], [], 0)
    for index in [index for index, connection in come.items() if connection in ready]:
        come.pop(index).close()


def visit(host: str, port: int, count: int, index: int, waiting: Waiting) -> Peers:
    """Another process: wait until process 0 is there, and until all others are.

    Raises:
        ValueError: nobody is there in time, or process 0 refuses.
    """
    where = f"{host}:{port}"
    last: list[BaseException] = [OSError("not tried")]
    found: list[socket.socket] = []
    addresses(host, port)  # a host that is not known will not be in five minutes

    def connect() -> bool:
        try:
            found.append(socket.create_connection((host, port), timeout=5))
            return True
        except OSError as error:
            last[0] = error
            time.sleep(0.5)
            return False

    answer: list[str] = []
    connection: socket.socket | None = None

    def listen() -> bool:
        assert connection is not None
        connection.settimeout(1)
        try:
            answer.append(_read_line(connection))
            return True
        except TimeoutError:
            return False
        except OSError as error:
            answer.append(reason(error))
            return True

    waiting.until(
        connect,
        lambda: f"nobody listens at {where} ({reason(last[0])})",
        "start process 0 there, or give all processes its --coordinator HOST:PORT",
    )
    connection = found[0]
    try:
        connection.sendall(f"{GREETING} {count} {index}\n".encode())
        waiting.until(
            listen,
            lambda: f"process 0 at {where} waits for others",
            "start them too, with the same --coordinator and --processes",
        )
        if answer[0] != GO:
            said = answer[0] or "it closed the connection"
            raise ValueError(
                f"process {index} of {count} was not let in at {where}: {said}. Process 0 must be "
                "there, and each process have its own --process-id and the same --processes"
            )
    except BaseException:
        connection.close()
        raise
    return Peers({0: connection})


def _read_line(connection: socket.socket, seconds: float | None = None) -> str:
    """Up to a line's end, which is not read past; empty if the other side has closed.

    Raises OSError if the line takes longer than `seconds`, whatever of it has come.
    """
    line, end = b"", time.monotonic() + (seconds or 0)
    while not line.endswith(b"\n") and len(line) < LONGEST_LINE:
        if seconds is not None:
            connection.settimeout(max(0.001, end - time.monotonic()))
        letter = connection.recv(1)
        if not letter:
            return ""
        line += letter
    return line.decode("ascii", "replace").strip()


def _listed(one: str, several: str, names: Iterable[str]) -> str:
    names = list(names)
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return f"{one if len(names) == 1 else several} {shown}"
