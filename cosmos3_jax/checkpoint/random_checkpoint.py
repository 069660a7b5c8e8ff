"""`random`: a small checkpoint in the public layout that knows nothing, made on first use, offline.

It has every tensor that a published checkpoint has, those that generation never reads included, so
any program that reads the public layout reads it. Its weights are random: it shows that the
machinery works, and what the scores of a model that learnt nothing are. The checkpoint that did
learn something is `tiny`, see `find`.
"""

import dataclasses
import json
import re
import zlib
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from cosmos3_jax.checkpoint import publish
from cosmos3_jax.checkpoint.files import MAX_SHARD_BYTES, PUBLIC_STEM, write_tensors
from cosmos3_jax.checkpoint.layouts import layouts
from cosmos3_jax.checkpoint.load import RECIPE_FILE, TOKENIZER_FOLDER
from cosmos3_jax.checkpoint.rules import Rule, split_weight_norm
from cosmos3_jax.checkpoint.tiny_tokenizer import write_tokenizer
from cosmos3_jax.config import Config, SoundVAEConfig, TransformerConfig, VideoVAEConfig
from cosmos3_jax.models.tokenizer import Tokenizer
from cosmos3_jax.parallel.device import user_cache

NAME = "random"
VERSION = 1  # raise it when what is written changes: a cached folder of another version is not read
TRANSFORMER_SHARD_BYTES = 1024**2  # several shards, as the published ones have

RECIPE = {
    "num_frames": 33, "height": 96, "width": 160, "fps": 24.0, "num_inference_steps": 8,
    "guidance_scale": 3.0, "flow_shift": 10.0, "schedule": "native",
}  # fmt: skip
TRANSFORMER = {
    "_class_name": "Cosmos3OmniTransformer",
    "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 32, "intermediate_size": 256, "rms_norm_eps": 1e-6, "rope_theta": 5000000.0,
    "rope_scaling": {"mrope_interleaved": True, "mrope_section": [6, 5, 5], "rope_type": "default"},
    "hidden_act": "silu", "attention_bias": False, "qk_norm_for_text": True,
    "base_fps": 24, "enable_fps_modulation": True, "timestep_scale": 0.001,
    "latent_channel": 48, "latent_patch_size": 2, "patch_latent_dim": 192,
    "unified_3d_mrope_reset_spatial_ids": True, "unified_3d_mrope_temporal_modality_margin": 15000,
    "sound_gen": True, "sound_dim": 64, "sound_latent_fps": 25.0,
    "action_gen": True, "action_dim": 8, "num_embodiment_domains": 2,
}  # fmt: skip
VIDEO_VAE = {"_class_name": "AutoencoderKLWan", "base_dim": 16, "decoder_base_dim": 16}
SOUND_VAE = {"_class_name": "Cosmos3AVAEAudioTokenizer", "dec_dim": 8, "enc_dim": 8}
SCHEDULER = {
    "_class_name": "UniPCMultistepScheduler",
    "num_train_timesteps": 1000, "solver_order": 2, "solver_type": "bh2", "predict_x0": True,
    "prediction_type": "flow_prediction", "use_flow_sigmas": True, "use_karras_sigmas": True,
    "flow_shift": 1.0, "sigma_max": 200.0, "sigma_min": 0.147, "final_sigmas_type": "zero",
    "lower_order_final": True, "timestep_spacing": "linspace",
}  # fmt: skip
MODEL_INDEX = {
    "_class_name": "Cosmos3OmniPipeline",
    "scheduler": ["diffusers", "UniPCMultistepScheduler"],
    "sound_tokenizer": ["diffusers", "Cosmos3AVAEAudioTokenizer"],
    "text_tokenizer": ["transformers", "Qwen2TokenizerFast"],
    "transformer": ["diffusers", "Cosmos3OmniTransformer"],
    "vae": ["diffusers", "AutoencoderKLWan"],
}
# Random residual branches at full strength would drive the waveform into its limits.
QUIET = ((r"decoder\.block\.\d\.res_unit\d\.conv2\.weight", 0.2), (r"decoder\.conv2\.weight", 0.1))


def cached() -> Path:
    """The folder of the random checkpoint, made if this user's cache does not hold it yet.

    The cache is `$XDG_CACHE_HOME/cosmos3_jax`, by default `~/.cache/cosmos3_jax`.

    Raises:
        OSError: the cache cannot be written, or nothing says where it is.
    """
    cache = user_cache()
    folder = cache / f"{NAME}-v{VERSION}"
    if folder.is_dir():
        return folder
    try:
        with publish.folder(folder, lock=False) as made:
            write(made)
    except OSError as error:
        if not folder.is_dir():  # or else another process was faster; what it made is the same
            raise OSError(
                f"the {NAME} checkpoint cannot be written into {cache} ({error}); "
                "set XDG_CACHE_HOME to a folder that can be written"
            ) from error
    return folder


def write(folder: Path) -> None:
    """Write the checkpoint into a folder; the bytes are the same each time."""
    write_tokenizer(folder / TOKENIZER_FOLDER)
    vocabulary = Tokenizer.from_folder(folder / TOKENIZER_FOLDER).vocab_size
    configs = {
        "transformer": TRANSFORMER | {"vocab_size": vocabulary},
        "vae": VIDEO_VAE | dataclasses.asdict(VideoVAEConfig.from_dict(VIDEO_VAE)),
        "sound_tokenizer": SOUND_VAE | dataclasses.asdict(SoundVAEConfig.from_dict(SOUND_VAE)),
    }
    for name, values in configs.items():
        _write_json(folder / name / "config.json", values)
    _write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    _write_json(folder / "model_index.json", MODEL_INDEX)
    _write_json(folder / RECIPE_FILE, RECIPE)

    config = Config(
        transformer=TransformerConfig.from_dict(configs["transformer"]),
        video_vae=VideoVAEConfig.from_dict(configs["vae"]),
        sound_vae=SoundVAEConfig.from_dict(configs["sound_tokenizer"]),
    )
    unread = unread_shapes(config.transformer, configs["transformer"])
    for name, (layout, leaves) in layouts(config).items():
        shapes = unread if name == "transformer" else {}
        tensors = {key: _random(key, shape) for key, shape in shapes.items()}
        for rule in layout.rules:
            tensors |= _random_for(rule, leaves[rule.leaf])
        dtype = np.float32 if name == "sound_tokenizer" else jnp.bfloat16
        tensors = {key: value.astype(dtype) for key, value in sorted(tensors.items())}
        sizes = {key: value.nbytes for key, value in tensors.items()}
        shard = TRANSFORMER_SHARD_BYTES if name == "transformer" else MAX_SHARD_BYTES
        write_tensors(folder / name, PUBLIC_STEM, sizes, tensors.__getitem__, shard)


def _write_json(path: Path, values: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def unread_shapes(config: TransformerConfig, values: dict) -> dict[str, tuple[int, ...]]:
    """The public tensors that generation never reads: the language head, actions and the like."""
    width, heads = config.hidden_size, config.num_attention_heads * config.head_dim
    domains, action = values["num_embodiment_domains"], values["action_dim"]
    last = f"layers.{config.num_hidden_layers - 1}"
    return {
        "lm_head.weight": (config.vocab_size, width),
        "norm.weight": (width,),
        f"{last}.self_attn.to_q.weight": (heads, width),
        f"{last}.self_attn.to_out.weight": (width, heads),
        f"{last}.self_attn.norm_q.weight": (config.head_dim,),
        f"{last}.mlp.gate_proj.weight": (config.intermediate_size, width),
        f"{last}.mlp.up_proj.weight": (config.intermediate_size, width),
        f"{last}.mlp.down_proj.weight": (width, config.intermediate_size),
        f"{last}.post_attention_layernorm.weight": (width,),
        "action_proj_in.fc.weight": (domains, width * action),
        "action_proj_in.bias.weight": (domains, width),
        "action_proj_out.fc.weight": (domains, width * action),
        "action_proj_out.bias.weight": (domains, action),
        "action_modality_embed": (width,),
    }


def _random_for(rule: Rule, leaf_shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Values for the tensors of one rule; a weight-norm pair folds to the random weight."""
    values = _random(rule.key, rule.public_shapes(leaf_shape)[rule.keys[0]])
    halves = split_weight_norm(values) if rule.weight_norm else (values,)
    return dict(zip(rule.keys, halves, strict=True))


def _random(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """float32 values that keep activations near 1, from a generator seeded by the name."""
    generator = np.random.RandomState(zlib.crc32(key.encode()))
    values = generator.standard_normal(shape).astype(np.float32)
    if "norm" in key or key.endswith("gamma"):
        return 1 + 0.1 * values
    if len(shape) < 2 or key.endswith((".alpha", ".beta")):
        return 0.02 * values
    gain = next((gain for pattern, gain in QUIET if re.fullmatch(pattern, key)), 1.0)
    return gain * values / np.sqrt(np.prod(shape[1:]))
