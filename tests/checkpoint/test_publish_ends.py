"""Ends of a process, Ctrl-C among them: whole or not at all, and nothing half-made stays."""

import itertools
import os
import shutil
from pathlib import Path

import pytest
from publishing import PUBLISHING, names, started, write

from cosmos3_jax.checkpoint import publish


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


@pytest.mark.parametrize("end", ["signal", "exit"])
def test_a_process_that_ends_leaves_what_can_be_resumed(tmp_path, end):
    process = started(tmp_path, "wait" if end == "signal" else "exit")
    if end == "signal":
        process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == (143 if end == "signal" else 0)
    assert names(tmp_path) == ["b.partial"]
