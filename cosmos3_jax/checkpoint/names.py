"""Patterns over names: what they choose, and an error where they choose nothing."""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence


def find(patterns: Sequence[str], names: Mapping[str, Iterable[str]]) -> set[str]:
    """The keys of `names` one of whose spellings any pattern is found in.

    Raises:
        ValueError: a pattern is found in none (near matches are named), or there is no pattern.
    """
    if isinstance(patterns, str):
        raise ValueError(f"patterns={patterns!r} must be a list of patterns: [{patterns!r}]")
    found: set[str] = set()
    for pattern in patterns:
        search = re.compile(pattern).search
        hits = {name for name, spellings in names.items() if any(map(search, spellings))}
        if not hits:
            raise ValueError(f"pattern {pattern!r} matches nothing; near: {near(pattern, names)}")
        found |= hits
    if not found:
        raise ValueError("no pattern was given, so nothing would change")
    return found


def near(word: str, names: Mapping[str, Iterable[str]]) -> str:
    """A few spellings that look like a word, or a part of which does, as a list for a message."""
    words = sorted({spelling for spellings in names.values() for spelling in spellings})

    def likeness(spelling: str) -> float:
        parts = [spelling, *re.split(r"[./]", spelling)]
        return max(difflib.SequenceMatcher(None, word, part).ratio() for part in parts)

    return ", ".join(sorted(words, key=likeness, reverse=True)[:5])
