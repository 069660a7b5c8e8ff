"""Conversions that are killed, run into a full disk or replace another: nothing is lost."""

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
from unittest.mock import Mock

import numpy as np
import pytest
from checkpoint_files import (
    SHARD_BYTES,
    assert_same_folder,
    contents,
    link_checkpoint,
    read_tensors,
    replace_file,
)
from disks import full_disk
from safetensors import SafetensorError

from cosmos3_jax.checkpoint import files, load
from cosmos3_jax.checkpoint.convert import convert_checkpoint
from cosmos3_jax.checkpoint.rules import CheckpointError

# Run in a process of its own, which is killed when the third shard is half written, under our
# temporary name and under the one that safetensors uses.
KILLED = """
import os, signal, sys
from pathlib import Path
from cosmos3_jax.checkpoint import convert, files

save_file, written = files.save_file, []

def save_and_die(tensors, path, metadata):
    if len(written) == 2:
        path.write_bytes(b"half a shard")
        path.with_name(".tmpAbCdEf").write_bytes(b"half a shard")
        os.kill(os.getpid(), signal.SIGKILL)
    written.append(path)
    save_file(tensors, path, metadata)

files.save_file = save_and_die
convert.convert_checkpoint(Path(sys.argv[1]), Path(sys.argv[2]), max_shard_bytes=int(sys.argv[3]))
"""


@pytest.fixture(scope="module")
def killed(public_checkpoint, tmp_path_factory):
    """What a conversion leaves that is killed in its third shard: a folder and a plan beside it."""
    folder = tmp_path_factory.mktemp("killed")
    command = [sys.executable, "-c", KILLED, public_checkpoint, folder / "target", str(SHARD_BYTES)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    return folder


@pytest.fixture
def unfinished(killed, tmp_path):
    folder = link_checkpoint(killed, tmp_path / "unfinished")
    assert sorted(path.name for path in folder.iterdir()) == [
        ".target.lock",  # a name alone: the system has let go of it
        "target.partial",
        "target.partial.json",
    ]
    sums = folder / "target.partial" / "SHA256SUMS"
    replace_file(sums, sums.read_bytes())  # it is linked to the fixture's, and grows
    return folder / "target"


def test_resumed_after_a_kill(public_checkpoint, converted, unfinished, monkeypatch):
    """Whole shards stay as they are, half ones go, and the result is that of a run in one go."""
    partial = unfinished.with_name("target.partial")
    whole = sorted((partial / "transformer").glob("params*"))
    hidden = [path.name for path in (partial / "transformer").glob(".*/*")]
    assert len(whole) == 2
    assert len(hidden) == 2
    before = [(path.name, path.stat().st_ino, path.stat().st_mtime_ns) for path in whole]
    written = []
    write_shard = files.write_shard

    def counted(path, values, **room):
        written.append(path)
        write_shard(path, values, **room)

    monkeypatch.setattr(files, "write_shard", counted)
    reported = []
    convert_checkpoint(
        public_checkpoint, unfinished, max_shard_bytes=SHARD_BYTES, on_bytes=reported.append
    )
    assert_same_folder(unfinished, converted)
    names = {path.name for path in whole}
    stats = [(name, (unfinished / "transformer" / name).stat()) for name in sorted(names)]
    assert [(name, stat.st_ino, stat.st_mtime_ns) for name, stat in stats] == before
    shards = list(unfinished.rglob("*.safetensors"))
    assert len(written) == len(shards) - 2
    # Progress counts the shards that were found, too.
    folders = [unfinished / name for name in ("transformer", "vae", "sound_tokenizer")]
    tensors = [value for folder in folders for value in read_tensors(folder).values()]
    assert (len(reported), sum(reported)) == (len(shards), sum(x.nbytes for x in tensors))
    assert [path.name for path in unfinished.parent.iterdir()] == ["target"]


@pytest.mark.parametrize("damage", ["short", "one bit", "no sum", "half a sum"])
def test_a_damaged_shard_is_written_again(public_checkpoint, converted, unfinished, damage, caplog):
    """As after a power failure, when a renamed file can be short, or on a disk that rots."""
    partial = unfinished.with_name("target.partial")
    shard = min((partial / "transformer").glob("params*"))
    content, sums = shard.read_bytes(), partial / "SHA256SUMS"
    if damage == "short":
        replace_file(shard, content[:-1])
    elif damage == "one bit":
        replace_file(shard, content[:-1] + bytes([content[-1] ^ 1]))
    else:
        _, first, *others = sums.read_text().split("\n")
        assert first.endswith(f"  transformer/{shard.name}")
        first = first[:40] if damage == "half a sum" else ""
        replace_file(sums, "\n".join([*others, first]).encode())
    convert_checkpoint(public_checkpoint, unfinished, max_shard_bytes=SHARD_BYTES)
    assert_same_folder(unfinished, converted)
    assert caplog.messages == [f"{shard} is not known to be what was written: it is written again"]


@pytest.mark.parametrize(
    "change", [{"dtype": "float32"}, {"sound": False}, {"max_shard_bytes": 10**6}, "source", "plan"]
)
def test_a_leftover_of_another_conversion_is_refused(
    public_checkpoint, unfinished, tmp_path, change
):
    arguments = {"source": public_checkpoint, "max_shard_bytes": SHARD_BYTES}
    if change == "source":
        arguments["source"] = link_checkpoint(public_checkpoint, tmp_path / "other")
    elif change == "plan":
        unfinished.with_name("target.partial.json").unlink()
    else:
        arguments |= change
    unfinished.with_name(".target.lock").unlink()
    before = contents(unfinished.parent)
    with pytest.raises(CheckpointError, match="target.partial holds an unfinished .*; remove it"):
        convert_checkpoint(target=unfinished, **arguments)
    assert contents(unfinished.parent) == before


def test_a_changed_source_is_another_source(public_checkpoint, tmp_path):
    """The same names with other bytes: shards of the first must not be mixed with the second's."""
    source = shutil.copytree(public_checkpoint, tmp_path / "source")

    def stop(size):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(source, tmp_path / "target", on_bytes=stop)
    shard = max((source / "vae").glob("*.safetensors"))
    os.utime(shard, ns=(0, 0))
    with pytest.raises(CheckpointError, match="holds an unfinished conversion"):
        convert_checkpoint(source, tmp_path / "target")


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_second_conversion_into_one_folder_is_refused(
    public_checkpoint, silent_checkpoint, converted, tmp_path, overwrite
):
    """By name and at once, whatever the first has done so far."""
    target, refused = tmp_path / "target", []
    if overwrite:
        convert_checkpoint(silent_checkpoint, target)

    def meanwhile(size):
        for source in (public_checkpoint, silent_checkpoint):
            with pytest.raises(BlockingIOError, match=f"another process is writing {target}"):
                convert_checkpoint(source, target, overwrite=overwrite)
            refused.append(source)

    convert_checkpoint(
        public_checkpoint, target, max_shard_bytes=SHARD_BYTES, overwrite=overwrite,
        on_bytes=meanwhile,
    )  # fmt: skip
    assert len(refused) > 4
    assert_same_folder(target, converted)
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_without_locks_none_of_two_that_meet_says_success_of_half(
    public_checkpoint, converted, tmp_path, monkeypatch
):
    """One ends while the other is in the middle, whose folder it takes away: that one fails."""
    monkeypatch.setattr(fcntl, "flock", Mock(side_effect=OSError(errno.ENOLCK, "none")))
    target, written = tmp_path / "target", []

    def meanwhile(size):
        written.append(size)
        if len(written) == 4:
            convert_checkpoint(public_checkpoint, target, max_shard_bytes=SHARD_BYTES)

    with pytest.raises((OSError, CheckpointError)):
        convert_checkpoint(
            public_checkpoint, target, max_shard_bytes=SHARD_BYTES, overwrite=True,
            on_bytes=meanwhile,
        )  # fmt: skip
    assert_same_folder(target, converted)


@pytest.mark.parametrize("end", ["error", "kill"])
@pytest.mark.parametrize("renames", [0, 1])
def test_overwriting_never_loses_the_old(
    public_checkpoint, silent_checkpoint, tmp_path, monkeypatch, renames, end
):
    """Stopped before either rename, the old checkpoint is still there; the next run ends well."""
    folder, killed = tmp_path / "here", tmp_path / "killed"
    target = convert_checkpoint(silent_checkpoint, folder / "target")
    old = contents(target)
    replace, done = os.replace, []

    def failing(source, destination):
        if target in (source, destination):
            if len(done) == renames:
                monkeypatch.setattr(os, "replace", replace)
                shutil.copytree(folder, killed)  # what a kill would leave, after which nothing runs
                raise OSError
            done.append(destination)
        replace(source, destination)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError):
        convert_checkpoint(public_checkpoint, target, overwrite=True)
    assert len(done) == renames
    here = killed if end == "kill" else folder
    renamed = end == "kill" and renames == 1  # between the two, the old one has another name
    assert contents(here / (".target.replaced" if renamed else "target")) == old
    convert_checkpoint(public_checkpoint, here / "target", overwrite=True)
    assert load.load_config(here / "target").has_sound
    assert [path.name for path in here.iterdir()] == ["target"]


@pytest.mark.parametrize("room", [0, 600, SHARD_BYTES // 2])
def test_a_full_disk(public_checkpoint, converted, tmp_path, room):
    """The file is named, nothing half-written stays, and there being room again the run goes on."""
    target = tmp_path / "new" / "target"
    with (
        full_disk(room),
        pytest.raises(OSError, match=r"target\.partial\S+ (cannot|could not) be written: .+"),
    ):
        convert_checkpoint(public_checkpoint, target, max_shard_bytes=SHARD_BYTES)
    assert not target.exists()
    assert not [path for path in tmp_path.rglob(".*")]
    assert room or not (tmp_path / "new").exists()  # not even the plan
    convert_checkpoint(public_checkpoint, target, max_shard_bytes=SHARD_BYTES)
    assert_same_folder(target, converted)


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    """Whichever way a version of safetensors fails: under a name of its own or under ours."""

    def save_half(tensors, path, metadata):
        path.write_bytes(b"half a shard")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(files, "save_file", save_half)
    with pytest.raises(OSError, match=r"a\.safetensors cannot be written: .*No space left"):
        files.write_shard(tmp_path / "a.safetensors", {"x": np.zeros(3)})
    assert list(tmp_path.iterdir()) == []


def test_a_stray_file_costs_no_shard(public_checkpoint, unfinished, monkeypatch):
    """It is named before any work; one that comes meanwhile leaves the sums of the shards."""
    partial = unfinished.with_name("target.partial")
    stray = partial / "transformer" / "Thumbs.db"
    stray.touch()
    with pytest.raises(CheckpointError, match="such as 'transformer/Thumbs.db'; remove them"):
        convert_checkpoint(public_checkpoint, unfinished, max_shard_bytes=SHARD_BYTES)
    stray.unlink()
    with pytest.raises(OSError, match="Thumbs.db"):
        convert_checkpoint(
            public_checkpoint, unfinished, max_shard_bytes=SHARD_BYTES,
            on_bytes=lambda _: stray.touch(),
        )  # fmt: skip
    stray.unlink()
    monkeypatch.setattr(files, "write_shard", Mock(side_effect=AssertionError("written again")))
    convert_checkpoint(public_checkpoint, unfinished, max_shard_bytes=SHARD_BYTES)
    assert [path.name for path in unfinished.parent.iterdir()] == ["target"]


def test_a_kill_before_the_last_rename_costs_no_shard(public_checkpoint, tmp_path, monkeypatch):
    folder, killed, replace = tmp_path / "here", tmp_path / "killed", os.replace

    def copying(source, destination):
        if destination == folder / "target":
            shutil.copytree(folder, killed)
        replace(source, destination)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", copying)
        convert_checkpoint(public_checkpoint, folder / "target", max_shard_bytes=SHARD_BYTES)
    monkeypatch.setattr(files, "write_shard", Mock(side_effect=AssertionError("written again")))
    convert_checkpoint(public_checkpoint, killed / "target", max_shard_bytes=SHARD_BYTES)
    assert [path.name for path in killed.iterdir()] == ["target"]
