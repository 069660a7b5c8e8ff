"""Ctrl-C and signals end a command within a second, also while a program runs on the device.

Python calls a signal's handler in the main thread, once that is back from C++: minutes later, if it
waits for a device. So the signal also wakes a thread, which ends the process if the main thread has
not by then.
"""

import signal
import socket
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
GRACE_SECONDS = 0.5  # for the main thread to end in order


class Interruption:
    """While it is open, a signal raises KeyboardInterrupt and soon ends the process.

    Signals that are ignored stay so, as under `nohup`. It must be opened in the main thread.

    Attributes:
        status: of a process that a signal has ended, 128 and its number; None until one comes.
    """

    def __init__(self, leave: Callable[[int], None]):
        """
        Args:
            leave: called in a thread with the status, to end the process.
        """
        self.status: int | None = None
        self._leave = leave
        self._over = threading.Event()

    def __enter__(self) -> "Interruption":
        heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        self._before: dict[int, Any] = {}
        self._unraisable, sys.unraisablehook = sys.unraisablehook, self._unraised
        self._ours, self._theirs = socket.socketpair()
        self._theirs.setblocking(False)
        self._wakeup = signal.set_wakeup_fd(self._theirs.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._watch, daemon=True).start()
        for number in heard:  # last: what they raise should be raised inside of the block
            self._before[number] = signal.signal(number, self._interrupt)
        return self

    def __exit__(self, *_) -> None:
        self._over.set()
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        sys.unraisablehook = self._unraisable
        self._theirs.close()  # which ends the thread

    def _interrupt(self, number: int, _: FrameType | None) -> None:
        self.status = 128 + number
        raise KeyboardInterrupt

    def _unraised(self, ignored: Any) -> None:
        """Of what is raised where nothing can catch it, as in the garbage collector: an interrupt
        is lost there, and the thread ends the process.
        """
        if not issubclass(ignored.exc_type, KeyboardInterrupt):
            self._unraisable(ignored)

    def _watch(self) -> None:
        with self._ours:
            while came := self._ours.recv(1):
                if came[0] in self._before:
                    self.status = 128 + came[0]
                    if not self._over.wait(GRACE_SECONDS):
                        self._leave(self.status)
