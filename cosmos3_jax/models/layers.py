"""Layers of both towers beside attention and MLP: linear maps, RMSNorm, timestep embedding.

Axes: B batch, S tokens, D model. Weights are cast to a module's `dtype` when they are used, so they
may be stored in any.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from cosmos3_jax.config import TransformerConfig
from cosmos3_jax.parallel import sharding

LORA = ("lora_a", "lora_b")  # [inputs, R] and [R, outputs], beside a kernel [inputs, outputs]


def traced_once(param_shapes: Callable) -> Callable:
    """A `param_shapes` that traces each configuration once, which takes a second; every call gets a
    tree of its own.
    """
    known = functools.cache(param_shapes)

    @functools.wraps(param_shapes)
    def copied(*arguments, **options):
        return jax.tree.map(lambda x: x, known(*arguments, **options))

    return copied


def precision(dtype: DTypeLike) -> jax.lax.Precision | None:
    """Full float32 products for float32, where a GPU would take TF32; None otherwise."""
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None


def _dot_general(x: Array, kernel: Array, *args, **kwargs) -> Array:
    return jax.lax.dot_general(x, sharding.whole(kernel), *args, **kwargs)


class Dense(nn.DenseGeneral):
    """y = W x, and + B A x where `lora.attach` has put a low-rank pair beside the kernel (Hu et
    al., 2021).

    The product B A is never formed. So a training step holds no second copy of the weights, and
    computes no gradient of their size.
    """

    dot_general: Callable = _dot_general

    def __call__(self, x: Array) -> Array:
        y = super().__call__(x)
        if not self.has_variable("params", "lora_a"):
            return y
        a, b = (self.get_variable("params", name).astype(self.dtype) for name in LORA)
        low = jnp.tensordot(x.astype(self.dtype), a, a.ndim - 1, precision=self.precision)
        return y + jnp.tensordot(low, b, 1, precision=self.precision)


def dense(
    features: int | tuple[int, ...], dtype: jnp.dtype, name: str, axis=-1, bias=False
) -> Dense:
    """A linear map over `axis`, without bias unless asked for."""
    return Dense(
        features, axis=axis, use_bias=bias, dtype=dtype, precision=precision(dtype), name=name
    )


def over_last(vector: Array, x: Array) -> Array:
    """A vector [C] as [1, .., C], of as many axes as x [.., C]: to multiply or add along the last.

    NumPy's promotion of ranks does it too, and can be forbidden (`jax_numpy_rank_promotion`).
    """
    return vector.reshape((1,) * (x.ndim - 1) + vector.shape)


def rms_norm(x: Array, scale: Array, epsilon: float) -> Array:
    """x / rms(x) over the last axis in float32, rounded to the dtype of `scale`, times it (Zhang &
    Sennrich, 2019). The scale has as many axes as x.
    """
    x = x.astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + epsilon)
    return x.astype(scale.dtype) * scale


class Scale(nn.Module):
    """The learned scale of `rms_norm` over this many features."""

    features: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self) -> Array:
        scale = self.param("scale", nn.initializers.ones, (self.features,))
        return scale.astype(self.dtype)


class RMSNorm(nn.Module):
    """`rms_norm` with a learned scale, in `dtype`."""

    epsilon: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        return rms_norm(x, over_last(scale.astype(self.dtype), x), self.epsilon)


class TimestepEmbedding(nn.Module):
    """Integer timestep [B] -> float32 [B, D]: 128 cosines and sines, then a two-layer MLP.

    All in float32: the timestep reaches 999 in steps of one, which bfloat16 cannot tell apart.
    """

    config: TransformerConfig
    frequencies: int = 128

    @nn.compact
    def __call__(self, timestep: Array) -> Array:
        exponent = (
            -np.log(10_000) * np.arange(self.frequencies, dtype=np.float32) / self.frequencies
        )
        scaled = timestep.astype(jnp.float32) * np.float32(self.config.timestep_scale)
        angles = scaled[:, None] * np.exp(exponent.astype(np.float32))[None]
        x = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
        x = nn.silu(dense(self.config.hidden_size, jnp.float32, "linear_1", bias=True)(x))
        return dense(self.config.hidden_size, jnp.float32, "linear_2", bias=True)(x)
