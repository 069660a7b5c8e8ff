"""The sizes that a benchmark takes: those asked for, or those of a dry run.

A dry run has few layers, so that a benchmark's own lines run in seconds. `--dry` takes its sizes in
place of Nano's, through the same functions. Its figures mean nothing.
"""

import argparse
from pathlib import Path

from cosmos3_jax.cli.bench import PROMPT_TOKENS, SIZES
from cosmos3_jax.config import Config, SoundVAEConfig, TransformerConfig, VideoVAEConfig
from cosmos3_jax.runtime.job import Job

SIZE = {"num_frames": 5, "height": 16, "width": 24}  # of a video
CONFIG = Config(
    TransformerConfig(
        hidden_size=128, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4,
        head_dim=32, intermediate_size=256, vocab_size=512, rope_axes_dim=(6, 5, 5),
    ),
    VideoVAEConfig(
        base_dim=8, decoder_base_dim=8, num_res_blocks=1, dim_mult=(1, 1),
        temperal_downsample=(True,), scale_factor_spatial=4, scale_factor_temporal=2,
    ),
    SoundVAEConfig(
        dec_dim=8, enc_dim=8, enc_num_blocks=1, enc_c_mults=(1, 2), enc_strides=(5, 24),
        dec_c_mults=(1, 2), dec_strides=(40, 48),
    ),
)  # fmt: skip
SILENT = CONFIG.silent()


def add_options(parser: argparse.ArgumentParser, size: str, several: bool = False) -> None:
    """`--out`, and the options that `video_size` reads; `size` is the default. Of `several` sizes,
    with commas between them, `bench.jobs` makes the jobs.
    """
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", choices=None if several else SIZES, default=size)
    parser.add_argument("--num-frames", type=int, default=189)
    parser.add_argument("--dry", action="store_true", help="tiny sizes")


def video_size(options: argparse.Namespace) -> dict[str, int]:
    """`num_frames`, `height` and `width` in pixels."""
    if options.dry:
        return SIZE
    height, width = SIZES[options.size]
    return {"num_frames": options.num_frames, "height": height, "width": width}


def job(options: argparse.Namespace, **fields) -> Job:
    """A job of these options, with `fields`, and prompts as `cosmos3-jax bench` has them."""
    prompts = {"text_tokens": PROMPT_TOKENS, "negative_tokens": PROMPT_TOKENS}
    return Job(**video_size(options) | prompts | fields)
