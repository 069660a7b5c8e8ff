"""The Mixture-of-Transformers: a text tower, once a prompt, and a media tower, at every step.

`encode_condition` keeps the keys and values of every layer of the text tower. `velocity` is one
pass of the media tower: its queries come from video and sound tokens, its keys and values are its
own and the text's of the same layer. Keys are ordered media first, text last, so that text padding
trails and one length an example masks it. Both towers are stacked layers under `nn.scan`, so one
layer is compiled; the media tower also runs unrolled, which is faster (see `unstack_layers`).

Axes: B batch, S text tokens, M media tokens, L layers, N query heads, K key/value heads, H head
dimension, D model; of the latents t frames, h rows, w columns, C channels, and s sound frames.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array
from jax.typing import ArrayLike

from cosmos3_jax.config import TransformerConfig
from cosmos3_jax.models import rope
from cosmos3_jax.models.attention import Projected, attention, attention_of_product, keeps_attention
from cosmos3_jax.models.layers import (
    RMSNorm,
    Scale,
    TimestepEmbedding,
    dense,
    over_last,
    traced_once,
)
from cosmos3_jax.models.mlp import SwiGLU
from cosmos3_jax.models.patches import patch_grid, patchify, unpatchify
from cosmos3_jax.parallel import sharding
from cosmos3_jax.parallel.sharding import BRANCHES, HEADS, PROMPTS, TOKENS, constrain, num_shards

# Arrays of all modalities: normalised latents, or anything of their shape (noise, velocity, a
# prediction of the clean latents). `video` is [B, t, h, w, C], `sound`, where there is any,
# [B, s, C].
Latents = dict[str, Array]
MODALITIES = ("video", "sound")  # in the order of their tokens: JAX sorts the keys of a dictionary


class Condition(struct.PyTreeNode):
    """All that a denoising step needs besides the noisy latents; the same at every step.

    Attributes:
        key, value: [L, B, S, K, H], the text tower's, keys after norm and rotation.
        text_length: int32 [B], how many of the S are real.
        rope: cos and sin of the media tokens, float32 [B, M, H / 2] each.
        clean: latents of the modalities with conditioning frames, read where `given` is set.
        given: bool [B, t] or [B, s] for each of those, its conditioning frames: they are given
            rather than generated, get no noise, and their velocity is zero.
    """

    key: Array
    value: Array
    text_length: Array
    rope: rope.Rope
    clean: Latents
    given: dict[str, Array]

    def keep_given(self, latents: Latents) -> Latents:
        """The latents with the conditioning frames in their places, bit for bit."""
        return {
            name: jnp.where(over_frame(self.given[name], x), self.clean[name], x)
            if name in self.given
            else x
            for name, x in latents.items()
        }


def over_frame(mask: Array, x: Array) -> Array:
    """A mask of frames [B, t], to be broadcast over x [B, t, ...]."""
    return mask.reshape(*mask.shape, *[1] * (x.ndim - 2))


class Attention(nn.Module):
    """Self-attention of one tower; the media tower also reads the text's keys and values."""

    config: TransformerConfig
    dtype: jnp.dtype
    tokens: int | None = None  # of those that come, the ones that are not padding; None for all

    @nn.compact
    def __call__(
        self, x: Array, table: rope.Rope, text: tuple[Array, Array] | None, length: Array | None
    ):
        config = self.config
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        batch = PROMPTS if text is None else BRANCHES
        qkv = dense((heads + 2 * kv_heads, config.head_dim), self.dtype, "qkv")(x)
        of_examples = len(x), config.head_dim
        scales = (
            jnp.broadcast_to(Scale(config.head_dim, self.dtype, name=name)(), of_examples)
            for name in ("q_norm", "k_norm")
        )
        projected = Projected(qkv, *scales, table, kv_heads, config.rms_norm_eps)
        padded, key_value = None if text is None else (*text, length), None
        if padded and num_shards(HEADS) == 1:
            mixed = attention_of_product(projected, padded, batch=batch)
        else:
            query, key, value = (constrain(x, batch, TOKENS, None, None) for x in projected.parts())
            key_value = key, value
            mixed = attention(
                query, key, value, text=padded, causal=text is None, tokens=self.tokens, batch=batch
            )
        mixed = constrain(mixed, batch, TOKENS, None, None)
        return dense(config.hidden_size, self.dtype, "out", axis=(-2, -1))(mixed), key_value


class Block(nn.Module):
    """One pre-norm transformer layer. Returns its keys and values only in the text tower."""

    config: TransformerConfig
    dtype: jnp.dtype
    tokens: int | None = None  # see Attention

    @nn.compact
    def __call__(
        self, x: Array, text: tuple[Array, Array] | None, table: rope.Rope, length: Array | None
    ):
        epsilon = self.config.rms_norm_eps
        batch = PROMPTS if text is None else BRANCHES
        normed = RMSNorm(epsilon, self.dtype, name="input_norm")(x)
        mixed, key_value = Attention(self.config, self.dtype, self.tokens, name="attention")(
            normed, table, text, length
        )
        x = constrain(x + mixed, batch, TOKENS, None)
        normed = RMSNorm(epsilon, self.dtype, name="post_attention_norm")(x)
        x = x + SwiGLU(self.config, self.dtype, batch, name="mlp")(normed)
        x = constrain(x, batch, TOKENS, None)
        return x, key_value if text is None else None


class Unrolled(nn.Module):
    """`length` blocks one after the other, each with a subtree of parameters of its own."""

    config: TransformerConfig
    dtype: jnp.dtype
    length: int
    tokens: int | None
    remat: bool = False

    @nn.compact
    def __call__(self, x: Array, text: tuple[Array, Array], table: rope.Rope, length: Array):
        for i in range(self.length):
            kind = nn.remat(Block, policy=keeps_attention) if self.remat else Block
            block = kind(self.config, self.dtype, self.tokens, name=str(i))
            x, _ = block(x, jax.tree.map(lambda stacked, i=i: stacked[i], text), table, length)
        return x, None


def _stack(
    config: TransformerConfig, dtype: jnp.dtype, layers: int, remat: bool, tokens: int | None = None
) -> nn.Module:
    """`layers` blocks run by one scan over their stacked parameters."""
    scanned = nn.scan(
        nn.remat(Block, prevent_cse=False, policy=keeps_attention) if remat else Block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(0, nn.broadcast, nn.broadcast),
        length=layers,
    )
    return scanned(config, dtype, tokens, name="layers")


class KeyValue(nn.Module):
    """The part of the text tower's last layer that the media tower reads: its keys and values."""

    config: TransformerConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array, table: rope.Rope) -> tuple[Array, Array]:
        config = self.config
        x = RMSNorm(config.rms_norm_eps, self.dtype, name="input_norm")(x)
        kv = dense((2 * config.num_key_value_heads, config.head_dim), self.dtype, "kv")(x)
        key, value = jnp.split(kv, 2, axis=2)
        key = RMSNorm(config.rms_norm_eps, self.dtype, name="k_norm")(key)
        return rope.apply_rope(key, table), value


class TextTower(nn.Module):
    """Token ids [B, S] -> keys and values [L, B, S, K, H]. Causal, so padding behind a prompt
    changes nothing.
    """

    config: TransformerConfig
    dtype: jnp.dtype
    remat: bool = False

    @nn.compact
    def __call__(self, text_ids: Array) -> tuple[Array, Array]:
        config = self.config
        table = rope.rope_table(config, rope.text_positions(text_ids.shape[1]))
        embed = nn.Embed(config.vocab_size, config.hidden_size, dtype=self.dtype, name="embed")
        x = constrain(embed(text_ids), PROMPTS, TOKENS, None)
        layers = _stack(config, self.dtype, config.num_hidden_layers - 1, self.remat)
        x, stacked = layers(x, None, table, None)
        last = KeyValue(config, self.dtype, name="last_layer")(x, table)
        joined = jax.tree.map(lambda many, one: jnp.concatenate([many, one[None]]), stacked, last)
        return jax.tree.map(lambda x: constrain(x, None, PROMPTS, None, HEADS, None), joined)


class MediaTower(nn.Module):
    """One denoising step: noisy latents, their timestep and the condition -> velocity."""

    config: TransformerConfig
    dtype: jnp.dtype
    unrolled: bool = False
    remat: bool = False

    @nn.compact
    def __call__(self, latents: Latents, timestep: Array, condition: Condition) -> Latents:
        config, dtype = self.config, self.dtype
        grid = patch_grid(config, latents["video"].shape[1:4])
        time = TimestepEmbedding(config, name="time_embedder")(timestep).astype(dtype)[:, None]
        parts = {
            name: self.embed(name, latents[name].astype(dtype), time, condition.given.get(name))
            for name in MODALITIES
            if name in latents
        }
        counts = [part.shape[1] for part in parts.values()]
        x, tokens = jnp.concatenate(list(parts.values()), axis=1), sum(counts)
        if len(parts) > 1 or tokens % sharding.num_shards(TOKENS):
            # Whole for once: parts of odd lengths could not be divided, put together and divided
            # anew without moving all of them.
            x = constrain(x, BRANCHES, None, None)
        x, cos, sin = (
            constrain(sharding.pad_tokens(each), BRANCHES, TOKENS, None)
            for each in (x, *condition.rope)
        )
        text, depth = (condition.key, condition.value), config.num_hidden_layers
        real = None if x.shape[1] == tokens else tokens
        if self.unrolled:
            layers = Unrolled(config, dtype, depth, real, self.remat, name="layers")
        else:
            layers = _stack(config, dtype, depth, self.remat, real)
        x, _ = layers(x, text, (cos, sin), condition.text_length)
        x = RMSNorm(config.rms_norm_eps, dtype, name="norm")(x)

        velocity, first = {}, 0
        for name, count in zip(parts, counts, strict=True):
            v = self.project(name, x, slice(first, first + count))
            if name == "video":
                v = unpatchify(config, v, grid)
                v = v[:, :, : latents[name].shape[2], : latents[name].shape[3]]
            if name in condition.given:
                v = jnp.where(over_frame(condition.given[name], v), 0, v)
            velocity[name], first = v, first + count
        return velocity

    def embed(self, name: str, x: Array, time: Array, given: Array | None) -> Array:
        """Latents of one modality -> their tokens [B, M, D], told the time where they are noisy."""
        config, dtype = self.config, self.dtype
        if name == "video":
            patches = patchify(config, x)
            in_frame = patches.shape[1] // x.shape[1]
            tokens = dense(config.hidden_size, dtype, "proj_in", bias=True)(patches)
        else:
            in_frame = 1
            tokens = dense(config.hidden_size, dtype, f"{name}_proj_in", bias=True)(x)
            embedding = self.param(
                f"{name}_modality_embed", nn.initializers.zeros, (config.hidden_size,)
            )
            tokens = tokens + over_last(embedding.astype(dtype), tokens)
        if given is not None:
            noisy = jnp.repeat(~given, in_frame, axis=1)[..., None]
            time = jnp.where(noisy, time, 0)
        return tokens + time

    def project(self, name: str, x: Array, tokens: slice) -> Array:
        """The tokens of one modality among all [B, M, D] -> its latents' features.

        Where a mesh divides tokens, a part of them would have to move to be divided anew: the
        projection takes all, and a part is taken of what is as small as the latents.
        """
        config = self.config
        if name == "video":
            features, layer = config.patch_latent_dim, "proj_out"
        else:
            features, layer = getattr(config, f"{name}_dim"), f"{name}_proj_out"
        out = dense(features, self.dtype, layer, bias=True)
        if sharding.num_shards(TOKENS) == 1:
            return out(x[:, tokens])
        return constrain(out(x), BRANCHES, None, None)[:, tokens]


def compute_dtype(params: dict) -> jnp.dtype:
    """The dtype that a tower computes in: that of its attention weights."""
    layers = params["layers"]
    return (layers["0"] if is_unstacked(params) else layers)["attention"]["qkv"]["kernel"].dtype


def is_unstacked(params: dict) -> bool:
    """Whether a tower's layers have a subtree each, see `unstack_layers`."""
    return "0" in params["layers"]


def unstack_layers(params: dict) -> dict:
    """A tower with its stacked `layers` [L, ...] taken apart into `layers/0`, `layers/1`, ...

    `velocity` takes the media tower either way, and computes the same. Stacked, one layer is
    compiled, and a loop copies each layer's weights out of the stack: 5% of a step at 192x320.
    Taken apart, it compiles for longer and copies nothing. This function copies all of them.
    """
    count = len(jax.tree.leaves(params["layers"])[0])
    layers = {str(i): jax.tree.map(lambda x, i=i: x[i], params["layers"]) for i in range(count)}
    return params | {"layers": layers}


def encode_condition(
    params: dict,
    config: TransformerConfig,
    text_ids: Array | np.ndarray,
    text_mask: Array | np.ndarray,
    *,
    video_shape: tuple[int, int, int],
    fps: ArrayLike,
    sound_frames: int = 0,
    items: tuple[rope.Item, ...] | None = None,
    clean: Latents | None = None,
    given: dict[str, Array] | None = None,
    remat: bool = False,
) -> Condition:
    """Run the text tower once; the result depends on neither the timestep nor the noise.

    Args:
        params: the text tower's parameters, `params["und"]`.
        text_ids: int32 [B, S], padded on the right.
        text_mask: bool [B, S], True on the prompt, False on the padding. What stands in the padding
            does not change the result.
        video_shape: latent (t, h, w).
        fps: frames per second of the video, a scalar or [B].
        sound_frames: sound latents s, 0 for none.
        items: what the t frames are made of, each with positions of its own: controls, a source
            image, the target. None is one item of all frames.
        clean: normalised latents of the modalities with conditioning frames.
        given: which of their frames those are, see `Condition`; None for no frame of any.
        remat: under differentiation keep each layer's input, and on a GPU the result of its
            attention, and compute the rest again.
    """
    batch = text_ids.shape[0]
    text_ids = jnp.where(text_mask, text_ids, 0)  # an id outside the vocabulary would embed as NaN
    key, value = TextTower(config, compute_dtype(params), remat).apply({"params": params}, text_ids)
    length = jnp.sum(text_mask, axis=1, dtype=jnp.int32)
    fps = jnp.broadcast_to(jnp.asarray(fps, jnp.float32), (batch,))
    items = items or (rope.Item(video_shape[0]),)
    assert sum(item.frames for item in items) == video_shape[0], (items, video_shape)
    grid = patch_grid(config, video_shape)
    table = rope.rope_table(config, rope.video_positions(config, grid, fps, length, items))
    if sound_frames:
        sound = rope.rope_table(config, rope.sound_positions(config, sound_frames, length))
        table = rope.concatenate([table, sound])
    return Condition(key, value, length, table, clean or {}, given or {})


def velocity(
    params: dict,
    config: TransformerConfig,
    condition: Condition,
    latents: Latents,
    timestep: Array,
    *,
    remat: bool = False,
) -> Latents:
    """The predicted velocity, noise minus clean latents, of one step.

    Args:
        params: the media tower's parameters, `params["gen"]`, stacked or taken apart by
            `unstack_layers`.
        latents: normalised latents; conditioning frames are taken from the condition.
        timestep: in 0..1000, a scalar or [B]; whole numbers, unless the model is distilled.
        remat: see `encode_condition`.

    Returns:
        Latents in the compute dtype, zero on conditioning frames.
    """
    latents = condition.keep_given(latents)
    timestep = jnp.broadcast_to(jnp.asarray(timestep), condition.text_length.shape)
    if sharding.num_shards(sharding.WEIGHTS) > 1:
        # The weights now depend on the step. If not, XLA would gather those of all layers once,
        # before the loop over steps, and each device would have to hold them whole.
        params, timestep = jax.lax.optimization_barrier((params, timestep))
        params = sharding.divide_weights("gen", params)
    tower = MediaTower(config, compute_dtype(params), is_unstacked(params), remat)
    return tower.apply({"params": params}, latents, timestep, condition)


@traced_once
def param_shapes(config: TransformerConfig) -> dict:
    """`{"und": ..., "gen": ...}` as `jax.ShapeDtypeStruct`s; nothing is allocated."""

    def init():
        key = jax.random.key(0)
        und = TextTower(config, jnp.float32).init(key, jnp.zeros((1, 1), jnp.int32))
        latents = {"video": jnp.zeros((1, 1, 2, 2, config.latent_channel))}
        if config.sound_gen:
            latents["sound"] = jnp.zeros((1, 1, config.sound_dim))
        condition = encode_condition(
            und["params"], config, jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool),
            video_shape=(1, 2, 2), fps=24.0, sound_frames=int(config.sound_gen),
        )  # fmt: skip
        gen = MediaTower(config, jnp.float32).init(key, latents, jnp.zeros((1,)), condition)
        return {"und": und["params"], "gen": gen["params"]}

    return jax.eval_shape(init)
