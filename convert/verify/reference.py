"""diffusers' modules from the public files of a checkpoint: whole small ones, and the transformer
a layer at a time.

A converted checkpoint in bfloat16 holds rounded weights. Against the public float32 ones its error
would be that rounding, and a mistake could hide in it; so the reference can be given weights that
are rounded alike: `rounded` is `folded`, after weight norm is folded, as our converter does it, or
`stored`, tensor by tensor, as in a checkpoint of the public layout; or "".

Axes: t latent frames, h rows, w columns, C channels, s sound latents, S text and M media tokens, D
model.
"""

import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from accelerate import init_empty_weights
from diffusers import (
    AutoencoderKLWan,
    Cosmos3AVAEAudioTokenizer,
    Cosmos3OmniPipeline,
    Cosmos3OmniTransformer,
)
from diffusers.models.transformers import transformer_cosmos3
from safetensors import safe_open
from torch.nn.utils import parametrize, remove_weight_norm

from cosmos3_jax.checkpoint.load import PUBLIC_STEM

FOLDERS = {
    "transformer": ("transformer", Cosmos3OmniTransformer),
    "video_vae": ("vae", AutoencoderKLWan),
    "sound_vae": ("sound_tokenizer", Cosmos3AVAEAudioTokenizer),
}
SHARP = "time_embedder"  # float32 whatever is asked for, in the reference as in ours


@contextlib.contextmanager
def exact_arithmetic() -> Iterator[None]:
    """No gradients, and no TF32; afterwards as before."""
    flags = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [flag.allow_tf32 for flag in flags]
    for flag in flags:
        flag.allow_tf32 = False
    try:
        with torch.no_grad():
            yield
    finally:
        for flag, value in zip(flags, before, strict=True):
            flag.allow_tf32 = value


def load_module(checkpoint: Path, component: str, dtype: str, rounded: str, device: str):
    """A whole component by its own loader, in `dtype`, ready to run."""
    folder, kind = FOLDERS[component]
    module = kind.from_pretrained(checkpoint / folder, torch_dtype=torch.float32)
    if rounded == "folded":
        fold_weight_norms(module)
    if rounded:
        for name, parameter in module.named_parameters():
            if SHARP not in name:
                parameter.data = parameter.data.bfloat16().float()
    if dtype == "bfloat16":
        module = to_bfloat16(module)
    return module.to(device).eval()


def system_prompt(pipe: Cosmos3OmniPipeline) -> str | None:
    """What our style `diffusers` is told, so that it has a system turn where this pipeline has one:
    a checkpoint's `model_index.json` may turn it off.
    """
    return None if pipe.config.default_use_system_prompt else ""


def to_bfloat16(module: torch.nn.Module) -> torch.nn.Module:
    """In place, as diffusers' loader does: the timestep embedding and all buffers stay sharp."""
    for name, parameter in module.named_parameters():
        if SHARP not in name:
            parameter.data = parameter.data.bfloat16()
    return module


def fold_weight_norms(module: torch.nn.Module) -> None:
    """Weight norm, in either of its implementations, becomes a plain weight."""
    for part in module.modules():
        if parametrize.is_parametrized(part, "weight"):
            parametrize.remove_parametrizations(part, "weight")
        elif hasattr(part, "weight_g"):
            remove_weight_norm(part)


class PublicTensors:
    """The tensors of a public component folder, read one at a time."""

    def __init__(self, folder: Path):
        index = folder / f"{PUBLIC_STEM}.safetensors.index.json"
        if index.is_file():
            files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        else:
            files = {f"{PUBLIC_STEM}.safetensors"}
        self._found: dict[str, Any] = {}
        for name in sorted(files):
            # Not mapped into memory: what the process holds is what it uses.
            file = safe_open(folder / name, framework="pt", backend="pread")
            self._found |= dict.fromkeys(file.keys(), file)

    def read(self, pattern: str, rounded: str) -> dict[str, torch.Tensor]:
        """Every tensor whose whole name the pattern fits, in float32, by that name."""
        tensors = {}
        for name, file in self._found.items():
            if re.fullmatch(pattern, name):
                tensor = file.get_tensor(name)
                if rounded and SHARP not in name:
                    tensor = tensor.bfloat16()
                tensors[name] = tensor.float()
        return tensors


class Door(torch.nn.Module):
    """Stands for the layers of a transformer: keeps what comes in, gives out what it is told to."""

    def __init__(self):
        super().__init__()
        self.came: tuple | None = None
        self.goes: tuple[torch.Tensor, torch.Tensor] | None = None

    def forward(self, und, gen, rotary):
        self.came = (und, gen, rotary)
        return self.goes or (und, gen)


class _Blank(torch.nn.Module):
    """An embedding of zeros."""

    def __init__(self, like: torch.Tensor):
        super().__init__()
        self.like = torch.zeros_like(like)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.like.expand(len(ids), -1)


class Transformer:
    """The reference's transformer without its layers, and each layer when it is asked for.

    Attributes:
        model: what is before and after the layers, in float32.
        door: see `Door`.
        config: diffusers' own.
    """

    def __init__(self, checkpoint: Path, rounded: str, device: str):
        folder = checkpoint / "transformer"
        self.tensors, self.rounded, self.device = PublicTensors(folder), rounded, device
        fields = Cosmos3OmniTransformer.load_config(folder)
        with init_empty_weights():
            empty = Cosmos3OmniTransformer.from_config(fields)
        self.config = empty.config
        self._layer = type(empty.layers[0])
        # The head of a language model is never run, the action weights neither.
        for name in ("lm_head", "action_proj_in", "action_proj_out", "action_modality_embed"):
            if hasattr(empty, name):
                delattr(empty, name)
        outside = r"(?!layers\.|lm_head\.|action_).*"
        self.model, self.door = empty, Door()
        self.model.layers = torch.nn.ModuleList([self.door])
        tensors = self.tensors.read(outside, rounded)
        self.model.load_state_dict(tensors, assign=True, strict=False)
        kept = {name for name, _ in self.model.named_parameters()}
        assert kept <= set(tensors), kept - set(tensors)
        self.model.to(device).eval()

    def forget_text(self) -> None:
        """Free the embeddings, a gigabyte or two: from now on text is zeros until the layers."""
        self.model.embed_tokens = _Blank(self.model.embed_tokens.weight[:1])

    def layer(self, index: int) -> torch.nn.Module:
        """Layer `index` in float32: its own module and nothing else."""
        fields = self.config
        with init_empty_weights():
            layer = self._layer(
                hidden_size=fields.hidden_size,
                head_dim=fields.head_dim,
                num_attention_heads=fields.num_attention_heads,
                num_key_value_heads=fields.num_key_value_heads,
                intermediate_size=fields.intermediate_size,
                attention_bias=fields.attention_bias,
                rms_norm_eps=fields.rms_norm_eps,
                hidden_act=fields.hidden_act,
                qk_norm_for_text=fields.qk_norm_for_text,
                use_und_k_norm_for_gen=fields.use_und_k_norm_for_gen,
            )
        prefix = f"layers.{index}."
        tensors = self.tensors.read(re.escape(prefix) + ".*", self.rounded)
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
        layer.load_state_dict(tensors, assign=True)
        return layer.to(self.device).eval()


def pack(config: Any, ids: list[int], video: np.ndarray, sound: np.ndarray | None, **how) -> dict:
    """The transformer's arguments for one example, by the pipeline's own methods.

    Args:
        config: the transformer's, of diffusers.
        ids: the prompt's.
        video: [t, h, w, C].
        sound: [s, C] or None.
        **how: `timestep`; `fps`; `given`, a list of known latent frames; `device`; `dtype`.
    """
    device, dtype, fps = how["device"], how["dtype"], how["fps"]
    pipeline = SimpleNamespace(
        transformer=SimpleNamespace(config=config), vae_scale_factor_temporal=4
    )
    prepare = Cosmos3OmniPipeline
    packed = prepare._prepare_text_segment(pipeline, ids, device)
    start, length = packed.pop("vision_start_temporal_offset"), len(ids)
    positions = [packed.pop("text_mrope_ids")]
    clip = torch.tensor(video).movedim(-1, 0)[None].to(device, dtype)
    packed |= prepare._prepare_vision_segment(
        pipeline, clip, False, start, fps, length, device, list(how["given"])
    )
    noisy = packed.pop("num_noisy_vision_tokens")
    packed |= {
        "vision_tokens": [clip],
        "vision_timesteps": torch.full((noisy,), how["timestep"], device=device),
    }
    positions.append(packed.pop("vision_mrope_ids"))
    length += packed.pop("num_vision_tokens")
    if sound is not None:
        tone = torch.tensor(sound).T.to(device, dtype)
        packed |= prepare._prepare_sound_segment(
            pipeline, tone, start, config.sound_latent_fps, length, device
        )
        count = packed.pop("sound_len")
        packed |= {
            "sound_tokens": [tone],
            "sound_timesteps": torch.full((count,), how["timestep"], device=device),
        }
        positions.append(packed.pop("sound_mrope_ids"))
        length += count
    return packed | {"position_ids": torch.cat(positions, dim=1), "sequence_length": length}


def run(transformer: Transformer, arguments: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The velocity of one example, `video` [t, h, w, C] and `sound` [s, C]; see `Door`."""
    out = transformer.model(**arguments)
    found = {"video": out.sample[0][0]} | ({"sound": out.sound[0]} if out.sound else {})
    return {name: x.movedim(0, -1).float().cpu().numpy() for name, x in found.items()}


@contextlib.contextmanager
def attention_calls() -> Iterator[list[dict[str, np.ndarray]]]:
    """Keep the queries, keys, values and results of the attentions meanwhile, [1, S, heads, H]."""
    calls, dispatch = [], transformer_cosmos3.dispatch_attention_fn

    def keep(query, key, value, **options):
        made = dispatch(query, key, value, **options)
        arrays = {"query": query, "key": key, "value": value, "made": made}
        calls.append({name: x.float().cpu().numpy() for name, x in arrays.items()})
        return made

    transformer_cosmos3.dispatch_attention_fn = keep
    try:
        yield calls
    finally:
        transformer_cosmos3.dispatch_attention_fn = dispatch
