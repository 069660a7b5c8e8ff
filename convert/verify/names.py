"""Where each public tensor belongs in our parameter tree, written independently of the package.

`checkpoint/layouts.py` has the rules that loading uses; a mistake in them would also be in a check
made of them. So names, transposes and the order of parts are written out here a second time.

Axes: d model, f hidden, n heads, h head dimension; i inputs and o outputs of a convolution.
"""

import re
from typing import NamedTuple

import einops
import numpy as np

from cosmos3_jax.config import TransformerConfig

EVERYTHING = slice(None)


class Target(NamedTuple):
    """The place of one public tensor."""

    leaf: str  # path in the component's parameter tree
    layer: int | None = None  # in a stacked leaf
    index: tuple = ()  # the part of the leaf, or of its layer, that the tensor fills
    axes: str = "... -> ..."  # from the public axes to ours
    size: int | None = None  # of a head, where `axes` tells heads apart

    @property
    def label(self) -> str:
        """For messages: `und/layers/mlp/gate_up/kernel[1]`."""
        return self.leaf if self.layer is None else f"{self.leaf}[{self.layer}]"

    def arrange(self, tensor: np.ndarray) -> np.ndarray:
        """A public tensor in our axes."""
        return einops.rearrange(tensor, self.axes, **({"h": self.size} if self.size else {}))


def transformer_target(name: str, config: TransformerConfig) -> Target | None:
    """The place of a tensor of `transformer/`; None if generation does not read it.

    Raises ValueError on a name that no Cosmos3 checkpoint has.
    """
    found = re.fullmatch(r"layers\.(\d+)\.(.+)\.weight", name)
    if found:
        return _layer_target(int(found[1]), found[2], config)
    if name in ("lm_head.weight", "norm.weight") or name.startswith("action_"):
        return None
    if name.startswith("audio_") and not config.sound_gen:
        return None
    named = {
        "audio_modality_embed": "gen/sound_modality_embed",
        "embed_tokens.weight": "und/embed/embedding",
        "norm_moe_gen.weight": "gen/norm/scale",
    }
    if name in named:
        return Target(named[name])
    module, _, kind = name.rpartition(".")
    leaf = "gen/" + module.replace("audio_", "sound_").replace(".", "/")
    return Target(f"{leaf}/bias") if kind == "bias" else Target(f"{leaf}/kernel", axes="o i -> i o")


# The public names of both towers' modules: only prefixes and suffixes tell them apart.
TOWERS = {
    "und": {
        "self_attn.to_q": "q", "self_attn.to_k": "k", "self_attn.to_v": "v",
        "self_attn.to_out": "out", "self_attn.norm_q": "attention/q_norm",
        "self_attn.norm_k": "attention/k_norm", "input_layernorm": "input_norm",
        "post_attention_layernorm": "post_attention_norm",
        "mlp.gate_proj": "gate", "mlp.up_proj": "up", "mlp.down_proj": "down",
    },
    "gen": {
        "self_attn.add_q_proj": "q", "self_attn.add_k_proj": "k", "self_attn.add_v_proj": "v",
        "self_attn.to_add_out": "out", "self_attn.norm_added_q": "attention/q_norm",
        "self_attn.norm_added_k": "attention/k_norm", "input_layernorm_moe_gen": "input_norm",
        "post_attention_layernorm_moe_gen": "post_attention_norm",
        "mlp_moe_gen.gate_proj": "gate", "mlp_moe_gen.up_proj": "up",
        "mlp_moe_gen.down_proj": "down",
    },
}  # fmt: skip


def _layer_target(layer: int, module: str, config: TransformerConfig) -> Target | None:
    tower = next((tower for tower, names in TOWERS.items() if module in names), None)
    if tower is None:
        raise ValueError(f"layers.{layer}.{module}.weight is unknown: is this Cosmos3?")
    role = TOWERS[tower][module]
    q, kv, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    heads = {"q": (0, q), "k": (q, q + kv), "v": (q + kv, q + 2 * kv)}
    if tower == "und" and layer == config.num_hidden_layers - 1:
        # The media tower reads only the keys and values of the last text layer.
        if role in ("k", "v"):
            part = slice(*(head - q for head in heads[role]))
            kernel = "und/last_layer/kv/kernel"
            return Target(kernel, None, (EVERYTHING, part), "(n h) d -> d n h", size)
        norms = {"input_norm": "input_norm", "attention/k_norm": "k_norm"}
        return Target(f"und/last_layer/{norms[role]}/scale") if role in norms else None
    if role in heads:
        leaf, index = "attention/qkv/kernel", (EVERYTHING, slice(*heads[role]))
        return Target(f"{tower}/layers/{leaf}", layer, index, "(n h) d -> d n h", size)
    if role == "out":
        leaf = f"{tower}/layers/attention/out/kernel"
        return Target(leaf, layer, (), "d (n h) -> n h d", size)
    if role in ("gate", "up"):
        index = (EVERYTHING, ("gate", "up").index(role))
        return Target(f"{tower}/layers/mlp/gate_up/kernel", layer, index, "f d -> d f")
    if role == "down":
        return Target(f"{tower}/layers/mlp/down/kernel", layer, (), "d f -> f d")
    return Target(f"{tower}/layers/{role}/scale", layer)


def autoencoder_target(name: str, axes: int) -> Target:
    """The place of a tensor of `vae/` or `sound_tokenizer/`, weight norm folded.

    Args:
        name: public; `weight` also for a pair of `weight_v` and `weight_g`.
        axes: how many the tensor has.
    """
    module, _, kind = name.rpartition(".")
    half = {"quant_conv": "encoder/", "post_quant_conv": "decoder/"}.get(module, "")
    path = half + re.sub(r"\.(\d+)", r"_\1", module).replace(".", "/")
    if kind == "weight" and axes > 1:
        transposed = module.endswith("conv_t1")
        return Target(f"{path}/kernel", axes=f"{'i o' if transposed else 'o i'} ... -> ... i o")
    kind = "scale" if kind in ("weight", "gamma") else kind  # or bias; alpha and beta, [1, C, 1]
    return Target(f"{path}/{kind}", axes="... -> (...)")
