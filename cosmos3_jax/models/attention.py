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

from cosmos3_jax.models import flash_attention, rope
from cosmos3_jax.models.layers import rms_norm
from cosmos3_jax.parallel import device as devices
from cosmos3_jax.parallel import sharding
from cosmos3_jax.parallel.device import AnyDevice

MAX_LOGIT_BYTES = 16 * 2**30

Parts = tuple[Array, Array, Array]  # queries [B, S, N, H], keys and values [B, T, K, H]
Text = tuple[Array, Array, Array]  # keys and values [B, T', K, H], and int32 [B]: how many are real


class Projected(struct.PyTreeNode):
    """Queries, keys and values of media as they leave their product, the first two still to be
    normed and rotated: by the kernels that read them, where there are such, which saves writing
    them down again.

    Attributes:
        product: [B, S, N + 2 K, H].
        query_scale, key_scale: [B, H], of their norms, in the dtype of the computation.
        table: of their rotation.
        key_heads: K.
        epsilon: of the norms.
    """

    product: Array
    query_scale: Array
    key_scale: Array
    table: rope.Rope
    key_heads: int = struct.field(pytree_node=False)
    epsilon: float = struct.field(pytree_node=False)

    def parts(self) -> tuple[Array, Array, Array]:
        """Queries [B, S, N, H], and keys and values [B, S, K, H]."""
        heads = self.product.shape[2] - 2 * self.key_heads
        query, key, value = jnp.split(self.product, (heads, heads + self.key_heads), axis=2)

        def turned(x: Array, scale: Array) -> Array:
            return rope.apply_rope(rms_norm(x, scale[:, None, None], self.epsilon), self.table)

        return turned(query, self.query_scale), turned(key, self.key_scale), value

    def turns(self) -> flash_attention.Turns:
        """For the kernels."""
        table = jnp.concatenate(self.table, axis=-1).astype(self.product.dtype)
        return flash_attention.Turns(self.query_scale, self.key_scale, table, self.epsilon)


def attention(
    query: Array,
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
        query: [B, S, N, H].
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
        return _attention((query, key, value), text or None, causal)

    return sharding.over_heads(attend, query, key, value, *(text or ()), batch=batch)


def attention_of_product(
    projected: Projected, text: Text, *, batch: tuple[str, ...] = sharding.PROMPTS
) -> Array:
    """`attention` of media, as they leave their product, over themselves and text.

    Args:
        projected: of the media; no mesh may divide its heads.
        text: keys and values, padded on the right, and how many of them are real.
        batch: axes of the ambient mesh that divide the examples.

    Returns:
        [B, S, N, H] in the dtype of the product.

    Raises:
        ValueError: see `check_logits`.
    """

    def attend(projected, *text):
        return _attention(projected, text, False)

    return sharding.over_heads(attend, projected, *text, batch=batch)


def _attention(media: Parts | Projected, text: Text | None, causal: bool) -> Array:
    """By the best kernel for arrays of one device, the default one."""
    device = devices.default_device()
    if text is not None:
        keys = media.product if isinstance(media, Projected) else media[1]
        if flash_attention.obstacle(keys, device) is None:
            return _fused_attention(True, False, media, text)
    media = _parts(media)
    query, key, _ = media
    obstacle = fused_obstacle(query.dtype, query.shape[-1], device)
    if obstacle is None:
        return _fused_attention(False, causal, media, text)
    batch, queries, heads, _ = query.shape
    keys = key.shape[1] + (0 if text is None else text[0].shape[1])
    check_logits(logit_bytes(batch, heads, queries, keys), obstacle)
    return xla_attention(*_in_a_row(media, text), causal)


def _parts(media: Parts | Projected) -> Parts:
    return media.parts() if isinstance(media, Projected) else media


def _in_a_row(media: Parts, text: Text | None) -> tuple[Array, Array, Array, Array | None]:
    """Queries, keys and values, the text's behind the media's, and how many of them are real."""
    query, key, value = media
    if text is None:
        return query, key, value, None
    text_key, text_value, count = text
    key, value = (jnp.concatenate(x, axis=1) for x in ((key, text_key), (value, text_value)))
    return query, key, value, media[1].shape[1] + count


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
    flash: bool, causal: bool, media: Parts | Projected, text: Text | None
) -> Array:
    """By a kernel that holds few logits at a time: our own, or cuDNN's."""
    if flash and isinstance(media, Projected):
        return flash_attention.attention_of_product(
            media.product, media.key_heads, media.turns(), *text
        )
    if flash:
        return flash_attention.flash_attention(*media, *text)
    return cudnn_attention(*_in_a_row(media, text), causal)


def _fused_forward(
    flash: bool, causal: bool, media: Parts | Projected, text: Text | None
) -> tuple[Array, Callable]:
    """cuDNN's, whatever runs without a derivative: its backward pass starts from its own result and
    log-sum-exps, and for any others it would have to run its forward pass again.

    JAX lets cuDNN have even numbers of tokens alone (it takes a bias that is not there for one), so
    a padding token is added to odd ones.
    """

    def padded(media: Parts | Projected, text: tuple[Array, Array] | None) -> Array:
        parts = _parts(media)
        query, key, value, length = _in_a_row(parts, text and (*text, count))
        if length is None and key.shape[1] % 2:
            length = jnp.full(key.shape[0], key.shape[1], jnp.int32)
        mixed = cudnn_attention(_even(query), _even(key), _even(value), length, causal)
        return mixed[:, : query.shape[1]]

    count = None if text is None else text[2]
    return jax.vjp(padded, media, None if text is None else text[:2])


def _fused_backward(flash: bool, causal: bool, transpose: Callable, gradient: Array) -> tuple:
    media, text = transpose(gradient)
    return media, None if text is None else (*text, None)


def keeps_attention(primitive, *_, **__) -> bool:
    """A policy for `jax.checkpoint`: of a layer that is computed again, keep the result and the
    log-sum-exps of cuDNN's attention. It is most of the time of a long video's layer, and no larger
    than the layer's input.
    """
    return primitive.name == "dot_product_attention_fwd_wrapper"


def _even(tokens: Array) -> Array:
    return jnp.pad(tokens, [(0, 0), (0, tokens.shape[1] % 2), (0, 0), (0, 0)])


_fused_attention.defvjp(_fused_forward, _fused_backward)
