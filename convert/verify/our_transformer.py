"""Our transformer a layer at a time.

What is before and after the layers is the code that generation runs, with the layers left out by
Flax's `intercept_methods`.

Axes: B batch, S text tokens, M media tokens, D model; t latent frames, h rows, w columns, C
channels, s sound latents.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct, traverse_util
from jax import Array

from convert.verify.transformer_inputs import Case
from cosmos3_jax.checkpoint.load import Component
from cosmos3_jax.checkpoint.place import Piece
from cosmos3_jax.config import TransformerConfig
from cosmos3_jax.models import rope, transformer


@struct.dataclass
class Stream:
    """The tokens of one case between two layers, and what stays beside them.

    Attributes:
        und: [B, S, D], and `text_table` its rotary table.
        gen: [B, M, D].
        condition: of the case; its keys and values are zeros.
    """

    und: Array
    text_table: rope.Rope
    gen: Array
    condition: transformer.Condition


def read_around(component: Component) -> dict:
    """`{"und", "gen"}` without layers, float32."""
    return _read(component, lambda piece: "layer" not in piece.leaf.split("/")[1])


def read_layer(component: Component, index: int, last: bool) -> dict:
    """`{"und", "gen"}`: layer `index` of both towers, float32; the text's `last` is shorter."""

    def chosen(piece: Piece) -> bool:
        return piece.place == (index,) or (last and "/last_layer/" in piece.leaf)

    tree = _read(component, chosen)
    return {tower: next(iter(tree[tower].values())) for tower in tree}


def _read(component: Component, chosen: Callable[[Piece], bool]) -> dict:
    pieces = filter(chosen, component.pieces(jnp.dtype(jnp.float32)))
    leaves = {piece.leaf: component.read(piece) for piece in pieces}
    return traverse_util.unflatten_dict(leaves, sep="/")


def cast(tree: Mapping, dtype: str) -> dict:
    """Weights in `dtype`; the timestep embedding stays in float32."""
    return {
        name: value if name == "time_embedder"
        else cast(value, dtype) if isinstance(value, Mapping)
        else jnp.asarray(value, jnp.dtype(dtype))
        for name, value in tree.items()
    }  # fmt: skip


@contextlib.contextmanager
def without_layers(config: TransformerConfig, out: Array | None = None) -> Iterator[dict]:
    """Towers that run meanwhile have no layers.

    Args:
        config: the transformer's.
        out: what the media tower's layers return; None returns their input.

    Yields:
        By tower, `und` and `gen`, the tokens and the rotary table that entered the first layer.
    """
    entered: dict[str, tuple[Array, rope.Rope]] = {}

    def intercept(call: Callable, arguments: tuple, options: dict, context) -> tuple:
        module, x = context.module, arguments[0] if arguments else None
        if context.method_name != "__call__":
            return call(*arguments, **options)
        if isinstance(module, transformer.Unrolled):  # the media tower's layers
            entered["gen"] = x, arguments[2]
            return (x if out is None else out), None
        if isinstance(module, transformer.Block | transformer.KeyValue):  # of the text tower
            zeros = jnp.zeros((*x.shape[:2], config.num_key_value_heads, config.head_dim))
            if isinstance(module, transformer.Block):
                return x, (zeros, zeros)
            entered["und"] = x, arguments[1]
            return zeros, zeros
        return call(*arguments, **options)

    with nn.intercept_methods(intercept):
        yield entered


def start(params: dict, config: TransformerConfig, dtype: str, case: Case) -> Stream:
    """What enters the first layer.

    Args:
        params: see `read_around`, in `dtype`.
        config: the transformer's.
        dtype: of the computation.
        case: the inputs.
    """
    stack = _qkv(config.num_hidden_layers - 1, dtype=dtype)
    with without_layers(config) as entered:
        condition = encode_condition(params["und"] | {"layers": stack}, config, case)
        _velocity(params, config, dtype, case, condition)
    (und, text_table), (gen, _) = entered["und"], entered["gen"]
    return Stream(und, text_table, gen, condition)


def velocity(
    params: dict, config: TransformerConfig, dtype: str, case: Case, stream: Stream
) -> dict[str, Array]:
    """`video` [B, t, h, w, C] and, with sound, `sound` [B, s, C], that follow from a last layer."""
    with without_layers(config, stream.gen):
        return _velocity(params, config, dtype, case, stream.condition)


def encode_condition(
    params: dict, config: TransformerConfig, case: Case, ids: np.ndarray | None = None
) -> transformer.Condition:
    """The condition of a case; `ids` [B, S] replace its token ids."""
    own, mask = case.padded_ids()
    return transformer.encode_condition(
        params, config, own if ids is None else ids, mask, video_shape=case.grid, fps=case.fps,
        sound_frames=case.sound_frames, clean={"video": case.latents()["video"]},
        given={"video": case.given_frames},
    )  # fmt: skip


def _velocity(params, config, dtype: str, case: Case, condition) -> dict[str, Array]:
    gen = params["gen"] | {"layers": {"0": _qkv(dtype=dtype)}}  # taken apart: not under a scan
    timestep = np.int32([example.timestep for example in case.examples])
    latents = jax.tree.map(jnp.asarray, case.latents())
    return transformer.velocity(gen, config, condition, latents, timestep)


def _qkv(*shape: int, dtype: str) -> dict:
    """A tower takes its dtype from this kernel, and is otherwise without layers here."""
    return {"attention": {"qkv": {"kernel": jnp.zeros((*shape, 0), dtype)}}}


@partial(jax.jit, static_argnames=("config", "dtype", "last"))
def run_layer(
    params: dict, stream: Stream, *, config: TransformerConfig, dtype: str, last: bool
) -> Stream:
    """One layer of both towers; the last of the text tower leaves its tokens as they are."""
    kind, und, condition = jnp.dtype(dtype), stream.und, stream.condition
    if last:
        module = transformer.KeyValue(config, kind)
        text = module.apply({"params": params["und"]}, und, stream.text_table)
    else:
        module = transformer.Block(config, kind)
        und, text = module.apply({"params": params["und"]}, und, None, stream.text_table, None)
    module = transformer.Block(config, kind)
    gen, _ = module.apply(
        {"params": params["gen"]}, stream.gen, text, condition.rope, condition.text_length
    )
    return stream.replace(und=und, gen=gen)
