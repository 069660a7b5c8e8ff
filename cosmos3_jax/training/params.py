"""The parameters to train: read, taken apart by the paths of their leaves, cast, put together."""

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.tree_util import keystr

from cosmos3_jax.checkpoint import load
from cosmos3_jax.checkpoint.find import find_checkpoint
from cosmos3_jax.checkpoint.layouts import transformer_layout
from cosmos3_jax.checkpoint.names import find
from cosmos3_jax.config import Config, TransformerConfig

TOWERS = ("und", "gen")


def load_towers(
    path_or_hub_id: str | Path, dtype: str = "bfloat16", load_sound: bool | None = None
) -> tuple[dict, Config]:
    """Both towers of a checkpoint, layers stacked, and its configuration.

    Stacked, one layer is compiled, forwards and backwards; `Cosmos3` takes them apart for speed.

    Args and errors as for `Cosmos3.from_pretrained`.
    """
    config = load.load_config(find_checkpoint(path_or_hub_id, False), load_sound)
    components = load.open_components(find_checkpoint(path_or_hub_id), config)
    return load.load_params(components, jnp.dtype(dtype), parts=TOWERS), config


def split_params(params: dict, patterns: Sequence[str]) -> tuple[dict, dict]:
    """The leaves that any pattern matches, and the others: two trees for `join_params`.

    Args:
        params: a nested dict. Of a whole model's, only the two towers are taken.
        patterns: regular expressions, searched for in paths such as `gen/layers/mlp/down/kernel`.

    Raises:
        ValueError: a pattern matches no leaf.
    """
    params = {part: params[part] for part in TOWERS if part in params}
    leaves = flatten_dict(params, sep="/")
    chosen = find(patterns, {path: (path,) for path in leaves})
    taken = {path: leaf for path, leaf in leaves.items() if path in chosen}
    others = {path: leaf for path, leaf in leaves.items() if path not in chosen}
    return unflatten_dict(taken, sep="/"), unflatten_dict(others, sep="/")


def join_params(first: dict, second: dict) -> dict:
    """One tree with the leaves of two that share none; raises ValueError if they share any."""
    leaves, others = flatten_dict(first, sep="/"), flatten_dict(second, sep="/")
    if shared := leaves.keys() & others.keys():
        raise ValueError(f"both trees have {min(shared)}")
    return unflatten_dict(leaves | others, sep="/")


def cast_params(params, dtype: jnp.dtype, config: TransformerConfig):
    """Every leaf in `dtype`, but in float32 those that inference keeps so.

    Differentiable: gradients come back in the dtype that went in.
    """
    float32 = transformer_layout(config).float32

    def cast(path: tuple, leaf: jax.Array) -> jax.Array:
        name = keystr(path, simple=True, separator="/")
        return leaf.astype(jnp.float32 if name.startswith(float32) else dtype)

    return jax.tree_util.tree_map_with_path(cast, params)
