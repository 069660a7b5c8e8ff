"""Model configurations, read by name from the JSON files of a checkpoint.

Defaults are Cosmos3-Nano's. Keys that mean nothing here are ignored (the public files carry about
eighteen of them); values that this implementation cannot honour are refused when they are read, so
a checkpoint of an unsupported kind fails before any weight is touched.
"""

import dataclasses
import math
from typing import Any, Self

from cosmos3_jax import limits
from cosmos3_jax.json_config import ConfigError, JsonConfig, check, only, read_json
from cosmos3_jax.recipes import Recipe, Recipes

__all__ = [
    "Config", "ConfigError", "Recipe", "Recipes", "SchedulerConfig", "SoundVAEConfig",
    "TransformerConfig", "VideoVAEConfig", "check_fps", "read_json",
]  # fmt: skip

SCHEDULER = "UniPCMultistepScheduler"
MEAN_WAN22 = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557,
    -0.1382, 0.0542, 0.2813, 0.0891, 0.1570, -0.0098, 0.0375, -0.1825,
    -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230,
    -0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748,
    0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)  # fmt: skip
STD_WAN22 = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013,
    0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978,
    0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093,
    0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887,
    0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class TransformerConfig(JsonConfig):
    """`transformer/config.json`: the two-tower Mixture-of-Transformers."""

    _least = {"num_hidden_layers": 2, "unified_3d_mrope_temporal_modality_margin": 0}
    _most = {
        "num_hidden_layers": limits.LAYERS, "num_attention_heads": limits.WIDTH,
        "num_key_value_heads": limits.WIDTH, "head_dim": limits.WIDTH,
        "vocab_size": limits.VOCABULARY,
    }  # fmt: skip

    hidden_size: int = 4096
    num_hidden_layers: int = 36
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 128
    intermediate_size: int = 12288
    vocab_size: int = 151936
    rms_norm_eps: float = 1e-6
    rope_theta: float = 5_000_000.0
    rope_axes_dim: tuple[int, int, int] = (24, 20, 20)
    unified_3d_mrope_temporal_modality_margin: int = 15000
    unified_3d_mrope_reset_spatial_ids: bool = only(True)
    enable_fps_modulation: bool = True
    base_fps: float = 24.0
    latent_channel: int = 48
    latent_patch_size: int = 2
    patch_latent_dim: int = 192
    timestep_scale: float = 0.001
    sound_gen: bool = True
    sound_dim: int | None = 64
    sound_latent_fps: float = 25.0
    hidden_act: str = only("silu")
    attention_bias: bool = only(False)
    qk_norm_for_text: bool = only(True)
    qk_norm_for_diffusion: bool = only(True)
    position_embedding_type: str = only("unified_3d_mrope")
    joint_attn_implementation: str = only("two_way")
    use_und_k_norm_for_gen: bool = only(False)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        # The mRoPE section is nested in Nano's file and at the top level in newer ones; absent keys
        # mean "no sound" in the public format, whatever our defaults are.
        values = {"sound_gen": False, **values}
        scaling = values.get("rope_scaling")
        check(
            scaling is None or isinstance(scaling, dict),
            f"rope_scaling={scaling!r} must be a JSON object or null",
        )
        if values.get("rope_axes_dim") is None:
            section = (scaling or {}).get("mrope_section")
            values["rope_axes_dim"] = section or cls.rope_axes_dim
        return super().from_dict(values)

    def __post_init__(self):
        super().__post_init__()
        check(
            self.num_attention_heads % self.num_key_value_heads == 0,
            f"num_attention_heads={self.num_attention_heads} is not a multiple of "
            f"num_key_value_heads={self.num_key_value_heads}",
        )
        check(
            len(self.rope_axes_dim) == 3 and 2 * sum(self.rope_axes_dim) == self.head_dim,
            f"rope_axes_dim={self.rope_axes_dim} must be three numbers that add up to "
            f"head_dim / 2 = {self.head_dim / 2:g}",
        )
        time, height, width = self.rope_axes_dim
        check(
            time >= max(height, width),
            f"rope_axes_dim={self.rope_axes_dim}: "
            "interleaving needs time >= height and time >= width",
        )
        patch_dim = self.latent_channel * self.latent_patch_size**2
        check(
            self.patch_latent_dim == patch_dim,
            f"patch_latent_dim={self.patch_latent_dim} is not latent_channel * "
            f"latent_patch_size^2 = {patch_dim}",
        )
        check(
            not self.sound_gen or self.sound_dim is not None,
            "sound_gen is on, but sound_dim=None: it must be a positive number of channels",
        )


@dataclasses.dataclass(frozen=True)
class VideoVAEConfig(JsonConfig):
    """`vae/config.json`: the Wan2.2 residual video autoencoder."""

    _least = {"latents_mean": -math.inf}
    _most = {
        "base_dim": limits.WIDTH, "decoder_base_dim": limits.WIDTH, "z_dim": limits.WIDTH,
        "dim_mult": limits.FACTOR, "num_res_blocks": limits.STAGES, "patch_size": limits.FACTOR,
        "scale_factor_spatial": limits.WIDTH, "scale_factor_temporal": limits.WIDTH,
    }  # fmt: skip

    base_dim: int = 160
    decoder_base_dim: int = 256
    z_dim: int = 48
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temperal_downsample: tuple[bool, ...] = (False, True, True)  # spelled so in the public format
    in_channels: int = 12
    out_channels: int = 12
    patch_size: int = 2
    scale_factor_spatial: int = 16
    scale_factor_temporal: int = 4
    latents_mean: tuple[float, ...] = MEAN_WAN22
    latents_std: tuple[float, ...] = STD_WAN22
    is_residual: bool = only(True)
    attn_scales: tuple[float, ...] = only(())
    clip_output: bool = only(False)

    def __post_init__(self):
        super().__post_init__()
        check(
            len(self.temperal_downsample) == len(self.dim_mult) - 1 < limits.STAGES,
            f"temperal_downsample={limits.shown(self.temperal_downsample)} needs one entry fewer "
            f"than dim_mult={limits.shown(self.dim_mult)}, of at most {limits.STAGES}",
        )
        for name in ("latents_mean", "latents_std"):
            length = len(getattr(self, name))
            check(length == self.z_dim, f"{name} has {length} entries, z_dim is {self.z_dim}")
        check(
            self.in_channels == self.out_channels == 3 * self.patch_size**2,
            f"in_channels={self.in_channels} and out_channels={self.out_channels} must be "
            f"3 * patch_size^2 = {3 * self.patch_size**2}",
        )
        check(
            self.scale_factor_spatial == self.patch_size * 2 ** len(self.temperal_downsample),
            f"scale_factor_spatial={self.scale_factor_spatial} is not what "
            f"patch_size={self.patch_size} and "
            f"{len(self.temperal_downsample)} downsamplings give",
        )
        check(
            self.scale_factor_temporal == 2 ** sum(self.temperal_downsample),
            f"scale_factor_temporal={self.scale_factor_temporal} is not what "
            f"temperal_downsample={self.temperal_downsample} gives",
        )


@dataclasses.dataclass(frozen=True)
class SoundVAEConfig(JsonConfig):
    """`sound_tokenizer/config.json`: the AVAE sound autoencoder."""

    _most = {
        "input_channels": limits.FACTOR, "dec_out_channels": limits.FACTOR,
        "enc_c_mults": limits.FACTOR, "dec_c_mults": limits.FACTOR, "enc_dim": limits.WIDTH,
        "dec_dim": limits.WIDTH, "vocoder_input_dim": limits.WIDTH,
        "enc_latent_dim": 2 * limits.WIDTH, "enc_num_blocks": limits.STAGES,
    }  # fmt: skip

    sampling_rate: int = 48000
    stereo: bool = True
    input_channels: int = 1
    normalize_volume: bool = True
    hop_size: int | None = None
    vocoder_input_dim: int = 64
    enc_dim: int = 192
    enc_c_mults: tuple[int, ...] = (1, 2, 4)
    enc_strides: tuple[int, ...] = (4, 5, 6)
    enc_num_blocks: int = 2
    enc_n_fft: int = 64
    enc_hop_length: int = 16
    enc_latent_dim: int = 128
    dec_dim: int = 320
    dec_c_mults: tuple[int, ...] = (1, 2, 4, 8, 16)
    dec_strides: tuple[int, ...] = (2, 4, 5, 6, 8)
    dec_out_channels: int = 2
    model_type: str = only("autoencoder_v2")
    enc_type: str = only("spec_convnext")
    enc_use_snake: bool = only(True)
    dec_type: str = only("oobleck")
    dec_use_snake: bool = only(True)
    dec_final_tanh: bool = only(False)
    dec_anti_aliasing: bool = only(False)
    dec_use_nearest_upsample: bool = only(False)
    dec_use_tanh_at_final: bool = only(False)
    bottleneck_type: str = only("vae")
    activation: str = only("snakebeta")
    snake_logscale: bool = only(True)
    anti_aliasing: bool = only(False)
    causal: bool = only(False)
    padding_mode: str = only("zeros")
    latent_mean: None = only(None)
    latent_std: None = only(None)

    def __post_init__(self):
        super().__post_init__()
        for part in ("dec", "enc"):
            mults, strides = (getattr(self, f"{part}_{name}") for name in ("c_mults", "strides"))
            check(
                len(mults) == len(strides) <= limits.STAGES,
                f"{part}_c_mults={limits.shown(mults)} and {part}_strides={limits.shown(strides)} "
                f"must have one entry a stage, of at most {limits.STAGES}",
            )
        check(
            self.enc_latent_dim == 2 * self.vocoder_input_dim,
            f"enc_latent_dim={self.enc_latent_dim} must be 2 * vocoder_input_dim = "
            f"{2 * self.vocoder_input_dim} (mean and scale)",
        )
        check(
            self.samples_per_latent == math.prod(self.dec_strides),
            f"hop_size={self.hop_size} is not the product of dec_strides, "
            f"{math.prod(self.dec_strides)}",
        )

    @property
    def samples_per_latent(self) -> int:
        """Waveform samples that one latent frame stands for (1920 in Nano)."""
        return self.hop_size if self.hop_size is not None else math.prod(self.dec_strides)

    @property
    def audio_channels(self) -> int:
        """Channels of the waveform that the encoder reads."""
        return self.input_channels * (2 if self.stereo else 1)


@dataclasses.dataclass(frozen=True)
class SchedulerConfig(JsonConfig):
    """`scheduler/scheduler_config.json`: what UniPC needs of it.

    `flow_shift` and `use_karras_sigmas` are kept for `info` alone: the recipe, not this file,
    chooses them. Distilled checkpoints name another class: they are refused.
    """

    _least = {"disable_corrector": 0}

    num_train_timesteps: int = only(1000)
    solver_order: int = only(2)
    solver_type: str = only("bh2")
    predict_x0: bool = only(True)
    prediction_type: str = only("flow_prediction")
    lower_order_final: bool = only(True)
    final_sigmas_type: str = only("zero")
    thresholding: bool = only(False)
    use_dynamic_shifting: bool = only(False)
    disable_corrector: tuple[int, ...] = only(())
    sigma_max: float | None = 200.0
    sigma_min: float | None = 0.147
    flow_shift: float = 1.0
    use_karras_sigmas: bool = True

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        found, stochastic = values.get("_class_name", SCHEDULER), values.get("stochastic_sampling")
        check(
            found == SCHEDULER and not stochastic,
            f"_class_name={limits.shown(found)} with stochastic_sampling={bool(stochastic)} is not "
            f"supported; only {SCHEDULER} without it is. Distilled four-step checkpoints have "
            "another sampler: take the checkpoint that they were distilled from",
        )
        return super().from_dict(values)


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that shapes the computation. `sound_vae` is None where there is no sound."""

    transformer: TransformerConfig = TransformerConfig()
    video_vae: VideoVAEConfig = VideoVAEConfig()
    sound_vae: SoundVAEConfig | None = SoundVAEConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    recipes: Recipes = Recipes()

    def __post_init__(self):
        check(
            self.transformer.latent_channel == self.video_vae.z_dim,
            f"the transformer's latent_channel={self.transformer.latent_channel} is not "
            f"the video VAE's z_dim={self.video_vae.z_dim}",
        )
        if self.sound_vae is not None and self.transformer.sound_gen:
            check(
                self.transformer.sound_dim == self.sound_vae.vocoder_input_dim,
                f"the transformer's sound_dim={self.transformer.sound_dim} is not the sound VAE's "
                f"vocoder_input_dim={self.sound_vae.vocoder_input_dim}",
            )
            rate, hop = self.sound_vae.sampling_rate, self.sound_vae.samples_per_latent
            check(
                math.isclose(self.transformer.sound_latent_fps, rate / hop),
                f"the transformer's sound_latent_fps={self.transformer.sound_latent_fps} is not "
                f"the sound VAE's sampling_rate / samples_per_latent = {rate} / {hop}",
            )

    @property
    def recipe(self) -> Recipe:
        """Of a video from text."""
        return self.recipes.of("text2video")

    @property
    def has_sound(self) -> bool:
        """Whether the transformer's sound head and the sound VAE are both there."""
        return self.transformer.sound_gen and self.sound_vae is not None

    def silent(self) -> Self:
        """The same sizes without sound, as a checkpoint is loaded for a video alone."""
        model = dataclasses.replace(self.transformer, sound_gen=False)
        return dataclasses.replace(self, transformer=model, sound_vae=None)


def check_fps(fps: float) -> None:
    """Raise ValueError unless these frames per second are a number that a video can have."""
    if not 0 < fps < math.inf:
        raise ValueError(f"fps={fps} must be positive and finite, for example 24.0")
    least, most = limits.FPS
    if not least <= fps <= most:
        raise ValueError(
            f"fps={fps} is not within {least:g} to {most:g}: take the video's own rate, for "
            "example 24.0"
        )
