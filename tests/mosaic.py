"""Runs a kernel written for Hopper GPUs on a CPU: its own code, a thread for each warpgroup.

`on_cpu` puts stand-ins for Pallas's names into the kernel's module. Memory is NumPy's, and products
are float32. Barriers are real ones: a wait that no arrival ends is an error, and so is a wait for a
phase that is not the last one. Copies and products are done when they are asked for: a missing wait
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

TIMEOUT = 60  # seconds of a wait
_here = threading.local()  # `axes`: a thread's place in the grid; `scope`: its block's allocations


class Slice:
    def __init__(self, start: Any, size: int):
        self.start, self.size = int(start), size


class Ref:
    """Memory, or a part of it; what lies behind its end reads as zeros and is not written."""

    def __init__(self, array: np.ndarray, shape: tuple[int, ...] | None = None):
        self.array, self.shape, self.dtype = array, shape or array.shape, array.dtype

    @property
    def at(self) -> "Ref":
        return self

    def __getitem__(self, index: Any) -> Any:
        """A part of it; of `ref[...]`, the values."""
        if index is Ellipsis:
            return jnp.asarray(self.read())
        index = index if isinstance(index, tuple) else (index,)
        index += (slice(None),) * (self.array.ndim - len(index))
        places, shape = [], []
        for each, size in zip(index, self.shape, strict=True):
            if isinstance(each, Slice):
                places.append(slice(each.start, each.start + each.size))
                shape.append(each.size)
            elif isinstance(each, slice):
                assert each == slice(None), each
                places.append(each)
                shape.append(size)
            else:
                places.append(int(each))
        part = self.array[tuple(places)]
        return Ref(part, tuple(shape)) if shape else jnp.asarray(part)

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
        return Ref(self.array.transpose(axes))


class Barrier:
    def __init__(self, arrivals: int):
        self.arrivals, self.arrived, self.phase = arrivals, 0, 0
        self.changed, self.waits = threading.Condition(), {}

    def arrive(self) -> None:
        with self.changed:
            self.arrived += 1
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


class Barriers(list):
    @property
    def at(self) -> "Barriers":
        return self

    def __getitem__(self, index: Any) -> Barrier:
        return super().__getitem__(int(index))


def _shared(shape: tuple[int, ...], dtype: Any, transforms: tuple = ()) -> Callable[[], Ref]:
    return lambda: Ref(np.full(shape, np.nan, dtype))


def _barriers(num_arrivals: int = 1, num_barriers: int = 1) -> Callable[[], Barriers]:
    return lambda: Barriers(Barrier(num_arrivals) for _ in range(num_barriers))


def _accumulator(shape: tuple[int, int], dtype: Any) -> Callable[[], Ref]:
    return lambda: Ref(np.zeros(shape, dtype))


def _wgmma(accumulator: Ref, a: Any, b: Ref) -> None:
    a = a.read() if isinstance(a, Ref) else np.asarray(a)
    accumulator.array += a.astype(np.float32) @ b.read().astype(np.float32)


def _copy_in(source: Ref, target: Ref, barrier: Barrier) -> None:
    target[...] = source.read()
    barrier.arrive()


def _copy_out(source: Ref, target: Ref) -> None:
    target[...] = source.read()


def _load(ref: Ref, index: tuple, layout: Any, optimized: bool = True) -> jax.Array:
    assert index == (), index
    return ref[...]


def _run_scoped(function: Callable, *makers: Any, collective_axes: Any = None) -> Any:
    made = _here.scope.together(makers) if collective_axes else _made(makers)
    return function(*made)


def _made(makers: Any) -> Any:
    return jax.tree.map(lambda maker: maker(), makers)


class _Scope:
    """What the warpgroups of one block allocate together."""

    def __init__(self, warpgroups: int):
        self.meeting, self.lock, self.made = threading.Barrier(warpgroups), threading.Lock(), None

    def together(self, makers: Any) -> Any:
        with self.lock:
            self.made = self.made or _made(makers)
        self.meeting.wait(TIMEOUT)
        return self.made


def _kernel(
    body: Callable, *, out_type: Any, grid: tuple[int, ...], grid_names: tuple[str, ...],
    num_threads: int, thread_name: str, **_: Any,
) -> Callable:  # fmt: skip
    def call(*arrays: Any) -> Any:
        inputs = [Ref(np.array(array)) for array in arrays]
        outputs = jax.tree.map(lambda out: Ref(np.full(out.shape, np.nan, out.dtype)), out_type)
        for point in itertools.product(*map(range, grid)):
            scope, errors = _Scope(num_threads), []

            def warpgroup(index: int, point=point, scope=scope, errors=errors) -> None:
                _here.scope = scope
                _here.axes = {**dict(zip(grid_names, point, strict=True)), thread_name: index}
                try:
                    body(*inputs, *jax.tree.leaves(outputs))
                except BaseException as error:
                    errors.append(error)
                    scope.meeting.abort()

            threads = [threading.Thread(target=warpgroup, args=(i,)) for i in range(num_threads)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            if errors:
                raise errors[0]
        return jax.tree.map(lambda out: jnp.asarray(out.array), outputs)

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
    cdiv=lambda a, b: -(-a // b), ds=Slice, run_scoped=_run_scoped, when=_when
)  # fmt: skip
MOSAIC = SimpleNamespace(
    ACC=_accumulator, Barrier=_barriers, CompilerParams=_nothing, SMEM=_shared,
    SwizzleTransform=_nothing, TilingTransform=_nothing, kernel=_kernel,
    barrier_arrive=Barrier.arrive, barrier_wait=Barrier.wait,
    broadcasted_iota=lambda dtype, shape, axis, layout: lax.broadcasted_iota(dtype, shape, axis),
    commit_smem=_nothing, load=_load, copy_gmem_to_smem=_copy_in, copy_smem_to_gmem=_copy_out,
    layout_cast=lambda x, layout: x, set_max_registers=_nothing, wait_smem_to_gmem=_nothing,
    wgmma=_wgmma, wgmma_accumulator_load=lambda accumulator, wait_n: accumulator[...],
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
