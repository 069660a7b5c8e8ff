"""One layer of the transformer, operation by operation, and the rotary tables it reads.

Names of modules are written out here, rather than taken from `checkpoint/transformer_layout.py`:
a mistake there must not be made twice.

Axes: S text tokens, M media tokens, D model, N query heads, H head dimension, J half of it.
"""

import contextlib
from collections.abc import Iterator
from unittest import mock

import jax.numpy as jnp
import numpy as np
import torch

from convert.verify import reference
from convert.verify.autoencoder_names import modules_with_weights
from convert.verify.compare import ALIKE, relative_l2
from convert.verify.transformer_ours import Stream
from convert.verify.witness import Found, Operation, Recording, Witness
from cosmos3_jax.config import TransformerConfig
from cosmos3_jax.models import rope, transformer

PADDING = 9.0  # what stands behind a prompt's keys and values, and is not to be read


def operations(tower: str, last: bool) -> dict[str, Operation]:
    """Our modules of one tower's layer and what they stand for."""
    names = {
        "und": ("to_q", "to_k", "to_v", "to_out", "norm_q", "norm_k", ""),
        "gen": (
            "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "norm_added_q", "norm_added_k",
            "_moe_gen",
        ),
    }  # fmt: skip
    q, k, v, out, q_norm, k_norm, suffix = names[tower]
    q, k, v, out, q_norm, k_norm = (f"self_attn.{n}" for n in (q, k, v, out, q_norm, k_norm))
    first, second, mlp = (
        f"input_layernorm{suffix}",
        f"post_attention_layernorm{suffix}",
        f"mlp{suffix}",
    )
    if last:
        return {
            "input_norm": Operation((first,)),
            "kv": Operation((k, v)),
            "k_norm": Operation((k_norm,)),
        }
    return {
        "input_norm": Operation((first,)),
        "attention/qkv": Operation((q, k, v)),
        "attention/q_norm": Operation((q_norm,)),
        "attention/k_norm": Operation((k_norm,)),
        "attention/out": Operation((out,)),
        "post_attention_norm": Operation((second,), "residual"),
        "mlp/gate_up": Operation((f"{mlp}.gate_proj", f"{mlp}.up_proj")),
        "mlp/down": Operation((f"{mlp}.down_proj",), "silu(gate) * up"),
    }


def one_example(name: str, module: torch.nn.Module, x: torch.Tensor, made: bool) -> torch.Tensor:
    """[S, ...] -> [1, S, ...]."""
    return x[None]


def watch_layer(
    index: int,
    layer: torch.nn.Module,
    und: torch.Tensor,
    gen: torch.Tensor,
    rotary: tuple,
    params: dict,
    config: TransformerConfig,
    last: bool,
    longest: int,
    found: Found,
) -> tuple[np.ndarray, np.ndarray]:
    """One layer on one example of the reference's. Returns the reference's text keys and values.

    Args:
        index: of the layer.
        layer: the reference's, in float32.
        und, gen: its inputs, [S, D] and [M, D].
        rotary: its rotary tables.
        params: ours, see `Parameters.layer`.
        config: the transformer's.
        last: whether the text tower's layer is its last, which ends at its keys and values.
        longest: what the text's keys and values are padded to.
        found: what is found is added to it.
    """
    recording = Recording()
    leaves = modules_with_weights(layer)
    with recording.of(leaves, one_example), reference.attention_calls() as calls:
        und_out, gen_out = layer(und, gen, rotary)
    exact = {"und": (und, und_out), "gen": (gen, gen_out)}
    cos_und, sin_und, cos_gen, sin_gen = (_half(x) for x in rotary)
    tables = {"und": (cos_und, sin_und), "gen": (cos_gen, sin_gen)}
    padding = ((0, 0), (0, longest - len(und)), (0, 0), (0, 0))
    text = tuple(
        jnp.pad(calls[0][name], padding, constant_values=PADDING) for name in ("key", "value")
    )
    # Of the last text layer, ours computes less.
    seen = {n for o in operations("und", False).values() for n in o.modules} if last else set()
    for tower, call in zip(("und", "gen"), calls, strict=True):
        short = last and tower == "und"
        table = operations(tower, short)
        witness = Witness(
            "transformer",
            table.get,
            recording,
            leaf=lambda path, tower=tower, short=short: _leaf(tower, index, path, short),
            tensors=lambda module: (f"{module}.weight",),
            hint=lambda module, path, tower=tower, table=table: hint(
                module, table[path].modules, _node(params[tower], path), layer, f"layers.{index}."
            ),
            prefix=f"layers.{index}.",
            found=found,
        )
        x = jnp.asarray(exact[tower][0].float().cpu().numpy())[None]
        name = "self_attn" if tower == "und" else "self_attn (media)"
        with witness.watching(), _watched_attention(witness, call, name):
            if short:
                module = transformer.KeyValue(config, jnp.float32)
                key, value = module.apply({"params": params["und"]}, x, tables["und"])
                witness.compare(f"{name}: keys, rotated", key, call["key"])
                witness.compare(f"{name}: values", value, call["value"])
            else:
                module = transformer.Block(config, jnp.float32)
                length = jnp.int32([len(und)])
                arguments = (
                    (None, tables["und"], None) if tower == "und" else (text, tables["gen"], length)
                )
                made, _ = module.apply({"params": params[tower]}, x, *arguments)
                out = exact[tower][1].float().cpu().numpy()[None]
                witness.compare(f"{tower} layer's output (residual)", made, out)
        seen |= witness.seen
    witness.check_coverage(seen)
    return calls[0]["key"], calls[0]["value"]


@contextlib.contextmanager
def _watched_attention(witness: Witness, call: dict, name: str) -> Iterator[None]:
    """Our attention function becomes an operation as any other."""
    attention = transformer.attention

    def watched(query, key, value, *, text: tuple | None = None, causal: bool = False, **mesh):
        own = {"query": query, "key": key, "value": value}
        count = key.shape[1]  # the reference has the text's keys in front of the media's
        exact = {part: jnp.asarray(call[part][:, -x.shape[1] :]) for part, x in own.items()}
        for part, x in own.items():
            before = "" if part == "value" else ", rotated"
            witness.compare(f"{name}: {part}{before}", x, exact[part])
        if text is not None:
            theirs = call["key"].shape[1] - count
            for part, x in (("key", text[0]), ("value", text[1])):
                witness.compare(f"{name}: text {part}", x[:, :theirs], call[part][:, :theirs])
        made = attention(*exact.values(), text=text, causal=causal, **mesh)
        witness.compare(f"{name}: softmax(q k) v", made, call["made"])
        return jnp.asarray(call["made"])

    with mock.patch.object(transformer, "attention", watched):
        yield


def compare_tables(witness: Witness, stream: Stream, rotary: tuple, config) -> None:
    """Our rotary tables against the reference's, by axis, for a stream of one example, whose text
    may be padded.
    """
    axes = rope.axis_of_slot(config)
    halves = [_half(x) for x in rotary]
    for name, ours, exact in (
        ("text", stream.text_table, halves[:2]),
        ("media", stream.condition.rope, halves[2:]),
    ):
        for which, mine, theirs in zip(("cos", "sin"), ours, exact, strict=True):
            mine = mine[:, : theirs.shape[1]] if name == "text" else mine
            far = [
                slot for slot in range(len(axes))
                if relative_l2(mine[..., slot], theirs[..., slot]) > 1e-3
            ]  # fmt: skip
            slots = ", ".join(f"{s} ({'time height width'.split()[axes[s]]})" for s in far[:8])
            where = f", slots off, with our axis: {slots}" if far else ""
            witness.compare(f"rotary_emb: {which} of {name} positions{where}", mine, theirs)


def hint(
    module: str, modules: tuple[str, ...], ours: dict, layer: torch.nn.Module, prefix: str
) -> str:
    """What our weights of a public module look like instead of its own, or ""."""
    if "scale" in ours:
        mine = np.asarray(ours["scale"])
        if (mine == 1).all():
            return "our scale is all ones"
    else:
        kernel, sizes = np.asarray(ours["kernel"]), []
        weights = [layer.get_submodule(name).weight for name in modules]
        if len(modules) > 1:  # side by side on the kernel's second axis
            sizes = [
                w.shape[0] * kernel.shape[1] // sum(x.shape[0] for x in weights) for w in weights
            ]
            start = sum(sizes[: modules.index(module)])
            kernel = kernel[:, start : start + sizes[modules.index(module)]]
        mine = kernel.reshape(weights[modules.index(module)].shape[::-1]).T
    if not mine.any():
        return "ours is all zeros"
    for name, tensor in layer.state_dict().items():
        theirs = tensor.float().cpu().numpy()
        if theirs.shape == mine.shape and relative_l2(mine, theirs) < ALIKE:
            return f"ours holds {prefix}{name}" if name != f"{module}.weight" else ""
        if theirs.T.shape == mine.shape and relative_l2(mine, theirs.T) < ALIKE:
            return f"ours holds {prefix}{name} transposed"
    return "ours holds no tensor of this layer" if np.isfinite(mine).all() else "ours is not finite"


def _half(table: torch.Tensor) -> jnp.ndarray:
    """[S, H] with both halves alike -> [1, S, J]."""
    return jnp.asarray(table[None, :, : table.shape[-1] // 2].float().cpu().numpy())


def _leaf(tower: str, index: int, path: str, short: bool) -> str:
    return f"und/last_layer/{path}" if short else f"{tower}/layers/{path}[{index}]"


def _node(tree: dict, path: str) -> dict:
    for name in path.split("/"):
        tree = tree[name]
    return tree
