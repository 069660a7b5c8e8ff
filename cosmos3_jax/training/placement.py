"""Where a batch and a state lie on a mesh of devices.

`data` divides examples. `fsdp` divides weights, and with them their masters, optimizer state and
averages (ZeRO stage 3, Rajbhandari et al., arXiv:1910.02054). Of an example, `seq` and `fsdp`
divide the tokens, as they do at inference. So `fsdp` computes nothing twice though it does not
divide examples; and a video of a size at which few examples fit on a device is divided too.

Inside a program these functions read the mesh that `jax.set_mesh` made the ambient one, and do
nothing without one. Outside they take the mesh as an argument.
"""

import math
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.tree_util import keystr

from cosmos3_jax.parallel import sharding
from cosmos3_jax.parallel.sharding import PROMPTS, WEIGHTS
from cosmos3_jax.training.flow import Batch
from cosmos3_jax.training.params import TOWERS

Tree = Any
# How many axes a field has if its first is that of examples.
BATCH_AXES = {
    "text_ids": 2, "text_mask": 2, "video": 5, "sound": 3, "fps": 1, "frame_mask": 2,
    "uncond_ids": 2, "uncond_mask": 2, "weight": 1,
}  # fmt: skip


def divide_batch(batch: Tree, axis: int = 0) -> Tree:
    """Inside a program, arrays with their examples on `axis`, divided by `data`."""

    def divide(x: Array) -> Array:
        axes = [None] * x.ndim
        axes[axis] = PROMPTS
        return sharding.constrain(x, *axes)

    return jax.tree.map(divide, batch)


def divide_state(tree: Tree) -> Tree:
    """Inside a program, each leaf of a state, or of a part of it, as `state_shardings` says."""
    num_shards = sharding.num_shards(WEIGHTS)

    def divide(path: tuple, leaf: Array) -> Array:
        return sharding.constrain(leaf, *sharding.weight_axes(_name(path), leaf.shape, num_shards))

    return jax.tree_util.tree_map_with_path(divide, tree)


def state_shardings(state: Tree, mesh: Mesh) -> Tree:
    """A sharding for each leaf of a state, of arrays or of `jax.ShapeDtypeStruct`s.

    What stands beside a weight lies as the weight does. All else is on every device whole:
    counters, norms, biases, and a LoRA with all that belongs to it, which weighs little.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: sharding.weight_sharding(mesh, _name(path), leaf.shape), state
    )


def place_state(state: Tree, mesh: Mesh) -> Tree:
    """A state that lies anywhere, on the devices of a mesh."""
    return jax.device_put(state, state_shardings(state, mesh))


def state_template(state: Tree, mesh: Mesh) -> Tree:
    """What `Checkpoints.restore` needs to read a state onto a mesh; nothing is allocated.

    Args:
        state: of arrays, or of `jax.eval_shape`, for example of `init_state`.
        mesh: the devices.
    """
    return jax.tree.map(
        lambda x, placed: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed),
        state, state_shardings(state, mesh),
    )  # fmt: skip


def place_batch(batch: Batch, mesh: Mesh) -> Batch:
    """A batch from the host, each device's examples sent to it and to no other.

    What has no axis of examples, a scalar `fps` or one prompt for none, goes to all. In a job of
    several processes each gives the whole batch, and sends the examples of its own devices.

    Raises:
        ValueError: the examples do not divide over the mesh.
    """
    count = len(batch.video)
    _check_divides(count, 1, dict(mesh.shape))
    axes = tuple(name for name in PROMPTS if name in mesh.shape)

    def place(name: str) -> Array | None:
        x = getattr(batch, name)
        if x is None:
            return None
        # By its axes: one prompt for none may be as long as there are examples. An array of another
        # number of examples goes to all whole; `check_batch` refuses it, with its name.
        divided = np.ndim(x) == BATCH_AXES[name] and len(x) == count
        spec = PartitionSpec(axes) if divided else PartitionSpec()
        return jax.device_put(x, NamedSharding(mesh, spec))

    return batch.replace(**{name: place(name) for name in BATCH_AXES})


def check_examples(count: int, microbatches: int) -> None:
    """Raise ValueError if a batch does not divide over microbatches and the ambient mesh."""
    if microbatches < 1 or count % microbatches:
        raise ValueError(
            f"a batch of {count} cannot go through in {microbatches} equal parts; choose from "
            + ", ".join(str(n) for n in range(1, count + 1) if count % n == 0)
        )
    _check_divides(count, microbatches, sharding.mesh_sizes())


def _check_divides(count: int, microbatches: int, sizes: dict[str, int]) -> None:
    """Raise ValueError if a part of a batch does not divide over a mesh of these sizes."""
    if sizes.get("cfg", 1) > 1:
        raise ValueError(
            f"mesh cfg={sizes['cfg']}: training has no branches of guidance; give its devices to "
            "data"
        )
    ways = math.prod(sizes.get(name, 1) for name in PROMPTS)
    if count // microbatches % ways:
        raise ValueError(
            f"mesh data={ways}: {count // microbatches} examples at a time do not divide; give a "
            f"multiple of {microbatches * ways} examples"
        )


def _name(path: tuple) -> str:
    """The name of the weight that a leaf of a state belongs to: what follows `und` or `gen`.

    An optimizer has trees like that of the parameters anywhere inside of its own.
    """
    keys = keystr(path, simple=True, separator="/").split("/")
    start = next((i for i, key in enumerate(keys) if key in TOWERS), len(keys))
    return "/".join(keys[start:])
