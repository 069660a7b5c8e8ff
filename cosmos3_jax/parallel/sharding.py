"""Where arrays lie on a mesh of devices, said by the names of its axes; XLA moves the data.

A model says how its arrays lie with `constrain`, which reads the mesh that `jax.set_mesh` made the
ambient one. Without a mesh, or on one of size one, it is the identity: one device is no special
case, and its programs have no trace of any of this. So `generate` under `jax.jit` composes with any
mesh that has some of these axes:

- `data`: prompts.
- `cfg`: the two branches of classifier-free guidance, which then run as one batch.
- `seq`: tokens; heads inside attention, as in DeepSpeed-Ulysses (Jacobs et al., arXiv:2309.14509).
- `fsdp`: weights of both towers, gathered layer by layer where they are used (Rajbhandari et al.,
  arXiv:1910.02054, stage 3); beside that it divides what `seq` does.

In the autoencoders, which know no branches, tokens or heads, all but `data` divide the rows of the
picture, see `rows`.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "cfg", "seq", "fsdp")
PROMPTS = ("data",)
BRANCHES = ("data", "cfg")  # both branches as one batch, see `join`
TOKENS = HEADS = ("seq", "fsdp")
ROWS = ("cfg", "seq", "fsdp")
WEIGHTS = ("fsdp",)

Axes = tuple[str, ...] | None


def mesh_sizes() -> dict[str, int]:
    """Sizes of the ambient mesh's axes, those of one device and those not ours left out.

    Axes that are manual, inside a `jax.shard_map`, are left out too: there is nothing to divide.

    Raises:
        ValueError: on an axis in explicit mode, where sharding is part of an array's type.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return {}
    axes = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
    ours = [(name, size, kind) for name, size, kind in axes if name in AXES and size > 1]
    explicit = [name for name, _, kind in ours if kind == AxisType.Explicit]
    if explicit:
        raise ValueError(
            f"mesh axis {explicit[0]} is explicit, and models are written for automatic ones: make "
            "the mesh with jax.sharding.Mesh, or with axis_types of jax.sharding.AxisType.Auto"
        )
    return {name: size for name, size, kind in ours if kind == AxisType.Auto}


def num_shards(axes: Axes) -> int:
    """Into how many parts these axes of the ambient mesh divide an array."""
    sizes = mesh_sizes()
    return math.prod(sizes.get(name, 1) for name in axes or ())


def spec(*axes: Axes) -> PartitionSpec:
    """What these axes are on the ambient mesh, for each axis of an array; None for undivided."""
    sizes = mesh_sizes()
    present = [tuple(name for name in names or () if name in sizes) for names in axes]
    return PartitionSpec(*(names or None for names in present))


def constrain(x: Array, *axes: Axes) -> Array:
    """x, each of its axes divided by these of the ambient mesh, and by no others."""
    if not mesh_sizes():
        return x
    return jax.lax.with_sharding_constraint(x, spec(*axes))


def join(*branches: Array, axis: int = 0) -> Array:
    """The branches' examples as one batch on this axis; on a mesh those of a prompt side by side.

    So the devices of a prompt have all its branches, and none has to be moved. See `part`.
    """
    if len(branches) == 1 or not mesh_sizes():
        return jnp.concatenate(branches, axis)
    first, second = (jnp.expand_dims(x, axis + 1) for x in branches)
    index = jnp.arange(2).reshape(2, *[1] * (first.ndim - axis - 2))
    both = jnp.where(index == 0, first, second)
    # The other axes stay as they are: heads, of the text's keys.
    others = [PartitionSpec.UNCONSTRAINED] * both.ndim
    placed = [*others[:axis], *spec(("data",), ("cfg",)), *others[axis + 2 :]]
    both = jax.lax.with_sharding_constraint(both, PartitionSpec(*placed))
    return both.reshape(*both.shape[:axis], -1, *both.shape[axis + 2 :])


def part(x: Array, count: int) -> list[Array]:
    """The inverse of `join` on axis 0, for this many branches; each device gets its prompts'."""
    if count == 1 or not mesh_sizes():
        return jnp.split(x, count)
    x = x.reshape(-1, count, *x.shape[1:])
    x = constrain(x, ("data",), *[None] * (x.ndim - 1))
    return [x[:, i] for i in range(count)]


def whole(weight: Array) -> Array:
    """A weight, gathered if `fsdp` divides it."""
    return constrain(weight, *[None] * weight.ndim) if num_shards(WEIGHTS) > 1 else weight


def weight_axes(path: str, shape: tuple[int, ...], num_shards: int) -> tuple[Axes, ...]:
    """How `fsdp` divides a leaf of the parameters: the first axis of a tower's matrix that it can.

    Vectors, biases and the autoencoders stay whole on each device: they weigh little.

    Args:
        path: of the leaf, `gen/layers/0/mlp/down/kernel`.
        shape: of the leaf.
        num_shards: the size of `fsdp`.
    """
    axes: list[Axes] = [None] * len(shape)
    stacked = int("/layers/" in path and not path.split("/layers/")[1][0].isdigit())
    if path.startswith(("und/", "gen/")) and path.endswith(("/kernel", "/embedding")):
        divisible = [i for i in range(stacked, len(shape)) if shape[i] % num_shards == 0]
        if divisible:
            axes[divisible[0]] = WEIGHTS
    return tuple(axes)


def weight_sharding(mesh: Mesh | None, path: str, shape: tuple[int, ...]) -> NamedSharding | None:
    """Where a leaf of the parameters lies on a mesh; None without one: on the default device."""
    if mesh is None:
        return None
    axes = weight_axes(path, shape, mesh.shape.get("fsdp", 1))
    names = [name and tuple(x for x in name if x in mesh.shape) or None for name in axes]
    return NamedSharding(mesh, PartitionSpec(*names))


def divide_weights(prefix: str, params: dict) -> dict:
    """Inside a program, the tree at `prefix` of the parameters as `place_params` places it."""

    def divide(path: tuple, leaf: Array) -> Array:
        name = "/".join([prefix, *(key.key for key in path)])
        return constrain(leaf, *weight_axes(name, leaf.shape, num_shards(WEIGHTS)))

    return jax.tree_util.tree_map_with_path(divide, params)


def place_params(params: dict, mesh: Mesh | None) -> dict:
    """A tree of parameters on the devices of a mesh; as it is without one."""
    if mesh is None:
        return params

    def place(path: tuple, leaf: Array) -> Array:
        name = "/".join(key.key for key in path)
        return jax.device_put(leaf, weight_sharding(mesh, name, leaf.shape))

    return jax.tree_util.tree_map_with_path(place, params)


def pad_tokens(x: Array) -> Array:
    """x [B, M, ...] with zeros behind its tokens, so that they divide evenly."""
    missing = -x.shape[1] % num_shards(TOKENS)
    return jnp.pad(x, [(0, 0), (0, missing), *[(0, 0)] * (x.ndim - 2)]) if missing else x


def over_heads(function: Callable, *arrays: Any, batch: tuple[str, ...]) -> Array:
    """`function` of the arrays, each device on its own examples and heads; nothing moves inside.

    Kernels that XLA cannot divide, it need not.

    Args:
        function: from arrays like these to [B, S, heads, H].
        arrays: [B, S, heads, H], or of another number of axes, of which the first is B; or trees of
            such.
        batch: what divides their examples.

    Raises:
        ValueError: heads that do not divide.
    """
    if not mesh_sizes():
        return function(*arrays)
    leaves = jax.tree.leaves(arrays)
    for x in leaves:
        if x.ndim == 4:
            check_heads(x.shape[2], mesh_sizes())
    batch_axes = batch if len(leaves[0]) % num_shards(batch) == 0 else None
    heads = spec(batch_axes, None, HEADS)
    specs = jax.tree.map(lambda x: heads if x.ndim == 4 else spec(batch_axes), arrays)
    # Not checked: a kernel does not say over which axes its result varies.
    return jax.shard_map(function, in_specs=specs, out_specs=heads, check_vma=False)(*arrays)


def over_tokens(function: Callable, x: Array, weights: Array, *, batch: tuple[str, ...]) -> Array:
    """`function` of x [B, S, D] and of weights that are whole, each device on its own tokens."""
    if not mesh_sizes():
        return function(x, weights)
    batch_axes = batch if len(x) % num_shards(batch) == 0 else None
    tokens = TOKENS if x.shape[1] % num_shards(TOKENS) == 0 else None
    own = spec(batch_axes, tokens, None)
    return jax.shard_map(function, in_specs=(own, spec()), out_specs=own, check_vma=False)(
        x, weights
    )


def check_heads(heads: int, sizes: dict[str, int]) -> None:
    """Raise ValueError if this many key/value heads do not divide over the mesh."""
    divided = math.prod(sizes.get(name, 1) for name in HEADS)
    if heads % divided:
        named = " x ".join(f"{name}={sizes[name]}" for name in HEADS if sizes.get(name, 1) > 1)
        choices = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        raise ValueError(
            f"mesh {named}: {heads} key/value heads do not divide; choose seq x fsdp from {choices}"
        )
