"""Where a checkpoint is, and what it says before its weights are read: configuration, tokenizer."""

import itertools
import logging
import os
import queue
import re
import socket
import threading
import time
import urllib.parse
import urllib.request
from importlib import resources
from pathlib import Path

from cosmos3_jax.checkpoint import load, random_checkpoint
from cosmos3_jax.checkpoint.rules import CheckpointError
from cosmos3_jax.config import Config
from cosmos3_jax.guard import LONG_REASON, reason
from cosmos3_jax.models.tokenizer import Tokenizer

TINY = "tiny"
CONNECTION_SECONDS = 3  # to the Hub
BUILT_IN = (TINY, random_checkpoint.NAME)
HUB_FILES = [
    "model_index.json",
    load.RECIPE_FILE,
    f"{load.TOKENIZER_FOLDER}/*",
    "scheduler/*.json",
    *(f"{part}/*.json" for part in ("transformer", "vae", "sound_tokenizer")),
]
HUB_WEIGHTS = [f"{part}/*.safetensors" for part in ("transformer", "vae", "sound_tokenizer")]


log = logging.getLogger("cosmos3_jax")


def find_checkpoint(
    path_or_hub_id: str | Path, weights: bool = True, revision: str | None = None
) -> Path:
    """The local folder of a checkpoint: one that is built in, itself, or a Hub download.

    `tiny` is what the package brings along: it was trained, see examples/tiny. `random` is written
    into the cache of this user on first use. A folder of such a name is `./tiny`. From the Hub
    comes only what generation reads; without `weights`, only configurations and tokenizer: enough
    to check a request. `revision` is a branch, a tag or a commit there.

    Raises:
        CheckpointError: it is none of these, a folder has no revisions, the Hub cannot be reached,
            or the package was installed without its data.
        OSError: the cache cannot be written.
    """
    name = str(path_or_hub_id)
    path = Path(os.path.expanduser(path_or_hub_id))  # which leaves a ~ that has no home
    on_hub = is_on_hub(name)
    if revision is not None and not on_hub:
        raise CheckpointError(
            f"revision {revision!r} is for a Hub id owner/name, and {name} is none: leave it out"
        )
    if isinstance(path_or_hub_id, Path) and path.is_dir():  # which has lost the ./ of ./tiny
        return path
    if name == TINY:
        return _tiny_checkpoint()
    if name == random_checkpoint.NAME:
        return random_checkpoint.cached()
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{name} is a file; a checkpoint is the folder that holds it")
    if not on_hub:
        raise CheckpointError(
            f"there is no folder {name}; a checkpoint is a folder, a Hub id of the form owner/name "
            f"or one that is built in, {' or '.join(BUILT_IN)}"
        )
    return _download(name, HUB_FILES + HUB_WEIGHTS * weights, revision)


def _download(name: str, wanted: list[str], revision: str | None) -> Path:
    """The folder of a Hub download, or what the cache has of it where the Hub is out of reach."""
    from huggingface_hub import constants, snapshot_download

    unreachable = None if constants.HF_HUB_OFFLINE else unreachable_because(constants.ENDPOINT)
    try:
        cached = {"local_files_only": True} if unreachable else {}
        folder = snapshot_download(name, allow_patterns=wanted, revision=revision, **cached)
    except Exception as error:  # of a dozen kinds, from a name not found to a licence not accepted
        at = "" if revision is None else f" at revision {revision}"
        raise CheckpointError(
            f"{name} is no local folder, and downloading it{at} from the Hub failed: "
            f"{unreachable or reason(error, LONG_REASON)}"
        ) from error
    if unreachable:
        log.warning("%s: from the cache, as %s", name, unreachable)
    return Path(folder)


def unreachable_because(endpoint: str) -> str | None:
    """Why nothing answers at an URL's host, or at the proxy that leads there; None if all is well.

    The Hub's client tries again and again: 38 s, or two minutes where packets are dropped.
    """
    url = urllib.parse.urlsplit(endpoint)
    proxies = urllib.request.getproxies()
    proxy = proxies.get(url.scheme) or proxies.get("all")
    if proxy and url.hostname and not urllib.request.proxy_bypass(url.hostname):
        url = urllib.parse.urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    answers: queue.Queue[str] = queue.Queue()  # "", or why there is none

    def connect(address: tuple) -> None:
        try:
            socket.create_connection(address[:2], timeout=CONNECTION_SECONDS).close()
            answers.put("")
        except OSError as error:
            answers.put(reason(error))

    def look_up() -> None:
        try:
            port = url.port or {"http": 80, "https": 443}.get(url.scheme, 1080)
            found = socket.getaddrinfo(url.hostname, port, type=socket.SOCK_STREAM)
        except (OSError, ValueError) as error:
            return answers.put(reason(error))
        addresses = {entry[4] for entry in found}
        waited.append(len(addresses))
        for address in addresses:  # at once: of a machine's two kinds one may lead nowhere
            threading.Thread(target=connect, args=(address,), daemon=True).start()

    # In threads, as looking up a name has no limit of its own.
    waited: list[int] = []
    threading.Thread(target=look_up, daemon=True).start()
    why, end = "", time.monotonic() + CONNECTION_SECONDS
    for number in itertools.count(1):
        try:
            why = answers.get(timeout=max(0.0, end - time.monotonic()))
        except queue.Empty:
            why = why or f"no answer within {CONNECTION_SECONDS:g} s"
            break
        if not why or number >= (waited or [1])[0]:
            break
    where = url.netloc.rpartition("@")[2]  # without a password
    return f"{where} cannot be reached ({why})" if why else None


def is_on_hub(name: str) -> bool:
    """Whether a checkpoint's name is a Hub id, and no folder here."""
    found = re.fullmatch(r"\w[\w.-]*/[\w.-]+", name)
    return found is not None and not os.path.isdir(os.path.expanduser(name))


def _tiny_checkpoint() -> Path:
    folder = resources.files("cosmos3_jax") / "data" / TINY
    if not (isinstance(folder, Path) and (folder / "model_index.json").is_file()):
        raise CheckpointError(
            f"{folder} holds no checkpoint: this copy of cosmos3_jax came without its data, or is "
            f"in an archive; install it with pip, or take --checkpoint {random_checkpoint.NAME}"
        )
    return folder


def open_folder(folder: Path, load_sound: bool | None = None) -> tuple[Config, Tokenizer]:
    """The configuration and tokenizer of a checkpoint folder: what a request needs, no weights.

    Raises:
        CheckpointError: the folder is no checkpoint, or its tokenizer belongs to another one.
    """
    config = load.load_config(folder, load_sound)
    tokenizer = Tokenizer.from_folder(folder / load.TOKENIZER_FOLDER)
    if tokenizer.vocab_size > config.transformer.vocab_size:
        raise CheckpointError(
            f"{folder}: the tokenizer has ids up to {tokenizer.vocab_size - 1}, the transformer "
            f"{config.transformer.vocab_size} embeddings; they belong to different checkpoints"
        )
    return config, tokenizer
