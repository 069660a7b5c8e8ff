"""Rounding on the chip, at Nano's width and real token counts: our bfloat16, diffusers' bfloat16
and our float32, each against diffusers in float32, on the same random weights and inputs.

python benchmarks/gpu_numerics.py --out FILE.json [--parts rope,transformer,sound_vae,video_vae]

Exits 1 if a bar is missed. `--tiny` is a dry run of every line, on any machine. The transformer has
two layers, which is every kind of layer there is: the text tower's last one differs.
"""

import os

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch shares the GPU

import argparse
import contextlib
import dataclasses
import gc
import json
import re
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers import AutoencoderKLWan, Cosmos3AVAEAudioTokenizer, Cosmos3OmniTransformer
from diffusers.models.transformers import transformer_cosmos3
from diffusers.pipelines.cosmos.pipeline_cosmos3_omni import get_3d_mrope_ids_vae_tokens

from cosmos3_jax import layers, rope, sound_vae, transformer, video_vae
from cosmos3_jax.checkpoint import load
from cosmos3_jax.config import Config, SoundVAEConfig, TransformerConfig, VideoVAEConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from oracle import pack  # noqa: E402

RATIO = 1.2  # our bfloat16 error over diffusers': what another order of roundings may cost
# Two float32 implementations that sum in other orders: 1e-6 at the CPU tests' widths. Sums here are
# up to a hundred times longer and their errors ten; the autoencoders are thirty convolutions deep.
FLOAT32 = {"transformer": 1e-5, "vae": 5e-5, "sound_tokenizer": 5e-5}
FAR = 3  # TF32 must miss these bars by as much, or they would not notice it
COSINE = 3e-7  # two or three float32 roundings near 1
SANE = (5e-4, 0.2)  # diffusers' bfloat16 error: really rounded, and no nonsense to excuse ours
LOGIT_BYTES = 2**31  # of one piece of the float32 oracle's attention
TIMESTEPS = (967, 500, 999, 3)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Case(NamedTuple):
    """A size of the transformer. Errors are pooled over inputs: those of one scatter."""

    grid: tuple[int, int, int]  # latent frames, rows, columns
    text: int
    sound: bool
    inputs: int


class Sizes(NamedTuple):
    config: Config
    cases: tuple[Case, ...]
    video: tuple[int, int, int]  # latents of the video VAE
    sound: int  # latents of the sound VAE


NANO = Sizes(
    # The vocabulary is cut: an embedding is a look-up, which rounds nothing.
    Config(TransformerConfig(num_hidden_layers=2, vocab_size=4096)),
    (
        Case((48, 12, 20), 1500, True, 4),  # 256p
        Case((5, 45, 80), 1500, True, 6),  # 720p's odd rows, in a clip short enough for float32
        Case((48, 30, 52), 300, False, 2),  # 480p
        Case((48, 45, 80), 1500, True, 1),  # 720p
    ),
    (3, 30, 52),
    197,
)
TINY = Sizes(
    Config(
        TransformerConfig(
            hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            head_dim=32, intermediate_size=128, vocab_size=64, rope_axes_dim=(6, 5, 5),
        ),
        VideoVAEConfig(base_dim=8, decoder_base_dim=8),
        SoundVAEConfig(dec_dim=8, enc_dim=8),
    ),
    (Case((6, 5, 3), 20, False, 8), Case((6, 5, 3), 150, True, 8)),
    (3, 3, 5),
    6,
)  # fmt: skip


class Pool:
    """Squared errors of each implementation, summed over inputs."""

    def __init__(self):
        self.error, self.exact, self.max = defaultdict(float), defaultdict(float), {}

    def add(self, exact: np.ndarray, **found: np.ndarray) -> None:
        for name, value in found.items():
            assert value.shape == exact.shape, (name, value.shape, exact.shape)
            difference = np.asarray(value, np.float64) - exact
            self.error[name] += np.sum(np.square(difference))
            self.exact[name] += np.sum(np.square(exact, dtype=np.float64))
            self.max[name] = max(self.max.get(name, 0.0), float(np.abs(difference).max()))

    def row(self, part: str, case: str, **description) -> dict:
        relative = {name: float(np.sqrt(self.error[name] / self.exact[name])) for name in self.max}
        ratio = relative["ours_bf16"] / relative["oracle_bf16"]
        row = {"part": part, "case": case, "ratio": ratio, "relative_l2": relative}
        return row | {"max_abs": self.max} | description


def failures(row: dict) -> list[str]:
    """What a row misses. Written so that NaN misses every bar."""
    checks = {f"ratio {row['ratio']:.3f}": row["ratio"] <= RATIO}
    if row["part"] == "rope":
        cosine = row["max_abs"]["our_cosine"]
        checks[f"cosine off by {cosine:.1e}"] = cosine <= COSINE
    else:
        found, bar = row["relative_l2"], FLOAT32[row["part"]]
        rounded = found["oracle_bf16"]
        checks[f"diffusers' bfloat16 off by {rounded:.1e}"] = SANE[0] <= rounded <= SANE[1]
        ours, tf32 = found.get("ours_fp32", 0.0), found.get("oracle_tf32", np.inf)
        checks[f"float32 off by {ours:.1e}"] = ours <= bar
        checks[f"TF32 off by {tf32:.1e} alone"] = tf32 >= FAR * bar
        checks["the limits hide errors"] = row.get("share_at_limit", 0.0) <= 0.01
    return [f"{row['part']} {row['case']}: {name}" for name, good in checks.items() if not good]


# ---------------------------------------------------------------- weights, and the two loaders

KINDS = {
    "transformer": Cosmos3OmniTransformer,
    "vae": AutoencoderKLWan,
    "sound_tokenizer": Cosmos3AVAEAudioTokenizer,
}


@torch.no_grad()
def save_checkpoint(folder: Path, config: Config) -> None:
    """Write all three components in the public layout, by diffusers' own `save_pretrained`."""
    parts = (config.transformer, config.video_vae, config.sound_vae)
    for (name, kind), part in zip(KINDS.items(), parts, strict=True):
        fields = dataclasses.asdict(part)
        fields.pop("clip_output", None)  # no argument of the oracle
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


# ---------------------------------------------------------------- transformer

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
    latents = transformer.Latents(video[None], None if sound is None else sound[None])
    out = _velocity(params["gen"], config, condition, latents, np.int32(timestep))
    found = {"video": out.video} | ({} if sound is None else {"sound": out.sound})
    return {name: np.asarray(x[0], np.float32) for name, x in found.items()}


def padded_length(text: int) -> int:
    return -(-text // 128) * 128


def transformer_rows(sizes: Sizes, folder: Path) -> Iterator[dict]:
    model = sizes.config.transformer
    oracles, params = load_both(folder, "transformer", sizes.config)
    for case in sizes.cases:
        frames = 4 * (case.grid[0] - 1) + 1
        heard = case.sound * sound_vae.sound_latent_length(sizes.config.sound_vae, frames, 24.0)
        tokens = int(np.prod(transformer.patch_grid(model, case.grid))) + heard
        logits = 4 * model.num_attention_heads * tokens * (tokens + padded_length(case.text))
        pools = defaultdict(Pool)
        for i in range(case.inputs):
            random = np.random.default_rng(i)
            ids = random.integers(0, model.vocab_size, case.text).tolist()
            video = random.standard_normal((*case.grid, model.latent_channel), np.float32)
            sound = random.standard_normal((heard, model.sound_dim), np.float32) if heard else None
            inputs = (ids, video, sound, TIMESTEPS[i % len(TIMESTEPS)])
            exact = oracle_velocity(oracles["float32"], *inputs)
            found = {
                "ours_bf16": our_velocity(params["bfloat16"], model, *inputs),
                "oracle_bf16": oracle_velocity(oracles["bfloat16"], *inputs),
            }
            if i == 0 and logits <= layers.MAX_LOGIT_BYTES:  # or else our float32 refuses
                found["ours_fp32"] = our_velocity(params["float32"], model, *inputs)
                if DEVICE == "cuda":
                    found["oracle_tf32"] = oracle_velocity(oracles["float32"], *inputs, tf32=True)
            for name, x in exact.items():
                pools[name].add(x, **{key: values[name] for key, values in found.items()})
        size = f"{'x'.join(map(str, case.grid))} text {case.text} sound {heard}"
        for name, pool in pools.items():
            yield pool.row("transformer", f"{size}: {name}", tokens=tokens, inputs=case.inputs)


# ---------------------------------------------------------------- rotary tables


def rope_rows(sizes: Sizes, folder: Path) -> Iterator[dict]:
    """Cosines and sines against float64 of the true positions and frequencies.

    Most of the error is the rounding of angles near 15,000 to float32, a thousandth, which is the
    reference's too; `our_cosine` is what the device adds to it.
    """
    model, grid = sizes.config.transformer, (48, 4, 4)
    turn = transformer_cosmos3.Cosmos3VLTextRotaryEmbedding(
        model.head_dim, model.rope_theta, model.rope_axes_dim
    ).to(DEVICE)
    sweep = np.random.default_rng(0).uniform(15000, 25000, (3, 20000)).astype(np.float32)
    examples = {"15,000 to 25,000": (sweep.astype(np.float64), sweep, torch.from_numpy(sweep))}
    for fps, text in ((24.0, 300), (29.97, 1500), (16.0, 9000)):
        t, h, w = np.indices(grid).reshape(3, -1)
        true = np.stack([t * 24 / fps + text + 15000, h, w])
        place = jax.jit(partial(rope.video_positions, model, grid))
        ours = np.asarray(place(np.float32([fps]), np.int32([text])))[0]
        theirs, _ = get_3d_mrope_ids_vae_tokens(*grid, text + 15000, True, fps)
        examples[f"{fps} fps, text {text}"] = true, ours, theirs

    def distance(tables, angles: np.ndarray) -> float:
        pairs = zip(tables, (np.cos(angles), np.sin(angles)), strict=True)
        return max(float(np.abs(np.asarray(a, np.float64) - b).max()) for a, b in pairs)

    slots = rope.axis_of_slot(model)
    for name, (true, ours, theirs) in examples.items():
        exact = true[slots].T * model.rope_theta ** -(2 * np.arange(len(slots)) / model.head_dim)
        on_device = (ours[slots].T * rope.inverse_frequencies(model)).astype(np.float64)
        found = [x[0] for x in jax.jit(partial(rope.rope_table, model))(ours)]
        errors = {"ours": distance(found, exact), "our_cosine": distance(found, on_device)}
        for key, tf32 in (("oracle", False), ("oracle_tf32", True)):
            with torch_mode(tf32):
                both = turn(theirs[:, None].to(DEVICE), DEVICE, torch.float32)
            errors[key] = distance([x[0, :, : len(slots)].cpu() for x in both], exact)
        ratio = errors["ours"] / errors["oracle"]
        yield {"part": "rope", "case": name, "ratio": ratio, "max_abs": errors}


# ---------------------------------------------------------------- autoencoders


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


def autoencoder_rows(name: str, sizes: Sizes, folder: Path) -> Iterator[dict]:
    random = np.random.default_rng(0)
    if name == "vae":
        config, module, tree, oracle = sizes.config.video_vae, video_vae, "video_vae", oracle_video
        (t, h, w), space = sizes.video, config.scale_factor_spatial
        pixels = (1, 3, config.scale_factor_temporal * (t - 1) + 1, space * h, space * w)
        latents = (1, t, h, w, config.z_dim)
        signal = random.random(pixels, np.float32)
        options = {"decode": {"video_dtype": jnp.float32}, "encode": {}}  # as `generate` asks for
        middle = {"decode": 0.5, "encode": 0.0}  # grey, which would make errors look smaller
    else:
        config, module, tree, oracle = sizes.config.sound_vae, sound_vae, "sound_vae", oracle_sound
        # The last latent frame is not complete, as that of a video of 189 frames.
        samples = config.samples_per_latent * sizes.sound - 240
        latents = (1, sizes.sound, config.vocoder_input_dim)
        signal = random.uniform(-0.8, 0.8, (1, config.audio_channels, samples)).astype(np.float32)
        options, middle = {"decode": {}, "encode": {}}, {"decode": 0.0, "encode": 0.0}
    oracles, params = load_both(folder, name, sizes.config)

    def theirs(way: str, x: np.ndarray, dtype: str, tf32: bool = False) -> np.ndarray:
        with torch_mode(tf32):
            found = oracle(oracles[dtype], config, way, torch.from_numpy(x).to(DEVICE))
        return found.float().cpu().numpy() - np.float32(middle[way])

    def ours(way: str, x: np.ndarray, dtype: str) -> np.ndarray:
        function = getattr(module, way)
        kind = {"dtype": jnp.dtype(dtype)} | options[way]
        found = jax.jit(lambda p, x: function(p, config, x, **kind))(params[dtype][tree], x)
        return np.asarray(found, np.float32) - np.float32(middle[way])

    for way, x in (("decode", random.standard_normal(latents, np.float32)), ("encode", signal)):
        exact, pool = theirs(way, x, "float32"), Pool()
        found = {"ours_bf16": ours(way, x, "bfloat16"), "oracle_bf16": theirs(way, x, "bfloat16")}
        found["ours_fp32"] = ours(way, x, "float32")
        if DEVICE == "cuda":
            found["oracle_tf32"] = theirs(way, x, "float32", tf32=True)
        pool.add(exact, **found)
        clipped = float(np.mean(np.abs(exact) == np.abs(exact).max())) * (way == "decode")
        yield pool.row(name, way, shape=list(x.shape), share_at_limit=clipped)


# ---------------------------------------------------------------- all of it

PARTS = {
    "rope": rope_rows,
    "transformer": transformer_rows,
    "sound_vae": partial(autoencoder_rows, "sound_tokenizer"),
    "video_vae": partial(autoencoder_rows, "vae"),
}


def scratch_folder() -> tempfile.TemporaryDirectory:
    """In memory where there is room for the 9 GB: they are written once and read twice."""
    memory = Path("/dev/shm")
    roomy = memory.is_dir() and shutil.disk_usage(memory).free > 12e9
    return tempfile.TemporaryDirectory(dir=memory if roomy else None)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    sizes, start = TINY if options.tiny else NANO, time.perf_counter()
    result = {
        "device": jax.devices()[0].device_kind,
        "versions": {m.__name__: m.__version__ for m in (jax, torch, diffusers)},
        "bars": {"ratio": RATIO, "float32": FLOAT32, "cosine": COSINE},
        "seconds": {}, "peak_gib": {}, "rows": [], "failures": [],
    }  # fmt: skip

    def write() -> None:
        stats = jax.devices()[0].memory_stats() or {}
        result["peak_gib"]["jax"] = stats.get("peak_bytes_in_use", 0) / 2**30
        if DEVICE == "cuda":
            result["peak_gib"]["torch"] = torch.cuda.max_memory_allocated() / 2**30
        options.out.write_text(json.dumps(result, indent=2) + "\n")

    with scratch_folder() as folder:
        save_checkpoint(Path(folder), sizes.config)
        result["seconds"]["save"] = time.perf_counter() - start
        for part in options.parts.split(","):
            begun = time.perf_counter()
            for row in PARTS[part](sizes, Path(folder)):
                result["rows"].append(row)
                result["failures"] += failures(row)
                result["seconds"][part] = time.perf_counter() - begun
                print(f"{time.perf_counter() - start:.0f} s", json.dumps(row), flush=True)
                write()  # what is measured stays, should the next size not fit
            gc.collect()  # what the part held, on both sides
            jax.clear_caches()
            if DEVICE == "cuda":
                torch.cuda.empty_cache()
    print("\n".join(result["failures"]) or "every bar is met", result["seconds"])
    return 1 if result["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
