"""Files and folders that appear whole or not at all.

They are filled under a temporary name beside their own, on the same disk, and renamed when they are
complete. A failure, Ctrl-C included, leaves what was there before.
"""

import contextlib
import dataclasses
import errno
import itertools
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

# A disk or a quota that is full, a file that grew too large, a device that failed.
WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)


def _hidden(path: Path) -> Path:
    """A free name beside `path`, with its suffix: writers choose a format by it."""
    return path.with_name(f".cosmos3-{secrets.token_hex(8)}{path.suffix}")


@contextlib.contextmanager
def file(path: Path) -> Iterator[Path]:
    """Yields the path of a file to write; when the block ends, it is renamed to `path`.

    A file that is there is replaced. Missing parent folders are made.

    Raises:
        OSError: it cannot be written; the error names `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _hidden(path)
    try:
        with _named(path):
            yield temporary
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Errors of a full disk and the like name the file that was asked for."""
    try:
        yield
    except OSError as error:
        if error.errno not in WRITE_ERRORS:
            raise
        reason = os.strerror(error.errno)
        raise OSError(error.errno, f"{path} could not be written: {reason}") from error


@dataclasses.dataclass
class Target:
    """A file that is written as `temporary`; `path` is its final name, once it is published."""

    temporary: Path
    path: Path


@contextlib.contextmanager
def free_file(path: Path) -> Iterator[Target]:
    """As `file`, but nothing is replaced: the first free one of `car.mp4`, `car-1.mp4` and so on is
    taken, also when others write there at the same time.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    target = Target(_hidden(path), path)
    try:
        with _named(path):
            yield target
            for number in itertools.count(1):
                try:
                    _rename_new(target.temporary, target.path)
                    break
                except FileExistsError:
                    target.path = path.with_name(f"{path.stem}-{number}{path.suffix}")
    finally:
        target.temporary.unlink(missing_ok=True)


def _rename_new(temporary: Path, path: Path) -> None:
    """Rename, but raise FileExistsError if there is something at `path`."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        path.touch(exist_ok=False)
        try:
            os.replace(temporary, path)
        except OSError:
            path.unlink()
            raise


@contextlib.contextmanager
def folder(path: Path, *, overwrite: bool = False, resume: bool = False) -> Iterator[Path]:
    """Yields the path of a folder to make; when the block ends, it is renamed to `path`.

    Args:
        path: its final path. Missing parent folders are made.
        overwrite: replace a folder that is there. It goes last: whenever the process is killed, the
            old folder or the new one exists, if only under its temporary name.
        resume: the folder to make is `path` with `.partial` added. After a failure it stays, and it
            may be there already.

    Raises:
        OSError: a folder that is not empty is at `path`, and `overwrite` is not set.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.partial") if resume else _hidden(path)
    try:
        yield temporary
        _rename(temporary, path, overwrite)
    finally:
        if not resume:
            shutil.rmtree(temporary, ignore_errors=True)


def _rename(temporary: Path, path: Path, overwrite: bool) -> None:
    replaced = path.with_name(f".{path.name}.replaced")
    if overwrite and path.exists():
        if replaced.exists():
            shutil.rmtree(replaced)
        os.replace(path, replaced)
    try:
        os.replace(temporary, path)
    except (OSError, KeyboardInterrupt):
        if replaced.exists() and not path.exists():
            os.replace(replaced, path)
        raise
    if replaced.exists():  # or else a run left it that was killed between the two renames
        shutil.rmtree(replaced)
