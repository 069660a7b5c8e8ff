"""Several writers of one place, ends of the process and full disks: whole or not at all."""

import contextlib
import errno
import fcntl
import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
from disks import full_disk

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


# Ends of a process
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PUBLISHING)
def test_clean_up_takes_back_what_is_open(tmp_path, kind):
    """The folders that were made for it go, too; what can be resumed stays, less half a file."""
    resumed = kind == "folder to resume"
    with pytest.raises(OSError), PUBLISHING[kind](tmp_path / "new" / "deeper" / "a") as opened:
        name = getattr(opened, "temporary", opened)
        if "folder" in kind:
            write(name)
        with publish.file(name / "b.txt" if resumed else tmp_path / "b.txt") as other:
            other.write_text("half")
            if "file" in kind:
                name.write_text("half")
            for _ in range(2):
                publish.clean_up()
            kept = ["new", "new/deeper", "new/deeper/a.partial", "new/deeper/a.partial/a.txt"]
            assert names(tmp_path) == (kept if resumed else [])


def test_clean_up_brings_back_what_is_replaced(tmp_path, monkeypatch):
    """On a signal between the two renames."""
    path, rename = tmp_path / "a", os.replace
    write(path, "old")

    def signalled(source, target):
        if target == path:
            monkeypatch.setattr(os, "replace", rename)
            publish.clean_up()
            assert names(tmp_path) == ["a", "a/a.txt"]
            assert (path / "a.txt").read_text() == "old"
        rename(source, target)

    with pytest.raises(OSError), publish.folder(path, overwrite=True) as temporary:
        write(temporary)
        monkeypatch.setattr(os, "replace", signalled)
    assert (path / "a.txt").read_text() == "old"


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("kind", ["folder to replace", "folder that fails"])
def test_ctrl_c_while_a_folder_is_removed(tmp_path, monkeypatch, kind, times):
    """Of the folder that was replaced, or of one that was given up, nothing stays; nor if Ctrl-C
    comes once more while that is mended, and the process ends.
    """
    path, fails, rmtree = tmp_path / "a", kind == "folder that fails", shutil.rmtree
    write(path, "old")
    stops = itertools.count(1)

    def stopped(folder, **how):
        if next(stops) <= times:
            (folder / "a.txt").unlink()
            write(folder, "half")
            raise KeyboardInterrupt
        rmtree(folder, **how)

    with pytest.raises(KeyboardInterrupt), publish.folder(path, overwrite=True) as temporary:
        write(temporary)
        monkeypatch.setattr(shutil, "rmtree", stopped)
        if fails:
            raise OSError
    if times > 1:
        publish.clean_up()
    assert names(tmp_path) == ["a", "a/a.txt"]
    assert (path / "a.txt").read_text() == ("old" if fails else "new")


def test_clean_up_while_another_thread_renames(tmp_path, monkeypatch):
    """The folder gets its other name when `clean_up` has just seen that nothing has it."""
    path, replaced = tmp_path / "a", tmp_path / ".a.replaced"
    rename, exists = os.replace, Path.exists
    write(path, "old")

    def looked(self, **how):
        found = exists(self, **how)
        if self == replaced:
            monkeypatch.setattr(Path, "exists", exists)
            rename(path, replaced)
        return found

    def renamed(source, target):
        monkeypatch.setattr(os, "replace", rename)
        monkeypatch.setattr(Path, "exists", looked)
        publish.clean_up()
        assert names(tmp_path) == ["a", "a/a.txt"]  # and here the process ends
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), publish.folder(path, overwrite=True) as temporary:
        write(temporary)
        monkeypatch.setattr(os, "replace", renamed)
    assert (path / "a.txt").read_text() == "old"


def test_ctrl_c_while_a_lock_is_removed(tmp_path, monkeypatch):
    """What is still to be done at the end of the process leaves another's lock alone."""
    unlink, lock = Path.unlink, tmp_path / ".a.lock"

    def stopped(self, **how):
        monkeypatch.setattr(Path, "unlink", unlink)
        unlink(self, **how)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), publish.locked(tmp_path / "a"):
        monkeypatch.setattr(Path, "unlink", stopped)
    lock.touch()
    publish.clean_up()
    assert lock.exists()


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


@pytest.mark.parametrize("end", ["signal", "exit"])
def test_a_process_that_ends_leaves_what_can_be_resumed(tmp_path, end):
    process = started(tmp_path, "wait" if end == "signal" else "exit")
    if end == "signal":
        process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == (143 if end == "signal" else 0)
    assert names(tmp_path) == ["b.partial"]


# Several writers
# ------------------------------------------------------------------------------------------------


def test_a_folder_that_another_process_writes_is_refused_by_name(tmp_path):
    """Until it ends, however it does."""
    process = started(tmp_path)
    before = names(tmp_path)
    for name, overwrite in itertools.product("ab", (False, True)):
        with pytest.raises(BlockingIOError, match=f"another process is writing {tmp_path / name}"):
            with publish.folder(tmp_path / name, overwrite=overwrite):
                pytest.fail("two write one folder")
    assert names(tmp_path) == before
    process.kill()
    process.communicate(timeout=60)
    for name in "ab":
        with publish.folder(tmp_path / name) as temporary:
            write(temporary)
        assert names(tmp_path / name) == ["a.txt"]
    assert not [*tmp_path.glob(".*.lock")]


@pytest.mark.parametrize("kind", ["folder", "folder to resume"])
def test_a_folder_that_is_there_is_refused_before_the_work(tmp_path, kind):
    path = tmp_path / "a"
    path.mkdir()
    with PUBLISHING[kind](path) as temporary:  # an empty one is none
        write(temporary)
    with pytest.raises(FileExistsError, match="a exists; choose another"), PUBLISHING[kind](path):
        pytest.fail("the work began")
    assert names(tmp_path) == ["a", "a/a.txt"]


def test_a_lock_is_that_of_the_file_that_is_there(tmp_path, monkeypatch):
    """Its holder removes it, between another's opening and locking: that one takes the next."""
    lock, flock, taken = tmp_path / ".a.lock", fcntl.flock, []

    def late(file, how):
        if not taken:
            lock.unlink()
        taken.append(os.fstat(file).st_ino)
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with publish.locked(tmp_path / "a"):
        assert len(taken) == 2 and lock.stat().st_ino == taken[-1]
        with pytest.raises(BlockingIOError), publish.locked(tmp_path / "a"):
            pytest.fail("two hold one lock")
        assert lock.exists()
    assert names(tmp_path) == []


def test_without_locks_it_is_said_and_the_first_to_end_wins(tmp_path, monkeypatch, caplog):
    def none_here(*_):
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(fcntl, "flock", none_here)
    with pytest.raises(OSError, match="not empty"), publish.folder(tmp_path / "a") as late:
        write(late, "late")
        with publish.folder(tmp_path / "a") as first:
            write(first, "first")
    assert names(tmp_path) == ["a", "a/a.txt"]
    assert (tmp_path / "a" / "a.txt").read_text() == "first"
    assert {*caplog.messages} == {
        f"{tmp_path / 'a'} cannot be locked (Operation not supported): let no other process write "
        "it"
    }


@pytest.mark.parametrize("change", ["more", "less", "another"])
@pytest.mark.parametrize("kind", PUBLISHING)
def test_what_is_there_afterwards_is_what_was_written(tmp_path, monkeypatch, kind, change):
    """Or else it is no success: another writer may have come between."""
    path = tmp_path / "a"

    def changed(rename):
        def rename_and_change(source, target):
            rename(source, target)
            file = target / "a.txt" if target.is_dir() else target
            if change == "more":
                (target / "b.txt" if target.is_dir() else file).write_text("more of it")
            elif change == "less":
                file.unlink()
            else:
                file.write_text("theirs")

        return rename_and_change

    with pytest.raises(OSError, match=f"{path} is not what was written there.*another process"):
        with PUBLISHING[kind](path) as opened:
            name = getattr(opened, "temporary", opened)
            write(name) if "folder" in kind else name.write_text("new")
            monkeypatch.setattr(os, "replace", changed(os.replace))
            monkeypatch.setattr(os, "link", changed(os.link))


def test_files_of_a_folder_that_nobody_wrote(tmp_path):
    write(tmp_path)
    publish.check_files(tmp_path, [tmp_path / "a.txt"])
    for files in ([], [tmp_path / "a.txt", tmp_path / "b.txt"]):
        with pytest.raises(OSError, match=r"not what was written there \([ab].txt\)"):
            publish.check_files(tmp_path, files)


# Disks
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("room", [0, 1, 4095, 4096, 9999])
@pytest.mark.parametrize("kind", PUBLISHING)
def test_a_disk_that_fills_at_any_byte(tmp_path, kind, room, old):
    path, is_folder = tmp_path / "new" / "a", "folder" in kind
    there = path / "a.txt" if is_folder else path
    if old and kind in ("file", "folder to replace"):
        there.parent.mkdir(parents=True)
        there.write_text("old")
    before = names(tmp_path)
    with pytest.raises(OSError, match=f"{path} could not be written: File too large"):
        with full_disk(room), PUBLISHING[kind](path) as opened:
            name = getattr(opened, "temporary", opened)
            if is_folder:
                name.mkdir()
                name = name / "a.txt"
            name.write_text("x" * 10_000)
    assert [each for each in names(tmp_path) if "a.partial" not in each] == (
        before or ["new"] * (kind == "folder to resume")
    )
    assert not before or there.read_text() == "old"


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    for kind, publishing in PUBLISHING.items():
        path = Path("/proc/new/a")
        with pytest.raises(OSError, match="/proc/new/a could not be written: "), publishing(path):
            pytest.fail(kind)
    (tmp_path / "file").touch()
    for path in (Path("/proc/new/a"), tmp_path / "file" / "a", tmp_path / "file" / "deeper" / "a"):
        with pytest.raises(OSError, match=f"{path}: cannot write files in .*; choose another"):
            publish.check_parent(path)
    publish.check_parent(tmp_path / "new" / "deeper" / "a")
    assert names(tmp_path) == ["file"]


def test_folders_that_were_made_halfway_go_again(tmp_path, monkeypatch):
    mkdir = Path.mkdir

    def halfway(path, **_):
        mkdir(path.parent)
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), str(path))

    monkeypatch.setattr(Path, "mkdir", halfway)
    path = tmp_path / "new" / "deeper" / "a"
    with pytest.raises(OSError, match=f"{path} could not be written: Disk quota"):
        with publish.file(path):
            pytest.fail("there is no folder")
    assert names(tmp_path) == []


def test_a_file_system_without_links(tmp_path, monkeypatch):
    """What holds the name while it is free goes again, if the rename fails or the process ends."""

    def none_here(*_):
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(os, "link", none_here)
    (tmp_path / "a.txt").write_text("old")
    with publish.free_file(tmp_path / "a.txt") as target:
        target.temporary.write_text("new")
    assert target.path == tmp_path / "a-1.txt" and target.path.read_text() == "new"
    assert names(tmp_path) == ["a-1.txt", "a.txt"]

    def ends(*_):
        assert names(tmp_path)[1:] == ["a-1.txt", "a-2.txt", "a.txt"]
        publish.clean_up()
        assert names(tmp_path) == ["a-1.txt", "a.txt"]
        raise OSError(errno.EIO, "")

    monkeypatch.setattr(os, "replace", ends)
    with contextlib.suppress(OSError), publish.free_file(tmp_path / "a.txt") as target:
        target.temporary.write_text("new")
    assert names(tmp_path) == ["a-1.txt", "a.txt"]


def test_ctrl_c_while_the_name_is_taken(tmp_path, monkeypatch):
    """On a file system without links: no empty file stays, and another's empty one does."""
    monkeypatch.setattr(os, "link", Mock(side_effect=OSError(errno.ENOTSUP, "none")))
    (tmp_path / "a.txt").touch()
    touch = Path.touch

    def stopped(path, **how):
        touch(path, **how)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "touch", stopped)
    with pytest.raises(KeyboardInterrupt), publish.free_file(tmp_path / "a.txt") as target:
        target.temporary.write_text("new")
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("kind", PUBLISHING)
def test_a_file_system_that_changes_times(tmp_path, monkeypatch, kind):
    """On a rename, as object stores do: what was written is there nevertheless."""

    def changed(rename):
        def rename_and_change(source, target):
            rename(source, target)
            os.utime(target / "a.txt" if target.is_dir() else target, ns=(0, 0))

        return rename_and_change

    monkeypatch.setattr(os, "replace", changed(os.replace))
    monkeypatch.setattr(os, "link", changed(os.link))
    with PUBLISHING[kind](tmp_path / "a") as opened:
        name = getattr(opened, "temporary", opened)
        write(name) if "folder" in kind else name.write_text("new")
    assert "a" in names(tmp_path)


@pytest.mark.parametrize("readable", [True, False])
def test_a_lock_that_another_user_has_left(tmp_path, monkeypatch, readable):
    lock, opening = tmp_path / ".a.lock", os.open
    lock.touch()

    def closed(path, flags, *mode, **more):
        if path == lock and (flags & os.O_RDWR or not readable):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return opening(path, flags, *mode, **more)

    monkeypatch.setattr(os, "open", closed)
    if readable:
        with publish.locked(tmp_path / "a"):
            pass
        assert names(tmp_path) == []
    else:
        with pytest.raises(PermissionError, match=f"{lock} belongs to another user.*: remove it"):
            with publish.folder(tmp_path / "a"):
                pytest.fail("it is not locked")
