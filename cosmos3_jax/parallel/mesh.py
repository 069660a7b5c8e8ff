"""Meshes as a user names them, `cfg=2,seq=2`: read, checked against a job, chosen by default."""

import contextlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from cosmos3_jax.parallel.sharding import AXES, check_heads

IDLE = "idle"  # the axis of devices that a job does not divide over


def parse_mesh(text: str) -> dict[str, int]:
    """`cfg=2,seq=2` -> {"cfg": 2, "seq": 2}. Raises ValueError on anything else."""
    sizes: dict[str, int] = {}
    for part in filter(None, text.replace(" ", "").split(",")):
        name, _, size = part.partition("=")
        if ";" in part:
            raise ValueError(f"mesh {text!r}: separate its axes with commas, as in cfg=2,seq=2")
        if name not in AXES or name in sizes:
            twice = "is there twice" if name in sizes else f"is none of {', '.join(AXES)}"
            raise ValueError(f"mesh {text!r}: {name!r} {twice}; write for example cfg=2,seq=2")
        if not size.isdecimal() or int(size) < 1:
            raise ValueError(f"mesh {text!r}: {name}={size} must be a whole number from 1 on")
        sizes[name] = int(size)
    if not sizes:
        raise ValueError(f"mesh {text!r} names no axis; write for example cfg=2,seq=2, or data=1")
    return sizes


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with all of our axes over these devices, all of this process and others' if None;
    devices along an axis `idle` do the same as each other.

    Neighbouring devices share tokens, which they exchange in every layer; the branches of guidance
    meet once a step, and prompts never. Processes hold neighbouring devices, so that on several
    machines tokens stay within one as far as they can.

    Raises:
        ValueError: if the product of the sizes is not the number of devices.
    """
    explicit = devices is not None
    devices = list(jax.devices() if devices is None else devices)
    axes = (IDLE, *AXES) if IDLE in sizes else AXES
    shape = [sizes.get(name, 1) for name in axes]
    count = math.prod(shape)
    if count > len(devices) or (count < len(devices) and (explicit or jax.process_count() > 1)):
        fewer = " at most" if not explicit and jax.process_count() == 1 else ""
        raise ValueError(
            f"mesh {describe(sizes)} has {count} devices, and there are {len(devices)}: the "
            f"product of its axes must be{fewer} {len(devices)}"
        )
    kinds = (AxisType.Auto,) * len(axes)
    return Mesh(np.asarray(devices[:count]).reshape(shape), axes, axis_types=kinds)


def describe(sizes: Mapping[str, int]) -> str:
    """`cfg=2,seq=2`, axes of one device left out."""
    return ",".join(f"{k}={sizes[k]}" for k in AXES if sizes.get(k, 1) > 1) or "of one device"


def as_automatic(mesh: Mesh) -> Mesh:
    """A mesh of ours or of a user's, its axes automatic. Raises ValueError if it has none of ours.

    `jax.make_mesh` makes explicit axes unless told otherwise.
    """
    if not isinstance(mesh, Mesh):
        raise ValueError(f"mesh={mesh!r}: give a jax.sharding.Mesh, or a text as cfg=2,seq=2")
    foreign = [k for k, size in mesh.shape.items() if k not in (*AXES, IDLE) and size > 1]
    if foreign:
        raise ValueError(
            f"mesh axis {foreign[0]!r} is none of {', '.join(AXES)}, and would be idle; name it so"
        )
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def check_mesh(sizes: Mapping[str, int], *, kv_heads: int, batch: int, guidance: bool) -> None:
    """Raise ValueError if a job does not divide over a mesh.

    Args:
        sizes: of the mesh's axes.
        kv_heads: key/value heads of the model.
        batch: prompts at a time.
        guidance: whether there are two branches.
    """
    cfg, data = sizes.get("cfg", 1), sizes.get("data", 1)
    if cfg not in (1, 2):
        raise ValueError(f"mesh cfg={cfg}: guidance has two branches; choose cfg from 1, 2")
    if cfg == 2 and not guidance:
        raise ValueError(
            "mesh cfg=2: with guidance_scale=1 there is one branch; leave cfg out, and give its "
            "devices to seq"
        )
    if batch % data:
        choices = ", ".join(str(n) for n in range(1, batch + 1) if batch % n == 0)
        many = f"{batch} prompts do" if batch > 1 else "one prompt does"
        raise ValueError(
            f"mesh data={data}: {many} not divide; choose data from {choices}, or, in Python, give "
            f"a list of a multiple of {data} prompts"
        )
    check_heads(kv_heads, dict(sizes))


def default_sizes(
    devices: int, *, kv_heads: int, batch: int = 1, guidance: bool = True, shard_weights=False
) -> dict[str, int] | None:
    """The default mesh of a job: prompts first, which share nothing, then branches of guidance,
    then tokens; None if the job does not divide.

    Args:
        devices: how many there are, all of which are used.
        kv_heads, batch, guidance: see `check_mesh`.
        shard_weights: divide the weights with the tokens, because they do not fit whole.
    """
    data = max(n for n in range(1, batch + 1) if batch % n == 0 and devices % n == 0)
    while data:
        rest = devices // data
        for cfg in (2, 1) if guidance and not shard_weights else (1, 2) if guidance else (1,):
            if rest % cfg == 0 and kv_heads % (rest // cfg) == 0:
                sizes = {"data": data, "cfg": cfg}
                return sizes | {"fsdp" if shard_weights else "seq": rest // cfg}
        smaller = [n for n in range(1, data) if batch % n == 0 and devices % n == 0]
        data = max(smaller, default=0)
    return None


def reachable(mesh: Mesh | None, x: Any) -> Any:
    """An array where a program on this mesh can read it: copied, if other devices have it."""
    if mesh is None or not isinstance(x, jax.Array) or not x.committed:
        return x
    if x.sharding.device_set == set(mesh.devices.flat):
        return x
    return jax.device_put(x, NamedSharding(mesh, PartitionSpec()))


class Meshes:
    """The mesh of each job: the one that was asked for, or the default one over the same devices.

    Attributes:
        weights: the mesh whose devices hold the weights; None where there is one device, and
            nobody asked.
    """

    def __init__(self, asked: Mesh | str | None, kv_heads: int, shard_weights: bool = False):
        """Checks that the model divides over the mesh; `of` checks that a job does.

        Args:
            asked: a mesh, or one as `parse_mesh` reads it; None for the default ones.
            kv_heads: key/value heads of the model.
            shard_weights: see `default_sizes`.

        Raises:
            ValueError: see `parse_mesh`, `make_mesh`, `as_automatic` and `check_mesh`.
        """
        self._kv_heads, self._shard_weights = kv_heads, shard_weights
        self._asked = None
        self.weights = None
        if asked is not None:
            mesh = make_mesh(parse_mesh(asked)) if isinstance(asked, str) else as_automatic(asked)
            batch = mesh.shape.get("data", 1)
            check_mesh(mesh.shape, kv_heads=kv_heads, batch=batch, guidance=True)
            self._asked = self.weights = mesh
        elif jax.config.jax_default_device is None and len(jax.devices()) > 1:
            count = len(jax.devices())
            while self._default(count) is None and jax.process_count() == 1:
                count -= 1
            self.weights = self._default_mesh(jax.devices()[:count])

    def of(self, batch: int, guidance: bool) -> Mesh | None:
        """The mesh for a job. Raises ValueError if it does not divide."""
        if self._asked is not None:
            sizes = self._asked.shape
            check_mesh(sizes, kv_heads=self._kv_heads, batch=batch, guidance=guidance)
            return self._asked
        if self.weights is None:
            return None
        return self._default_mesh(list(self.weights.devices.flat), batch, guidance)

    def sizes(self, batch: int, guidance: bool) -> dict[str, int]:
        """Of the axes of a job's mesh, empty without one. One asked for is not checked."""
        mesh = self._asked or self.of(batch, guidance)
        return {} if mesh is None else dict(mesh.shape)

    def _default_mesh(self, devices: Sequence, batch: int = 1, guidance: bool = True) -> Mesh:
        """As many of the devices as the job divides over; the others repeat what these do."""
        total = len(devices)
        divisors = [n for n in range(total, 0, -1) if total % n == 0]
        count, sizes = next(
            (n, sizes) for n in divisors if (sizes := self._default(n, batch, guidance))
        )
        return make_mesh(sizes if count == total else sizes | {IDLE: total // count}, devices)

    def _default(self, devices: int, batch: int = 1, guidance: bool = True) -> dict | None:
        return default_sizes(
            devices, kv_heads=self._kv_heads, batch=batch, guidance=guidance,
            shard_weights=self._shard_weights,
        )  # fmt: skip


def ambient(mesh: Mesh | None) -> contextlib.AbstractContextManager:
    """Programs traced in this context run on the mesh; None is the default device."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)
