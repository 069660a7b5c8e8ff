"""What a checkpoint says before its weights are read: where it is, configuration, tokenizer."""

from pathlib import Path

from cosmos3_jax import tiny
from cosmos3_jax.checkpoint import load
from cosmos3_jax.config import Config
from cosmos3_jax.prompt import Tokenizer


def find_checkpoint(path_or_hub_id: str | Path, weights: bool = True) -> Path:
    """The local folder of a checkpoint: itself, the embedded default for `tiny`, or a Hub
    download.
    """
    if str(path_or_hub_id) == tiny.NAME and not Path(path_or_hub_id).is_dir():
        return tiny.tiny_checkpoint()
    return load.find_checkpoint(path_or_hub_id, weights)


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
