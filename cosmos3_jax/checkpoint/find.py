"""Where a checkpoint is, and what it says before its weights are read: configuration, tokenizer."""

import re
from importlib import resources
from pathlib import Path

from cosmos3_jax.checkpoint import load, random_checkpoint
from cosmos3_jax.checkpoint.rules import CheckpointError
from cosmos3_jax.config import Config
from cosmos3_jax.models.tokenizer import Tokenizer

TINY = "tiny"
BUILT_IN = (TINY, random_checkpoint.NAME)
HUB_FILES = [
    "model_index.json",
    load.RECIPE_FILE,
    f"{load.TOKENIZER_FOLDER}/*",
    "scheduler/*.json",
    *(f"{part}/*.json" for part in ("transformer", "vae", "sound_tokenizer")),
]
HUB_WEIGHTS = [f"{part}/*.safetensors" for part in ("transformer", "vae", "sound_tokenizer")]


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
    path = Path(path_or_hub_id).expanduser()
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
    from huggingface_hub import snapshot_download

    try:
        wanted = HUB_FILES + HUB_WEIGHTS * weights
        return Path(snapshot_download(name, allow_patterns=wanted, revision=revision))
    except Exception as error:  # of a dozen kinds, from a name not found to a licence not accepted
        at = "" if revision is None else f" at revision {revision}"
        raise CheckpointError(
            f"{name} is no local folder, and downloading it{at} from the Hub failed: {error}"
        ) from error


def is_on_hub(name: str) -> bool:
    """Whether a checkpoint's name is a Hub id, and no folder here."""
    found = re.fullmatch(r"\w[\w.-]*/[\w.-]+", name)
    return found is not None and not Path(name).expanduser().is_dir()


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
