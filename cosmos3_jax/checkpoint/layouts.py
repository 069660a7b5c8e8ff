"""The public names of all tensors, and their places in our trees.

Both towers of the transformer have the same leaf names. The public names tell them apart by
prefixes and suffixes that load without an error when they are swapped, which only a numeric check
finds: they stand here and nowhere else. In the autoencoders names stay as they are, with slashes
for dots and `resnets_1` for `resnets.1`.
"""

import re
from collections.abc import Iterator

from cosmos3_jax.checkpoint.rules import Layout, Rule, leaf_shapes
from cosmos3_jax.config import Config, SoundVAEConfig, TransformerConfig, VideoVAEConfig
from cosmos3_jax.models import sound_vae, transformer, video_vae

ALL = slice(None)
CONV_1D = "o i k -> k i o"
CONV_TRANSPOSE = "i o k -> k i o"
CONV_2D = "o i h w -> h w i o"
CONV_3D = "o i t h w -> t h w i o"
NORM_2D = "c 1 1 -> c"
NORM_3D = "c 1 1 1 -> c"

# public attention names: q, k, v, out, q norm, k norm; and the suffix of the norms and the MLP
TOWERS = {
    "und": ("to_q", "to_k", "to_v", "to_out", "norm_q", "norm_k", ""),
    "gen": (
        "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "norm_added_q", "norm_added_k",
        "_moe_gen",
    ),
}  # fmt: skip


def layouts(
    config: Config, sound_encoder: bool = True
) -> dict[str, tuple[Layout, dict[str, tuple[int, ...]]]]:
    """Each component's folder in a checkpoint -> how it is stored, and our leaves' shapes."""
    found = {
        "transformer": (
            transformer_layout(config.transformer),
            transformer.param_shapes(config.transformer),
        ),
        "vae": (video_vae_layout(config.video_vae), video_vae.param_shapes(config.video_vae)),
    }
    if config.has_sound:
        found["sound_tokenizer"] = (
            sound_vae_layout(config.sound_vae, sound_encoder),
            sound_vae.param_shapes(config.sound_vae, sound_encoder),
        )
    return {name: (layout, leaf_shapes(shapes)) for name, (layout, shapes) in found.items()}


def transformer_layout(config: TransformerConfig) -> Layout:
    """Rules for every tensor of `transformer/` that generation reads, and the names of the
    others.
    """
    last = config.num_hidden_layers - 1
    rules = [
        Rule("embed_tokens.weight", "und/embed/embedding", "v d -> v d"),
        Rule("norm_moe_gen.weight", "gen/norm/scale", "d -> d"),
        *_linear("proj_in", "gen/proj_in"),
        *_linear("proj_out", "gen/proj_out"),
        *_linear("time_embedder.linear_1", "gen/time_embedder/linear_1"),
        *_linear("time_embedder.linear_2", "gen/time_embedder/linear_2"),
    ]
    if config.sound_gen:
        rules += [
            *_linear("audio_proj_in", "gen/sound_proj_in"),
            *_linear("audio_proj_out", "gen/sound_proj_out"),
            Rule("audio_modality_embed", "gen/sound_modality_embed", "d -> d"),
        ]
    for layer in range(config.num_hidden_layers):
        rules += _layer(config, "gen", layer)
        rules += _layer(config, "und", layer) if layer < last else _last_text_layer(config, layer)
    unused_last = r"(self_attn\.(to_q|to_out|norm_q)|mlp\.\w+|post_attention_layernorm)"
    unused = [
        r"lm_head\.weight",
        r"norm\.weight",
        r"action_.*",
        rf"layers\.{last}\.{unused_last}\.weight",
    ]
    if not config.sound_gen:
        unused.append(r"audio_.*")
    # The timestep must not be blurred: the reference keeps its embedding in float32 too.
    return Layout("transformer", tuple(rules), tuple(unused), float32=("gen/time_embedder/",))


def _linear(
    key: str, leaf: str, rearrange: str = "o i -> i o", weight_norm: bool = False
) -> list[Rule]:
    return [
        Rule(f"{key}.weight", f"{leaf}/kernel", rearrange, weight_norm=weight_norm),
        Rule(f"{key}.bias", f"{leaf}/bias", "o -> o"),
    ]


def _layer(config: TransformerConfig, tower: str, layer: int) -> Iterator[Rule]:
    q, k, v, out, q_norm, k_norm, suffix = TOWERS[tower]
    public, ours = f"layers.{layer}", f"{tower}/layers"
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    head_size = (("h", config.head_dim),)
    yield Rule(
        f"{public}.input_layernorm{suffix}.weight", f"{ours}/input_norm/scale", "d -> d", (layer,)
    )
    first = 0
    for name, count in ((q, heads), (k, kv_heads), (v, kv_heads)):
        part = (layer, ALL, slice(first, first + count))
        kernel = f"{ours}/attention/qkv/kernel"
        yield Rule(f"{public}.self_attn.{name}.weight", kernel, "(n h) d -> d n h", part, head_size)
        first += count
    yield Rule(
        f"{public}.self_attn.{q_norm}.weight", f"{ours}/attention/q_norm/scale", "h -> h", (layer,)
    )
    yield Rule(
        f"{public}.self_attn.{k_norm}.weight", f"{ours}/attention/k_norm/scale", "h -> h", (layer,)
    )
    kernel = f"{ours}/attention/out/kernel"
    yield Rule(f"{public}.self_attn.{out}.weight", kernel, "d (n h) -> n h d", (layer,), head_size)
    norm = f"{ours}/post_attention_norm/scale"
    yield Rule(f"{public}.post_attention_layernorm{suffix}.weight", norm, "d -> d", (layer,))
    for index, name in enumerate(("gate_proj", "up_proj")):
        kernel = f"{ours}/mlp/gate_up/kernel"
        yield Rule(f"{public}.mlp{suffix}.{name}.weight", kernel, "f d -> d f", (layer, ALL, index))
    yield Rule(
        f"{public}.mlp{suffix}.down_proj.weight", f"{ours}/mlp/down/kernel", "d f -> f d", (layer,)
    )


def _last_text_layer(config: TransformerConfig, layer: int) -> Iterator[Rule]:
    """Only the keys and values of the text tower's last layer are ever read."""
    public, ours = f"layers.{layer}", "und/last_layer"
    head_size = (("h", config.head_dim),)
    kv_heads = config.num_key_value_heads
    yield Rule(f"{public}.input_layernorm.weight", f"{ours}/input_norm/scale", "d -> d")
    for index, name in enumerate(("to_k", "to_v")):
        part = (ALL, slice(index * kv_heads, (index + 1) * kv_heads))
        kernel = f"{ours}/kv/kernel"
        yield Rule(f"{public}.self_attn.{name}.weight", kernel, "(n h) d -> d n h", part, head_size)
    yield Rule(f"{public}.self_attn.norm_k.weight", f"{ours}/k_norm/scale", "h -> h")


def video_vae_layout(config: VideoVAEConfig) -> Layout:
    """One rule for each of the public tensors: 196 in Nano."""
    return Layout("video VAE", tuple(_video_rules(config)))


def _video_rules(config: VideoVAEConfig) -> Iterator[Rule]:
    yield from _video_conv("quant_conv")
    yield from _video_conv("post_quant_conv")
    for half in ("encoder", "decoder"):
        yield from _video_conv(f"{half}.conv_in")
        yield from _resnet(f"{half}.mid_block.resnets.0", widened=False)
        yield _norm(f"{half}.mid_block.attentions.0.norm", NORM_2D)
        yield from _video_conv(f"{half}.mid_block.attentions.0.to_qkv", CONV_2D)
        yield from _video_conv(f"{half}.mid_block.attentions.0.proj", CONV_2D)
        yield from _resnet(f"{half}.mid_block.resnets.1", widened=False)
        yield _norm(f"{half}.norm_out")
        yield from _video_conv(f"{half}.conv_out")
    down, up = config.temperal_downsample, tuple(reversed(config.temperal_downsample))
    widths, depth = (1, *config.dim_mult), config.num_res_blocks
    yield from _blocks("encoder.down_blocks", "downsampler", widths, depth, down)
    widths = (config.dim_mult[-1], *reversed(config.dim_mult))
    yield from _blocks("decoder.up_blocks", "upsampler", widths, depth + 1, up)


def _blocks(
    prefix: str, resampler: str, widths: tuple[int, ...], depth: int, time: tuple[bool, ...]
) -> Iterator[Rule]:
    """The blocks of one half. `widths` has one entry more than there are blocks, `time` one
    fewer.
    """
    for i in range(len(widths) - 1):
        for j in range(depth):
            yield from _resnet(
                f"{prefix}.{i}.resnets.{j}", widened=j == 0 and widths[i] != widths[i + 1]
            )
        if i < len(time):
            yield from _video_conv(f"{prefix}.{i}.{resampler}.resample.1", CONV_2D)
            if time[i]:
                yield from _video_conv(f"{prefix}.{i}.{resampler}.time_conv")


def _resnet(key: str, widened: bool) -> Iterator[Rule]:
    yield _norm(f"{key}.norm1")
    yield from _video_conv(f"{key}.conv1")
    yield _norm(f"{key}.norm2")
    yield from _video_conv(f"{key}.conv2")
    if widened:
        yield from _video_conv(f"{key}.conv_shortcut")


def _video_conv(key: str, rearrange: str = CONV_3D) -> list[Rule]:
    # The two 1x1x1 convolutions at the latents go into the half of the VAE that uses them.
    half = {"quant_conv": "encoder/", "post_quant_conv": "decoder/"}.get(key, "")
    return _linear(key, half + _path(key), rearrange)


def _norm(key: str, rearrange: str = NORM_3D) -> Rule:
    return Rule(f"{key}.gamma", f"{_path(key)}/scale", rearrange)


def sound_vae_layout(config: SoundVAEConfig, with_encoder: bool) -> Layout:
    """One rule for each of the public tensors: 249, 182 of them the decoder's.

    A checkpoint with the decoder alone is as valid. Without `with_encoder`, encoder tensors may be
    there but stay unread.
    """
    if with_encoder:
        return Layout("sound VAE", (*_sound_decoder(config), *_sound_encoder(config)))
    return Layout("sound VAE", tuple(_sound_decoder(config)), unused=(r"encoder\..*",))


def _sound_decoder(config: SoundVAEConfig) -> list[Rule]:
    rules = _sound_conv("decoder.conv1") + _snake("decoder.snake1")
    rules += _sound_conv("decoder.conv2", bias=False)
    for i in range(len(config.dec_strides)):
        block = f"decoder.block.{i}"
        rules += _snake(f"{block}.snake1") + _sound_conv(f"{block}.conv_t1", CONV_TRANSPOSE)
        for unit in (f"{block}.res_unit{j}" for j in (1, 2, 3)):
            rules += _snake(f"{unit}.snake1") + _sound_conv(f"{unit}.conv1")
            rules += _snake(f"{unit}.snake2") + _sound_conv(f"{unit}.conv2")
    return rules


def _sound_encoder(config: SoundVAEConfig) -> list[Rule]:
    stage = config.enc_num_blocks + 1
    last = stage * len(config.enc_strides) + 1
    rules = _sound_conv("encoder.layers.0", bias=False)
    rules += _sound_conv(f"encoder.layers.{last}", bias=False)
    for i in range(1, last):
        layer = f"encoder.layers.{i}"
        rules += _sound_conv(layer) if i % stage == 0 else _convnext(layer)
    return rules


def _convnext(key: str) -> list[Rule]:
    rules = [Rule(f"{key}.norm.weight", f"{_path(key)}/norm/scale", "c -> c")]
    for conv in ("dwconv.1", "pwconv1", "pwconv2"):
        rules += _sound_conv(f"{key}.{conv}", weight_norm=False)
    return rules + _snake(f"{key}.act")


def _sound_conv(
    key: str, rearrange: str = CONV_1D, bias: bool = True, weight_norm: bool = True
) -> list[Rule]:
    return _linear(key, _path(key), rearrange, weight_norm)[: 1 + bias]


def _snake(key: str) -> list[Rule]:
    return [Rule(f"{key}.{x}", f"{_path(key)}/{x}", "1 c 1 -> c") for x in ("alpha", "beta")]


def _path(key: str) -> str:
    return re.sub(r"\.(\d+)", r"_\1", key).replace(".", "/")
