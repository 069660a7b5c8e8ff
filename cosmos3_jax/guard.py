"""The guard around every parser: whatever it raises becomes one line that names file and reason."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

LONGEST_REASON = 200  # letters
# What is not the parser's: the user's wish to stop.
NOT_CAUGHT = (KeyboardInterrupt, SystemExit, GeneratorExit)


@contextlib.contextmanager
def parsing(
    name: str | Path, kind: str, error: type[Exception] = ValueError, way_out: str = ""
) -> Iterator[None]:
    """Around the call of a parser, and nothing else: all that it raises becomes `error`.

    Parsers raise more than their documents say: RecursionError, MemoryError, errors of the codecs
    below them, and, of those written in Rust, panics, which are no `Exception`. Errors of the
    system that have a number (no such file, no permission) pass: they name the file themselves.

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
        if isinstance(raised, OSError) and raised.errno is not None:
            raise
        end = f"; {way_out}" if way_out else ""
        raise error(f"{name} is not {kind}: {reason(raised)}{end}") from raised


def reason(raised: BaseException) -> str:
    """An exception as part of one line: no line breaks, nothing unprintable, not too long."""
    if isinstance(raised, RecursionError):
        return "it is nested too deeply"
    if isinstance(raised, MemoryError):
        return "it asks for more memory than there is"
    text = " ".join(str(raised).split())
    text = "".join(letter if letter.isprintable() else "?" for letter in text)
    if len(text) > LONGEST_REASON:
        text = text[:LONGEST_REASON] + " ..."
    return text or type(raised).__name__
