"""A few bad inputs of every reader, and whether the fuzzers see what they look for."""

import os
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from fuzz import frame, kills
from fuzz.__main__ import MARKERS, REPORT, counts, replaced, table
from fuzz.frame import OUTCOMES, Case, Result, wrong_words
from fuzz.readers import READERS

INPUTS = 600


@pytest.fixture(autouse=True)
def _room_beside_the_suite(monkeypatch):
    """A forked process counts the pages of its parent as its own, and here the parent is a process
    of the suite, which holds any amount.
    """
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    monkeypatch.setattr(frame, "BYTES", held + 2**29)


def test_bad_inputs_are_refused_or_read_right():
    """In a process of its own: this one has started a device."""
    command = [sys.executable, "-m", "fuzz", "--inputs", str(INPUTS), "--without-training"]
    tests = Path(__file__).parents[1]
    done = subprocess.run(
        command, cwd=tests, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert f"| all | {INPUTS} |" in done.stdout


def burn():
    while True:
        pass


def take_memory():
    return np.ones(frame.BYTES // 8)


def ask_for_too_much():
    return np.ones(2**40)


def fail(error):
    def read():
        raise error

    return read


SEEN = {
    "accepted": Case(lambda: 1),
    "refused": Case(fail(ValueError("a.json: no")), "a.json"),
    "wrong": Case(lambda: 1, check=lambda found: f"{found} is not 2"),
    "words": Case(fail(ValueError("no")), "a.json"),
    "traceback": Case(fail(KeyError("a"))),
    "hang": Case(burn),
    "memory": Case(take_memory),
    "crash": Case(lambda: os.kill(os.getpid(), signal.SIGKILL)),
}


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_every_outcome_is_told_from_the_others(outcome, tmp_path, monkeypatch):
    """In forked processes that start no device."""
    if outcome == "hang":
        monkeypatch.setattr(frame, "SECONDS", 0.2)
        monkeypatch.setattr(frame, "WAIT", 0.5)
    result = frame.try_input("a", lambda *_: SEEN[outcome], 0, tmp_path / "a-0")
    assert result.outcome == outcome, result.words
    assert result.failed == (outcome not in ("accepted", "refused"))


def test_more_memory_than_there_is_and_waiting_are_told(tmp_path, monkeypatch):
    case = Case(ask_for_too_much)
    assert frame.try_input("a", lambda *_: case, 0, tmp_path / "a").outcome == "memory"
    monkeypatch.setattr(frame, "WAIT", 0.3)
    waits = Case(lambda: time.sleep(60))
    assert frame.try_input("a", lambda *_: waits, 0, tmp_path / "b").outcome == "hang"


@pytest.mark.parametrize(
    "words, problem",
    [
        ("a.json: no", None), ("the files of a.json:\n  x", None), ("a.json:\nx", "several lines"),
        ("b.json: no", "does not name a.json"), ("a.json" * 400, "too long"), (" ", "no words"),
        ("a.json: \x1b[31m", "unprintable letters"),
    ],
)  # fmt: skip
def test_messages_are_judged(words, problem):
    assert wrong_words(words, "a.json") == problem


def test_an_input_is_the_same_each_time(tmp_path):
    """And another of another seed."""

    def make(random, folder):
        return Case(lambda: 1, check=lambda _: str(random.random()))

    first, again, other = (
        frame.try_input("a", make, seed, tmp_path / str(i)).words
        for i, seed in enumerate((1, 1, 2))
    )
    assert first == again != other


def test_every_reader_is_in_the_tables_of_the_documentation():
    text = REPORT.read_text("utf-8")
    rows = text.partition(MARKERS[0])[2].partition(MARKERS[1])[0].strip().split("\n")[2:]
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows] == [*READERS, "all"]
    assert [row.split(" | ")[4] for row in rows] == ["0"] * len(rows)  # failures
    assert int(rows[-1].split(" | ")[1].replace(",", "")) >= 20_000
    of_kills = text.partition(kills.MARKERS[0])[2].partition(kills.MARKERS[1])[0]
    for what in (*kills.STAGES, "converting", "training"):
        for number in kills.SIGNALS:
            assert f"| {what}, {number.name[3:]} |" in of_kills


def test_tables_and_shares():
    assert sum(counts(20_000, READERS).values()) == 20_000
    results = [Result("noise", 1, "hang", "", 1.25, 2**20), Result("noise", 2, "refused", "", 1, 0)]
    assert "| noise | 2 | 0 | 1 | 1 | 1.2 | 1 |" in table(results)
    assert replaced("a<!-- inputs -->b<!-- end of inputs -->c", "x").split() == [
        "a<!--", "inputs", "-->", "x", "<!--", "end", "of", "inputs", "-->c",
    ]  # fmt: skip
    assert kills.table(Counter(a=2), Counter(a=1)).endswith("| a | 2 | 1 |\n| all | 2 | 1 |")
