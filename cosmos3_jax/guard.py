"""The guard around every reader: what cannot be read becomes one line that names file and reason.

`parsing` goes around parsers, `read` and `check_plain` open nothing but files, of a size that was
judged first.
"""

import contextlib
import errno
import os
import re
import stat
from collections.abc import Iterator

LONGEST_REASON = 200  # letters
LONG_REASON = 600  # of another program or a service, which may say at its end what to do
LONGEST_LINE = 900  # of a message
# Bytes that a file of settings may have. Published ones have a few thousand.
MOST_JSON = 16 * 2**20
# What is not the parser's: the user's wish to stop.
NOT_CAUGHT = (KeyboardInterrupt, SystemExit, GeneratorExit)
_KINDS = {
    stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}  # fmt: skip


@contextlib.contextmanager
def parsing(
    name: object, kind: str, error: type[Exception] = ValueError, way_out: str = ""
) -> Iterator[None]:
    """Around the call of a parser: all that it raises becomes `error`.

    Parsers raise more than their documents say: RecursionError, MemoryError, errors of the codecs
    below them, and, of those written in Rust, panics, which are no `Exception`. Two kinds pass,
    because they name the file themselves: errors of the system with the name in them (no such
    file, no permission), and a ValueError that begins with the name.

    Args:
        name: of the file or text, as the user knows it.
        kind: what it should be: `a tokenizer`.
        error: the kind of error to raise.
        way_out: what to do about it.

    Raises:
        error: "{name} is not {kind}: {reason}; {way_out}".
    """
    try:
        yield
    except NOT_CAUGHT:
        raise
    except BaseException as raised:
        if isinstance(raised, OSError) and raised.filename is not None:
            raise
        if isinstance(raised, ValueError) and str(raised).startswith((f"{name} ", f"{name}: ")):
            raise
        end = f"; {way_out}" if way_out else ""
        raise error(f"{name} is not {kind}: {reason(raised)}{end}") from raised


def reason(raised: BaseException, longest: int = LONGEST_REASON) -> str:
    """An exception as part of one line: no line breaks, nothing unprintable, not too long."""
    if isinstance(raised, RecursionError):
        return "it is nested too deeply"
    if isinstance(raised, MemoryError):
        return "it asks for more memory than there is"
    try:
        text = line(str(raised), longest)
    except Exception:  # of an exception that was given something odd
        text = ""
    if isinstance(raised, LookupError | AttributeError) or not text:  # `'model'` alone says little
        return f"{type(raised).__name__} {text}".strip()
    return text


def line(text: str, longest: int = LONGEST_REASON) -> str:
    """A text that a file said, as part of one line of a message."""
    text = text if len(text) <= longest else text[:longest] + " ..."
    return "".join(letter if letter.isprintable() else "?" for letter in " ".join(text.split()))


def printable(text: str) -> str:
    """A message whose lines are printable and not too long, whatever names and values are in it.

    Two spaces begin every line but the first; any other line break is of a name.
    """
    lines = (
        line if len(line) <= LONGEST_LINE else f"{line[:LONGEST_LINE]} ..."
        for line in re.split(r"\n(?=  )", text)
    )
    return "\n".join(
        "".join(letter if letter.isprintable() else "?" for letter in line) for line in lines
    )


def check_plain(path: str | os.PathLike[str], error: type[Exception] = ValueError) -> None:
    """Raise unless `path`, or what it links to, is a file: opening a pipe would wait for ever, and
    a device has no end.

    Raises:
        OSError: there is no such file, or it is a folder.
        error: it is a pipe, a socket or a device, or no name of a file.
    """
    with parsing(path, "the name of a file", error):
        _check_mode(path, os.stat(path).st_mode, error)


def read(
    path: str | os.PathLike[str],
    most: int = MOST_JSON,
    error: type[Exception] = ValueError,
    pipes: bool = False,
) -> bytes:
    """The bytes of a file.

    Args:
        path: a file, or a link to one.
        most: how many bytes it may have.
        error: the kind of error to raise.
        pipes: whether pipes and devices are read too: `/dev/stdin`, `<(command)` of a shell.

    Raises:
        OSError: it cannot be read, or is a folder.
        error: it is a pipe, a socket or a device, or has more bytes.
    """
    with parsing(path, "a file that can be read", error):
        # What has no writer is opened without waiting for one.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | (0 if pipes else os.O_NONBLOCK))
        try:
            mode = os.fstat(descriptor).st_mode
            if not pipes or stat.S_ISDIR(mode):
                _check_mode(path, mode, error)
            with open(descriptor, "rb", closefd=False) as file:
                content = file.read(most + 1)
        finally:
            os.close(descriptor)
    if len(content) > most:
        size = os.stat(path).st_size
        raise error(
            f"{path} has {size if size > most else 'more'} bytes, and at most {most} are read: it "
            "is another file, or damaged"
        )
    return content


def _check_mode(path: str | os.PathLike[str], mode: int, error: type[Exception]) -> None:
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    if kind := _KINDS.get(stat.S_IFMT(mode)):
        raise error(f"{path} is {kind}, and no file that can be read; give a file")


def text(content: bytes, path: object, error: type[Exception] = ValueError) -> str:
    """The text of a file's bytes. Raises `error` if they are not UTF-8."""
    with parsing(path, "text in UTF-8", error):
        return content.decode("utf-8")
