"""The one attention function, by the best kernel there is, and what can be known before it runs.

On a Hopper GPU the media tower's runs in our own kernel (`flash_attention`); else on a GPU in
cuDNN's; elsewhere, and in float32, in XLA's, which holds all logits at once.

Axes: B batch, S query tokens, T key tokens, N query heads, K key/value heads, H head dimension.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from cosmos3_jax.models import flash_attention
from cosmos3_jax.models.layers import rms_norm
from cosmos3_jax.models.rope import Rope, apply_rope
from cosmos3_jax.parallel import device as devices
from cosmos3_jax.parallel import sharding
from cosmos3_jax.parallel.device import AnyDevice

MAX_LOGIT_BYTES = 16 * 2**30

Text = tuple[Array, Array, Array]  # keys and values [B, T', K, H], and int32 [B]: how many are real


class RawHeads(struct.PyTreeNode):
    """Queries as they leave their product, still to be normed and rotated: by the kernel that reads
    them, if it can, which saves writing them down twice.

    Attributes:
        product: [B, S, >= heads, H], the queries first.
        scale: [B, H], of their norm, in the dtype of the computation.
        table: of their rotation.
        heads: how many are queries.
        epsilon: of the norm.
    """

    product: Array
    scale: Array
    table: Rope
    heads: int = struct.field(pytree_node=False)
    epsilon: float = struct.field(pytree_node=False)

    def turned(self) -> Array:
        """Normed and rotated [B, S, heads, H]."""
        scale = self.scale[:, None, None]
        normed = rms_norm(self.product[:, :, : self.heads], scale, self.epsilon)
        return apply_rope(normed, self.table)

    def turn(self) -> flash_attention.Turn:
        """For the kernel."""
        table = jnp.concatenate(self.table, axis=-1).astype(self.product.dtype)
        return flash_attention.Turn(self.scale, table, self.epsilon, self.heads)


Query = Array | RawHeads


def _turned(query: Query) -> Array:
    return query.turned() if isinstance(query, RawHeads) else query


def attention(
    query: Query,
    key: Array,
    value: Array,
    *,
    text: Text | None = None,
    causal: bool = False,
    tokens: int | None = None,
    batch: tuple[str, ...] = sharding.PROMPTS,
) -> Array:
    """Scaled dot-product attention with grouped key/value heads; scale H^-1/2, softmax in float32.

    Args:
        query: [B, S, N, H]; or `RawHeads`, unless a mesh divides heads.
        key, value: [B, T, K, H]; query head i reads key head i // (N / K).
        text: further keys and values, padded on the right, and how many of them are real.
        causal: whether query i reads keys 0..i only; without `text`.
        tokens: of the T, those that are not padding; None for all.
        batch: axes of the ambient mesh that divide the examples; each device has heads of its own.

    Returns:
        [B, S, N, H] in the query's dtype.

    Raises:
        ValueError: see `check_logits` and `sharding.over_heads`.
    """

    def attend(query, key, value, *text):
        if tokens is not None:
            key, value = key[:, :tokens], value[:, :tokens]
        return _attention(query, key, value, text or None, causal)

    return sharding.over_heads(attend, query, key, value, *(text or ()), batch=batch)


def _attention(query: Query, key: Array, value: Array, text: Text | None, causal: bool) -> Array:
    """By the best kernel for arrays of one device, the default one."""
    length, device = None, devices.default_device()
    if text is not None:
        raw = query.product if isinstance(query, RawHeads) else query
        obstacle = flash_attention.obstacle(raw, key, device)
        length = key.shape[1] + text[2]
        key, value = (jnp.concatenate(pair, axis=1) for pair in ((key, text[0]), (value, text[1])))
        if obstacle is None:
            return _fused_attention(True, False, query, key, value, length)
    query = _turned(query)
    obstacle = fused_obstacle(query.dtype, query.shape[-1], device)
    if obstacle is None:
        return _fused_attention(False, causal, query, key, value, length)
    batch, queries, heads, _ = query.shape
    check_logits(logit_bytes(batch, heads, queries, key.shape[1]), obstacle)
    return xla_attention(query, key, value, length, causal)


def fused_obstacle(dtype: jnp.dtype, head_dim: int, device: AnyDevice | None = None) -> str | None:
    """Why no kernel that holds few logits at a time can run, or None if one can.

    Without a `device`, on the default one.
    """
    device = device or devices.default_device()
    if device.platform != "gpu":
        return f"the device is a {device.platform.upper()}, not an NVIDIA GPU"
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"the dtype is {dtype}, not bfloat16 or float16"
    if head_dim % 8 or head_dim > 128:
        return f"the head dimension {head_dim} is not a multiple of 8 up to 128"
    capability = getattr(device, "compute_capability", "0")
    if float(capability) < 8:
        return f"the GPU has compute capability {capability}, less than 8.0 (Ampere)"
    return None


def logit_bytes(batch: int, heads: int, queries: int, keys: int) -> int:
    """Size of all logits of one attention in float32."""
    return 4 * batch * heads * queries * keys


def check_logits(size: int, obstacle: str | None) -> None:
    """Raise ValueError if logits of `size` bytes are more than `MAX_LOGIT_BYTES`.

    `obstacle` is why an attention has to hold them, see `fused_obstacle`.
    """
    if size > MAX_LOGIT_BYTES:
        raise ValueError(
            f"attention would hold {size / 2**30:.0f} GiB of logits (limit "
            f"{MAX_LOGIT_BYTES / 2**30:.0f}), because no kernel that needs fewer can run: "
            f"{obstacle}. Change that, or make the video smaller or shorter"
        )


def _library_attention(
    query: Array,
    key: Array,
    value: Array,
    length: Array | None = None,
    causal: bool = False,
    *,
    implementation: Literal["xla", "cudnn"],
) -> Array:
    with jax.default_matmul_precision("highest" if query.dtype == jnp.float32 else None):
        return jax.nn.dot_product_attention(
            query,
            key,
            value,
            key_value_seq_lengths=length,
            is_causal=causal,
            implementation=implementation,
        )


xla_attention = partial(_library_attention, implementation="xla")
cudnn_attention = partial(_library_attention, implementation="cudnn")


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _fused_attention(
    flash: bool, causal: bool, query: Query, key: Array, value: Array, length: Array | None
) -> Array:
    """By a kernel that holds few logits at a time: our own, or cuDNN's."""
    if flash and isinstance(query, RawHeads):
        return flash_attention.flash_attention(query.product, key, value, length, query.turn())
    if flash:
        return flash_attention.flash_attention(query, key, value, length)
    return cudnn_attention(query, key, value, length, causal)


def _fused_forward(
    flash: bool, causal: bool, query: Query, key: Array, value: Array, length: Array | None
) -> tuple[Array, Callable]:
    """cuDNN's, whatever runs without a derivative: its backward pass starts from its own result and
    log-sum-exps, and for any others it would have to run its forward pass again.

    JAX lets cuDNN have even numbers of tokens alone (it takes a bias that is not there for one), so
    a padding token is added to odd ones.
    """
    if length is None and key.shape[1] % 2:
        length = jnp.full(key.shape[0], key.shape[1], jnp.int32)

    def padded(query: Query, key: Array, value: Array) -> Array:
        query = _turned(query)
        mixed = cudnn_attention(_even(query), _even(key), _even(value), length, causal)
        return mixed[:, : query.shape[1]]

    return jax.vjp(padded, query, key, value)


def _fused_backward(flash: bool, causal: bool, transpose: Callable, gradient: Array) -> tuple:
    return *transpose(gradient), None


def keeps_attention(primitive, *_, **__) -> bool:
    """A policy for `jax.checkpoint`: of a layer that is computed again, keep the result and the
    log-sum-exps of cuDNN's attention. It is most of the time of a long video's layer, and no larger
    than the layer's input.
    """
    return primitive.name == "dot_product_attention_fwd_wrapper"


def _even(tokens: Array) -> Array:
    return jnp.pad(tokens, [(0, 0), (0, tokens.shape[1] % 2), (0, 0), (0, 0)])


_fused_attention.defvjp(_fused_forward, _fused_backward)
