"""Our transformer a layer at a time: the real towers, whose layers are run from outside of them.

`Door` stands for the layers, as `reference.Door` does on the other side, so that all that comes
before and after them is the code that generation runs.

Axes: B batch, S text tokens, M media tokens, D model, K key/value heads, H head dimension.
"""

import contextlib
from collections.abc import Iterator, Mapping
from functools import partial
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from convert.verify.transformer_inputs import Case
from cosmos3_jax.checkpoint.load import Component
from cosmos3_jax.config import TransformerConfig
from cosmos3_jax.models import rope, transformer


class Parameters:
    """The transformer's weights, from the files, a layer or the rest at a time."""

    def __init__(self, component: Component):
        self._component = component
        self._pieces = component.pieces(jnp.dtype(jnp.float32))

    def rest(self) -> dict:
        """`{"und", "gen"}` without layers, float32."""
        chosen = [
            (piece, piece.leaf)
            for piece in self._pieces
            if "/layers/" not in piece.leaf and "/last_layer/" not in piece.leaf
        ]
        return self._tree(chosen)

    def layer(self, index: int, last: bool) -> dict:
        """`{"und", "gen"}`: both towers' layer `index`, float32; the text's `last` is shorter."""
        chosen = [
            (piece, piece.leaf.replace("/layers/", "/"))
            for piece in self._pieces
            if "/layers/" in piece.leaf and piece.place == (index,)
        ]
        if last:
            chosen += [
                (piece, piece.leaf.replace("/last_layer/", "/"))
                for piece in self._pieces
                if "/last_layer/" in piece.leaf
            ]
        return self._tree(chosen)

    def _tree(self, chosen: list) -> dict:
        tree: dict = {}
        for piece, path in chosen:
            *parents, name = path.split("/")
            node = tree
            for parent in parents:
                node = node.setdefault(parent, {})
            node[name] = self._component.read(piece)
        return tree


def cast(tree: dict, dtype: str) -> dict:
    """Weights in `dtype`; the timestep embedding stays in float32."""
    return {
        name: value if name == "time_embedder"
        else cast(value, dtype) if isinstance(value, Mapping)
        else jnp.asarray(value, jnp.dtype(dtype))
        for name, value in tree.items()
    }  # fmt: skip


@struct.dataclass
class Stream:
    """What flows through the layers of one case, and what stays beside it.

    Attributes:
        und: [B, S, D], and `text_table` its rotary table.
        gen: [B, M, D].
        condition: of the case, less its keys and values.
    """

    und: Array
    text_table: rope.Rope
    gen: Array
    condition: transformer.Condition


class Door:
    """Stands for both towers' layers, and for the text tower's shorter last one.

    Attributes:
        came: by tower, the arguments that its layers were called with.
        goes: what the media tower's layers are to return; None lets through what came.
    """

    def __init__(self, config: TransformerConfig, out: Array | None):
        self.config, self.came, self.goes = config, {}, out

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Towers that run meanwhile have no layers but these."""
        with (
            mock.patch.object(transformer, "_stack", lambda *_: self.layers),
            mock.patch.object(transformer, "KeyValue", lambda *_, name: self.last_layer),
        ):
            yield

    def layers(self, x: Array, text: tuple | None, table: rope.Rope, length: Array | None):
        self.came["und" if text is None else "gen"] = (x, table)
        if text is not None:
            return (x if self.goes is None else self.goes), None
        count = self.config.num_hidden_layers - 1
        return x, (jnp.zeros((count, *self._heads(x)), x.dtype),) * 2

    def last_layer(self, x: Array, table: rope.Rope) -> tuple[Array, Array]:
        return (jnp.zeros(self._heads(x), x.dtype),) * 2

    def _heads(self, x: Array) -> tuple[int, ...]:
        return (*x.shape[:2], self.config.num_key_value_heads, self.config.head_dim)


def run_before(params: dict, config: TransformerConfig, dtype: str, case: Case) -> Stream:
    """All that comes before the layers.

    Args:
        params: see `Parameters.rest`, in `dtype`.
        config: the transformer's.
        dtype: of the computation.
        case: the inputs.
    """
    ids, mask = case.padded_ids()
    video = np.stack([example.video for example in case.examples])
    door = Door(config, None)
    with door.open():
        condition = transformer.encode_condition(
            _with_dtype(params["und"], dtype), config, ids, mask, video_shape=case.grid,
            fps=case.fps, sound_frames=case.sound_frames, clean_latents=video,
            frame_mask=case.frame_mask,
        )  # fmt: skip
    _velocity(params, config, dtype, case, condition, door)
    (x, table), (media, _) = door.came["und"], door.came["gen"]
    return Stream(x, table, media, condition)


def run_after(
    params: dict, config: TransformerConfig, dtype: str, case: Case, stream: Stream, out: Array
) -> dict[str, Array]:
    """All that comes after the layers, which made `out` [B, M, D].

    Returns the velocity: `video` [B, t, h, w, C] and, with sound, `sound` [B, s, C].
    """
    return _velocity(params, config, dtype, case, stream.condition, Door(config, out))


def _velocity(params, config, dtype, case: Case, condition, door: Door) -> dict[str, Array]:
    sound = np.stack([e.sound for e in case.examples]) if case.sound_frames else None
    latents = transformer.Latents(np.stack([e.video for e in case.examples]), sound)
    timestep = np.int32([example.timestep for example in case.examples])
    gen = _with_dtype(params["gen"], dtype)
    with door.open():
        made = transformer.velocity(gen, config, condition, latents, timestep)
    return {"video": made.video} | ({} if sound is None else {"sound": made.sound})


def _with_dtype(params: dict, dtype: str) -> dict:
    """A tower takes its dtype from an attention kernel, and that there is no list of layers."""
    return params | {"layers": {"attention": {"qkv": {"kernel": jnp.zeros(0, dtype)}}}}


@partial(jax.jit, static_argnames=("config", "dtype", "last"))
def run_layer(
    params: dict, stream: Stream, *, config: TransformerConfig, dtype: str, last: bool
) -> Stream:
    """One layer of both towers; the text tower's last leaves its stream as it is."""
    kind, und, condition = jnp.dtype(dtype), stream.und, stream.condition
    if last:
        tower = transformer.KeyValue(config, kind)
        text = tower.apply({"params": params["und"]}, und, stream.text_table)
    else:
        tower = transformer.Block(config, kind)
        und, text = tower.apply({"params": params["und"]}, und, None, stream.text_table, None)
    tower = transformer.Block(config, kind)
    gen, _ = tower.apply(
        {"params": params["gen"]}, stream.gen, text, condition.rope, condition.text_length
    )
    return stream.replace(und=und, gen=gen)
