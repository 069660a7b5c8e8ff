"""Files and folders that appear whole or not at all.

They are filled under a temporary name beside their own, on the same disk, and renamed when they are
complete; then it is checked that what was written is what is there. A failure, Ctrl-C included,
leaves what was there before. A process that is about to end without its `finally` blocks, as on a
signal, calls `clean_up`.
"""

import atexit
import contextlib
import dataclasses
import errno
import fcntl
import itertools
import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

# A disk or a quota that is full, a file that grew too large, a device that failed.
WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
ALONE = "another process writes to it too; make it again, alone"

log = logging.getLogger("cosmos3_jax")

# What takes back each step that this process has begun and not ended, the oldest first.
_undo: dict[object, Callable[[], None]] = {}
_cleanings: list[None] = []
os.register_at_fork(after_in_child=_undo.clear)  # they are the parent's


@atexit.register
def clean_up() -> None:
    """Remove every temporary file and folder that this process has open now, and its locks.

    What was there before stays, or comes back; so does the `.partial` folder of a `folder` that can
    be resumed. Any thread may call it, also a signal handler, and more than once.
    """
    _cleanings.append(None)
    for _ in range(2):  # what another thread begins meanwhile is taken back in the second pass
        for undo in reversed([*_undo.values()]):
            with contextlib.suppress(OSError):
                undo()


def times_cleaned() -> int:
    """How often `clean_up` was called: files that vanish meanwhile were removed by this process."""
    return len(_cleanings)


@contextlib.contextmanager
def _undone(undo: Callable[[], None]) -> Iterator[None]:
    """Calls `undo` when the block ends. `clean_up` calls it, too, until it is done: Ctrl-C may stop
    it before.
    """
    key = object()
    _undo[key] = undo
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            undo()
        _undo.pop(key, None)


@contextlib.contextmanager
def temporary(path: Path) -> Iterator[Path]:
    """Yields a free hidden name beside `path` for a file or a folder, removed when the block ends.

    It has the suffix of `path`: writers choose a format by it.
    """
    name = path.with_name(f".cosmos3-{secrets.token_hex(8)}{path.suffix}")
    with _undone(lambda: remove(name)):
        yield name


@contextlib.contextmanager
def room(folder: Path) -> Iterator[Path]:
    """Yields an empty hidden folder in `folder`, for writers with temporary names of their own.

    `replace` takes out what they have finished. What is left goes when the block ends.
    """
    with parents(folder / "room"), temporary(folder / "room") as name:
        name.mkdir()
        yield name


def remove(path: Path) -> None:
    """Remove a file or a folder with all that it holds, if it is there.

    A folder is renamed first: a thread that still writes into it then finds no place.
    """
    if path.is_dir() and not path.is_symlink():
        gone = path.with_name(f".cosmos3-{secrets.token_hex(8)}.gone")
        with _undone(lambda: shutil.rmtree(gone, ignore_errors=True)):
            with contextlib.suppress(OSError):
                path = path.rename(gone)
            shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def check_parent(path: Path) -> None:
    """Raise OSError unless files can be made beside `path`; call this before any long work.

    Makes nothing: of a folder that is not there yet, the nearest one above it is asked.
    """
    try:
        nearest = next(folder for folder in path.absolute().parents if os.path.lexists(folder))
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        reason = error.strerror or error
        raise type(error)(
            f"{path}: cannot write files in {path.parent} ({reason}); choose another folder"
        ) from error


@contextlib.contextmanager
def parents(path: Path) -> Iterator[None]:
    """Makes the folders above `path`; those that are empty when the block ends go again."""
    missing = [folder for folder in path.parents if not folder.exists()]

    def remove() -> None:
        for folder in missing:  # the deepest first; one that holds something ends it
            with contextlib.suppress(FileNotFoundError):
                folder.rmdir()

    with _undone(remove):
        path.parent.mkdir(parents=True, exist_ok=True)
        yield


@contextlib.contextmanager
def file(path: Path) -> Iterator[Path]:
    """Yields the path of a file to write; when the block ends, it is renamed to `path`.

    A file that is there is replaced. Missing parent folders are made.

    Raises:
        OSError: it cannot be written, or is not what is there afterwards; the error names `path`.
    """
    with _named(path), parents(path), temporary(path) as name:
        yield name
        _flush(name)
        replace(name, path)


def _flush(name: Path) -> None:
    """Wait until the disk has a file: some say only then that they are full."""
    with name.open("rb") as written:
        os.fsync(written.fileno())


def replace(name: Path, path: Path) -> None:
    """Rename a file to `path`. Raises OSError if it is not what is there afterwards."""
    written = _listing(name)
    os.replace(name, path)
    _check(path, written)


def _listing(path: Path) -> dict[str, int]:
    """Size of a file, or of all files in a folder by their names.

    Not their inodes or times: some network file systems give a file others when it is renamed.
    """
    files = [each for each in path.rglob("*") if not each.is_dir()] if path.is_dir() else [path]
    return {each.relative_to(path).as_posix(): each.lstat().st_size for each in files}


def check_files(folder: Path, files: Iterable[Path]) -> None:
    """Raise OSError unless these are all files in a folder."""
    expected = {path.relative_to(folder).as_posix() for path in files}
    if names := sorted(expected ^ _listing(folder).keys()):
        raise OSError(f"{folder} is not what was written there{_some(names)}: {ALONE}")


def _check(path: Path, written: dict[str, int]) -> None:
    try:
        found = _listing(path)
    except FileNotFoundError:
        found = {}
    if found != written:
        names = sorted({name for name, _ in found.items() ^ written.items()} - {"."})
        raise OSError(f"{path} is not what was written there{_some(names)}: {ALONE}")


def _some(names: Sequence[str]) -> str:
    return f" ({', '.join(names[:3])}{', ...' * (len(names) > 3)})" if names else ""


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Errors of a full disk, a closed folder and the like name what was asked for."""
    try:
        yield
    except OSError as error:
        ours = isinstance(error.filename, str) and _is_ours(Path(error.filename), path)
        if error.errno is None or not (ours or error.errno in WRITE_ERRORS):
            raise
        reason = os.strerror(error.errno)
        if error.strerror != reason:  # it is named already: a file of this folder
            raise
        raise OSError(error.errno, f"{path} could not be written: {reason}") from error


def _is_ours(name: Path, path: Path) -> bool:
    """Whether a name is of what is written for `path`: above it, or a temporary one."""
    return name in path.parents or (name.name.startswith(".") and name.parent == path.parent)


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
    with _named(path), parents(path), temporary(path) as name:
        target = Target(name, path)
        yield target
        _flush(name)
        written = _listing(name)
        for number in itertools.count(1):
            try:
                _rename_new(name, target.path)
                break
            except FileExistsError:
                target.path = path.with_name(f"{path.stem}-{number}{path.suffix}")
        _check(target.path, written)


def _rename_new(name: Path, path: Path) -> None:
    """Rename, but raise FileExistsError if there is something at `path`."""
    try:
        os.link(name, path)
        return
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        if os.path.lexists(path):
            raise FileExistsError(f"{path} exists") from None
    is_theirs = False

    def remove() -> None:
        # Not renamed yet: what holds the place is still empty.
        if not is_theirs and name.exists() and path.stat().st_size == 0:
            path.unlink()

    with _undone(remove):  # before the place is taken: Ctrl-C may come at once
        try:
            path.touch(exist_ok=False)
        except FileExistsError:
            is_theirs = True
            raise
        os.replace(name, path)


@contextlib.contextmanager
def folder(
    path: Path, *, overwrite: bool = False, resume: bool = False, lock: bool = True
) -> Iterator[Path]:
    """Yields the path of a folder to make; when the block ends, it is renamed to `path`.

    Args:
        path: its final path. Missing parent folders are made.
        overwrite: replace a folder that is there. It goes last: whenever the process is killed, the
            old folder or the new one exists, if only under its temporary name.
        resume: the folder to make is `path` with `.partial` added. After a failure it stays, and it
            may be there already.
        lock: refuse while another process makes the same folder. Without it, the first to end wins.

    Raises:
        BlockingIOError: another process is making this folder.
        FileExistsError: something is at `path`, and `overwrite` is not set.
        OSError: it cannot be written, or is not what is there afterwards, or a folder that is not
            empty has come to be at `path` meanwhile, and `overwrite` is not set.
    """
    partial = path.with_name(f"{path.name}.partial")
    with (
        _named(path),
        locked(path) if lock else parents(path),
        contextlib.nullcontext(partial) if resume else temporary(path) as name,
    ):
        if not overwrite and path.exists() and not (path.is_dir() and not any(path.iterdir())):
            raise FileExistsError(f"{path} exists; choose another folder or pass --overwrite")
        yield name
        written = _listing(name)
        _rename(name, path, overwrite)
        _check(path, written)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keeps other processes from writing `path`, by a lock of `.NAME.lock` beside it.

    The system lets go of it when the process ends; then the file may stay, and means nothing.

    Raises:
        BlockingIOError: another process holds it.
        OSError: the folder cannot be written.
    """
    lock = path.with_name(f".{path.name}.lock")
    with parents(path), contextlib.ExitStack() as opened:
        while True:
            file = _open_lock(lock)
            opened.callback(os.close, file)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise BlockingIOError(
                    f"another process is writing {path}; wait until it has ended, or choose "
                    "another folder"
                ) from error
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                reason = error.strerror
                log.warning("%s cannot be locked (%s): let no other process write it", path, reason)
            if _is(file, lock):
                break
            opened.close()  # whoever held it has removed it

        def unlink() -> None:
            if _is(file, lock):  # and not another's, who holds it by now
                lock.unlink(missing_ok=True)

        with _undone(unlink):  # before it is let go
            yield


def _open_lock(lock: Path) -> int:
    try:
        return os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
    except PermissionError:
        if not lock.exists():  # the folder is closed
            raise
    try:  # another user's, which is locked as well when it can be read alone
        return os.open(lock, os.O_RDONLY)
    except PermissionError as error:
        raise PermissionError(
            f"{lock} belongs to another user and cannot be opened; if nobody writes there now, a "
            "run that was killed has left it: remove it, or choose another folder"
        ) from error


def _is(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def _rename(name: Path, path: Path, overwrite: bool) -> None:
    replaced = path.with_name(f".{path.name}.replaced")

    def put_back() -> None:
        if not replaced.exists():  # asked once: another thread may be between the two renames
            return
        if path.exists():  # the new one is there
            remove(replaced)
            return
        try:
            os.replace(replaced, path)
        except OSError as error:
            if not path.exists():
                log.warning(
                    "the older %s could not be put back (%s): rename %s to that",
                    path, error.strerror, replaced,
                )  # fmt: skip
            raise

    if overwrite and path.exists():
        remove(replaced)  # of a run that was killed after the two renames
    with _undone(put_back):
        if overwrite and path.exists():
            os.replace(path, replaced)
        os.replace(name, path)
