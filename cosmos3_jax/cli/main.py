"""The command line: cosmos3-jax generate | convert | info | bench.

JAX is imported after the options are read, so that help and errors come at once.
"""

import io
import logging
import os
import sys
import time
import traceback
import warnings

from cosmos3_jax.cli.interrupt import Interruption
from cosmos3_jax.cli.options import parse
from cosmos3_jax.guard import LONG_REASON, printable, reason


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Returns the exit status; errors that a user can mend are one line, not a
    traceback.

    Without `arguments` they are this process's own, and a signal ends it: within a second, with
    128 and the signal's number as its status.
    """
    _open_streams()
    if arguments is not None:
        return _run(arguments)
    with Interruption(_leave_interrupted) as interruption:
        try:
            status = _run(None)
        except BaseException:
            if interruption.status is None:
                raise
        if interruption.status is not None:  # whatever became of the KeyboardInterrupt
            _leave_interrupted(interruption.status)
    return status


def _run(arguments: list[str] | None) -> int:
    options = parse(arguments)
    import jax

    from cosmos3_jax.checkpoint import publish
    from cosmos3_jax.cli.commands import COMMANDS
    from cosmos3_jax.parallel import device, distributed

    distributed.call_before_leaving(publish.clean_up)
    device.use_whole_device()
    try:
        with _Messages(), warnings.catch_warnings():
            warnings.showwarning = _show_warning
            status = COMMANDS[options.command](options)
            sys.stdout.flush()
    except BrokenPipeError:  # of `info | head`: nobody reads on
        _discard_output()
        status = 1
    except (ValueError, OSError) as error:
        say(f"cosmos3-jax: error: {error}")
        status = 2
    except KeyboardInterrupt:
        if arguments is None:
            raise
        say("cosmos3-jax: interrupted")
        status = 130
    except Exception as error:
        if obstacle := device.backend_obstacle():
            say(f"cosmos3-jax: error: {obstacle}")
            status = 2
        elif not distributed.are_several():
            raise
        elif isinstance(error, jax.errors.JaxRuntimeError):
            time.sleep(1)  # who watches the others ends this process first, and names the one
            say(
                f"cosmos3-jax: error: the devices of {jax.process_count()} processes did not "
                f"finish ({reason(error, LONG_REASON)}); perhaps one of them ended, see what the "
                "others say"
            )
            status = 1
        else:
            traceback.print_exc()
            status = 1
    if status and distributed.are_several():
        distributed.leave(status)
    return status


def _open_streams() -> None:
    """Streams that were closed (`2>&-`) lead nowhere: files would get their numbers, and what is
    said to them.
    """
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            mode = os.O_RDONLY if name == "stdin" else os.O_WRONLY
            file = os.fdopen(os.open(os.devnull, mode), "r" if name == "stdin" else "w")
            setattr(sys, name, file)
    for stream in (sys.stdout, sys.stderr):  # a letter that the terminal has not must not fail
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _discard_output() -> None:
    """Of what is still to be written: the interpreter would try once more when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


_said_so = False


def _leave_interrupted(status: int) -> None:
    """End this process at once: an ordinary end would wait for the program on the device."""
    global _said_so
    if not _said_so:
        _said_so = True
        say("cosmos3-jax: interrupted")
    # Not imported here: the main thread may be about to.
    distributed = sys.modules.get("cosmos3_jax.parallel.distributed")
    getattr(distributed, "leave", os._exit)(status)


def say(text: str) -> None:
    print(printable(text), file=sys.stderr, flush=True)


def _show_warning(message: Warning | str, *_, **__) -> None:
    say(f"cosmos3-jax: warning: {' '.join(str(message).split())}")


class _Messages(logging.Handler):
    """While it is open, what the package logs is said: each stage, and, once, what was decided."""

    log = logging.getLogger("cosmos3_jax")

    def __init__(self):
        super().__init__()
        self.decided: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if record.levelno >= logging.WARNING:
            if message in self.decided:  # for each file of several
                return
            self.decided.add(message)
        say(f"cosmos3-jax: {message}")

    def __enter__(self) -> None:
        self.before = self.log.level
        self.log.setLevel(logging.INFO)
        self.log.addHandler(self)

    def __exit__(self, *_) -> None:
        self.log.removeHandler(self)
        self.log.setLevel(self.before)


if __name__ == "__main__":
    sys.exit(main())
