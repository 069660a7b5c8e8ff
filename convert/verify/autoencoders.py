"""The autoencoders on both sides: whole, both ways, and operation by operation.

Axes: B batch, T frames, H rows, W columns, C channels; N waveform samples.
"""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch
from einops import rearrange

from convert.verify import reference
from convert.verify.compare import Outcome, Pool, relative_l2
from convert.verify.witness import Operation, Recording, Witness
from cosmos3_jax import programs, sound_vae, video_vae, video_vae_modules
from cosmos3_jax.checkpoint.load import Component, load_params
from cosmos3_jax.config import SoundVAEConfig, VideoVAEConfig

GRID = (
    3,
    3,
    5,
)  # latents: odd and oblong, and the first frame, which is its own kind, has followers
SOUND_FRAMES = 3
UNFINISHED = 700  # samples that the last latent frame of a sound lacks
INPUTS = 2  # thousands of values each: errors scatter less than a transformer's
ALIKE = 1e-2  # see `transformer_layer`
SMALL = 1e-2  # of outputs, by how many may be at a limit that hides errors

# What lies between the modules before and these.
BEFORE = {
    "encoder.conv_in": "patch order",
    "post_quant_conv": "statistics of the latents",
    "encoder.layers.0": "spectrum",
}
BETWEEN = (
    (r".*attentions\.\d+\.proj", "attention"),
    (r".*(resample\.1|time_conv)", "change of rate"),
    (r".*\.block\.\d+\.snake1|.*resnets\.0\.norm1", "shortcut"),
    (r".*pwconv1|.*norm2|.*norm1|.*conv[12]", "activation or sum"),
)


@dataclasses.dataclass(frozen=True)
class Kind:
    """What the video and the sound VAE differ in here: arrays are ours, channels first.

    Attributes:
        ours, theirs: (parameters or module, configuration, way, input) -> output.
        watch: (witness, parameters, configuration, way, input) runs ours without `jax.jit`, and
            returns its output.
        middle: way -> what counts as zero: for pictures grey, lest it make errors look smaller.
    """

    ours: Callable
    theirs: Callable
    watch: Callable
    middle: dict[str, float]


def compare(
    name: str,
    checkpoint: Path,
    component: Component,
    config: VideoVAEConfig | SoundVAEConfig,
    dtypes: tuple[str, ...],
    *,
    rounded: bool,
    device: str,
) -> Outcome:
    """Compare one autoencoder, `video_vae` or `sound_vae`, both ways; see `transformer.compare`."""
    kind, outcome = KINDS[name], Outcome()
    params = {d: load_params([component], jnp.dtype(d))[name] for d in {"float32", *dtypes}}
    module = reference.load_module(checkpoint, name, "float32", rounded, device)
    inputs = {"decode": _latents(config)} | {"encode": _signals(config)}
    if "encoder" not in params["float32"]:
        del inputs["encode"]
        outcome.skipped.append(f"{name}: encoding, the weights are a decoder's alone")
    operations = outcome.details["operations"] = []
    exact = {
        way: [kind.theirs(module, config, way, x) for x in several]
        for way, several in inputs.items()
    }
    for way, several in inputs.items():
        witness = _witness(name, module, params["float32"], way)
        with witness.recording.of(_modules(module), _arrange):
            kind.theirs(module, config, way, several[0])
        made = kind.watch(witness, params["float32"], config, way, several[0])
        last = (
            "encoder's latents (statistics)" if way == "encode" else "decoder's last (patch order)"
        )
        middle = np.float32(kind.middle[way])
        witness.compare(last, made - middle, exact[way][0] - middle)
        outcome.places += witness.places
        operations += witness.operations
    low: dict[str, list] = {way: [None] * INPUTS for way in inputs}
    if "bfloat16" in dtypes:
        half = reference.to_bfloat16(module)
        low = {way: [kind.theirs(half, config, way, x) for x in v] for way, v in inputs.items()}
    for dtype in dtypes:
        for way, several in inputs.items():
            pool, middle = Pool(), np.float32(kind.middle[way])
            for x, right, rough in zip(several, exact[way], low[way], strict=True):
                found = np.asarray(kind.ours(params[dtype], config, way, x), np.float32)
                rough = rough - middle if dtype == "bfloat16" else None
                pool.add(found - middle, right - middle, rough)
            picture = name == "video_vae" and way == "decode"
            outcome.rows.append(pool.row(name, way, dtype, picture=picture))
    limit = np.abs(exact["decode"][0] - kind.middle["decode"]) >= 1 - kind.middle["decode"]
    outcome.details["share_at_limit"] = float(np.mean(limit))
    if np.mean(limit) > SMALL:
        share = f"{np.mean(limit):.0%}"
        outcome.skipped.append(f"{name}: {share} of the decoded values, they are at the limit")
    return outcome


def _latents(config: VideoVAEConfig | SoundVAEConfig) -> list[np.ndarray]:
    random = np.random.default_rng(1)
    if isinstance(config, VideoVAEConfig):
        shape = (1, config.z_dim, *GRID)
    else:
        shape = (1, config.vocoder_input_dim, SOUND_FRAMES)
    return [random.standard_normal(shape, np.float32) for _ in range(INPUTS)]


def _signals(config: VideoVAEConfig | SoundVAEConfig) -> list[np.ndarray]:
    """Videos in [0, 1], [1, 3, T, H, W]; sounds within 0.8, [1, C, N], that grow louder."""
    random = np.random.default_rng(2)
    if isinstance(config, VideoVAEConfig):
        frames, space = (
            config.scale_factor_temporal * (GRID[0] - 1) + 1,
            config.scale_factor_spatial,
        )
        shape = (1, 3, frames, space * GRID[1], space * GRID[2])
        return [random.random(shape, np.float32) for _ in range(INPUTS)]
    samples = config.samples_per_latent * SOUND_FRAMES - UNFINISHED
    shape = (1, config.audio_channels, samples)
    louder = np.linspace(0, 1, samples)
    return [(random.uniform(-0.8, 0.8, shape) * louder).astype(np.float32) for _ in range(INPUTS)]


# ---------------------------------------------------------------- the video VAE


def _our_video(params, config, way: str, x: np.ndarray):
    if way == "decode":
        return programs.decode_video(params, x, config=config, chunk_size=None)
    return programs.encode_video(params, x, config=config, chunk_size=1)


def _their_video(vae, config: VideoVAEConfig, way: str, x: np.ndarray) -> np.ndarray:
    """The statistics of the latents are applied in the VAE's dtype, as in diffusers' pipeline."""
    mean, std = (
        torch.tensor(values, dtype=vae.dtype, device=vae.device).view(1, -1, 1, 1, 1)
        for values in (config.latents_mean, config.latents_std)
    )
    x = torch.from_numpy(x).to(vae.device)
    if way == "decode":
        made = (vae.decode(x.to(vae.dtype) / (1 / std) + mean).sample.float() + 1) / 2
    else:
        latents = vae.encode((2 * x - 1).to(vae.dtype)).latent_dist.mode()
        made = (latents - mean) * (1 / std)
    return made.float().cpu().numpy()


def _watch_video(witness: Witness, params, config: VideoVAEConfig, way: str, x: np.ndarray):
    """As `video_vae.decode` and `encode`, a latent frame at a time, but not under a scan."""
    x = jnp.moveaxis(jnp.asarray(x), 1, -1)
    half = {"decode": video_vae_modules.Decoder, "encode": video_vae_modules.Encoder}[way]
    module, tree = half(config, jnp.float32), params["decoder" if way == "decode" else "encoder"]
    frames = 1 if way == "decode" else config.scale_factor_temporal
    cache, pieces, start = {}, [], 0
    while start < x.shape[1]:
        first = start == 0
        piece = x[:, start : start + (1 if first else frames)]
        start += piece.shape[1]
        piece = video_vae.denormalize_latents(config, piece) if way == "decode" else 2 * piece - 1
        # Frame 0 passes the convolutions over time by; the reference does not call them.
        witness.passing = lambda path, x, first=first: first and path.endswith("time_conv")
        with witness.watching():
            made, state = module.apply(
                {"params": tree, "cache": cache}, piece, first, mutable=["cache"]
            )
        cache = state["cache"]
        pieces.append(made)
    made = np.asarray(jnp.concatenate(pieces, axis=1))
    if way == "decode":
        made = (np.clip(made, -1, 1) + 1) / 2
    else:
        made = np.asarray(video_vae.normalize_latents(config, made))
    return rearrange(made, "B T H W C -> B C T H W")


# ---------------------------------------------------------------- the sound VAE


def _our_sound(params, config, way: str, x: np.ndarray):
    run = programs.decode_sound if way == "decode" else programs.encode_sound
    return run(params, x, config=config)


def _their_sound(vae, config: SoundVAEConfig, way: str, x: np.ndarray) -> np.ndarray:
    x = torch.from_numpy(x).to(vae.device)
    made = vae.decode(x.to(vae.dtype)) if way == "decode" else vae.encode(x).latent_dist.mode()
    return made.float().cpu().numpy()


def _watch_sound(witness: Witness, params, config: SoundVAEConfig, way: str, x: np.ndarray):
    with witness.watching():
        if way == "decode":
            return np.asarray(sound_vae.decode(params, config, jnp.swapaxes(x, 1, 2)))
        return np.asarray(jnp.swapaxes(sound_vae.encode(params, config, jnp.asarray(x)), 1, 2))


KINDS = {
    "video_vae": Kind(_our_video, _their_video, _watch_video, {"decode": 0.5, "encode": 0.0}),
    "sound_vae": Kind(_our_sound, _their_sound, _watch_sound, {"decode": 0.0, "encode": 0.0}),
}


# ---------------------------------------------------------------- names and shapes


def _modules(module: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The reference's modules that have weights of their own, by name."""
    return {n: m for n, m in module.named_modules() if n and list(m.parameters(recurse=False))}


def _arrange(name: str, module: torch.nn.Module, x: torch.Tensor, made: bool) -> torch.Tensor:
    """What a module read or made as [1, T, ..., C], without what was put around its input."""
    if not (x.ndim == 3 and isinstance(module, torch.nn.LayerNorm)):
        x = x.movedim(1, -1)
    if x.ndim == 4:  # the frames of one clip, each by itself
        x = x[None]
    if not made and name.endswith("downsampler.time_conv"):
        return x[:, 1:]  # the frame before
    if not made and name.endswith("dwconv.1"):
        return x[:, 3:-3]
    return x


def _witness(name: str, module: torch.nn.Module, params: dict, way: str) -> Witness:
    half, known = "decoder" if way == "decode" else "encoder", _modules(module)

    def public(path: str) -> str:
        """Our module's path -> the public name: written out, not taken from the layout's rules."""
        dotted = re.sub(r"_(\d+)(?=/|$)", r".\1", path).replace("/", ".")
        return dotted if dotted in ("quant_conv", "post_quant_conv") else f"{half}.{dotted}"

    def operation(path: str) -> Operation | None:
        key = public(path)
        if key not in known:
            return None
        between = (why for pattern, why in BETWEEN if re.fullmatch(pattern, key))
        return Operation((key,), BEFORE.get(key) or next(between, ""))

    def hint(key: str, path: str) -> str:
        node: Any = params[half]
        for part in path.split("/"):
            node = node[part]
        return _hint(key, node, known)

    return Witness(
        name,
        operation,
        Recording(),
        leaf=lambda path: f"{name}/{half}/{path}",
        tensors=lambda key: tuple(
            f"{key}.{part}" for part, _ in known[key].named_parameters(recurse=False)
        ),
        hint=hint,
    )


def _hint(key: str, ours: dict, modules: dict[str, torch.nn.Module]) -> str:
    """What our kernel looks like instead of the reference's, or "" where it is the same."""
    if "kernel" not in ours:
        return "our scale is all ones" if np.all(np.asarray(ours.get("scale", 0)) == 1) else ""
    mine, theirs = np.moveaxis(np.asarray(ours["kernel"]), (-1, -2), (0, 1)), _kernel(modules[key])
    if relative_l2(mine, theirs) < ALIKE:
        return ""
    swapped = np.swapaxes(theirs, 0, 1)
    if swapped.shape == mine.shape and relative_l2(mine, swapped) < ALIKE:
        return "ours is transposed, inputs for outputs"
    for axis in range(2, mine.ndim):
        if relative_l2(mine, np.flip(theirs, axis)) < ALIKE:
            return f"ours is reversed along axis {axis}"
    for name, module in modules.items():
        if hasattr(module, "weight") and name != key:
            other = _kernel(module)
            if other.shape == mine.shape and relative_l2(mine, other) < ALIKE:
                return f"ours holds {name}.weight"
    cosine = np.sum(mine * theirs) / np.linalg.norm(mine) / np.linalg.norm(theirs)
    folded = ", after weight norm" if hasattr(modules[key], "weight_g") else ""
    return f"kernels{folded} have cosine {cosine:.3f}"


def _kernel(module: torch.nn.Module) -> np.ndarray:
    """Outputs first, then inputs, then space; weight norm folded."""
    weight = module.weight.detach().float().cpu().numpy()
    transposed = isinstance(module, torch.nn.ConvTranspose1d)
    return np.swapaxes(weight, 0, 1) if transposed else weight
