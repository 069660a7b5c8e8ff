"""The pipelines on both sides: prompts to token ids, and noise to final latents, at a small size.

Here both models are whole in memory, one after the other: where that does not fit, this is skipped.
"""

import gc
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import torch
from diffusers import Cosmos3OmniPipeline, UniPCMultistepScheduler

from convert.verify import reference
from convert.verify.compare import Mismatch, Outcome, Pool
from cosmos3_jax import Cosmos3
from cosmos3_jax.checkpoint.find import open_folder
from cosmos3_jax.checkpoint.load import load_params, open_components
from cosmos3_jax.config import Config
from cosmos3_jax.io.prompt import encode_prompts, resolve_prompts

PROMPTS = (
    ("A red ball rolls down a hill.", "blurry"),
    ("Rain, and 3 cats: \u732b\u732b\u732b", ""),
)
SIZES = ((189, 720, 1280, 24.0), (9, 48, 80, 30.0), (1, 256, 256, 24.0))
# Odd latent rows and columns; few steps, of both orders. Guidance is the recipe's: it amplifies
# errors, and a trained model leaves its ways under more of it than it is made for.
SETTINGS = {
    "num_frames": 9, "height": 48, "width": 80, "num_inference_steps": 4, "fps": 24.0,
}  # fmt: skip
SEEDS = {"float32": 1, "bfloat16": 6}  # errors in bfloat16 scatter, and are pooled
HEADROOM = 2.0  # activations and what loading holds for a moment, in GiB


def compare(
    outcome: Outcome,
    checkpoint: Path,
    folder: Path,
    config: Config,
    dtypes: tuple[str, ...],
    *,
    rounded: str,
    device: str,
    free_gib: float,
) -> None:
    """Compare token ids and, where both models fit into `free_gib`, final latents.

    Args:
        outcome: what is found is added to it.
        checkpoint: the public one.
        folder: where our weights are read from.
        config: of both.
        dtypes: see `transformer.compare`.
        rounded, device: see `transformer.compare`.
        free_gib: host memory.
    """
    _, tokenizer = open_folder(folder)
    # It wants a video VAE, whatever it is used for.
    vae = reference.load_module(checkpoint, "video_vae", "float32", "", "cpu")
    pipe = _assemble(checkpoint, {"transformer": None, "vae": vae})
    compare_token_ids(outcome, pipe, config, tokenizer)
    del pipe, vae
    values = sum(
        int(np.prod(shape)) for c in open_components(folder, config) for shape in c.leaves.values()
    )
    needed = 2 * 4 * values / 2**30 + HEADROOM
    if needed > free_gib:
        outcome.skipped.append(
            f"pipeline: whole generations, both models take {needed:.0f} GiB in float32 and "
            f"{free_gib:.0f} are free"
        )
        return
    guidance = config.recipe.guidance_scale
    modalities = ["video"] + ["video and sound"] * config.has_sound
    exact: dict[tuple, dict] = {}
    for dtype in ("float32", "bfloat16"):
        if dtype == "bfloat16" and dtype not in dtypes:
            continue
        theirs = _their_pipeline(checkpoint, config, dtype, rounded, device)
        params = load_params(open_components(folder, config), jnp.dtype(dtype))
        ours = Cosmos3(config, params, tokenizer)
        for modality in modalities:
            pools = {name: Pool() for name in modality.split(" and ")}
            for seed in range(SEEDS["bfloat16" if "bfloat16" in dtypes else "float32"]):
                request = ours.prepare(
                    PROMPTS[0][0], negative_prompt=PROMPTS[0][1], prompt_style="diffusers",
                    system_prompt=reference.system_prompt(theirs), schedule="native", seed=seed,
                    sound="sound" in modality, guidance_scale=guidance, **SETTINGS,
                )  # fmt: skip
                latents = _their_latents(theirs, request, guidance, device)
                if dtype == "float32":
                    exact[modality, seed] = latents
                if dtype not in dtypes:
                    continue
                made = ours.run(request, output="latents")
                for name, pool in pools.items():
                    low = latents[name] if dtype == "bfloat16" else None
                    pool.add(np.asarray(made[name]), exact[modality, seed][name], low)
            outcome.rows += [
                pool.row("pipeline", f"{modality}: {name} latents", dtype)
                for name, pool in pools.items() if pool.inputs
            ]  # fmt: skip
        del theirs, params, ours
        gc.collect()


def compare_token_ids(outcome: Outcome, pipe, config: Config, tokenizer) -> None:
    """Token ids of style `diffusers`: equal, or the first that differs."""
    pool, system_prompt = Pool(), reference.system_prompt(pipe)
    for prompt, negative in PROMPTS:
        for frames, height, width, fps in SIZES:
            size = {"num_frames": frames, "height": height, "width": width, "fps": fps}
            theirs = pipe.tokenize_prompt(prompt, negative, **size)
            resolved = resolve_prompts(
                prompt, negative, style="diffusers", system_prompt=system_prompt, **size
            )
            both = zip(encode_prompts(tokenizer, resolved), theirs, strict=True)
            for which, (ours, exact) in zip(("prompt", "negative"), both, strict=True):
                ours, exact = list(ours), list(exact)
                longest = max(len(ours), len(exact))
                padded = (ids + [-1] * (longest - len(ids)) for ids in (ours, exact))
                pool.add(*map(np.asarray, padded))
                if ours == exact:
                    continue
                pairs = zip(ours, exact, strict=False)
                at = next(
                    (i for i, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(exact))
                )
                name = f"token {at} of the {which} {prompt!r} at {size}"
                outcome.mismatches.append(Mismatch("pipeline", name, (), "", np.inf, 0.0))
    outcome.rows.append(pool.row("pipeline", "token ids", "int32", bar=0.0))


def _assemble(checkpoint: Path, parts: dict) -> Cosmos3OmniPipeline:
    """The reference's pipeline around these parts; without sound unless it is among them."""
    parts = {"sound_tokenizer": None} | parts
    return Cosmos3OmniPipeline.from_pretrained(checkpoint, enable_safety_checker=False, **parts)


def _their_pipeline(checkpoint: Path, config: Config, dtype: str, rounded: str, device: str):
    names = ["transformer", "video_vae"] + ["sound_vae"] * config.has_sound
    parts = {
        reference.FOLDERS[name][0]: reference.load_module(checkpoint, name, dtype, rounded, device)
        for name in names
    }
    pipe = _assemble(checkpoint, parts)
    pipe.scheduler = UniPCMultistepScheduler.from_config(
        pipe.scheduler.config, flow_shift=config.recipe.flow_shift, use_karras_sigmas=False
    )
    pipe.register_to_config(use_native_flow_schedule=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _their_latents(pipe, request, guidance: float, device: str) -> dict[str, np.ndarray]:
    """Final latents of a request's noise. The pipeline keeps those of sound to itself: they are
    caught on their way to the decoder.
    """
    caught, decode = {}, pipe.decode_sound

    def catch(latents):
        caught["sound"] = latents.float().cpu().numpy()[None]
        return torch.zeros(1, 1)

    def keep(pipe, step, timestep, values):
        caught["video"] = values["latents"].float().cpu().numpy()
        return {}

    pipe.decode_sound = catch
    try:
        pipe(
            PROMPTS[0][0],
            negative_prompt=PROMPTS[0][1],
            enable_sound=bool(request.sound_frames),
            latents=torch.from_numpy(request.noise).to(device),
            sound_latents=torch.from_numpy(request.sound_noise[0]).to(device)
            if request.sound_frames
            else None,
            output_type="latent",
            callback_on_step_end=keep,
            guidance_scale=guidance,
            **SETTINGS,
        )
    finally:
        pipe.decode_sound = decode
    return caught
