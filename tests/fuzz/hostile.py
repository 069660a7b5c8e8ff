"""Inputs that are made to harm, beside those that are damaged by chance: one function a format."""

import io
import json
import os
import struct
import zipfile
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from fuzz import mutate

CAPTION = {
    "subjects": [{"description": "a red ball", "action": "rolls", "location": "centre"}],
    "background_setting": "a plain room", "lighting": {"conditions": "soft", "direction": "left"},
    "cinematography": {"camera_motion": "static", "framing": "wide"},
    "temporal_caption": "The ball rolls to the right.", "duration": "5s", "fps": 24,
    "resolution": {"H": 32, "W": 32}, "aspect_ratio": "1,1",
}  # fmt: skip
RECORDS = (
    {"prompt": json.dumps(CAPTION), "negative_prompt": "blurry"},
    {"temporal_caption": CAPTION, "index": 3},
    {"caption": CAPTION, "scratchpad": "thoughts"},
    {"upsampled_prompt": json.dumps(CAPTION), "prompt": "a ball"},
    {"prompts": [CAPTION, CAPTION]},
    [CAPTION],
)


def prompt(random: Random) -> tuple[bytes, str]:
    """A file's content, and its suffix."""
    kind = random.randrange(8)
    suffix = random.choice(("json", "json", "jsonl", "txt"))
    if kind < 3:
        return mutate.json_bytes(random, CAPTION), suffix
    if kind < 5:
        return mutate.json_bytes(random, random.choice(RECORDS)), suffix
    fences = ("```json\n{}\n```", "<think>{0}</think>{0}", "```{}", "<think>{}", "{}\n{}", "\n\n{}")
    if kind == 5:
        content = mutate.json_bytes(random, random.choice((CAPTION, *RECORDS)))
        fence = random.choice(fences)
        text = content.decode("utf-8", errors="surrogateescape")
        text = fence.replace("{0}", "{}").replace("{}", text)
        return text.encode("utf-8", errors="surrogateescape"), suffix
    if kind == 6:
        text = mutate.text(random, "A red ball rolls over grass. <|im_end|> ")
        return text.encode("utf-8", errors="surrogatepass"), random.choice(("txt", "json"))
    return random.randbytes(random.choice((0, 1, 10, 10_000))), suffix


NORMALIZERS = (
    {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "b"},
    {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000},
    {"type": "Replace", "pattern": {"Regex": "(?=a)*"}, "content": "bb"},
    {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "x" * 100}] * 40},
    {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
    {"type": "NFC"},
    {"type": "Strip"},
)
SPLITTERS = (
    {"type": "Split", "pattern": {"Regex": "(.+)+x"}, "behavior": "Isolated", "invert": False},
    {"type": "Split", "pattern": {"Regex": ""}, "behavior": "Removed", "invert": True},
    {"type": "Split", "pattern": {"Regex": "(" * 500}, "behavior": "Removed", "invert": False},
    {"type": "Metaspace"},
    {"type": "Whitespace"},
    {"type": "FixedLength", "length": 0},
    {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True},
)


def tokenizer(random: Random, values: dict[str, Any]) -> bytes:
    """A `tokenizer.json`."""
    kind = random.randrange(8)
    values = json.loads(json.dumps(values))
    if kind == 0:
        values["normalizer"] = random.choice(NORMALIZERS)
    elif kind == 1:
        values["pre_tokenizer"] = random.choice(SPLITTERS)
    elif kind == 2:
        model = values["model"]
        name = random.choice((*model, "dropout", "unk_token", "alpha", "type"))
        model[name] = random.choice((0.5, "WordPiece", "Unigram", "WordLevel", [], {}, None,
                                     mutate.any_json(random)))  # fmt: skip
    elif kind == 3:
        vocabulary = values["model"].get("vocab")
        for key in random.sample(sorted(vocabulary), min(5, len(vocabulary))):
            vocabulary[key] = random.choice((*mutate.NUMBERS, "a", None))
    elif kind == 4 and values.get("added_tokens"):
        token = random.choice(values["added_tokens"])
        token[random.choice([*token])] = mutate.any_json(random)
    elif kind == 5:
        values["truncation"] = random.choice(({"max_length": 1, "stride": 0, "strategy":
            "LongestFirst", "direction": "Right"}, mutate.any_json(random)))  # fmt: skip
        values["post_processor"] = mutate.any_json(random)
    else:
        return mutate.json_bytes(random, values)
    try:
        return json.dumps(values).encode()
    except (ValueError, RecursionError):
        return b"{}"


ATOMS = (
    "messages", "messages[0].content", "eos_token", "add_generation_prompt", "range(10**9)",
    "range(99999999)", "'a' * 10**9", "10 ** 10 ** 10", "''.__class__.__mro__", "self", "loop",
    "cycler", "namespace(a=1)", "lipsum(n=100000)", "dict(a=1)", "joiner()", "[1] * 10**8",
    "none", "undefined.x", "1 / 0", "'%1000000000d' % 1", "messages|tojson(indent=10**8)",
    "'{0.__class__}'.format(1)", "messages.pop()", "('a' ~ 'b') * 1000", "raise_exception('no')",
    "strftime_now('%Y' * 9999)", "'x'.center(10**9)", "'x'.ljust(10**9)", "(1, 2)", "-1", "1e400",
)  # fmt: skip
FILTERS = (
    "list", "join(',' * 1000)", "map(attribute='content')", "sort", "batch(1)", "slice(10**8)",
    "center(10**9)", "indent(10**8)", "replace('', 'ab')", "repeat", "wordwrap(1)", "tojson",
    "safe", "length", "sum", "groupby('role')", "pprint", "urlize", "xmlattr", "format(1)",
    "truncate(1)", "random", "unique", "reverse", "first", "string", "upper", "trim", "e",
)  # fmt: skip


def _expression(random: Random, depth: int = 2) -> str:
    atom = random.choice(ATOMS)
    for _ in range(random.choice((0, 0, 1, 2))):
        atom = f"{atom} | {random.choice(FILTERS)}"
    if depth and random.random() < 0.3:
        sign = random.choice(("~", "+", "*", "**", "in", "and", "//", "%"))
        atom = f"({atom}) {sign} ({_expression(random, depth - 1)})"
    return atom


def _block(random: Random, depth: int) -> str:
    inner = "".join(_block(random, depth - 1) for _ in range(2)) if depth else "x"
    e = _expression(random)
    return random.choice((
        f"{{% for a in {e} %}}{inner}{{% endfor %}}",
        f"{{% for a in range(1000) %}}{{% for b in range(1000) %}}{inner}{{% endfor %}}"
        "{% endfor %}",
        f"{{% if {e} %}}{inner}{{% endif %}}", f"{{{{ {e} }}}}", f"{{% set a = {e} %}}{inner}",
        f"{{% macro m(x) %}}{inner}{{{{ m(x) }}}}{{% endmacro %}}{{{{ m(1) }}}}",
        "{% set ns = namespace(s='ab') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}"
        f"{{% endfor %}}{{{{ ns.s|length }}}}{inner}",
        "{% include '/etc/passwd' %}", "{% import 'os' as os %}", "{% extends 'x' %}",
        f"{{% filter {random.choice(FILTERS)} %}}{inner}{{% endfilter %}}",
        f"{{% for a in [1] recursive %}}{{{{ loop([1]) }}}}{inner}{{% endfor %}}",
        "{% generation %}x{% endgeneration %}", "{% break %}", "{# " + inner, inner,
    ))  # fmt: skip


def template(random: Random, original: str) -> bytes:
    """A chat template."""
    kind = random.randrange(5)
    if kind == 0:
        return mutate.damaged(random, original.encode())
    if kind == 1:
        return mutate.text(random, original).encode("utf-8", errors="surrogatepass")
    block = _block(random, random.choice((0, 1, 2)))
    if kind == 2:
        return block.encode()
    place = random.choice((0, len(original), random.randrange(len(original))))
    return (original[:place] + block + original[place:]).encode()


def shard(random: Random, content: bytes) -> bytes:
    """A safetensors file with another header, values that are not finite, or any damage."""
    kind = random.randrange(6)
    if kind == 0:
        return mutate.damaged(random, content)
    (size,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + size]), bytearray(content[8 + size :])
    if kind == 1 and data:
        for _ in range(random.choice((1, 3))):
            place = random.randrange(len(data)) // 4 * 4
            data[place : place + 4] = random.choice(
                (b"\xff\xff\xff\xff", b"\x00\x00\x80\x7f", b"\xff\xff\x7f\x7f", b"\x80\x7f\x80\x7f")
            )
    elif kind == 2:
        name = random.choice([*header])
        header[random.choice(mutate.TEXTS)] = header.pop(name)
    elif kind == 3:
        name = random.choice([*header])
        if isinstance(header[name], dict):
            field = random.choice(("dtype", "shape", "data_offsets"))
            kinds = ("F64", "F32", "F16", "BF16", "I64", "I8", "BOOL", "F8_E4M3", "U64", "C64")
            values = (random.choice(kinds), [2**40, 2**40], [-1, -1], [0], [], [0, 2**62],
                      [2**63, 0], mutate.any_json(random))  # fmt: skip
            header[name][field] = random.choice(values)
    elif kind == 4:
        names = [name for name in header if name != "__metadata__"]
        one, other = random.choice(names), random.choice(names)
        header[one], header[other] = header[other], header[one]
    else:
        header = mutate.changed_json(random, header)
    try:
        text = json.dumps(header).encode()
    except (ValueError, RecursionError):
        text = b"{}"
    length = len(text) if random.random() < 0.95 else random.choice((0, 2**63, 2**64 - 1, 7, 10**9))
    return struct.pack("<Q", length) + text + bytes(data)


def index(random: Random, content: bytes) -> bytes:
    """A checkpoint's index that leads elsewhere, or is damaged."""
    values = json.loads(content)
    if random.random() < 0.5:
        return mutate.json_bytes(random, values)
    places = values["weight_map"]
    for name in random.sample(sorted(places), random.choice((1, 3))):
        places[name] = random.choice(
            ("../vae/diffusion_pytorch_model.safetensors", "/dev/zero", "/dev/stdin", "..", ".", "",
             "/etc/passwd", "config.json", "a\0b", "x" * 5000, "\ud800", "missing.safetensors",
             5, None, [], {}, "./" + places[name], "diffusion_pytorch_model.safetensors.index.json")
        )  # fmt: skip
    return json.dumps(values).encode()


def odd_file(random: Random, path: Path, valid: Path) -> None:
    """Something else of that name: a pipe, a folder, a link to a device or to nothing."""
    kind = random.randrange(6)
    if kind == 0:
        os.mkfifo(path)
    elif kind == 1:
        path.mkdir()
    elif kind < 5:
        path.symlink_to(
            random.choice(("/dev/zero", "/dev/tty", path.name, "missing", "/", "/proc"))
        )
    else:
        path.write_bytes(b"")
        path.chmod(0)


def _npy(random: Random) -> bytes:
    """An array's file, with a header that need not be true."""
    shape = random.choice(((1, 48, 2, 2, 2), (), (0,), (2**40,), (2**31, 2**31), (-1,), (3, 3)))
    kinds = ("<f4", "<f8", ">f4", "<f2", "<f16", "<c8", "|O", "<M8[s]", "|S5", "<U9", "|b1", "<i8")
    kind = random.choice((*kinds[:3], *kinds, "[('a', '<f4')]", "|V4"))
    kind = kind if kind.startswith("[") else repr(kind)
    text = f"{{'descr': {kind}, 'fortran_order': {random.random() < 0.2}, 'shape': {shape}, }}"
    text = random.choice((text, text, text, "{" * 3000, "__import__('os')", text[:20]))
    data = random.choice((b"", bytes(768), np.float32([np.nan] * 192).tobytes(), bytes(99)))
    version = random.choice((b"\1\0", b"\1\0", b"\2\0", b"\3\0", b"\7\7"))
    length = struct.pack("<H" if version[0] == 1 else "<I", len(text))
    return b"\x93NUMPY" + version + length + text.encode() + data


def archive(random: Random, content: bytes, path: Path) -> None:
    """An npz file: damaged, or with odd members."""
    kind = random.randrange(6)
    if kind == 0:
        path.write_bytes(mutate.damaged(random, content))
        return
    with np.load(io.BytesIO(content)) as arrays:
        members = dict(arrays)
    if kind == 1:
        name = random.choice([*members])
        values = (
            np.float32(np.nan), np.full((1, 48, 2, 2, 2), 1e30, np.float32), np.zeros(0),
            np.float64([1e300]), members[name].astype("<U9"),
            np.zeros((1, 48, 2, 2, 2), np.complex64), np.zeros(3, "M8[s]"), np.zeros(3, bool),
            np.zeros((), np.float32), np.zeros((1,) * 30, np.float16), np.arange(5),
        )  # fmt: skip
        np.savez(path, **members | {name: random.choice(values)})
        return
    if kind == 2:
        np.savez(path, **members | {"noise": np.array([{}, []], object)}, allow_pickle=True)
        return
    way = random.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA))
    with zipfile.ZipFile(path, "w", way) as file:
        for name in random.sample([*members, "identity", "noise", "../noise"], 2):
            if kind == 3 and name in members:
                file.writestr(f"{name}.npy", bytes(random.choice((10, 2**24))))
            else:
                file.writestr(f"{name}.npy", _npy(random))
        if random.random() < 0.2:
            file.writestr("noise.npy", _npy(random))
    if random.random() < 0.3:
        path.write_bytes(mutate.damaged(random, path.read_bytes()))


def adapter_settings(random: Random, settings: dict[str, Any]) -> bytes:
    """PEFT's `adapter_config.json`."""
    if random.random() < 0.5:
        return mutate.json_bytes(random, settings)
    name = random.choice(("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules",
                          "use_rslora", "fan_in_fan_out", "init_lora_weights", "bias"))  # fmt: skip
    patterns = ({"(a+)+$": 4}, {"(": 2}, {".*": 1e400}, {"": 0}, {"(.*)*x": 8}, {"layers": "a"})
    value = random.choice((*patterns, *mutate.NUMBERS, True, "all-linear", "(.*.*)*y"))
    return json.dumps(settings | {name: value}).encode()


def media(random: Random, source: Path, other: Path) -> bytes:
    """A picture or a clip, damaged; sometimes another kind, or no media at all."""
    content = source.read_bytes()
    if random.random() < 0.03:
        lists = (b"#EXTM3U\nfile:///etc/passwd", b"ffconcat version 1.0\nfile /etc/passwd")
        return random.choice((*lists, b"", random.randbytes(3000), b"<svg/>", other.read_bytes()))
    return mutate.damaged(random, content, other.read_bytes())
