"""Where each public tensor belongs in our parameter tree, written independently of the package.

`checkpoint/layouts.py` has the rules that loading uses; a mistake in them would also be in a check
made of them. So names, transposes and the order of parts are written out here a second time.

Axes: D model, F hidden, N query heads, K key/value heads, H head dimension; I inputs and O outputs
of a convolution.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from cosmos3_jax.config import TransformerConfig

EVERYTHING = slice(None)


class Target(NamedTuple):
    """The place of one public tensor.

    Attributes:
        leaf: path in the component's parameter tree.
        layer: index of the layer in a stacked leaf, or None.
        index: the part of the leaf, or of its layer, that the tensor fills.
        arrange: from the public axes to ours.
    """

    leaf: str
    layer: int | None = None
    index: tuple = ()
    arrange: Callable[[np.ndarray], np.ndarray] = lambda tensor: tensor

    @property
    def label(self) -> str:
        """For messages: `und/layers/mlp/gate_up/kernel[1]`."""
        return self.leaf if self.layer is None else f"{self.leaf}[{self.layer}]"


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
    if name == "audio_modality_embed":
        return Target("gen/sound_modality_embed")
    module, _, kind = name.rpartition(".")
    if module == "embed_tokens":
        return Target("und/embed/embedding")
    if module == "norm_moe_gen":
        return Target("gen/norm/scale")
    leaf = "gen/" + module.replace("audio_", "sound_").replace(".", "/")
    return (
        Target(f"{leaf}/bias") if kind == "bias" else Target(f"{leaf}/kernel", arrange=np.transpose)
    )


# The public names of both towers' modules: only prefixes and suffixes tell them apart.
UND = {
    "self_attn.to_q": "q", "self_attn.to_k": "k", "self_attn.to_v": "v", "self_attn.to_out": "out",
    "self_attn.norm_q": "attention/q_norm", "self_attn.norm_k": "attention/k_norm",
    "input_layernorm": "input_norm", "post_attention_layernorm": "post_attention_norm",
    "mlp.gate_proj": "gate", "mlp.up_proj": "up", "mlp.down_proj": "down",
}  # fmt: skip
GEN = {
    "self_attn.add_q_proj": "q", "self_attn.add_k_proj": "k", "self_attn.add_v_proj": "v",
    "self_attn.to_add_out": "out", "self_attn.norm_added_q": "attention/q_norm",
    "self_attn.norm_added_k": "attention/k_norm", "input_layernorm_moe_gen": "input_norm",
    "post_attention_layernorm_moe_gen": "post_attention_norm", "mlp_moe_gen.gate_proj": "gate",
    "mlp_moe_gen.up_proj": "up", "mlp_moe_gen.down_proj": "down",
}  # fmt: skip


def _layer_target(layer: int, module: str, config: TransformerConfig) -> Target | None:
    if module not in UND | GEN:
        raise ValueError(f"layers.{layer}.{module}.weight is unknown: is this Cosmos3?")
    tower = "und" if module in UND else "gen"
    role = (UND if tower == "und" else GEN)[module]
    heads, kv_heads, size = (
        config.num_attention_heads, config.num_key_value_heads, config.head_dim
    )  # fmt: skip

    def split_heads(tensor: np.ndarray) -> np.ndarray:
        """[N H, D] -> [D, N, H]."""
        return tensor.reshape(-1, size, tensor.shape[1]).transpose(2, 0, 1)

    if tower == "und" and layer == config.num_hidden_layers - 1:
        # The media tower reads only the keys and values of the last text layer.
        kernel = "und/last_layer/kv/kernel"
        places = {
            "input_norm": Target("und/last_layer/input_norm/scale"),
            "attention/k_norm": Target("und/last_layer/k_norm/scale"),
            "k": Target(kernel, None, (EVERYTHING, slice(0, kv_heads)), split_heads),
            "v": Target(kernel, None, (EVERYTHING, slice(kv_heads, None)), split_heads),
        }
        return places.get(role)

    def target(leaf: str, *index, arrange: Callable = np.transpose) -> Target:
        return Target(f"{tower}/layers/{leaf}", layer, index, arrange)

    first = {"q": 0, "k": heads, "v": heads + kv_heads}
    end = {"q": heads, "k": heads + kv_heads, "v": None}
    if role in first:
        part = slice(first[role], end[role])
        return target("attention/qkv/kernel", EVERYTHING, part, arrange=split_heads)
    if role == "out":  # [D, N H] -> [N, H, D]
        return target(
            "attention/out/kernel", arrange=lambda tensor: tensor.T.reshape(heads, size, -1)
        )
    if role in ("gate", "up"):
        return target("mlp/gate_up/kernel", EVERYTHING, ("gate", "up").index(role))
    if role == "down":
        return target("mlp/down/kernel")
    return target(f"{role}/scale")


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
        if module.endswith("conv_t1"):  # transposed: [I, O, ...]
            return Target(f"{path}/kernel", arrange=lambda x: np.moveaxis(x, (0, 1), (-2, -1)))
        return Target(f"{path}/kernel", arrange=lambda x: np.moveaxis(x, (0, 1), (-1, -2)))
    if kind in ("weight", "gamma"):
        return Target(f"{path}/scale", arrange=np.ravel)
    return Target(f"{path}/{kind}", arrange=np.ravel)  # bias; alpha and beta, [1, C, 1]
