"""The MLP of a layer of either tower.

Axes: B batch, S tokens, D model, F features of the hidden layer.
"""

from functools import partial

import flax.linen as nn
import jax
from jax import Array

from cosmos3_jax.config import TransformerConfig
from cosmos3_jax.models import gated_product
from cosmos3_jax.models.layers import Dense, dense, precision
from cosmos3_jax.parallel import device as devices
from cosmos3_jax.parallel import sharding


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), gate and up in one product (Shazeer, 2020).

    `batch` are the axes of the ambient mesh that divide the examples.
    """

    config: TransformerConfig
    dtype: jax.typing.DTypeLike
    batch: tuple[str, ...]

    @nn.compact
    def __call__(self, x: Array) -> Array:
        hidden = GatedDense(
            (2, self.config.intermediate_size), use_bias=False, dtype=self.dtype,
            precision=precision(self.dtype), batch=self.batch, name="gate_up",
        )(x)  # fmt: skip
        return dense(self.config.hidden_size, self.dtype, "down")(hidden)


class GatedDense(Dense):
    """silu(gate(x)) * up(x), of a kernel [D, 2, F]."""

    batch: tuple[str, ...] = sharding.PROMPTS

    def __call__(self, x: Array) -> Array:
        if self.is_initializing() or self.has_variable("params", "lora_a"):
            return _activated(super().__call__(x))
        kernel = sharding.whole(self.get_variable("params", "kernel").astype(self.dtype))
        return sharding.over_tokens(_gated, x.astype(self.dtype), kernel, batch=self.batch)


def _activated(both: Array) -> Array:
    return nn.silu(both[..., 0, :]) * both[..., 1, :]


@jax.custom_vjp
def _gated(x: Array, kernel: Array) -> Array:
    """By our kernel, where it can run, which does not write the product down."""
    device = devices.default_device()
    if gated_product.obstacle(x, kernel, device) is None:
        return gated_product.gated_product(x, kernel, device)
    return _plainly(x, kernel)


def _plainly(x: Array, kernel: Array) -> Array:
    axes = (((x.ndim - 1,), (0,)), ((), ()))
    return _activated(jax.lax.dot_general(x, kernel, axes, precision=precision(x.dtype)))


_gated.defvjp(partial(jax.vjp, _plainly), lambda transpose, gradient: transpose(gradient))
