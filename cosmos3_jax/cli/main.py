"""The command line: cosmos3-jax generate | convert | info | bench.

JAX is imported after the options are read, so that help and errors come at once.
"""

import io
import logging
import os
import sys
import traceback
import warnings

from cosmos3_jax.cli.options import parse


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Returns the exit status; errors that a user can mend are one line, not a
    traceback.
    """
    for stream in (sys.stdout, sys.stderr):  # a letter that the terminal has not must not fail
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    options = parse(arguments)
    import jax

    from cosmos3_jax.cli.commands import COMMANDS
    from cosmos3_jax.parallel import device, distributed

    device.use_whole_device()
    try:
        with _Messages(), warnings.catch_warnings():
            warnings.showwarning = _show_warning
            status = COMMANDS[options.command](options)
            sys.stdout.flush()
    except BrokenPipeError:  # of `info | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except (ValueError, OSError) as error:
        say(f"cosmos3-jax: error: {error}")
        status = 2
    except jax.errors.JaxRuntimeError:
        if not distributed.are_several():
            raise
        traceback.print_exc()
        say(
            f"cosmos3-jax: error: the devices of {jax.process_count()} processes did not finish; "
            "perhaps one of them ended, see what the others say"
        )
        status = 1
    except KeyboardInterrupt:
        say("cosmos3-jax: interrupted")
        status = 130
    if status and distributed.are_several():
        distributed.leave(status)
    return status


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


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
