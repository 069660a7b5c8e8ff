"""Ways to damage bytes, texts and JSON, and values of every kind. All draw from one generator."""

import json
import math
from random import Random
from typing import Any

TEXTS = (
    "", " ", "\0", "\n", "..", "/", "../../etc/passwd", "/dev/zero", "~", "a" * 5000, "\ud800",
    "\u202e\u2066", "🎈" * 50, "<|im_end|>", "{{ 7 * 7 }}", "{%", "-1", "1e400", "nan", "--help",
    "null", "\x1b[31m", "%s%n", "é" * 700, "C:\\x", "0x10", "1_000", "٣", "True", "{", "[", '"',
)  # fmt: skip
NUMBERS = (
    0, -0.0, 1, -1, 2, 3, 5, 7, 16, 17, 255, 256, 2**15, 2**31 - 1, 2**31, 2**32, 2**53, 2**63,
    2**64, 10**30, 10**400, -(2**31), -(2**63), 0.5, 1e-300, 1e-38, 1e30, 1e39, 1e300, -1e39,
    math.nan, math.inf, -math.inf, 1.0000001, 4000000001,
)  # fmt: skip
BYTES = (b"\0", b"\xff", b"\x7f", b"{", b"}", b"[", b'"', b"\\", b"\n", b"\x80", b"\xed\xa0\x80")


def deep(random: Random) -> Any:
    """Lists or objects, one in the other, up to hundreds."""
    value: Any = 1
    for _ in range(random.choice((10, 100, 200))):
        value = [value] if random.random() < 0.5 else {"a": value}
    return value


def any_json(random: Random, depth: int = 2) -> Any:
    """Any JSON value, odd ones more often than not."""
    kind = random.randrange(9)
    if kind < 3:
        return random.choice(NUMBERS)
    if kind < 5:
        return random.choice(TEXTS)
    if kind == 5:
        return random.choice((None, True, False))
    if kind == 6 and random.random() < 0.2:
        return deep(random)
    if depth == 0:
        return [] if kind == 7 else {}
    count = random.choice((0, 1, 2, 3, 5, 200))
    if kind == 7:
        return [any_json(random, depth - 1) for _ in range(min(count, 20))] * (count // 20 + 1)
    return {random.choice(TEXTS) or str(i): any_json(random, depth - 1) for i in range(count % 20)}


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a JSON value, or the first many."""
    keys = value.keys() if isinstance(value, dict) else range(len(value))
    found = [(value, key) for key in keys]
    for key in keys:
        if isinstance(value[key], dict | list) and len(found) < 30_000:
            found += places(value[key])
    return found


def changed_json(random: Random, value: Any) -> Any:
    """The same with a few values replaced, removed, added, exchanged or repeated."""
    value = json.loads(json.dumps(value))
    for _ in range(random.choice((1, 1, 1, 2, 3, 8))):
        found = places(value) if isinstance(value, dict | list) else []
        if len(found) > 20_000:
            break
        if not found or random.random() < 0.03:
            value = any_json(random)
            continue
        into, key = random.choice(found)
        kind = random.randrange(8)
        if kind < 3:
            into[key] = any_json(random)
        elif kind == 3:
            into[key] = near(random, into[key])
        elif kind == 4:
            del into[key]
        elif kind == 5:
            other, place = random.choice(found)
            into[key] = json.loads(json.dumps(other[place] if key != place else None))
        elif kind == 6 and isinstance(into, list):
            into.insert(key, any_json(random))
        elif kind == 6:
            into[random.choice(TEXTS)] = any_json(random)
        elif isinstance(into, list):
            into *= random.choice((0, 2, 50 if len(found) < 1000 else 1))
        else:
            into[key] = [into[key]] * random.choice((0, 1, 3))
    return value


def near(random: Random, value: Any) -> Any:
    """A value of the same kind."""
    if isinstance(value, bool):
        return random.choice((not value, int(value), str(value)))
    if isinstance(value, int | float) and abs(value) < 1e30:
        return random.choice((value + 1, value - 1, -value, value * 2, value * 1e6, value / 3,
                              float(value), str(value), value * 10**9))  # fmt: skip
    if isinstance(value, str):
        return random.choice((value[1:], value + random.choice(TEXTS), value.upper(), value * 3))
    return random.choice(([], {}, None, [value]))


def json_bytes(random: Random, value: Any) -> bytes:
    """A JSON value as a file: whole, or damaged in its structure, its letters or its bytes."""
    kind = random.randrange(10)
    if kind < 6:
        changed = changed_json(random, value)
        try:
            text = json.dumps(changed, ensure_ascii=random.random() < 0.5)
        except (ValueError, RecursionError):  # of a number with too many digits
            text = json.dumps(value)
        return text.encode("utf-8", errors="surrogatepass")
    text = json.dumps(value).encode()
    if kind == 6:
        depth = random.choice((500, 1000, 5000, 100_000))
        return random.choice((b"[" * depth, b'{"a":' * depth, b"[" * depth + b"]" * depth))
    if kind == 7:
        place = random.randrange(len(text))
        odd = (b"NaN", b"-Infinity", b"1" * 5000, b"1e999", b"'", b"/**/", b"\\u", b"\\ud800", b",")
        return text[:place] + random.choice(odd) + text[place:]
    if kind == 8:
        encoded = text.decode().encode(random.choice(("utf-16", "utf-32", "utf-8-sig")))
        return random.choice((encoded, b"", b"\0" * 100, text + text, b" " * 10_000 + text))
    return damaged(random, text)


def damaged(random: Random, content: bytes, other: bytes = b"") -> bytes:
    """Bytes flipped, cut off, taken out, put in, repeated, or joined with those of another file."""
    content = bytearray(content)
    for _ in range(random.choice((1, 1, 2, 4, 16))):
        size = len(content)
        if size < 2:
            return bytes(content)
        place = random.randrange(min(size, random.choice((64, 512, size, size))))
        length = random.choice((1, 2, 4, 8, 64, 1024))
        kind = random.randrange(9)
        if kind < 2:
            content[place] ^= 1 << random.randrange(8)
        elif kind == 2:
            content[place : place + length] = random.randbytes(length)
        elif kind == 3:
            del content[random.choice((place, size - min(length, size))) :]
        elif kind == 4:
            del content[place : place + length]
        elif kind == 5:
            content[place:place] = random.choice(BYTES) * length
        elif kind == 6:
            content[place:place] = content[place : place + length]
        elif kind == 7:
            number = random.choice((0, 1, 2**31 - 1, 2**32 - 1, 2**16 - 1, 2**63 - 1))
            end = random.choice(("little", "big"))
            width = random.choice((2, 4, 8))
            content[place : place + width] = (number % 2 ** (8 * width)).to_bytes(width, end)
        else:
            content[place:] = other[random.randrange(len(other) + 1) :]
    return bytes(content)


def text(random: Random, base: str) -> str:
    """A text with odd letters put in, taken out or repeated."""
    for _ in range(random.choice((1, 2, 5))):
        place = random.randrange(len(base) + 1)
        odd = random.choice((*TEXTS, chr(random.randrange(0x110000)), base[place:][:20]))
        base = random.choice((base[:place] + odd + base[place:], base[:place] + base[place + 5 :]))
    return base if random.random() < 0.95 else base * random.choice((0, 100, 20_000))
