"""The autoencoders on both sides: whole, both ways, and operation by operation.

Axes: B batch, T frames, H rows, W columns, C channels; N waveform samples.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import torch
from einops import rearrange

from convert.verify import reference
from convert.verify.autoencoder_names import arrange, make_witness, modules_with_weights
from convert.verify.compare import Outcome, Pool
from convert.verify.witness import Found, Witness, merge
from cosmos3_jax.checkpoint.load import Component, load_params
from cosmos3_jax.config import SoundVAEConfig, VideoVAEConfig
from cosmos3_jax.models import sound_vae, video_vae, video_vae_modules
from cosmos3_jax.runtime import programs

# Latents: odd and oblong; and two frames after the first, which is a kind of its own.
GRID = (3, 3, 5)
SOUND_FRAMES = 3
UNFINISHED = 700  # samples that the last latent frame of a sound lacks
INPUTS = 2  # thousands of values each: errors scatter less than a transformer's
SMALL = 1e-2  # of the decoded values, that may be cut off without a word
LAST = {"decode": "decoder's last (patch order)", "encode": "encoder's latents (statistics)"}


@dataclasses.dataclass(frozen=True)
class Kind:
    """What the video and the sound VAE differ in here: arrays are ours, channels first.

    Attributes:
        ours, theirs: (parameters or module, configuration, way, input) -> output.
        watch: (witness, configuration, way, parameters, input) -> our output; its every module
            is to run outside of any scan.
        middle: way -> what counts as zero: for pictures grey, lest it make errors look smaller.
        limits: where decoded values are cut off, which hides errors.
    """

    ours: Callable
    theirs: Callable
    watch: Callable
    middle: dict[str, np.float32]
    limits: tuple[float, float]


def compare(
    outcome: Outcome,
    name: str,
    checkpoint: Path,
    component: Component,
    config: VideoVAEConfig | SoundVAEConfig,
    dtypes: tuple[str, ...],
    *,
    rounded: str,
    device: str,
) -> None:
    """Compare one autoencoder, `video_vae` or `sound_vae`, both ways; see `transformer.compare`."""
    kind = KINDS[name]
    params = {d: load_params([component], jnp.dtype(d))[name] for d in {"float32", *dtypes}}
    module = reference.load_module(checkpoint, name, "float32", rounded, device)
    inputs = {"decode": _latents(config), "encode": _signals(config)}
    if "encoder" not in params["float32"]:
        del inputs["encode"]
        outcome.skipped.append(f"{name}: encoding, the weights are a decoder's alone")

    def all_theirs() -> dict[str, list[np.ndarray]]:
        return {
            way: [kind.theirs(module, config, way, x) for x in xs] for way, xs in inputs.items()
        }

    exact = all_theirs()
    operations = outcome.details["operations"] = []
    for way, several in inputs.items():
        witness = make_witness(name, module, params["float32"], way)
        with witness.recording.of(modules_with_weights(module), arrange):
            kind.theirs(module, config, way, several[0])
        watch, middle = partial(kind.watch, witness, config, way), kind.middle[way]
        try:
            made = witness.run(watch, params["float32"], several[0])
            witness.compare(LAST[way], np.asarray(made) - middle, exact[way][0] - middle)
            witness.check_coverage()
        finally:  # what was found before an error may be its reason
            outcome.places += merge({way: Found(witness.places, witness.operations)})
        operations += witness.operations
    if "bfloat16" in dtypes:
        reference.to_bfloat16(module)
    low = all_theirs() if "bfloat16" in dtypes else exact
    for dtype in dtypes:
        for way, several in inputs.items():
            pool, middle = Pool(), kind.middle[way]
            for x, right, rough in zip(several, exact[way], low[way], strict=True):
                found = np.asarray(kind.ours(params[dtype], config, way, x), np.float32)
                rough = rough - middle if dtype == "bfloat16" else None
                pool.add(found - middle, right - middle, rough)
            picture = name == "video_vae" and way == "decode"
            outcome.rows.append(pool.row(name, way, dtype, picture=picture))
    limits = kind.limits
    hidden = float(np.mean((exact["decode"][0] <= limits[0]) | (exact["decode"][0] >= limits[1])))
    outcome.details["share_at_limit"] = hidden
    if hidden > SMALL:
        outcome.skipped.append(f"{name}: {hidden:.0%} of the decoded values, cut off at {limits}")


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
    """The statistics of the latents, by the reference's own configuration, are applied in the VAE's
    dtype, as in diffusers' pipeline.
    """
    mean, std = (
        torch.tensor(values, dtype=vae.dtype, device=vae.device).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    x = torch.from_numpy(x).to(vae.device)
    if way == "decode":
        made = (vae.decode(x.to(vae.dtype) / (1 / std) + mean).sample.float() + 1) / 2
    else:
        latents = vae.encode((2 * x - 1).to(vae.dtype)).latent_dist.mode()
        made = (latents - mean) * (1 / std)
    return made.float().cpu().numpy()


def _watch_video(witness: Witness, config: VideoVAEConfig, way: str, params, x):
    """As `video_vae.decode` and `encode`, a latent frame at a time, but not under a scan."""
    x = jnp.moveaxis(x, 1, -1)
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
        witness.passing = lambda path, first=first: first and path.endswith("time_conv")
        variables = {"params": tree, "cache": cache}
        made, state = module.apply(variables, piece, first, mutable=["cache"])
        cache = state["cache"]
        pieces.append(made)
    made = jnp.concatenate(pieces, axis=1)
    if way == "decode":
        made = (jnp.clip(made, -1, 1) + 1) / 2
    else:
        made = video_vae.normalize_latents(config, made)
    return rearrange(made, "B T H W C -> B C T H W")


# ---------------------------------------------------------------- the sound VAE


def _our_sound(params, config, way: str, x: np.ndarray):
    run = programs.decode_sound if way == "decode" else programs.encode_sound
    return run(params, x, config=config)


def _their_sound(vae, config: SoundVAEConfig, way: str, x: np.ndarray) -> np.ndarray:
    x = torch.from_numpy(x).to(vae.device)
    if way == "decode":
        made = vae.decode(x.to(vae.dtype))
    else:  # oneDNN's strided convolutions of one dimension are wrong in bfloat16 on some CPUs
        with torch.backends.mkldnn.flags(enabled=vae.dtype == torch.float32):
            made = vae.encode(x).latent_dist.mode()
    return made.float().cpu().numpy()


def _watch_sound(witness: Witness, config: SoundVAEConfig, way: str, params, x):
    if way == "decode":
        return sound_vae.decode(params, config, jnp.swapaxes(x, 1, 2))
    return jnp.swapaxes(sound_vae.encode(params, config, x), 1, 2)


KINDS = {
    "video_vae": Kind(
        _our_video,
        _their_video,
        _watch_video,
        {"decode": np.float32(0.5), "encode": np.float32(0)},
        (0.0, 1.0),
    ),
    "sound_vae": Kind(
        _our_sound,
        _their_sound,
        _watch_sound,
        {"decode": np.float32(0), "encode": np.float32(0)},
        (-1.0, 1.0),
    ),
}
