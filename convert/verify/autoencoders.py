"""The autoencoders on both sides: every tensor, then decoding and encoding as a whole.

Axes: B batch, C channels; T frames, H rows, W columns of pixels, t, h, w of latents; N samples.
"""

import copy
import itertools
import re
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch

from convert.verify import reference, weights
from convert.verify.compare import FLOAT32, Outcome, Pool
from convert.verify.names import Target, autoencoder_target
from convert.verify.sides import FOLDERS, Sides
from cosmos3_jax import Cosmos3
from cosmos3_jax.checkpoint.files import TensorFiles
from cosmos3_jax.checkpoint.load import PUBLIC_STEM, load_params
from cosmos3_jax.config import Config

# Latents: odd and oblong; and two frames after the first, which is a kind of its own.
GRID = (3, 3, 5)
SOUND_FRAMES = 3
UNFINISHED = 700  # samples that the last latent frame of a sound lacks
INPUTS = 2  # thousands of values each: errors scatter less than a transformer's
SMALL = 1e-2  # of the decoded values, that may be cut off without a word
LIMITS = {"video_vae": (0.0, 1.0), "sound_vae": (-1.0, 1.0)}  # decoded values are cut off there
GREY = np.float32(0.5)  # the zero of pictures: else a common brightness makes errors look smaller


def compare(outcome: Outcome, sides: Sides) -> None:
    """Compare the autoencoder that `outcome` names, `video_vae` or `sound_vae`, both ways."""
    name, config, dtypes = outcome.component, sides.config, sides.dtypes
    component, modality = sides.component(name), name.removesuffix("_vae")
    module = reference.load_module(sides, name)
    has_encoder = any(leaf.startswith("encoder/") for leaf in component.leaves)
    wrong = _compare_weights(outcome, sides, module, has_encoder)
    inputs = {"decode": _latents(config, modality), "encode": _signals(config, modality)}
    if not has_encoder:
        del inputs["encode"]
        outcome.skipped.append(f"{name}: encoding, the weights are a decoder's alone")
    run = {"video": their_video, "sound": their_sound}[modality]
    theirs = {}
    for dtype in ("float32", *dtypes):  # the module is rounded in between
        if dtype == "bfloat16":
            reference.to_bfloat16(module)
        if dtype not in theirs:
            theirs[dtype] = {w: [run(module, w, x) for x in xs] for w, xs in inputs.items()}
    for dtype in dtypes:
        model = Cosmos3(config, load_params([component], jnp.dtype(dtype)), None)
        for way, several in inputs.items():
            picture = (modality, way) == ("video", "decode")
            pool, middle = Pool(), GREY if picture else 0
            ours = getattr(model, f"{way}_{modality}")
            made = [np.asarray(ours(x), np.float32) - middle for x in several]
            right = [x - middle for x in theirs["float32"][way]]
            low = [x - middle for x in theirs[dtype][way]] if dtype == "bfloat16" else []
            for results in itertools.zip_longest(made, right, low):
                pool.add(*results)
            outcome.rows.append(pool.row(name, way, dtype, picture=picture))
            if dtype == "float32":
                blame = not any(target.leaf.startswith(f"{way}r/") for target in wrong)
                step = f"{way}: the computation of the {way}r"
                outcome.check_step(step, made[0], right[0], FLOAT32[name], blame)
    lowest, highest = LIMITS[name]
    decoded = theirs["float32"]["decode"][0]
    hidden = float(np.mean((decoded <= lowest) | (decoded >= highest)))
    outcome.details["share_at_limit"] = hidden
    if hidden > SMALL:
        outcome.skipped.append(
            f"{name}: {hidden:.0%} of the decoded values, cut off at {LIMITS[name]}"
        )


def _compare_weights(
    outcome: Outcome, sides: Sides, module: torch.nn.Module, encoder: bool
) -> list[Target]:
    name = outcome.component
    stored = TensorFiles(sides.checkpoint / FOLDERS[name], PUBLIC_STEM).shapes
    gain = re.compile(r"(weight_g|parametrizations\.weight\.original0)$")
    normed = {gain.sub("weight", key) for key in stored if gain.search(key)}
    plain = copy.deepcopy(module)
    reference.fold_weight_norms(plain)
    tensors = {
        key: tensor.detach().float().cpu().numpy() for key, tensor in plain.named_parameters()
        if encoder or not key.startswith("encoder.")
    }  # fmt: skip
    in_order = sorted(tensors.items(), key=lambda item: weights.natural_order(item[0]))
    return weights.compare(
        outcome, sides.component(name), in_order, autoencoder_target, folded=normed,
        dtype="bfloat16" if sides.rounded(name) else "float32",
    )  # fmt: skip


def _latents(config: Config, modality: str) -> list[np.ndarray]:
    random = np.random.default_rng(1)
    if modality == "video":
        shape = (1, config.video_vae.z_dim, *GRID)
    else:
        shape = (1, config.sound_vae.vocoder_input_dim, SOUND_FRAMES)
    return [random.standard_normal(shape, np.float32) for _ in range(INPUTS)]


def _signals(config: Config, modality: str) -> list[np.ndarray]:
    """Videos in [0, 1], [1, 3, T, H, W]; sounds within 0.8, [1, C, N], that grow louder."""
    random = np.random.default_rng(2)
    if modality == "video":
        vae = config.video_vae
        time, space = vae.scale_factor_temporal, vae.scale_factor_spatial
        shape = (1, 3, time * (GRID[0] - 1) + 1, space * GRID[1], space * GRID[2])
        return [random.random(shape, np.float32) for _ in range(INPUTS)]
    samples = config.sound_vae.samples_per_latent * SOUND_FRAMES - UNFINISHED
    shape = (1, config.sound_vae.audio_channels, samples)
    louder = np.linspace(0, 1, samples)
    return [(random.uniform(-0.8, 0.8, shape) * louder).astype(np.float32) for _ in range(INPUTS)]


def their_video(vae: Any, way: str, x: np.ndarray) -> np.ndarray:
    """`decode` normalised latents [B, C, t, h, w] to pixels [B, 3, T, H, W] in [0, 1], or `encode`.

    The statistics of the latents are applied in the VAE's dtype, as in diffusers' pipeline.
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


def their_sound(vae: Any, way: str, x: np.ndarray) -> np.ndarray:
    """`decode` latents [B, C, s] to a waveform [B, channels, N], or `encode`."""
    x = torch.from_numpy(x).to(vae.device)
    if way == "decode":
        made = vae.decode(x.to(vae.dtype))
    else:  # oneDNN's strided convolutions of one dimension are wrong in bfloat16 on some CPUs
        with torch.backends.mkldnn.flags(enabled=vae.dtype == torch.float32):
            made = vae.encode(x).latent_dist.mode()
    return made.float().cpu().numpy()
