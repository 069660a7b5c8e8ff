"""The ways to publish, a process that does, and what a folder holds."""

import subprocess
import sys
from pathlib import Path

from cosmos3_jax.checkpoint import publish

PUBLISHING = {
    "file": publish.file,
    "free file": publish.free_file,
    "folder": publish.folder,
    "folder to replace": lambda path: publish.folder(path, overwrite=True),
    "folder to resume": lambda path: publish.folder(path, resume=True),
}


def write(folder: Path, text: str = "new") -> None:
    folder.mkdir(exist_ok=True)
    (folder / "a.txt").write_text(text)


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


# A process that has begun a file, a folder and one to resume, in a thread that does not end, and
# says so; then it waits, or ends.
PROCESS = """
import contextlib, os, signal, sys, threading
from pathlib import Path
from cosmos3_jax.checkpoint import publish

then, here = sys.argv[1], Path(sys.argv[2])
signal.signal(signal.SIGTERM, lambda *_: (publish.clean_up(), os._exit(143)))
opened = contextlib.ExitStack()

def work():
    opened.enter_context(publish.file(here / "new" / "a.mp4")).write_bytes(b"half")
    for name, resume in ("a", False), ("b", True):
        folder = opened.enter_context(publish.folder(here / name, resume=resume))
        folder.mkdir()
        opened.enter_context(publish.file(folder / "a.txt")).write_text("half")
    begun.set()
    signal.sigwait([])

begun = threading.Event()
threading.Thread(target=work, daemon=True).start()
begun.wait()
if os.fork() == 0:  # a child cleans up after itself alone
    publish.clean_up()
    os._exit(0)
os.wait()
print("open", len(list(here.rglob(".cosmos3-*"))), flush=True)
if then == "wait":
    signal.pause()
"""


def started(folder: Path, then: str = "wait") -> subprocess.Popen:
    command = [sys.executable, "-c", PROCESS, then, str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "open 4\n"
    return process
