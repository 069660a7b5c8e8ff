"""Both implementations on the same weights and inputs, for `gpu_numerics.py`: random checkpoints,
each side's loader, and one call of each model.
"""

import contextlib
import dataclasses
import inspect
import re
import shutil
import sys
import tempfile
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers import AutoencoderKLWan, Cosmos3AVAEAudioTokenizer, Cosmos3OmniTransformer
from diffusers.models.transformers import transformer_cosmos3

from cosmos3_jax.checkpoint import load
from cosmos3_jax.config import Config, SoundVAEConfig, VideoVAEConfig
from cosmos3_jax.models import transformer

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from oracle import pack  # noqa: E402

LOGIT_BYTES = 2**31  # of one piece of the float32 oracle's attention
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KINDS = {
    "transformer": Cosmos3OmniTransformer,
    "vae": AutoencoderKLWan,
    "sound_tokenizer": Cosmos3AVAEAudioTokenizer,
}


def scratch_folder() -> tempfile.TemporaryDirectory:
    """In memory where there is room for the 9 GB: they are written once and read twice."""
    memory = Path("/dev/shm")
    roomy = memory.is_dir() and shutil.disk_usage(memory).free > 12e9
    return tempfile.TemporaryDirectory(dir=memory if roomy else None)


@torch.no_grad()
def save_checkpoint(folder: Path, config: Config) -> None:
    """Write all three components in the public layout, by diffusers' own `save_pretrained`."""
    parts = (config.transformer, config.video_vae, config.sound_vae)
    for (name, kind), part in zip(KINDS.items(), parts, strict=True):
        arguments = inspect.signature(kind.__init__).parameters  # not all fields are the oracle's
        fields = {k: v for k, v in dataclasses.asdict(part).items() if k in arguments}
        torch.manual_seed(0)
        with torch.device(DEVICE):
            module = kind(**{k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()})
            randomise(module)
            # Pixels and samples stay within -1 and 1: the limits must hide no error.
            if name == "vae":
                module.decoder.conv_out.weight.mul_(0.4)
            if name == "sound_tokenizer":
                loudness = module.decoder(torch.randn(1, part.vocoder_input_dim, 8)).std()
                module.decoder.conv2.weight_g.mul_(0.2 / loudness)
        module.cpu().save_pretrained(folder / name)
    assert load.load_config(folder) == config


def randomise(module: torch.nn.Module) -> None:
    """Matrices that keep a signal's variance; biases and scales away from 0 and 1.

    Norms of query and key heads get 1.7, so that logits deviate by 3, as in a trained model: at 1
    a query would read the mean of all values, which over 44,160 is nothing.
    """
    for name, p in module.named_parameters():
        vector, noise = p.numel() == max(p.shape), torch.randn_like(p)
        p.copy_(p + 0.1 * noise if vector else noise * (p.shape[0] / p.numel()) ** 0.5)
        if re.search(r"norm_(added_)?[qk]\.weight$", name):
            p.mul_(1.7)


def load_both(folder: Path, name: str, config: Config) -> tuple[dict, dict]:
    """diffusers' modules and our trees by dtype, each by its own loader, which decides what stays
    in float32."""
    component = [c for c in load.open_components(folder, config) if c.name == name]
    oracles, params = {}, {}
    for dtype in ("float32", "bfloat16"):
        oracle = KINDS[name].from_pretrained(folder / name, torch_dtype=getattr(torch, dtype))
        oracles[dtype] = oracle.to(DEVICE).eval()
        params[dtype] = load.load_params(component, jnp.dtype(dtype))
    return oracles, params


@contextlib.contextmanager
def torch_mode(tf32: bool = False):
    """No gradients; TF32 only if asked for; no oneDNN, wrong in bfloat16 on some CPUs."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    with torch.no_grad(), torch.backends.mkldnn.flags(enabled=False):
        yield


# ---------------------------------------------------------------- one call of each model

_encode = jax.jit(
    transformer.encode_condition, static_argnames=("config", "video_shape", "sound_frames")
)
_velocity = jax.jit(transformer.velocity, static_argnames="config")
_dispatch = transformer_cosmos3.dispatch_attention_fn


def oracle_attention(query, key, value, *, is_causal: bool, **options):
    """diffusers' own, but in float32 over all keys: torch has no fused kernel for grouped heads in
    float32, and its plain one would hold 250 GB of logits at 720p. Here queries come in pieces."""
    if query.dtype != torch.float32 or is_causal:
        return _dispatch(query, key, value, is_causal=is_causal, **options)
    key, value = key[0].transpose(0, 1), value[0].transpose(0, 1)  # [K, T, H]
    outs = []
    for part in query[0].split(max(1, LOGIT_BYTES // (4 * query.shape[2] * key.shape[1]))):
        grouped = part.unflatten(1, (len(key), -1)).permute(1, 2, 0, 3)  # [K, N / K, S, H]
        logits = grouped.flatten(1, 2) @ key.mT * query.shape[-1] ** -0.5
        mixed = torch.softmax(logits, dim=-1) @ value
        outs.append(mixed.view(grouped.shape).permute(2, 0, 1, 3).flatten(1, 2))
    return torch.cat(outs)[None]


def oracle_velocity(model, ids, video, sound, timestep: int, tf32=False) -> dict[str, np.ndarray]:
    def move(value):
        if isinstance(value, list):
            return [move(x) for x in value]
        return value.to(DEVICE) if torch.is_tensor(value) else value

    arguments = {k: move(v) for k, v in pack(model, ids, video, sound, timestep=timestep).items()}
    pieces = mock.patch.object(transformer_cosmos3, "dispatch_attention_fn", oracle_attention)
    with torch_mode(tf32), pieces:
        out = model(**arguments)
    found = {"video": out.sample[0][0]} | ({"sound": out.sound[0]} if out.sound else {})
    return {name: x.movedim(0, -1).float().cpu().numpy() for name, x in found.items()}


def our_velocity(params, config, ids, video, sound, timestep: int) -> dict[str, np.ndarray]:
    padded = np.zeros((1, padded_length(len(ids))), np.int32)
    padded[0, : len(ids)] = ids
    condition = _encode(
        params["und"], config, padded, np.arange(padded.shape[1])[None] < len(ids),
        video_shape=video.shape[:3], fps=np.float32([24]),
        sound_frames=0 if sound is None else len(sound),
    )  # fmt: skip
    latents = {"video": video[None]} | ({} if sound is None else {"sound": sound[None]})
    out = _velocity(params["gen"], config, condition, latents, np.int32(timestep))
    return {name: np.asarray(x[0], np.float32) for name, x in out.items()}


def padded_length(text: int) -> int:
    return -(-text // 128) * 128


def oracle_video(vae, config: VideoVAEConfig, way: str, x: torch.Tensor) -> torch.Tensor:
    """The latent statistics are applied in the VAE's dtype, as in diffusers' pipeline."""
    mean, std = (
        torch.tensor(values, dtype=vae.dtype, device=x.device).view(1, -1, 1, 1, 1)
        for values in (config.latents_mean, config.latents_std)
    )
    if way == "decode":
        video = vae.decode(x.movedim(-1, 1).to(vae.dtype) / (1 / std) + mean).sample
        return (video.float() + 1) / 2
    latents = vae.encode((2 * x - 1).to(vae.dtype)).latent_dist.mode()
    return ((latents - mean) * (1 / std)).movedim(1, -1)


def oracle_sound(vae, config: SoundVAEConfig, way: str, x: torch.Tensor) -> torch.Tensor:
    if way == "decode":
        return vae.decode(x.mT.to(vae.dtype))
    return vae.encode(x).latent_dist.mode().mT
