"""The pipelines on both sides: prompts to token ids, and noise to final latents, at a small size.

Here both models are whole in memory, one after the other: where that does not fit, this is skipped.
"""

import contextlib
import gc
import itertools
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import psutil
import torch
from diffusers import Cosmos3OmniPipeline, UniPCMultistepScheduler

from convert.verify import reference
from convert.verify.compare import Outcome, Pool
from convert.verify.sides import FOLDERS, Sides
from cosmos3_jax import Cosmos3
from cosmos3_jax.checkpoint.find import open_folder
from cosmos3_jax.checkpoint.load import load_params
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


def compare(outcome: Outcome, sides: Sides) -> None:
    """Compare token ids and, where both models fit into free memory, final latents."""
    config, dtypes = sides.config, sides.dtypes
    _, tokenizer = open_folder(sides.folder)
    # It wants a video VAE, whatever it is used for.
    vae = reference.load_module(sides, "video_vae")
    pipe = _assemble(sides, {"transformer": None, "vae": vae})
    compare_token_ids(outcome, pipe, config, tokenizer)
    del pipe, vae
    components = list(sides.components.values())
    values = sum(int(np.prod(shape)) for c in components for shape in c.leaves.values())
    needed, free = 2 * 4 * values / 2**30 + HEADROOM, free_gib(sides.device)
    if needed > free:
        outcome.skipped.append(
            f"pipeline: whole generations, both models take {needed:.0f} GiB in float32 and "
            f"{free:.0f} are free"
        )
        return
    modalities = ["video"] + ["video and sound"] * config.has_sound
    seeds = range(SEEDS["bfloat16" if "bfloat16" in dtypes else "float32"])
    exact: dict[tuple, dict] = {}
    for dtype in dict.fromkeys(("float32", *dtypes)):  # float32 is what errors are measured against
        theirs = _their_pipeline(sides, dtype)
        ours = Cosmos3(config, load_params(components, jnp.dtype(dtype)), tokenizer)
        for modality in modalities:
            pools = {name: Pool() for name in modality.split(" and ")}
            for seed in seeds:
                request = ours.prepare(
                    PROMPTS[0][0], negative_prompt=PROMPTS[0][1], prompt_style="diffusers",
                    system_prompt=reference.system_prompt(theirs), schedule="native", seed=seed,
                    sound="sound" in modality, guidance_scale=config.recipe.guidance_scale,
                    **SETTINGS,
                )  # fmt: skip
                latents = _their_latents(theirs, request, sides)
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
        del theirs, ours
        gc.collect()


def free_gib(device: str, cgroup: Path = Path("/sys/fs/cgroup")) -> float:
    """Memory that is free on the host, within the limit of a container; and on the GPU, where the
    work is done there.
    """
    free = psutil.virtual_memory().available
    with contextlib.suppress(OSError, ValueError):  # none, or "max"
        limit, used = (int((cgroup / f"memory.{n}").read_text()) for n in ("max", "current"))
        free = min(free, max(limit - used, 0))
    if device == "cuda":
        free = min(free, torch.cuda.mem_get_info()[0])
    return free / 2**30


def compare_token_ids(outcome: Outcome, pipe, config: Config, tokenizer) -> None:
    """Token ids of style `diffusers`: equal, or the first that differs."""
    pool, system_prompt = Pool(), reference.system_prompt(pipe)
    for (prompt, negative), (frames, height, width, fps) in itertools.product(PROMPTS, SIZES):
        size = {"num_frames": frames, "height": height, "width": width, "fps": fps}
        theirs = pipe.tokenize_prompt(prompt, negative, **size)
        resolved = resolve_prompts(
            prompt, negative, style="diffusers", system_prompt=system_prompt, **size
        )
        both = zip(encode_prompts(tokenizer, resolved), theirs, strict=True)
        for which, pair in zip(("prompt", "negative"), both, strict=True):
            # Behind the shorter one stands what is no token.
            ours, exact = np.array([*itertools.zip_longest(*pair, fillvalue=-1)]).T
            pool.add(ours, exact)
            if different := np.flatnonzero(ours != exact).tolist():
                outcome.add(f"token {different[0]} of the {which} {prompt!r} at {size}")
    outcome.rows.append(pool.row("pipeline", "token ids", "int32", bar=0.0))


def _assemble(sides: Sides, parts: dict) -> Cosmos3OmniPipeline:
    """The reference's pipeline around these parts; without sound unless it is among them."""
    parts = {"sound_tokenizer": None} | parts
    return Cosmos3OmniPipeline.from_pretrained(
        sides.checkpoint, enable_safety_checker=False, **parts
    )


def _their_pipeline(sides: Sides, dtype: str) -> Cosmos3OmniPipeline:
    """The reference's pipeline, which returns the latents of sound as they are."""
    names = [name for name in FOLDERS if name != "sound_vae" or sides.config.has_sound]
    parts = {FOLDERS[name]: reference.load_module(sides, name, dtype) for name in names}
    pipe = _assemble(sides, parts)
    pipe.scheduler = UniPCMultistepScheduler.from_config(
        pipe.scheduler.config, flow_shift=sides.config.recipe.flow_shift, use_karras_sigmas=False
    )
    pipe.register_to_config(use_native_flow_schedule=True)
    pipe.set_progress_bar_config(disable=True)
    pipe.decode_sound = lambda latents: latents
    return pipe


def _their_latents(pipe, request, sides: Sides) -> dict[str, np.ndarray]:
    """Final latents of a request's noise."""
    video, sound = (
        None if noise is None else torch.from_numpy(noise).to(sides.device)
        for noise in (request.noise, request.sound_noise[0] if request.sound_frames else None)
    )  # fmt: skip
    out = pipe(
        PROMPTS[0][0], negative_prompt=PROMPTS[0][1], latents=video, sound_latents=sound,
        enable_sound=sound is not None, output_type="latent",
        guidance_scale=sides.config.recipe.guidance_scale, **SETTINGS,
    )  # fmt: skip
    made = {"video": out.video} | ({} if sound is None else {"sound": out.sound[None]})
    return {name: x.float().cpu().numpy() for name, x in made.items()}
