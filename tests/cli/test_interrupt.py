"""Ctrl-C and signals: a command ends within a second, also while a program runs on the device."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from cosmos3_jax.cli.interrupt import Interruption

# A command that writes a file, and waits for a program that does not end.
CHILD = """
import sys
from pathlib import Path
from cosmos3_jax.cli import commands, main

def wait(options):
    import jax
    from cosmos3_jax.checkpoint import publish
    goes_on = lambda x: (x < 2).all()
    program = jax.jit(lambda x: jax.lax.while_loop(goes_on, jax.numpy.sin, x))
    x = jax.numpy.ones(10)
    program.lower(x).compile()
    with publish.file(Path(folder) / "a.txt") as temporary:
        temporary.write_text("half")
        print("runs", flush=True)
        program(x).block_until_ready()
    return 0

folder = sys.argv.pop()
commands.COMMANDS["info"] = wait
sys.exit(main.main())
"""
ENDED_BY = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


def test_a_signal_ends_a_program_on_the_device(tmp_path):
    """With the status of a shell, one line, and without a temporary file. Ctrl-C said
    "interrupted" and computed on.
    """
    started = {}
    for number in ENDED_BY:
        folder = tmp_path / number.name
        folder.mkdir()
        started[number] = subprocess.Popen(
            [sys.executable, "-c", CHILD, "info", "tiny", str(folder)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
    try:
        for number, process in started.items():
            assert process.stdout.readline() == "runs\n", process.stderr.read()
            assert len([*(tmp_path / number.name).iterdir()]) == 1
        time.sleep(0.5)  # they are in the midst of it
        for number, process in started.items():
            start = time.monotonic()
            process.send_signal(number)
            assert process.wait(30) == ENDED_BY[number]
            # Measured: 0.6; three programs and another test share the processor here.
            assert time.monotonic() - start < 10
            assert process.stderr.read() == "cosmos3-jax: interrupted\n"
            assert not [*(tmp_path / number.name).iterdir()]
    finally:
        for process in started.values():
            process.kill()
            process.communicate()


def test_a_signal_interrupts_in_order_and_handlers_come_back():
    """The main thread has a moment to end by itself; then the process is ended."""
    left = []
    before = [signal.getsignal(number) for number in ENDED_BY]
    with pytest.raises(KeyboardInterrupt), Interruption(left.append) as interruption:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    assert interruption.status == 143 and not left
    assert [signal.getsignal(number) for number in ENDED_BY] == before
    with Interruption(left.append) as interruption:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except KeyboardInterrupt:
            time.sleep(0.8)  # more than it has
    assert left == [143]


def test_an_ignored_signal_stays_ignored():
    """As under `nohup`."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interruption(pytest.fail) as interruption:
            os.kill(os.getpid(), signal.SIGHUP)
            assert interruption.status is None
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_an_interrupt_of_the_garbage_collector_is_no_traceback(capsys):
    """It is lost where it is raised; the thread ends the process then."""
    left = threading.Event()

    class Odd:
        def __init__(self, error):
            self.error = error

        def __del__(self):
            if self.error is None:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.1)  # the handler is called here
            raise self.error or ValueError("told")

    hook = sys.unraisablehook
    sys.unraisablehook = sys.__unraisablehook__  # the test runner's fails the test
    try:
        with Interruption(lambda status: left.set()):
            Odd(ValueError("told"))
            assert "told" in capsys.readouterr().err
            Odd(None)
            assert left.wait(5)
        assert sys.unraisablehook is sys.__unraisablehook__
    finally:
        sys.unraisablehook = hook
    assert capsys.readouterr().err == ""
