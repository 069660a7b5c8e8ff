"""Files and folders appear whole or not at all, and a failure leaves what was there."""

import errno
import os

import pytest

from cosmos3_jax.checkpoint import publish

STOPS = [OSError, ValueError, KeyboardInterrupt]


def test_a_file(tmp_path):
    """Until the block ends only a hidden name is there, with the suffix that writers go by."""
    path = tmp_path / "deeper" / "a.mp4"
    with publish.file(path) as temporary:
        temporary.write_text("new")
        assert [*path.parent.iterdir()] == [temporary]
        assert temporary.name.startswith(".") and temporary.suffix == ".mp4"
    assert [*path.parent.iterdir()] == [path]
    assert path.read_text() == "new"


def test_two_writers_of_a_file_do_not_share_a_temporary_name(tmp_path):
    path = tmp_path / "a.txt"
    with publish.file(path) as first, publish.file(path) as second:
        first.write_text("first")
        second.write_text("second")
    assert [*tmp_path.iterdir()] == [path]
    assert path.read_text() == "first"  # the last to end


@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize("written", [False, True])
def test_a_file_that_fails(tmp_path, stop, written):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(stop), publish.file(path) as temporary:
        if written:
            temporary.write_text("half")
        raise stop
    assert [*tmp_path.iterdir()] == [path]
    assert path.read_text() == "old"


def test_a_full_disk_is_told_with_the_name_that_was_asked_for(tmp_path):
    path = tmp_path / "car.mp4"
    for publishing in (publish.file, publish.free_file):
        with pytest.raises(OSError, match="car.mp4 could not be written: No space") as told:
            with publishing(path):
                raise OSError(errno.ENOSPC, "No space left on device", ".cosmos3-temporary")
        assert told.value.errno == errno.ENOSPC and not any(tmp_path.iterdir())


def write(folder, text):
    folder.mkdir(exist_ok=True)
    (folder / "a.txt").write_text(text)


def test_a_folder(tmp_path):
    path = tmp_path / "deeper" / "a"
    with publish.folder(path) as temporary:
        assert not temporary.exists()
        write(temporary, "new")
        assert not path.exists() and temporary.name.startswith(".")
    assert [*path.parent.iterdir()] == [path]
    assert (path / "a.txt").read_text() == "new"


@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_that_fails(tmp_path, stop, resume):
    """What was there stays; what was made goes, unless another run is to go on with it."""
    path, partial = tmp_path / "a", tmp_path / "a.partial"
    write(path, "old")
    with pytest.raises(stop), publish.folder(path, overwrite=True, resume=resume) as temporary:
        write(temporary, "half")
        raise stop
    assert {*tmp_path.iterdir()} == ({path, partial} if resume else {path})
    assert (path / "a.txt").read_text() == "old"
    if resume:
        with publish.folder(path, overwrite=True, resume=True) as temporary:
            assert (temporary / "a.txt").read_text() == "half"
        assert [*tmp_path.iterdir()] == [path]
        assert (path / "a.txt").read_text() == "half"


def test_a_folder_is_replaced_only_if_told(tmp_path):
    """Also one that another process makes meanwhile."""
    path = tmp_path / "a"
    with pytest.raises(OSError, match="not empty"), publish.folder(path) as temporary:
        write(temporary, "new")
        write(path, "theirs")
    assert [*tmp_path.iterdir()] == [path]
    assert (path / "a.txt").read_text() == "theirs"
    with publish.folder(path, overwrite=True) as temporary:
        write(temporary, "new")
    assert [*tmp_path.iterdir()] == [path]
    assert (path / "a.txt").read_text() == "new"


@pytest.mark.parametrize("stop", [OSError, KeyboardInterrupt])
def test_a_folder_that_cannot_be_renamed(tmp_path, monkeypatch, stop):
    """Stopped between the two renames, the old folder comes back."""
    path, replace = tmp_path / "a", os.replace
    write(path, "old")

    def failing(source, target):
        if target == path:
            monkeypatch.setattr(os, "replace", replace)
            raise stop
        replace(source, target)

    with pytest.raises(stop), publish.folder(path, overwrite=True) as temporary:
        write(temporary, "new")
        monkeypatch.setattr(os, "replace", failing)
    assert [*tmp_path.iterdir()] == [path]
    assert (path / "a.txt").read_text() == "old"
