"""`jax.jit` for a process that lives long: only the programs that were used last are kept.

`jax.jit` keeps each program that it compiled, with its trace: 14 MiB of the host's memory for one
of the checkpoint `tiny` on a CPU. A server whose users choose sizes would grow with each size.
"""

import functools
import logging
import os
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cosmos3_jax.parallel import device

VARIABLE = "COSMOS3_JAX_PROGRAMS"

log = logging.getLogger("cosmos3_jax")


def read_bound(environment: Mapping[str, str], default: int = 64) -> int:
    """How many programs a process keeps. A generation of one size has three to five.

    A variable that is no whole number from 1 on is not followed, and that is said: no result
    depends on it.
    """
    text = environment.get(VARIABLE, str(default))
    if text.isdecimal() and int(text) >= 1:
        return int(text)
    log.warning("%s=%r is no whole number from 1 on; %d programs are kept", VARIABLE, text, default)
    return default


class BoundedJit:
    """A jitted function of which the programs used last are kept, of all such functions together.

    Positional arguments are trees of arrays, or of `jax.ShapeDtypeStruct`s to compile ahead; the
    options by name are static. What is compiled is what `jax.jit` compiles, with
    `device.compiler_options` where it is a program of its own.
    """

    def __init__(self, function: Callable, **jit_options):
        self.function, self.jit_options = function, jit_options

    def __call__(self, *arguments, **static) -> Any:
        return self._program(arguments, static)(*arguments, **static)

    def lower(self, *arguments, **static) -> jax.stages.Lowered:
        return self._program(arguments, static).lower(*arguments, **static)

    def eval_shape(self, *arguments, **static) -> Any:
        return self._program(arguments, static).eval_shape(*arguments, **static)

    def is_new(self, *arguments, **static) -> bool:
        """Whether the program for these arguments is asked for the first time, or again after it
        was dropped.
        """
        before = wrapper.cache_info().misses
        self._program(arguments, static)
        return wrapper.cache_info().misses > before

    def _program(self, arguments: tuple, static: dict) -> jax.stages.Wrapped:
        leaves, tree = jax.tree.flatten(arguments)
        shapes = tuple((np.shape(x), x.dtype) for x in leaves)
        mesh = jax.sharding.get_abstract_mesh()
        options = device.compiler_options()
        if options and is_traced(leaves):
            options = {}
        key = tree, shapes, tuple(sorted(static.items())), mesh
        return wrapper(self, key, tuple(options.items()))


def is_traced(leaves: list) -> bool:
    """Whether a function of these arguments becomes a part of another program, or is
    differentiated. JAX refuses compiler options there.
    """
    made_here = jnp.zeros(())  # traced within `jax.jit`, whatever the arguments are
    return any(isinstance(x, jax.core.Tracer) for x in (*leaves, made_here))


@functools.lru_cache(read_bound(os.environ))
def wrapper(function: BoundedJit, key: Hashable, compiler_options: tuple) -> jax.stages.Wrapped:
    """A wrapper for one program. JAX forgets a program when the function that it was traced from
    goes; so each is traced from a function of its own.
    """
    options = function.jit_options | {"compiler_options": dict(compiler_options)}
    return jax.jit(functools.partial(function.function), **options)
