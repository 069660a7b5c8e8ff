"""Outputs that cannot be written where they should be: what was made is saved elsewhere."""

import errno
import json
import os
import tempfile

import numpy as np
import pytest
from command_line import SMALL, without_a_model

from cosmos3_jax.cli import main as cli
from cosmos3_jax.io import media

pytestmark = pytest.mark.usefixtures("own_cache", "no_compilation_cache")


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs `generate` with the names of files that the disk does not take; what it says and what
    lies where: in the folder asked for, and among the temporary files.
    """
    without_a_model(monkeypatch)
    here, spare = tmp_path / "new" / "here", tmp_path / "spare"
    spare.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(spare))

    def run(*full: str, error: int = errno.ENOSPC, options: tuple = ()):
        def refusing(rename):
            def refuse(source, target):
                if any(str(target).endswith(name) for name in full):
                    raise OSError(error, os.strerror(error), str(source), None, str(target))
                rename(source, target)

            return refuse

        with monkeypatch.context() as patch:
            patch.setattr(os, "link", refusing(os.link))
            patch.setattr(os, "replace", refusing(os.replace))
            outputs = ["--out", str(here / "a.mp4"), "--save-latents", str(here / "a.npz")]
            status = cli.main([*SMALL, *outputs, *options])
        said = capsys.readouterr().err
        found = [
            sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
            for folder in (tmp_path / "new", spare)
        ]
        return status, said.splitlines()[-1], *found

    run.here, run.spare = here, spare
    return run


def is_whole(path) -> bool:
    return media.probe(path).frames == 9


@pytest.mark.parametrize(
    "error",
    [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES, errno.ENOENT],
)
def test_a_video_that_the_disk_does_not_take(run, error):
    """It and its record are among the temporary files, never over one that is there."""
    (run.spare / "a.mp4").write_text("mine")
    status, said, here, spare = run("here/a.mp4", error=error)
    assert status == 2
    assert said == (
        f"cosmos3-jax: error: {run.here}/a.mp4 could not be written: {os.strerror(error)}; "
        f"instead it is in {run.spare}/a-1.mp4"
    )
    assert (here, spare) == (["here", "here/a.npz"], ["a-1.mp4", "a-1.mp4.json", "a.mp4"])
    assert is_whole(run.spare / "a-1.mp4") and (run.spare / "a.mp4").read_text() == "mine"
    assert json.loads((run.spare / "a-1.mp4.json").read_text())["num_frames"] == 9


def test_a_record_that_the_disk_does_not_take(run):
    """The video stays, and it is said why the same command asks for more."""
    status, said, here, spare = run("here/a.json")
    assert status == 2
    assert said == (
        f"cosmos3-jax: error: {run.here}/a.json could not be written: No space left on device; "
        f"instead it is in {run.spare}/a.json; {run.here}/a.mp4 is whole, so that the same command "
        "needs --overwrite or another --out"
    )
    assert (here, spare) == (["here", "here/a.mp4", "here/a.npz"], ["a.json"])
    assert is_whole(run.here / "a.mp4")
    assert run(options=("--overwrite",))[0] == 0


def test_latents_that_the_disk_does_not_take(run):
    """The video is made nevertheless; that all is well is not said."""
    status, said, here, spare = run("here/a.npz")
    assert status == 2
    assert said.startswith(
        f"cosmos3-jax: error: {run.here}/a.npz could not be written: No space left on device; "
        f"instead it is in {run.spare}/a.npz"
    )
    assert (here, spare) == (["here", "here/a.json", "here/a.mp4"], ["a.npz"])
    with np.load(run.spare / "a.npz") as arrays:
        assert set(arrays) == {"video"}


@pytest.mark.parametrize(
    "name, kept",
    [("a.mp4", ["a.npz"]), ("a.json", ["a.mp4", "a.npz"]), ("a.npz", ["a.json", "a.mp4"])],
)
def test_where_nothing_takes_it(run, name, kept):
    """No half files, no folders for nothing, and each file that could not be written is named."""
    status, said, here, spare = run(name)
    assert status == 2
    full = "could not be written: No space left on device"
    assert f"{run.here}/{name} {full}; nor elsewhere: {run.spare}/{name} {full}" in said
    assert (here, spare) == (["here", *(f"here/{other}" for other in kept)], [])
    assert ("a.mp4 is whole" in said) == (name != "a.mp4")


def test_a_refused_run_makes_no_folders(run, tmp_path):
    for options in (["--height", "50"], ["--noise", str(tmp_path / "none.npz")]):
        outputs = ["--out", str(run.here / "a.mp4"), "--save-latents", str(run.here / "a.npz")]
        assert cli.main([*SMALL, *outputs, *options]) == 2
    assert cli.main(["convert", str(tmp_path / "none"), str(run.here / "target")]) == 2
    assert cli.main(["bench", "--out", str(run.here / "a.json"), "--repeats", "0"]) == 2
    assert not run.here.parent.exists()


def test_a_home_folder(run, tmp_path, monkeypatch, capsys):
    """A shell leaves the ~ of `--out=~/a.mp4` as it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(run.spare)
    options = ("--out=~/made/b.mp4", "--save-latents=~/made/b.npz")
    assert run(options=options)[0] == 0
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == [
        "b.json",
        "b.mp4",
        "b.npz",
    ]
    assert not any(run.spare.iterdir())
    with pytest.raises(SystemExit):
        run(options=("--out=~nobody-of-this-name/b.mp4",))
    assert "~nobody-of-this-name/b.mp4: this user has no home folder" in capsys.readouterr().err
