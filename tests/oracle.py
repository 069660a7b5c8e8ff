"""The executable oracle: diffusers' modules at small sizes, with every parameter away from 0 and
1.
"""

import dataclasses
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import torch
from diffusers import (
    AutoencoderKLWan,
    Cosmos3AVAEAudioTokenizer,
    Cosmos3OmniPipeline,
    Cosmos3OmniTransformer,
    UniPCMultistepScheduler,
)
from transformers import AutoTokenizer

from cosmos3_jax.checkpoint import rules
from cosmos3_jax.checkpoint.tiny_tokenizer import write_tokenizer


def tree_from_state_dict(layout: rules.Layout, state_dict, shapes) -> dict:
    """A PyTorch state dict in our tree (nested dict of float32 arrays), through the layout's rules.

    `shapes` is the tree of `jax.ShapeDtypeStruct`s; the rules are checked against the state dict
    first.
    """
    tensors = {
        rules.canonical_key(key): value.detach().float().numpy()
        for key, value in state_dict.items()
    }
    leaves = rules.leaf_shapes(shapes)
    rules.check(layout, {key: value.shape for key, value in tensors.items()}, leaves)
    filled = {path: np.full(shape, np.nan, np.float32) for path, shape in leaves.items()}
    for rule in layout.rules:
        filled[rule.leaf][rule.index] = rule.to_leaf(*(tensors[key] for key in rule.keys))
    tree = {}
    for path, value in filled.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = jnp.asarray(value)
    return tree


def perturb(module: torch.nn.Module, seed: int, scale: float = 0.1) -> torch.nn.Module:
    """Add noise to every parameter, so that no bias is 0 and no norm scale is 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return module.eval()


# Nano's switches at small sizes: silu, text qk-norm, sound and action weights, grouped key/value
# heads.
TRANSFORMER = dict(
    hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    intermediate_size=96, vocab_size=264, rope_scaling={"mrope_section": [4, 2, 2]},
    latent_channel=6, patch_latent_dim=24, sound_gen=True, sound_dim=5,
    action_gen=True, action_dim=4, num_embodiment_domains=2,
)  # fmt: skip
VIDEO_VAE = dict(
    base_dim=8, decoder_base_dim=8, z_dim=6, dim_mult=[1, 2, 4, 4], num_res_blocks=1,
    temperal_downsample=[False, True, True], in_channels=12, out_channels=12, patch_size=2,
    is_residual=True,
    scale_factor_spatial=16, scale_factor_temporal=4,
    latents_mean=[-0.2, 0.1, 0.3, 0.0, -0.4, 0.2], latents_std=[0.5, 1.1, 0.8, 0.4, 1.3, 0.9],
)  # fmt: skip
SOUND_VAE = dict(dec_dim=4, enc_dim=4, vocoder_input_dim=5, enc_latent_dim=10)


# One generation with odd latent height and width, (3, 3, 5), and guidance.
SETTINGS = dict(
    num_frames=9, height=48, width=80, num_inference_steps=5, guidance_scale=6.0, fps=24.0
)
PROMPT, NEGATIVE = "A red ball rolls down a hill", "blurry"


def save_pipeline(folder, seed: int = 0, **transformer) -> None:
    """Write a small checkpoint in the public layout by the oracle's own `save_pretrained`, in
    several shards.
    """
    torch.manual_seed(seed)
    model = perturb(Cosmos3OmniTransformer(**TRANSFORMER | transformer), seed + 1, 0.05)
    video = perturb(AutoencoderKLWan(**VIDEO_VAE), seed + 2, 0.02)
    write_tokenizer(folder / "text_tokenizer")
    components = {"transformer": model, "vae": video}
    if model.config.sound_gen:
        components["sound_tokenizer"] = perturb(
            Cosmos3AVAEAudioTokenizer(**SOUND_VAE), seed + 3, 0.02
        )
    else:
        components["sound_tokenizer"] = None
    pipeline = Cosmos3OmniPipeline(
        text_tokenizer=AutoTokenizer.from_pretrained(folder / "text_tokenizer"),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, use_karras_sigmas=True,
            sigma_max=200.0, sigma_min=0.147, timestep_spacing="linspace",
        ),
        enable_safety_checker=False,
        **components,
    )  # fmt: skip
    pipeline.save_pretrained(folder, max_shard_size="200KB")


def load_pipeline(folder, schedule: str = "native", dtype: torch.dtype = torch.float32):
    """The oracle's pipeline on a saved checkpoint, with the scheduler that one of our schedules
    names.
    """
    pipeline = Cosmos3OmniPipeline.from_pretrained(
        folder, enable_safety_checker=False, torch_dtype=dtype
    )
    if schedule != "karras":
        config = pipeline.scheduler.config
        pipeline.scheduler = UniPCMultistepScheduler.from_config(
            config, flow_shift=10.0, use_karras_sigmas=False
        )
    pipeline.register_to_config(use_native_flow_schedule=schedule == "native")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def pack(model, ids, video, sound=None, *, timestep: int, fps: float = 24.0, given=()) -> dict:
    """The oracle transformer's arguments for one example, packed by its pipeline's own methods.

    `ids` is a list, `video` [t, h, w, C], `sound` [s, C] or None; `given` lists known frames.
    """
    pipeline = SimpleNamespace(transformer=model, vae_scale_factor_temporal=4)
    video, sound = (
        None if x is None else torch.tensor(x).movedim(-1, 0).to(model.proj_in.weight.dtype)
        for x in (video, sound)
    )
    video, length = video[None], len(ids)
    packed = Cosmos3OmniPipeline._prepare_text_segment(pipeline, ids, "cpu")
    offset = packed.pop("vision_start_temporal_offset")
    packed |= Cosmos3OmniPipeline._prepare_vision_segment(
        pipeline, video, False, offset, fps, length, "cpu", list(given)
    )
    steps = torch.full((packed.pop("num_noisy_vision_tokens"),), timestep)
    packed |= dict(vision_tokens=[video], vision_timesteps=steps)
    length += packed.pop("num_vision_tokens")
    if sound is not None:
        sound_fps = model.config.sound_latent_fps
        packed |= Cosmos3OmniPipeline._prepare_sound_segment(
            pipeline, sound, offset, sound_fps, length, "cpu"
        )
        steps = torch.full((packed.pop("sound_len"),), timestep)
        packed |= dict(sound_tokens=[sound], sound_timesteps=steps)
        length += len(steps)
    names = ("text_mrope_ids", "vision_mrope_ids", "sound_mrope_ids")
    positions = [packed.pop(name) for name in names if name in packed]
    return packed | dict(position_ids=torch.cat(positions, dim=1), sequence_length=length)


@torch.no_grad()
def oracle_velocity(model, *args, **kwargs) -> dict:
    """`{"video": [t, h, w, C], "sound": [s, C]}`: the oracle's velocity of what `pack` takes."""
    out = model(**pack(model, *args, **kwargs))
    velocity = {"video": out.sample[0][0]} | ({"sound": out.sound[0]} if out.sound else {})
    return {name: x.movedim(0, -1).float().numpy() for name, x in velocity.items()}


@dataclasses.dataclass
class OracleRun:
    """What the oracle made, in our shapes: latents and media by name, every step of the video."""

    latents: dict
    media: dict
    steps: dict


def run_oracle(
    pipe, request, prompt=PROMPT, negative_prompt=NEGATIVE, latents_only=False, **settings
):
    """Run the oracle on a prepared request's noise.

    It keeps its sound latents to itself, so they are caught on their way to the decoder. The clean
    predictions are its scheduler's history.
    """
    sound, video, clean = [], [], []

    def catch_sound(latents):
        sound.append(latents.float().numpy()[None])
        return decode_sound(latents)

    def catch_step(pipe, step, timestep, values):
        video.append(values["latents"].float().numpy())
        clean.append(pipe.scheduler.model_outputs[-1].float().numpy()[0])
        return {}

    decode_sound, pipe.decode_sound = pipe.decode_sound, catch_sound
    try:
        result = pipe(
            prompt,
            negative_prompt=negative_prompt,
            enable_sound=bool(request.sound_frames),
            latents=torch.from_numpy(request.noise),
            sound_latents=torch.from_numpy(request.sound_noise[0])
            if request.sound_frames
            else None,
            output_type="latent" if latents_only else "np",
            callback_on_step_end=catch_step,
            **SETTINGS | settings,
        )
    finally:
        pipe.decode_sound = decode_sound
    media = {}
    if not latents_only:
        media["video"] = result.video.transpose(3, 0, 1, 2)[None]
    if sound:
        media["sound"] = result.sound.float().numpy()[None]
    latents = {"video": video[-1]} | ({"sound": sound[0]} if sound else {})
    return OracleRun(latents, media, {"latents": np.stack(video), "clean": np.stack(clean)})


def prepare(model, prompt=PROMPT, **settings):
    """A request as the oracle understands it."""
    defaults = SETTINGS | dict(
        prompt_style="diffusers", schedule="native", negative_prompt=NEGATIVE
    )
    return model.prepare(prompt, **defaults | settings)
