"""Configurations: Nano's files are the defaults, what cannot be honoured is refused by name."""

import json
import re

import pytest

from cosmos3_jax.config import (
    Config,
    ConfigError,
    Recipe,
    SchedulerConfig,
    SoundVAEConfig,
    TransformerConfig,
    VideoVAEConfig,
)

# nvidia/Cosmos3-Nano, transformer/config.json, every key of it
NANO = {
    "_class_name": "Cosmos3OmniTransformer", "_diffusers_version": "0.37.1", "action_dim": 64,
    "action_gen": True, "attention_bias": False, "attention_dropout": 0.0, "base_fps": 24,
    "dtype": "bfloat16", "enable_fps_modulation": True, "freeze_und": False, "head_dim": 128,
    "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
    "intermediate_size": 12288, "joint_attn_implementation": "two_way", "latent_channel": 48,
    "latent_patch_size": 2, "max_action_dim": 64, "max_position_embeddings": 262144,
    "model_type": "qwen3_vl_text", "num_attention_heads": 32,
    "num_embodiment_domains": 32, "num_hidden_layers": 36,
    "num_key_value_heads": 8, "patch_latent_dim": 192,
    "position_embedding_type": "unified_3d_mrope", "qk_norm": False, "qk_norm_for_diffusion": True,
    "qk_norm_for_text": True, "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default",
    },
    "rope_theta": 5000000, "sound_dim": 64, "sound_gen": True, "sound_latent_fps": 25,
    "temporal_compression_factor_sound": 1, "timestep_scale": 0.001,
    "unified_3d_mrope_reset_spatial_ids": True,
    "unified_3d_mrope_temporal_modality_margin": 15000, "use_cache": True, "use_moe": True,
    "video_temporal_causal": False, "vocab_size": 151936,
}  # fmt: skip
# nvidia/Cosmos3-Edge: another backbone, which is not implemented
EDGE = dict(
    hidden_act="relu2", qk_norm_for_text=False, use_und_k_norm_for_gen=True, sound_dim=None,
    sound_gen=False, rope_axes_dim=[24, 20, 20],
)  # fmt: skip


def write(path, text: str):
    path.write_text(text, encoding="utf-8")
    return path


def test_distilled_checkpoints_are_refused():
    distilled = {"_class_name": "FlowMatchEulerDiscreteScheduler", "stochastic_sampling": True}
    for values in (distilled, {"_class_name": "DDIMScheduler"}, {"stochastic_sampling": True}):
        with pytest.raises(ConfigError, match="take the checkpoint that they were distilled from"):
            SchedulerConfig.from_dict(values)


def test_nano_is_the_default(tmp_path):
    """Keys that mean nothing here are ignored, and numbers may be written as integers."""
    file = write(tmp_path / "config.json", json.dumps(NANO | {"a key of tomorrow": [1, {"b": 2}]}))
    assert TransformerConfig.from_file(file) == TransformerConfig.from_dict(NANO)
    assert TransformerConfig.from_dict(NANO) == TransformerConfig()


@pytest.mark.parametrize(
    ("values", "section"),
    [
        (dict(rope_scaling={"mrope_section": [32, 16, 16]}), (32, 16, 16)),
        (dict(rope_axes_dim=[32, 16, 16]), (32, 16, 16)),
        # the oracle's order: the top level wins, null counts as absent
        (
            dict(rope_axes_dim=[32, 16, 16], rope_scaling={"mrope_section": [24, 20, 20]}),
            (32, 16, 16),
        ),
        (dict(rope_axes_dim=None, rope_scaling={"mrope_section": [32, 16, 16]}), (32, 16, 16)),
        (dict(rope_axes_dim=None, rope_scaling=None), (24, 20, 20)),
        (dict(rope_scaling={"rope_type": "default"}), (24, 20, 20)),
        ({}, (24, 20, 20)),
    ],
)
def test_mrope_section_is_found_at_either_place(values, section):
    assert TransformerConfig.from_dict(values).rope_axes_dim == section


def test_sound_is_off_unless_the_file_says_otherwise():
    """The public format leaves the key out of checkpoints without sound; our default is Nano's."""
    assert not TransformerConfig.from_dict({}).sound_gen
    assert not TransformerConfig.from_dict(dict(sound_dim=None, sound_gen=False)).sound_gen
    assert (
        TransformerConfig.from_dict(dict(sound_gen=True)).sound_gen
        and TransformerConfig().sound_gen
    )


def test_configurations_are_hashable():
    """They are static arguments of jitted functions, lists of the JSON file included."""
    assert hash(TransformerConfig.from_dict(NANO)) == hash(TransformerConfig())
    assert hash(Config()) == hash(Config())
    assert Config() != Config(sound_vae=None) and not Config(sound_vae=None).has_sound
    assert Config().has_sound


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(hidden_act="relu2"), "hidden_act='relu2' is not supported; only 'silu' is"),
        (EDGE, "hidden_act='relu2' is not supported; only 'silu' is"),
        (dict(attention_bias=True), "attention_bias=True is not supported"),
        (dict(qk_norm_for_text=False), "qk_norm_for_text=False is not supported"),
        (dict(qk_norm_for_diffusion=False), "qk_norm_for_diffusion=False is not supported"),
        (dict(position_embedding_type="3d_rope"), "only 'unified_3d_mrope' is"),
        (dict(joint_attn_implementation="three_way"), "only 'two_way' is"),
        (dict(use_und_k_norm_for_gen=True), "use_und_k_norm_for_gen=True is not supported"),
        (
            dict(unified_3d_mrope_reset_spatial_ids=False),
            "unified_3d_mrope_reset_spatial_ids=False",
        ),
        (
            dict(rope_axes_dim=[24, 20, 19]),
            "rope_axes_dim=(24, 20, 19) must be three numbers that add up to head_dim / 2 = 64",
        ),
        (dict(rope_scaling={"mrope_section": [32, 32]}), "must be three numbers that add up to"),
        (dict(rope_axes_dim=[16, 24, 24]), "interleaving needs time >= height and time >= width"),
        (dict(sound_gen=True, sound_dim=None), "sound_gen is on, but sound_dim=None"),
        (
            dict(num_key_value_heads=5),
            "num_attention_heads=32 is not a multiple of num_key_value_heads=5",
        ),
        (dict(num_hidden_layers=1), "num_hidden_layers=1 must be at least 2"),
        (
            dict(patch_latent_dim=48),
            "patch_latent_dim=48 is not latent_channel * latent_patch_size^2 = 192",
        ),
        (dict(rope_scaling=[24, 20, 20]), "rope_scaling=[24, 20, 20] must be a JSON object"),
        (dict(rope_scaling="default"), "rope_scaling='default' must be a JSON object or null"),
    ],
)
def test_transformer_values_that_cannot_be_honoured(values, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        TransformerConfig.from_dict(values)


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (
            VideoVAEConfig,
            dict(is_residual=False),
            "is_residual=False is not supported; only True is",
        ),
        (VideoVAEConfig, dict(latents_mean=[0.0] * 16), "latents_mean has 16 entries, z_dim is 48"),
        (
            VideoVAEConfig,
            dict(temperal_downsample=[True, True]),
            "needs one entry fewer than dim_mult",
        ),
        (VideoVAEConfig, dict(patch_size=4), "must be 3 * patch_size^2 = 48"),
        (
            VideoVAEConfig,
            dict(scale_factor_spatial=8),
            "scale_factor_spatial=8 is not what patch_size=2",
        ),
        (VideoVAEConfig, dict(scale_factor_temporal=8), "scale_factor_temporal=8 is not what"),
        (SoundVAEConfig, dict(dec_final_tanh=True), "dec_final_tanh=True is not supported"),
        (
            SoundVAEConfig,
            dict(latent_mean=[0.0]),
            "latent_mean=(0.0,) is not supported; only None is",
        ),
        (SoundVAEConfig, dict(dec_c_mults=[1, 2]), "must have one entry a stage"),
        (SoundVAEConfig, dict(enc_strides=[4]), "must have one entry a stage"),
        (SoundVAEConfig, dict(enc_latent_dim=64), "must be 2 * vocoder_input_dim = 128"),
        (
            SoundVAEConfig,
            dict(hop_size=960),
            "hop_size=960 is not the product of dec_strides, 1920",
        ),
        (SchedulerConfig, dict(solver_order=3), "solver_order=3 is not supported; only 2 is"),
        (
            SchedulerConfig,
            dict(prediction_type="epsilon"),
            "prediction_type='epsilon' is not supported",
        ),
    ],
)
def test_other_values_that_cannot_be_honoured(kind, values, message):
    assert kind.from_dict({}) == kind()
    with pytest.raises(ConfigError, match=re.escape(message)):
        kind.from_dict(values)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("kind", "name", "value", "limit"),
    [
        # integers
        (TransformerConfig, "vocab_size", -1, "must be positive"),
        (TransformerConfig, "latent_patch_size", 0, "must be positive"),
        (TransformerConfig, "num_key_value_heads", 0, "must be positive"),
        (TransformerConfig, "num_hidden_layers", 2.5, "must be an integer"),
        (TransformerConfig, "num_hidden_layers", -3, "must be at least 2"),
        (TransformerConfig, "hidden_size", "4096", "must be an integer"),
        (TransformerConfig, "head_dim", True, "must be an integer"),
        (TransformerConfig, "head_dim", None, "must be an integer"),
        (TransformerConfig, "sound_dim", 0, "must be positive"),
        (TransformerConfig, "sound_dim", 64.0, "must be an integer"),
        (TransformerConfig, "unified_3d_mrope_temporal_modality_margin", -1, "must be at least 0"),
        (VideoVAEConfig, "base_dim", 0, "must be positive"),
        (SoundVAEConfig, "sampling_rate", 0, "must be positive"),
        (SoundVAEConfig, "hop_size", 0, "must be positive"),
        (Recipe, "num_frames", "33", "must be an integer"),
        (Recipe, "num_inference_steps", -1, "must be positive"),
        # numbers
        (TransformerConfig, "rope_theta", "5e6", "must be a number"),
        (TransformerConfig, "rope_theta", 10**400, "must be finite"),
        (TransformerConfig, "rms_norm_eps", 0.0, "must be positive"),
        (TransformerConfig, "base_fps", True, "must be a number"),
        (SchedulerConfig, "sigma_max", -200.0, "must be positive"),
        (SchedulerConfig, "flow_shift", None, "must be a number"),
        (Recipe, "flow_shift", 0, "must be positive"),
        (Recipe, "fps", INF, "must be finite"),
        (Recipe, "guidance_scale", NAN, "must be finite"),
        # switches and names
        (TransformerConfig, "enable_fps_modulation", 1, "must be true or false"),
        (TransformerConfig, "hidden_act", None, "must be a string"),
        (SoundVAEConfig, "stereo", "yes", "must be true or false"),
        (Recipe, "schedule", 3, "must be a string"),
        # tuples
        (TransformerConfig, "rope_axes_dim", 64, "must be a tuple (in JSON: a list)"),
        (VideoVAEConfig, "dim_mult", "1244", "must be a tuple (in JSON: a list)"),
    ],
)
def test_impossible_values(kind, name, value, limit):
    """Whether they come from a file or from Python."""
    message = re.escape(f"{name}={value!r} {limit}")
    for build in (kind.from_dict, lambda values: kind(**values)):
        with pytest.raises(ConfigError, match=message):
            build({name: value})


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (TransformerConfig, dict(rope_axes_dim=[64, 20, -20]), "[2]=-20 must be positive"),
        (TransformerConfig, dict(rope_axes_dim=[24, 20.0, 20]), "[1]=20.0 must be an integer"),
        (VideoVAEConfig, dict(latents_std=[1.0] * 47 + [0.0]), "[47]=0.0 must be positive"),
        (VideoVAEConfig, dict(latents_mean=[NAN] * 48), "[0]=nan must be finite"),
        (VideoVAEConfig, dict(temperal_downsample=[0, 1, 1]), "[0]=0 must be true or false"),
        (SoundVAEConfig, dict(dec_strides=[2, 4, 5, 6, 0]), "[4]=0 must be positive"),
        (SoundVAEConfig, dict(enc_c_mults=[1, [2], 4]), "[1]=[2] must be an integer"),
    ],
)
def test_impossible_entries_are_named(kind, values, message):
    (name,) = values
    with pytest.raises(ConfigError, match=re.escape(name + message)):
        kind.from_dict(values)


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (TransformerConfig, dict(rope_theta=5000000, unified_3d_mrope_temporal_modality_margin=0)),
        (VideoVAEConfig, dict(latents_mean=[-1, 0, 0.5] * 16, latents_std=[1] * 48)),
        (SoundVAEConfig, dict(hop_size=1920)),
        (SoundVAEConfig, dict(hop_size=None)),
        (SchedulerConfig, dict(sigma_max=None, sigma_min=None, flow_shift=5)),
        (Recipe, dict(fps=30, guidance_scale=0)),
        (Recipe, dict(guidance_scale=-1.5)),
    ],
)
def test_possible_values_at_the_edge(kind, values):
    """Integers for floats, null where the format has it, signs where they mean something."""
    config = kind.from_dict(values)
    for name, value in values.items():
        assert getattr(config, name) == (tuple(value) if isinstance(value, list) else value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not valid JSON"),
        (r'{"_class_name": "\ud800"}', "is not valid JSON: 'utf-8' codec can't encode"),
        ("", "is not valid JSON"),
        ("[1, 2]", "holds a list, not a JSON object"),
        ('{"hidden_act": "relu2"}', "hidden_act='relu2' is not supported"),
        (None, "cannot read"),
    ],
)
def test_bad_files_are_named(tmp_path, text, message):
    file = tmp_path / "config.json"
    if text is not None:
        write(file, text)
    with pytest.raises(ConfigError, match=re.escape(message)) as raised:
        TransformerConfig.from_file(file)
    assert str(file) in str(raised.value)


def test_a_folder_is_not_a_file(tmp_path):
    with pytest.raises(ConfigError, match="cannot read .*directory"):
        Recipe.from_file(tmp_path)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            dict(transformer=TransformerConfig(latent_channel=16, patch_latent_dim=64)),
            "the transformer's latent_channel=16 is not the video VAE's z_dim=48",
        ),
        (
            dict(transformer=TransformerConfig(sound_dim=32)),
            "the transformer's sound_dim=32 is not the sound VAE's vocoder_input_dim=64",
        ),
        (
            dict(transformer=TransformerConfig(sound_latent_fps=50.0)),
            "the transformer's sound_latent_fps=50.0 is not the sound VAE's "
            "sampling_rate / samples_per_latent = 48000 / 1920",
        ),
    ],
)
def test_components_must_fit_each_other(parts, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        Config(**parts)
    if "sound" in message:  # sizes of a part that is not there do not matter
        assert not Config(**parts, sound_vae=None).has_sound
