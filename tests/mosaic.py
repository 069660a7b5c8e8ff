"""Runs a kernel written for Hopper GPUs on a CPU: its own code, a thread for each warpgroup.

`on_cpu` puts stand-ins for Pallas's names into the kernel's module. Memory is NumPy's, and products
are float32. Barriers are real ones: a wait that no arrival ends is an error, and so is a wait for a
phase that is not the last one. The blocks of a cluster run at the same time, and of a copy for all
of them each makes its share. Copies and products are done when they are asked for: a missing wait
for one of them is not seen. Layouts, and the room in shared memory, are not looked at either.

JAX's interpreter (0.10) knows neither products of registers nor accumulators that are written to.
"""

import itertools
import threading
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl

TIMEOUT = 60  # seconds of a wait
# Of a thread: `axes`, its place in the grid; `member`, its block's in the cluster; `scope`, what
# the blocks of the cluster allocate.
_here = threading.local()


class Ref:
    """Memory, or a part of it; what lies behind its end reads as zeros and is not written.

    Shared memory is an array for each block of a cluster.
    """

    def __init__(self, *arrays: np.ndarray, shape: tuple[int, ...] | None = None):
        self.arrays = arrays
        self.shape, self.dtype = shape or arrays[0].shape, arrays[0].dtype

    @property
    def at(self) -> "Ref":
        return self

    @property
    def array(self) -> np.ndarray:
        return self.arrays[_here.member if len(self.arrays) > 1 else 0]

    def __getitem__(self, index: Any) -> Any:
        """A part of it; of `ref[...]`, the values."""
        if index is Ellipsis:
            return jnp.asarray(self.read())
        index = index if isinstance(index, tuple) else (index,)
        index += (slice(None),) * (self.array.ndim - len(index))
        places, shape = [], []
        for each, size in zip(index, self.shape, strict=True):
            if isinstance(each, pl.Slice):
                places.append(slice(int(each.start), int(each.start) + each.size))
                shape.append(each.size)
            elif isinstance(each, slice):
                assert each == slice(None), each
                places.append(each)
                shape.append(size)
            else:
                places.append(int(each))
        parts = [array[tuple(places)] for array in self.arrays]
        return Ref(*parts, shape=tuple(shape)) if shape else jnp.asarray(parts[0])

    def __setitem__(self, index: Any, value: Any) -> None:
        assert index is Ellipsis, index
        value = np.asarray(value)
        assert value.shape == self.shape and value.dtype == self.dtype, (value.shape, value.dtype)
        self.array[...] = value[tuple(map(slice, self.array.shape))]

    def read(self) -> np.ndarray:
        whole = np.zeros(self.shape, self.dtype)
        whole[tuple(map(slice, self.array.shape))] = self.array
        return whole

    def transpose(self, axes: tuple[int, ...]) -> "Ref":
        return Ref(*(array.transpose(axes) for array in self.arrays))


class Barrier:
    """One of a block of a cluster of `members`, each of which may make a part of an arrival."""

    def __init__(self, arrivals: int, members: int):
        self.members, self.arrivals, self.arrived, self.phase = members, arrivals * members, 0, 0
        self.changed, self.waits = threading.Condition(), {}

    def arrive(self, parts: int) -> None:
        with self.changed:
            self.arrived += parts
            if self.arrived == self.arrivals:
                self.arrived, self.phase = 0, self.phase + 1
                self.changed.notify_all()

    def wait(self) -> None:
        with self.changed:
            me = threading.get_ident()
            phase = self.waits.get(me, 0)
            assert self.phase <= phase + 1, "the barrier is a phase ahead: its parity says nothing"
            assert self.changed.wait_for(lambda: self.phase > phase, TIMEOUT), "nobody arrives"
            self.waits[me] = phase + 1


class Barriers:
    """Those of each block of a cluster, or a part of them; with `everyone` all hear an arrival."""

    def __init__(self, blocks: list[list[Barrier]], everyone: bool):
        self.blocks, self.everyone = blocks, everyone

    @property
    def at(self) -> "Barriers":
        return self

    def __getitem__(self, index: Any) -> "Barriers":
        return Barriers([[block[int(index)]] for block in self.blocks], self.everyone)

    def arrive(self) -> None:
        for [barrier] in self.blocks if self.everyone else [self.blocks[_here.member]]:
            barrier.arrive(barrier.members)

    def wait(self) -> None:
        [barrier] = self.blocks[_here.member]
        barrier.wait()


def _shared(shape: tuple[int, ...], dtype: Any, transforms: tuple = ()) -> Callable[[int], Ref]:
    return lambda members: Ref(*(np.full(shape, np.nan, dtype) for _ in range(members)))


def _barriers(
    num_arrivals: int = 1, num_barriers: int = 1, collective_axes: Any = None
) -> Callable[[int], Barriers]:
    def make(members: int) -> Barriers:
        arrivals = num_arrivals * (members if collective_axes else 1)
        blocks = [[Barrier(arrivals, members) for _ in range(num_barriers)] for _ in range(members)]
        return Barriers(blocks, everyone=bool(collective_axes))

    return make


def _accumulator(shape: tuple[int, int], dtype: Any) -> Callable[[int], Ref]:
    return lambda members: Ref(np.zeros(shape, dtype))


def _wgmma(accumulator: Ref, a: Any, b: Ref) -> None:
    a = a.read() if isinstance(a, Ref) else np.asarray(a)
    accumulator.array[...] += a.astype(np.float32) @ b.read().astype(np.float32)


def _copy_in(source: Ref, target: Ref, barrier: Barriers, collective_axes: Any = None) -> None:
    whole = source.read()
    if not collective_axes:
        target[...] = whole
        barrier.arrive()
        return
    share = len(whole) // len(target.arrays)
    rows = slice(_here.member * share, (_here.member + 1) * share)
    for array, [each] in zip(target.arrays, barrier.blocks, strict=True):
        array[rows] = whole[rows]
        each.arrive(1)


def _copy_out(source: Ref, target: Ref) -> None:
    target[...] = source.read()


def _load(ref: Ref, index: tuple = (), *, layout: Any, optimized: bool = True) -> jax.Array:
    assert index == (), index
    return ref[...]


def _run_scoped(function: Callable, *makers: Any, collective_axes: Any = None) -> Any:
    return function(*(_here.scope.together(makers) if collective_axes else _made(makers, 1)))


def _made(makers: Any, members: int) -> Any:
    return jax.tree.map(lambda maker: maker(members), makers)


class _Scope:
    """What the blocks of one cluster allocate, all of it once."""

    def __init__(self, members: int, warpgroups: int):
        self.members, self.meeting = members, threading.Barrier(members * warpgroups)
        self.lock, self.made = threading.Lock(), None

    def together(self, makers: Any) -> Any:
        with self.lock:
            self.made = self.made or _made(makers, self.members)
        self.meeting.wait(TIMEOUT)
        return self.made


def _kernel(
    body: Callable, *, out_type: Any, grid: tuple[int, ...], grid_names: tuple[str, ...],
    num_threads: int, thread_name: str, cluster: tuple[int, ...] = (1,),
    cluster_names: tuple[str, ...] = ("member",), **_: Any,
) -> Callable:  # fmt: skip
    [members], [member_name] = cluster, cluster_names

    def call(*arrays: Any) -> Any:
        inputs = [Ref(np.array(array)) for array in arrays]
        outputs = jax.tree.map(lambda out: Ref(np.full(out.shape, np.nan, out.dtype)), out_type)
        for point in itertools.product(*map(range, grid)):
            scope, errors = _Scope(members, num_threads), []
            place = dict(zip(grid_names, point, strict=True))

            def warpgroup(member: int, index: int, place=place, scope=scope, errors=errors):
                _here.scope, _here.member = scope, member
                _here.axes = {**place, member_name: member, thread_name: index}
                try:
                    body(*inputs, *jax.tree.leaves(outputs))
                except BaseException as error:
                    errors.append(error)
                    scope.meeting.abort()

            threads = [
                threading.Thread(target=warpgroup, args=each)
                for each in itertools.product(range(members), range(num_threads))
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            if errors:
                raise errors[0]
        return jax.tree.map(lambda out: jnp.asarray(out.arrays[0]), outputs)

    return call


def _fori_loop(start: Any, stop: Any, body: Callable, carry: Any) -> Any:
    for i in range(int(start), int(stop)):
        carry = body(jnp.int32(i), carry)
    return carry


def _when(condition: Any) -> Callable[[Callable], Any]:
    return lambda function: function() if bool(condition) else None


def _nothing(*_: Any, **__: Any) -> None:
    pass


PALLAS = SimpleNamespace(
    cdiv=lambda a, b: -(-a // b), ds=pl.ds, run_scoped=_run_scoped, when=_when
)  # fmt: skip
MOSAIC = SimpleNamespace(
    ACC=_accumulator, Barrier=_barriers, ClusterBarrier=_barriers, CompilerParams=_nothing,
    SMEM=_shared,
    SwizzleTransform=_nothing, TilingTransform=_nothing, kernel=_kernel,
    barrier_arrive=Barriers.arrive, barrier_wait=Barriers.wait,
    broadcasted_iota=lambda dtype, shape, axis, layout: lax.broadcasted_iota(dtype, shape, axis),
    commit_smem=_nothing, load=_load, copy_gmem_to_smem=_copy_in, copy_smem_to_gmem=_copy_out,
    layout_cast=lambda x, layout: x, set_max_registers=_nothing, wait_smem_to_gmem=_nothing,
    wgmma=_wgmma, wgmma_wait=_nothing, wgmma_accumulator_load=lambda ref, wait_n: ref[...],
)  # fmt: skip
LAX = SimpleNamespace(
    axis_index=lambda name: jnp.int32(_here.axes[name]), broadcast_in_dim=lax.broadcast_in_dim,
    div=lax.div, fori_loop=_fori_loop, optimization_barrier=lambda x: x, rem=lax.rem,
    rsqrt=lax.rsqrt,
)  # fmt: skip


def on_cpu(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> None:
    """Have a kernel's module, which names them `pl`, `plgpu` and `lax`, use the stand-ins."""
    for name, stand_in in (("pl", PALLAS), ("plgpu", MOSAIC), ("lax", LAX)):
        monkeypatch.setattr(module, name, stand_in)
