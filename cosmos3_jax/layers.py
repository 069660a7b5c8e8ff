"""Layers of both towers: RMSNorm, SwiGLU, timestep embedding and the one attention function.

Axes: B batch, S query tokens, T key tokens, N query heads, K key/value heads, H head dimension, D
model. Weights are cast to a module's `dtype` when they are used, so they may be stored in any.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

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
KEY_BLOCK = 128  # cuDNN's kernel is at full rate for a whole number of these
SPLIT_FROM = 32768  # tokens from which a second small attention costs less than a mask on one large

Text = tuple[Array, Array, Array]  # keys and values [B, T', K, H], and int32 [B]: how many are real


def attention(
    query: Array, key: Array, value: Array, *, text: Text | None = None, causal: bool = False
) -> Array:
    """Scaled dot-product attention with grouped key/value heads; scale H^-1/2, softmax in float32.

    On a GPU it runs in cuDNN's fused kernel, elsewhere in XLA's, which holds all logits at once.

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
    obstacle = _cudnn_obstacle(query)
    if text is not None and obstacle is None and key.shape[1] >= SPLIT_FROM:
        return _split_attention(query, key, value, text)
    length = None
    if text is not None:
        length = key.shape[1] + text[2]
        key, value = (jnp.concatenate(pair, axis=1) for pair in ((key, text[0]), (value, text[1])))
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
def _split_attention(query: Array, key: Array, value: Array, text: Text) -> Array:
    """Attention over the media and over the text apart, merged by their log-sum-exps; exact.

    A mask costs the kernel several per cent of its rate, and so does a number of keys that is not a
    multiple of `KEY_BLOCK`. Here only the few keys behind the last whole block pay for it. The
    merging rule: Dao et al., 2022, section 3.1.
    """
    # Not through jax.nn, which rounds the log-sum-exp to the output's dtype.
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    whole = key.shape[1] - key.shape[1] % KEY_BLOCK
    scale = query.shape[-1] ** -0.5
    many, many_lse = cudnn.dot_product_attention(
        query, key[:, :whole], value[:, :whole], scale=scale, return_residual=True
    )
    few, few_lse = cudnn.dot_product_attention(
        query,
        jnp.concatenate([key[:, whole:], text[0]], axis=1),
        jnp.concatenate([value[:, whole:], text[1]], axis=1),
        scale=scale,
        mask_type=cudnn.MaskType.PADDING,
        q_seqlen=jnp.full_like(text[2], query.shape[1]),
        kv_seqlen=key.shape[1] - whole + text[2],
        return_residual=True,
    )
    share = jnp.swapaxes(jax.nn.sigmoid(few_lse - many_lse), 1, 2)[..., None]  # [B, S, N, 1]
    return (many + share * (few.astype(jnp.float32) - many)).astype(query.dtype)


def _split_forward(query: Array, key: Array, value: Array, text: Text):
    return _split_attention(query, key, value, text), (query, key, value, text)


def _split_backward(saved, gradient: Array):
    # cuDNN's own backward pass ignores the gradient of a log-sum-exp; that of the whole needs none.
    query, key, value, (text_key, text_value, length) = saved

    def whole(query, key, value, text_key, text_value):
        keys, values = jnp.concatenate([key, text_key], 1), jnp.concatenate([value, text_value], 1)
        return _cudnn_attention(query, keys, values, key.shape[1] + length)

    *gradients, text_key, text_value = jax.vjp(whole, query, key, value, text_key, text_value)[1](
        gradient
    )
    return *gradients, (text_key, text_value, None)


_split_attention.defvjp(_split_forward, _split_backward)
