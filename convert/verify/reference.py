"""diffusers' modules from the public files of a checkpoint, in float32 or bfloat16.

Axes: t latent frames, h rows, w columns, C channels, s sound latents.
"""

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKLWan,
    Cosmos3AVAEAudioTokenizer,
    Cosmos3OmniPipeline,
    Cosmos3OmniTransformer,
)
from torch.nn.utils import parametrize, remove_weight_norm

from convert.verify.sides import FOLDERS, Sides

KINDS = {
    "transformer": Cosmos3OmniTransformer,
    "video_vae": AutoencoderKLWan,
    "sound_vae": Cosmos3AVAEAudioTokenizer,
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


def load_module(sides: Sides, component: str, dtype: str = "float32"):
    """A whole component by its own loader, in `dtype`, ready to run."""
    folder, rounded = sides.checkpoint / FOLDERS[component], sides.rounded(component)
    module = KINDS[component].from_pretrained(folder, torch_dtype=torch.float32)
    if rounded == "folded":
        fold_weight_norms(module)
    if rounded:
        for name, parameter in module.named_parameters():
            if SHARP not in name:
                parameter.data = parameter.data.bfloat16().float()
    if dtype == "bfloat16":
        module = to_bfloat16(module)
    return module.to(sides.device).eval()


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
    """Weight norm, in either of its implementations, becomes a plain weight, in place."""
    for part in module.modules():
        if parametrize.is_parametrized(part, "weight"):
            parametrize.remove_parametrizations(part, "weight")
        elif hasattr(part, "weight_g"):
            remove_weight_norm(part)


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
