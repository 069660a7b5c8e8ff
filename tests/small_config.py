"""Sizes of a small model with sound."""

from cosmos3_jax.config import Config, SoundVAEConfig, TransformerConfig, VideoVAEConfig

# Every number that enters the count of the arithmetic is another one.
CONFIG = Config(
    transformer=TransformerConfig(
        hidden_size=64, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2,
        head_dim=32, intermediate_size=80, vocab_size=128, rope_axes_dim=(6, 5, 5),
    ),
    video_vae=VideoVAEConfig(base_dim=8, decoder_base_dim=8, num_res_blocks=1),
    sound_vae=SoundVAEConfig(enc_dim=8, dec_dim=4),
)  # fmt: skip
