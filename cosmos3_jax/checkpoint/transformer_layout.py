"""The public names of the transformer's tensors and their places in the two towers.

Both towers have the same leaf names. The public names tell them apart by prefixes and suffixes that
load without an error when they are swapped, which only a numeric check finds: they stand here and
nowhere else.
"""

from collections.abc import Iterator

from cosmos3_jax.checkpoint.rules import Layout, Rule
from cosmos3_jax.config import TransformerConfig

ALL = slice(None)

# public attention names: q, k, v, out, q norm, k norm; and the suffix of the norms and the MLP
TOWERS = {
    "und": ("to_q", "to_k", "to_v", "to_out", "norm_q", "norm_k", ""),
    "gen": (
        "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "norm_added_q", "norm_added_k",
        "_moe_gen",
    ),
}  # fmt: skip


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


def _linear(key: str, leaf: str) -> list[Rule]:
    return [
        Rule(f"{key}.weight", f"{leaf}/kernel", "o i -> i o"),
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
        yield Rule(
            f"{public}.self_attn.{name}.weight",
            f"{ours}/kv/kernel",
            "(n h) d -> d n h",
            part,
            head_size,
        )
    yield Rule(f"{public}.self_attn.norm_k.weight", f"{ours}/k_norm/scale", "h -> h")
