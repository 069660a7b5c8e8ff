"""What a checkpoint says before its weights are read: where it is, configuration, tokenizer."""

from importlib import resources
from pathlib import Path

from cosmos3_jax.checkpoint import load, random_checkpoint
from cosmos3_jax.config import Config
from cosmos3_jax.io.prompt import Tokenizer

TINY = "tiny"
BUILT_IN = (TINY, random_checkpoint.NAME)


def find_checkpoint(path_or_hub_id: str | Path, weights: bool = True) -> Path:
    """The local folder of a checkpoint: itself, one that is built in, or a Hub download.

    `tiny` is what the package brings along: it was trained, see examples/tiny. `random` is written
    into the cache of this user on first use. A folder of such a name comes before either.

    Raises:
        CheckpointError: the package was installed without its data.
        OSError: the cache cannot be written.
    """
    if not Path(path_or_hub_id).is_dir():
        if str(path_or_hub_id) == TINY:
            return _tiny_checkpoint()
        if str(path_or_hub_id) == random_checkpoint.NAME:
            return random_checkpoint.cached()
    return load.find_checkpoint(path_or_hub_id, weights)


def _tiny_checkpoint() -> Path:
    folder = resources.files("cosmos3_jax") / "data" / TINY
    if not (isinstance(folder, Path) and (folder / "model_index.json").is_file()):
        raise load.CheckpointError(
            f"{folder} holds no checkpoint: this copy of cosmos3_jax came without its data, or is "
            f"in an archive; install it with pip, or take --checkpoint {random_checkpoint.NAME}"
        )
    return folder


def load_frontend(folder: Path, load_sound: bool | None = None) -> tuple[Config, Tokenizer]:
    """The configuration and tokenizer of a checkpoint folder: what `prepare_request` needs, no
    weights.

    Raises:
        CheckpointError: the folder is no checkpoint, or its tokenizer belongs to another one.
    """
    config = load.load_config(folder, load_sound)
    tokenizer = Tokenizer.from_folder(folder / load.TOKENIZER_FOLDER)
    if tokenizer.vocab_size > config.transformer.vocab_size:
        raise load.CheckpointError(
            f"{folder}: the tokenizer has ids up to {tokenizer.vocab_size - 1}, the transformer "
            f"{config.transformer.vocab_size} embeddings; they belong to different checkpoints"
        )
    return config, tokenizer
