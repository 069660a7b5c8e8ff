"""Rounding on the chip, at Nano's width and real token counts: our bfloat16, diffusers' bfloat16
and our float32, each against diffusers in float32, on the same random weights and inputs.

python benchmarks/gpu_numerics.py --out FILE.json [--parts rope,transformer,sound_vae,video_vae]

Exits 1 if a bar is missed. The file is written at the start and after every row: `complete` in it
says whether the run came to its end, `unfinished` which parts did not. `--dry` runs every line
at tiny sizes, on any machine. The transformer has two layers, which is every kind of layer there
is: the text tower's last one differs.
"""

import os

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch shares the GPU

import argparse
import gc
import json
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import dry
import jax
import jax.numpy as jnp
import numerics_models as models
import numpy as np
import oracle_model
import torch
from diffusers.models.transformers import transformer_cosmos3
from diffusers.pipelines.cosmos.pipeline_cosmos3_omni import get_3d_mrope_ids_vae_tokens

from cosmos3_jax.config import Config, TransformerConfig
from cosmos3_jax.models import attention, rope, sound_vae, transformer, video_vae
from cosmos3_jax.runtime.measure import device_peak_gib, environment

RATIO = 1.2  # our bfloat16 error over diffusers': what another order of roundings may cost
# Two float32 implementations that sum in other orders: 1e-6 at the CPU tests' widths. Sums here are
# up to a hundred times longer and their errors ten; the autoencoders are thirty convolutions deep.
FLOAT32 = {"transformer": 1e-5, "vae": 5e-5, "sound_tokenizer": 5e-5}
FAR = 3  # TF32 must miss these bars by as much, or they would not notice it
COSINE = 3e-7  # two or three float32 roundings near 1
SANE = (5e-4, 0.2)  # diffusers' bfloat16 error: really rounded, and no nonsense to excuse ours
TIMESTEPS = (967, 500, 999, 3)


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
DRY = Sizes(
    Config(
        TransformerConfig(
            hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            head_dim=32, intermediate_size=128, vocab_size=64, rope_axes_dim=(6, 5, 5),
        ),
        dry.CONFIG.video_vae,
        dry.CONFIG.sound_vae,
    ),
    (Case((6, 5, 3), 150, True, 8),),
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


# ---------------------------------------------------------------- transformer


def transformer_rows(sizes: Sizes, folder: Path) -> Iterator[dict]:
    model = sizes.config.transformer
    oracles, params = models.load_both(folder, "transformer", sizes.config)
    for case in sizes.cases:
        frames = 4 * (case.grid[0] - 1) + 1
        heard = case.sound * sound_vae.sound_latent_length(sizes.config.sound_vae, frames, 24.0)
        tokens = int(np.prod(transformer.patch_grid(model, case.grid))) + heard
        keys = tokens + models.padded_length(case.text)
        logits = attention.logit_bytes(1, model.num_attention_heads, tokens, keys)
        pools = defaultdict(Pool)
        for i in range(case.inputs):
            random = np.random.default_rng(i)
            ids = random.integers(0, model.vocab_size, case.text).tolist()
            video = random.standard_normal((*case.grid, model.latent_channel), np.float32)
            sound = random.standard_normal((heard, model.sound_dim), np.float32) if heard else None
            inputs = (ids, video, sound, TIMESTEPS[i % len(TIMESTEPS)])
            exact = models.oracle_velocity(oracles["float32"], *inputs)
            found = {
                "ours_bf16": models.our_velocity(params["bfloat16"], model, *inputs),
                "oracle_bf16": models.oracle_velocity(oracles["bfloat16"], *inputs),
            }
            if i == 0 and logits <= attention.MAX_LOGIT_BYTES:  # or else our float32 refuses
                found["ours_fp32"] = models.our_velocity(params["float32"], model, *inputs)
                if models.DEVICE == "cuda":
                    found["oracle_tf32"] = models.oracle_velocity(
                        oracles["float32"], *inputs, tf32=True
                    )
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
    ).to(models.DEVICE)
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
            with models.torch_mode(tf32):
                both = turn(theirs[:, None].to(models.DEVICE), models.DEVICE, torch.float32)
            errors[key] = distance([x[0, :, : len(slots)].cpu() for x in both], exact)
        ratio = errors["ours"] / errors["oracle"]
        yield {"part": "rope", "case": name, "ratio": ratio, "max_abs": errors}


# ---------------------------------------------------------------- autoencoders


def autoencoder_rows(name: str, sizes: Sizes, folder: Path) -> Iterator[dict]:
    random = np.random.default_rng(0)
    if name == "vae":
        config, module, tree = sizes.config.video_vae, video_vae, "video_vae"
        oracle = models.oracle_video
        (t, h, w), space = sizes.video, config.scale_factor_spatial
        pixels = (1, 3, config.scale_factor_temporal * (t - 1) + 1, space * h, space * w)
        latents = (1, t, h, w, config.z_dim)
        signal = random.random(pixels, np.float32)
        options = {"decode": {"video_dtype": jnp.float32}, "encode": {}}  # as `generate` asks for
        middle = {"decode": 0.5, "encode": 0.0}  # grey, which would make errors look smaller
    else:
        config, module, tree = sizes.config.sound_vae, sound_vae, "sound_vae"
        oracle = models.oracle_sound
        # The last latent frame is not complete, as that of a video of 189 frames.
        samples = config.samples_per_latent * sizes.sound - 240
        latents = (1, sizes.sound, config.vocoder_input_dim)
        signal = random.uniform(-0.8, 0.8, (1, config.audio_channels, samples)).astype(np.float32)
        options, middle = {"decode": {}, "encode": {}}, {"decode": 0.0, "encode": 0.0}
    oracles, params = models.load_both(folder, name, sizes.config)

    def theirs(way: str, x: np.ndarray, dtype: str, tf32: bool = False) -> np.ndarray:
        with models.torch_mode(tf32):
            found = oracle(oracles[dtype], config, way, torch.from_numpy(x).to(models.DEVICE))
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
        if models.DEVICE == "cuda":
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


def run(sizes: Sizes, parts: list[str], out: Path) -> dict:
    """Measure parts one after the other; what there is of it is in the file after every row."""
    start = time.perf_counter()
    result = environment() | {
        "diffusers": oracle_model.environment(),
        "bars": {"ratio": RATIO, "float32": FLOAT32, "cosine": COSINE},
        "parts": parts, "unfinished": list(parts), "complete": False,
        "seconds": {}, "peak_gib": {}, "rows": [], "failures": [],
    }  # fmt: skip

    def write() -> None:
        result["peak_gib"]["jax"] = device_peak_gib()
        if models.DEVICE == "cuda":
            result["peak_gib"]["torch"] = torch.cuda.max_memory_allocated() / 2**30
        out.write_text(json.dumps(result, indent=2) + "\n")

    write()
    with models.scratch_folder() as folder:
        models.save_checkpoint(Path(folder), sizes.config)
        result["seconds"]["save"] = time.perf_counter() - start
        for part in parts:
            begun = time.perf_counter()
            for row in PARTS[part](sizes, Path(folder)):
                result["rows"].append(row)
                result["failures"] += failures(row)
                result["seconds"][part] = time.perf_counter() - begun
                print(f"{time.perf_counter() - start:.0f} s", json.dumps(row), flush=True)
                write()  # what is measured stays, should the next size not fit
            result["unfinished"].remove(part)
            gc.collect()  # what the part held, on both sides
            jax.clear_caches()
            if models.DEVICE == "cuda":
                torch.cuda.empty_cache()
    result["complete"] = True
    write()
    return result


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--dry", action="store_true", help="tiny sizes")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    parts = options.parts.split(",")
    if unknown := set(parts) - PARTS.keys():
        parser.error(f"unknown parts {', '.join(sorted(unknown))}: choose from {', '.join(PARTS)}")
    result = run(DRY if options.dry else NANO, parts, options.out)
    print("\n".join(result["failures"]) or "every bar is met", result["seconds"])
    return 1 if result["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
