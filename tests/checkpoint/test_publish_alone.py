"""Several writers of one place, and full disks: whole or not at all."""

import contextlib
import errno
import fcntl
import itertools
import os
from pathlib import Path
from unittest.mock import Mock

import pytest
from disks import full_disk
from publishing import PUBLISHING, names, started, write

from cosmos3_jax.checkpoint import publish

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
