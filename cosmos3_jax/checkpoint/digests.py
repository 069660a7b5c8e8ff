"""What a checkpoint's files hold, as digests: for the record of a generation, and to compare.

A digest of thirty gigabytes takes a minute. So files up to 64 MiB are digested whole, larger ones
by their header and 256 blocks: another training changes those, a change of one tensor may not. On
request all are digested whole, and the digests are kept for the next time.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from cosmos3_jax import guard
from cosmos3_jax.checkpoint import publish
from cosmos3_jax.checkpoint.lora_spellings import PEFT_CONFIG

WHOLE_BYTES = 64 * 2**20
BLOCKS, BLOCK_BYTES = 256, 64 * 2**10
FOLDERS = ("", "transformer", "vae", "sound_tokenizer", "text_tokenizer", "scheduler")
SUFFIXES = (".json", ".safetensors", ".txt", ".jinja")

Digests = dict[str, dict[str, Any]]


def of_file(path: Path) -> str:
    """The sha256 of a whole file, in hexadecimal digits."""
    guard.check_plain(path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def of_path(path: Path) -> str:
    """Of a file, or of all files in a folder with their names."""
    if path.is_file():
        return of_file(path)
    return _of_files(path, sorted(each for each in path.rglob("*") if each.is_file()))


def of_lora(path: Path) -> str:
    """Of a LoRA's file and the settings of PEFT beside it, which say its scale; else `of_path`."""
    settings = path.with_name(PEFT_CONFIG)
    if not path.is_file() or not settings.is_file():
        return of_path(path)
    return _of_files(path.parent, [settings, path])


def _of_files(folder: Path, files: Iterable[Path]) -> str:
    lines = [f"{each.relative_to(folder).as_posix()} {of_file(each)}" for each in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def of_folder(folder: Path, whole: bool = False) -> dict[str, Any]:
    """What a checkpoint's folder holds.

    Args:
        folder: see `find.find_checkpoint`.
        whole: digest files of any size whole, or take what was kept of them.

    Returns:
        `revision`: the commit of a snapshot of the Hub's, else None; `files`: for each name,
        `bytes` and `sha256` or, of large files, `sampled`; and `blob`, its name on the Hub (the
        sha256 of a large file, git's sha1 of a small one).

    Raises:
        OSError: a file cannot be read.
    """
    revision = folder.name if folder.parent.name == "snapshots" else None
    kept = _Kept() if whole else None
    files: Digests = {}
    for path in _files(folder):
        size = path.stat().st_size
        digest: dict[str, Any] = {"bytes": size}
        if size <= WHOLE_BYTES:
            digest["sha256"] = of_file(path)
        else:
            digest["sampled"] = _sampled(path, size)
            if kept is not None:
                digest["sha256"] = kept.of(path)
        if path.is_symlink() and path.resolve().parent.name == "blobs":
            digest["blob"] = path.resolve().name
        files[path.relative_to(folder).as_posix()] = digest
    if kept is not None:
        kept.save()
    return {"revision": revision, "files": files}


def differences(recorded: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """In words, each file that is another one, is missing or was not there."""
    old, new = recorded["files"], found["files"]
    words = [f"{name} is missing" for name in sorted(old.keys() - new.keys())]
    words += [f"{name} was not there" for name in sorted(new.keys() - old.keys())]
    for name in sorted(old.keys() & new.keys()):
        keys = [
            key
            for key in ("bytes", "sha256", "sampled")
            if {key} <= old[name].keys() & new[name].keys()
        ]
        if any(old[name][key] != new[name][key] for key in keys):
            words.append(f"{name} holds something else")
    return words


def _files(folder: Path) -> Iterator[Path]:
    for name in FOLDERS:
        if (folder / name).is_dir():
            paths = sorted((folder / name).iterdir())
            yield from (path for path in paths if path.suffix in SUFFIXES and path.is_file())


def _sampled(path: Path, size: int) -> str:
    """The sha256 of a safetensors file's header, of blocks at even distances, and of the end."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
        digest.update(file.read(min(header, WHOLE_BYTES)))
        for block in range(BLOCKS):
            file.seek((size - BLOCK_BYTES) * block // (BLOCKS - 1))
            digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()


class _Kept:
    """Whole digests from earlier times, each for a file that has not been written since."""

    def __init__(self):
        cache = os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
        self.path = Path(cache) / "cosmos3_jax" / "digests.json"
        try:
            with guard.parsing(self.path, "a file of digests"):
                kept = json.loads(guard.read(self.path))
        except (OSError, ValueError):
            kept = None
        self.digests: dict[str, Any] = kept if isinstance(kept, dict) else {}

    def of(self, path: Path) -> str:
        path = path.resolve()
        stat = path.stat()
        key = f"{path}:{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ino}"
        if not isinstance(self.digests.get(key), str):
            self.digests[key] = of_file(path)
        return self.digests[key]

    def save(self) -> None:
        if not self.path.is_absolute():  # there is no home
            return
        try:
            with publish.file(self.path) as temporary:
                temporary.write_text(json.dumps(self.digests, indent=1), "utf-8")
        except OSError:  # a home that cannot be written: they are computed again next time
            pass


class Sums:
    """The sha256 of files of an unfinished folder, kept in it as `sha256sum` writes them."""

    def __init__(self, folder: Path):
        self.folder, self.path = folder, folder / "SHA256SUMS"
        text = self.path.read_text("utf-8", "replace") if self.path.is_file() else ""
        lines = (line.partition("  ") for line in text.splitlines())
        self._sums = {name: digest for digest, _, name in lines}

    def hold(self, path: Path) -> bool:
        """Whether the content of a file in the folder is what was noted."""
        return self._sums.get(self._name(path)) == of_file(path)

    def add(self, path: Path) -> None:
        """Note the content of a file. Raises OSError if the disk does not take it."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(f"\n{of_file(path)}  {self._name(path)}")  # the last line may be half a one

    def _name(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()
