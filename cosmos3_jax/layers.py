"""Layers of both towers: RMSNorm, SwiGLU, timestep embedding and the one attention function.

Axes: B batch, S query tokens, T key tokens, N query heads, K key/value heads, H head dimension, D
model. Weights are cast to a module's `dtype` when they are used, so they may be stored in any.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from cosmos3_jax import flash_attention
from cosmos3_jax.config import TransformerConfig


def precision(dtype: jnp.dtype) -> jax.lax.Precision | None:
    """Full float32 products for float32, where a GPU would take TF32; None otherwise."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def dense(
    features: int | tuple[int, ...], dtype: jnp.dtype, name: str, axis=-1, bias=False
) -> nn.DenseGeneral:
    """A linear map over `axis`, without bias unless asked for."""
    return nn.DenseGeneral(
        features, axis=axis, use_bias=bias, dtype=dtype, precision=precision(dtype), name=name
    )


class RMSNorm(nn.Module):
    """x / rms(x) in float32, rounded to `dtype`, times a learned scale (Zhang & Sennrich, 2019)."""

    epsilon: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon)
        return x.astype(self.dtype) * scale.astype(self.dtype)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), gate and up in one product (Shazeer, 2020)."""

    config: TransformerConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        gate_up = dense((2, self.config.intermediate_size), self.dtype, "gate_up")(x)
        hidden = nn.silu(gate_up[..., 0, :]) * gate_up[..., 1, :]
        return dense(self.config.hidden_size, self.dtype, "down")(hidden)


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
        angles = scaled[:, None] * np.exp(exponent.astype(np.float32))
        x = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
        x = nn.silu(dense(self.config.hidden_size, jnp.float32, "linear_1", bias=True)(x))
        return dense(self.config.hidden_size, jnp.float32, "linear_2", bias=True)(x)


MAX_LOGIT_BYTES = 16 * 2**30

Text = tuple[Array, Array, Array]  # keys and values [B, T', K, H], and int32 [B]: how many are real


def attention(
    query: Array, key: Array, value: Array, *, text: Text | None = None, causal: bool = False
) -> Array:
    """Scaled dot-product attention with grouped key/value heads; scale H^-1/2, softmax in float32.

    With text, on a Hopper GPU, it runs in our own kernel, see `flash_attention`; otherwise on a GPU
    in cuDNN's; elsewhere in XLA's, which holds all logits at once.

    Args:
        query: [B, S, N, H].
        key, value: [B, T, K, H]; query head i reads key head i // (N / K).
        text: further keys and values, padded on the right, and how many of them are real.
        causal: whether query i reads keys 0..i only; without `text`.

    Returns:
        [B, S, N, H] in the query's dtype.

    Raises:
        ValueError: if cuDNN's kernel cannot run and the logits would not fit in `MAX_LOGIT_BYTES`.
    """
    length = None
    if text is not None:
        length = key.shape[1] + text[2]
        key, value = (jnp.concatenate(pair, axis=1) for pair in ((key, text[0]), (value, text[1])))
        if flash_attention.obstacle(query, key) is None:
            return _flash_attention(query, key, value, length)
    obstacle = _cudnn_obstacle(query)
    if obstacle is None:
        return _cudnn_attention(query, key, value, length, causal)
    return _xla_attention(query, key, value, length, causal, obstacle)


def _cudnn_obstacle(query: Array) -> str | None:
    """Why cuDNN's attention cannot run on such an array here, or None if it can."""
    if jax.default_backend() != "gpu":
        return f"the backend is {jax.default_backend()}"
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        return f"the dtype is {query.dtype}, not bfloat16 or float16"
    if query.shape[-1] % 8 or query.shape[-1] > 128:
        return f"the head dimension {query.shape[-1]} is not a multiple of 8 up to 128"
    capability = getattr(jax.devices()[0], "compute_capability", "0")
    if float(capability) < 8:
        return f"the GPU has compute capability {capability}, less than 8.0 (Ampere)"
    return None


def _xla_attention(query, key, value, key_length, causal: bool, obstacle: str) -> Array:
    (batch, queries, heads, _), keys = query.shape, key.shape[1]
    size = 4 * batch * heads * queries * keys
    if size > MAX_LOGIT_BYTES:
        raise ValueError(
            f"attention of {queries} queries over {keys} keys would hold {size / 2**30:.0f} GiB of "
            f"logits (limit {MAX_LOGIT_BYTES / 2**30:.0f}), because cuDNN's kernel does not run: "
            f"{obstacle}. Use bfloat16 on an NVIDIA GPU, or a smaller or shorter video"
        )
    with jax.default_matmul_precision("highest" if query.dtype == jnp.float32 else None):
        return jax.nn.dot_product_attention(
            query,
            key,
            value,
            key_value_seq_lengths=key_length,
            is_causal=causal,
            implementation="xla",
        )


def _cudnn_attention(query, key, value, key_length=None, causal: bool = False) -> Array:
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        key_value_seq_lengths=key_length,
        is_causal=causal,
        implementation="cudnn",
    )


@jax.custom_vjp
def _flash_attention(query: Array, key: Array, value: Array, length: Array) -> Array:
    return flash_attention.flash_attention(query, key, value, length)


def _flash_forward(*arrays: Array) -> tuple[Array, tuple[Array, ...]]:
    return _flash_attention(*arrays), arrays


def _flash_backward(arrays: tuple[Array, ...], gradient: Array) -> tuple[Array | None, ...]:
    """cuDNN's: it runs its own forward pass again."""
    query, key, value, length = arrays
    _, transpose = jax.vjp(lambda *qkv: _cudnn_attention(*qkv, length), query, key, value)
    return *transpose(gradient), None


_flash_attention.defvjp(_flash_forward, _flash_backward)
