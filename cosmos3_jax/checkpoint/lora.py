"""LoRA (Hu et al., 2021) as a transformation of the parameter tree: W becomes W + scale B A.

Adapters belong to the public modules (`to_q`, `to_k`, `gate_proj`, ...), as everybody else's do:
our kernels fuse several of them, and one pair of matrices for a fused kernel would be something
that no other program can read. A family of modules, one a layer, is stacked over layers as its
kernel is.

`attach` hangs the pairs beside their kernels, where `layers.Dense` adds B (A x): for training,
which then holds no second copy of a weight. `merge` adds B A to the kernels, and `merge_on_read`
does so while a checkpoint is read: for inference. Files are in `lora_files.py`.

Axes: L layers, R rank; i inputs and o outputs of a module, flat and in public order.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array

from cosmos3_jax.checkpoint.layouts import transformer_layout
from cosmos3_jax.checkpoint.names import find
from cosmos3_jax.checkpoint.rules import is_stacked, layer_path, leaf_shapes
from cosmos3_jax.config import TransformerConfig
from cosmos3_jax.models import transformer

_HELD = (
    "the parameters already have an adapter beside {}; take those without it, merge the first "
    "adapter into them, and then add the second"
)
DEFAULT_PATTERNS = ("gen/layers/(attention|mlp)/",)  # every linear map of the media tower's layers


@struct.dataclass
class Lora:
    """One adapter.

    Attributes:
        adapters: family -> {"a": [L, i, R], "b": [L, R, o]}, without L where layers are not
            stacked. A layer whose a and b are zero is not adapted, and gets no gradient.
        scale: alpha / rank, what B A is multiplied by.
    """

    adapters: dict[str, dict[str, Array]]
    scale: float = struct.field(pytree_node=False, default=1.0)


@dataclasses.dataclass(frozen=True)
class Family:
    """Public modules that share a place in our tree.

    Attributes:
        name: the module's, with `*` for the layer: `layers.*.self_attn.to_q`.
        modules: public names, one a layer where stacked.
        leaf: path of their kernel.
        stacked: whether the kernel has a leading axis of layers.
        kernel: shape of one layer's kernel, and the first `inputs` of its axes are inputs.
        outputs: the part of the kernel's output axes that is this module's.
    """

    name: str
    modules: tuple[str, ...]
    leaf: str
    stacked: bool
    kernel: tuple[int, ...]
    inputs: int
    outputs: tuple[int | slice, ...]

    @property
    def part(self) -> tuple[int, ...]:
        """The shape of this module's part of the output axes."""
        return np.empty(self.kernel[self.inputs :])[self.outputs].shape

    @property
    def sizes(self) -> tuple[int, int]:
        """i and o."""
        return int(np.prod(self.kernel[: self.inputs])), int(np.prod(self.part))


@functools.cache
def families(config: TransformerConfig) -> dict[str, Family]:
    """Every family of linear maps that generation reads, by name."""
    leaves = leaf_shapes(transformer.param_shapes(config))
    found: dict[str, Family] = {}
    for rule in transformer_layout(config).rules:
        if not rule.leaf.endswith("/kernel"):
            continue
        stacked, module = is_stacked(rule.leaf), rule.key.removesuffix(".weight")
        name = re.sub(r"\.\d+\.", ".*.", module) if stacked else module
        if name in found:
            modules = (*found[name].modules, module)
            found[name] = dataclasses.replace(found[name], modules=modules)
            continue
        # The public axes are "outputs inputs", either a group of ours: "d (n h)".
        _, inputs = re.findall(r"\([^)]*\)|\w+", rule.rearrange.partition("->")[0])
        count = len(inputs.strip("()").split())
        kernel, index = leaves[rule.leaf][stacked:], rule.index[stacked:]
        found[name] = Family(name, (module,), rule.leaf, stacked, kernel, count, index[count:])
    return found


def init(
    key: Array,
    config: TransformerConfig,
    *,
    patterns: Sequence[str] = DEFAULT_PATTERNS,
    rank: int = 16,
    alpha: float | None = None,
) -> Lora:
    """A new adapter in float32: A random, B zero, so that it changes nothing yet.

    Args:
        key: for A, uniform in +-1 / sqrt(i), as PEFT draws it.
        config: the transformer's.
        patterns: regular expressions, searched for in public names (`layers.3.mlp.down_proj`,
            `_moe_gen` for the media tower) and in our paths (`gen/layers/mlp/down/kernel`).
        rank: R, at least 1.
        alpha: the scale is alpha / rank; None: alpha = rank.

    Raises:
        ValueError: a pattern matches nothing, rank < 1, or alpha is 0 or not finite.
    """
    if rank < 1:
        raise ValueError(f"rank={rank} must be at least 1")
    if alpha == 0:
        raise ValueError("alpha=0 would change nothing")
    if alpha is not None and not math.isfinite(alpha):
        raise ValueError(f"alpha={alpha} must be finite")
    names = {
        module: (module, family.leaf)
        for family in families(config).values()
        for module in family.modules
    }
    chosen = find(patterns, names)
    adapters = _draw(key, config, frozenset(chosen), rank)
    return Lora(adapters, 1.0 if alpha is None else alpha / rank)


@partial(jax.jit, static_argnums=(1, 2, 3))
def _draw(
    key: Array, config: TransformerConfig, chosen: frozenset[str], rank: int
) -> dict[str, dict[str, Array]]:
    adapters = {}
    for name, family in families(config).items():
        wanted = np.array([module in chosen for module in family.modules])
        if not wanted.any():
            continue
        key, for_a = jax.random.split(key)
        layers = (len(wanted),) if family.stacked else ()
        inputs, outputs = family.sizes
        a = jax.random.uniform(for_a, (*layers, inputs, rank), minval=-1) / np.sqrt(inputs)
        a = jnp.where(wanted.reshape(*layers, 1, 1), a, 0)
        adapters[name] = {"a": a, "b": jnp.zeros((*layers, rank, outputs))}
    return adapters


def attach(lora: Lora, params: dict, config: TransformerConfig) -> dict:
    """The parameters with the adapter beside them, for `encode_condition`, `velocity`, `generate`.

    Nothing of the size of a weight is made. Differentiable in both; the fused kernel's pair is
    [i, sum of R] and [sum of R, o], zero where a part's rank meets another part's outputs.

    Raises:
        ValueError: a kernel has another adapter already; or the adapter changes nothing. In
            training it may, at first: a step that is compiled cannot know.
    """
    check_changes(lora)
    leaves = flatten_dict(params, sep="/")
    for kernel, pair in _pairs_of(lora, leaves, config).items():
        leaves |= {kernel.removesuffix("kernel") + half: x for half, x in pair.items()}
    return unflatten_dict(leaves, sep="/")


def _pairs_of(lora: Lora, leaves: dict, config: TransformerConfig) -> dict[str, dict[str, Array]]:
    """Path of each kernel that the adapter changes, stacked or not -> the pair for it."""
    pairs = {}
    for leaf, pair in _fused_pairs(lora, config).items():
        parts = {leaf: pair}
        if leaf not in leaves and is_stacked(leaf):
            layers = range(len(pair["lora_a"]))
            parts = {layer_path(leaf, i): {half: x[i] for half, x in pair.items()} for i in layers}
        for path in parts:
            if path not in leaves:
                raise KeyError(path)
            if path.removesuffix("kernel") + "lora_a" in leaves:
                raise ValueError(_HELD.format(leaf))
        pairs |= parts
    return pairs


@partial(jax.jit, static_argnums=1)
def _fused_pairs(lora: Lora, config: TransformerConfig) -> dict[str, dict[str, Array]]:
    """Path of a kernel -> the pair that `layers.Dense` reads beside it."""
    known, by_leaf, fused = families(config), {}, {}
    for name in lora.adapters:
        by_leaf.setdefault(known[name].leaf, []).append(known[name])
    for leaf, members in by_leaf.items():
        pairs = [lora.adapters[family.name] for family in members]
        layers = (slice(None),) * members[0].stacked
        a = jnp.concatenate([pair["a"] for pair in pairs], axis=-1)
        leading, ranks = a.shape[: len(layers)], a.shape[-1]
        a = a.reshape(*leading, *members[0].kernel[: members[0].inputs], ranks)
        b = jnp.zeros((*leading, ranks, *members[0].kernel[members[0].inputs :]), a.dtype)
        start = 0
        for family, pair in zip(members, pairs, strict=True):
            stop = start + pair["b"].shape[-2]
            values = pair["b"].reshape(*leading, stop - start, *family.part) * lora.scale
            b = b.at[(*layers, slice(start, stop), *family.outputs)].set(values.astype(b.dtype))
            start = stop
        fused[leaf] = {"lora_a": a, "lora_b": b}
    return fused


def merge(lora: Lora, params: dict, config: TransformerConfig) -> tuple[dict, dict[str, Array]]:
    """The parameters with scale B A added, in float32 and rounded once; and what they replaced.

    Returns:
        The merged tree, and `{path: kernel}` of the original kernels, for `unmerge`: the very
        arrays, so they take no memory while the original tree is held. `jax.device_get` moves them
        off the device.

    Raises:
        ValueError: the parameters have another adapter beside them; or the adapter changes nothing,
            or nothing that the weights' dtype can tell.
    """
    leaves = flatten_dict(params, sep="/")
    if held := [path for path in leaves if path.endswith("/lora_a")]:
        raise ValueError(_HELD.format(held[0].removesuffix("lora_a") + "kernel"))
    check_changes(lora)
    replaced, changed = {}, False
    for path, pair in _pairs_of(lora, leaves, config).items():
        kernel = replaced[path] = leaves[path]
        leaves[path] = merged = _add_product(kernel, pair["lora_a"], pair["lora_b"])
        changed = changed or isinstance(merged, jax.core.Tracer) or bool(_differ(merged, kernel))
    if not changed:
        raise ValueError(
            "the adapter changes nothing: what it adds is too small for any weight of "
            f"{next(iter(replaced.values())).dtype}; merge into float32, or train it for longer"
        )
    return unflatten_dict(leaves, sep="/"), replaced


@jax.jit
def _differ(one: Array, other: Array) -> Array:
    return jnp.any(one != other)


@jax.jit
def _add_product(kernel: Array, a: Array, b: Array) -> Array:
    """kernel + a b; a scan where layers are stacked, so that one layer at a time is float32."""

    def one(kernel: Array, a: Array, b: Array) -> Array:
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        product = jnp.tensordot(a, b, 1, precision=jax.lax.Precision.HIGHEST)
        return (kernel.astype(jnp.float32) + product).astype(kernel.dtype)

    if a.ndim + b.ndim - 2 == kernel.ndim:
        return one(kernel, a, b)
    return jax.lax.map(lambda layer: one(*layer), (kernel, a, b))


def unmerge(merged: dict, replaced: dict[str, Array]) -> dict:
    """The tree that `merge` was given, bit for bit.

    Subtracting B A again would not give it back: the sum was rounded.
    """
    return unflatten_dict(flatten_dict(merged, sep="/") | replaced, sep="/")


def merge_on_read(
    loras: Sequence[Lora], config: TransformerConfig
) -> Callable[[str, int | None], np.ndarray | None]:
    """For a checkpoint's reader: (path of a kernel, layer or None) -> what to add, or None.

    On the host and in float32, one layer of one kernel at a time.

    Raises ValueError if an adapter changes nothing, or is not finite.
    """
    known, by_leaf = families(config), {}
    for lora in loras:
        lora = jax.tree.map(partial(np.asarray, dtype=np.float32), lora)
        check_changes(lora)
        for name, pair in lora.adapters.items():
            by_leaf.setdefault(known[name].leaf, []).append((known[name], pair, lora.scale))

    def addition(leaf: str, layer: int | None) -> np.ndarray | None:
        if leaf not in by_leaf:
            return None
        place = () if layer is None else (layer,)
        total = np.zeros(by_leaf[leaf][0][0].kernel, np.float32)
        for family, pair, scale in by_leaf[leaf]:
            product = scale * (pair["a"][place] @ pair["b"][place])
            shape = (*family.kernel[: family.inputs], *family.part)
            total[(slice(None),) * family.inputs + family.outputs] += product.reshape(shape)
        return total

    return addition


def adapted_leaves(loras: Sequence[Lora], config: TransformerConfig) -> set[str]:
    """Paths of the kernels that adapters change, stacked where layers are."""
    return {families(config)[name].leaf for lora in loras for name in lora.adapters}


def check_changes(lora: Lora) -> None:
    """Raise ValueError if an adapter changes no weight, by a product of zeros or a scale of 0; or
    if it spoils them, by a scale or a matrix that is not finite.

    Of matrices it cannot know while they are traced, and then it does not.
    """
    if not math.isfinite(lora.scale):
        raise ValueError(f"the adapter's scale, or factor, is {lora.scale}: it must be finite")
    pairs = [(pair["a"], pair["b"]) for pair in lora.adapters.values()]
    if any(isinstance(x, jax.core.Tracer) for pair in pairs for x in pair):
        return
    for name, pair in lora.adapters.items():
        for half, x in pair.items():
            isfinite = np.isfinite if isinstance(x, np.ndarray) else jnp.isfinite
            if not isfinite(x).all():
                raise ValueError(
                    f"the adapter's {half.upper()} of {name} has values that are not finite; train "
                    "it again at a lower learning rate, or take an earlier state"
                )
    if lora.scale == 0 or not any(np.any(a) and np.any(b) for a, b in pairs):
        raise ValueError(
            "the adapter changes nothing: "
            + (f"its scale is {lora.scale}" if lora.scale == 0 else "every A or every B is zero")
            + "; it was never trained, or not saved from what was trained"
        )
