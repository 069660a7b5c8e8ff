"""The parameters to train: read, taken apart by the paths of their leaves, cast, put together."""

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from cosmos3_jax.checkpoint import load
from cosmos3_jax.checkpoint.find import find_checkpoint
from cosmos3_jax.checkpoint.names import find
from cosmos3_jax.checkpoint.rules import leaf_shapes
from cosmos3_jax.checkpoint.transformer_layout import transformer_layout
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
    chosen = find(patterns, {path: (path,) for path in leaf_shapes(params)})

    def take(tree: dict, prefix: str, wanted: bool) -> dict:
        taken = {}
        for name, value in tree.items():
            path = f"{prefix}{name}"
            if isinstance(value, dict):
                if inner := take(value, f"{path}/", wanted):
                    taken[name] = inner
            elif (path in chosen) == wanted:
                taken[name] = value
        return taken

    return take(params, "", True), take(params, "", False)


def join_params(first: dict, second: dict) -> dict:
    """One tree with the leaves of two that share none."""
    joined = dict(first)
    for name, value in second.items():
        joined[name] = join_params(joined[name], value) if name in joined else value
    return joined


def cast_params(params, dtype: jnp.dtype, config: TransformerConfig):
    """Every leaf in `dtype`, but in float32 those that inference keeps so.

    Differentiable: gradients come back in the dtype that went in.
    """
    float32 = transformer_layout(config).float32

    def cast(path: tuple, leaf: jax.Array) -> jax.Array:
        name = "/".join(str(getattr(key, "key", "")) for key in path)
        return leaf.astype(jnp.float32 if name.startswith(float32) else dtype)

    return jax.tree_util.tree_map_with_path(cast, params)
