"""What a checkpoint weighs, and what a generation of a given shape needs, by arithmetic.

A generation runs in stages, each a compiled program of its own: the video encoder if pixels are
given, the text tower, the loop over steps, the video decoder, the sound decoder. Weights, inputs
and outputs of a stage are exact; what its program needs beside them was measured on a GPU
(benchmarks/NOTES.md) and is explained here in terms of the model's sizes, within 5% at the three
sizes measured.
"""

import functools
import math
from collections.abc import Mapping

import jax.numpy as jnp

from cosmos3_jax.checkpoint.rules import leaf_shapes
from cosmos3_jax.config import Config, check_fps
from cosmos3_jax.models import sound_vae, transformer, video_vae
from cosmos3_jax.models.attention import fused_obstacle, logit_bytes
from cosmos3_jax.parallel.sharding import ROWS, TOKENS
from cosmos3_jax.runtime.job import Job
from cosmos3_jax.sampling.denoise import is_one_batch

STAGES = {  # by the part of the weights that they read
    "und": "text stage",
    "gen": "denoising stage",
    "video_vae": "video decoding stage",
    "sound_vae": "sound decoding stage",
}
ENCODING = "video encoding stage"  # before them, of what is given as pixels
STAGE_NAMES = (ENCODING, *STAGES.values())
_NAMES = {
    "und": "text tower",
    "gen": "media tower",
    "video_vae": "video VAE",
    "sound_vae": "sound VAE",
}
# Where attention is XLA's: logits, their exponentials, and most of a third. Measured, 2.0 to 2.7.
LOGIT_COPIES = 3
GATHERED_LAYERS = 2  # where `fsdp` divides the weights: one that computes, one that arrives
ENCODER_TENSORS = 8  # of the encoder's first stage; measured, 7.8 to 8.0, for one video at a time


def parameter_counts(config: Config) -> dict[str, int]:
    """Parameters that are loaded, by part: text tower, media tower, the autoencoders."""
    return {
        _NAMES[part]: sum(map(math.prod, leaf_shapes(tree).values()))
        for part, tree in _trees(config).items()
    }


@functools.lru_cache
def _trees(config: Config) -> dict[str, dict]:
    """Shapes of all that is loaded. Found by tracing, which takes a second."""
    towers = transformer.param_shapes(config.transformer)
    trees = {"und": towers["und"], "gen": towers["gen"]}
    trees["video_vae"] = video_vae.param_shapes(config.video_vae)
    if config.has_sound:
        trees["sound_vae"] = sound_vae.param_shapes(config.sound_vae, with_encoder=True)
    return trees


def _attention(config: Config, job: Job, shape: tuple, sound_frames: int) -> tuple[int, ...]:
    """Of the media tower on one device: batch, with those branches that are run as one, heads,
    queries and keys.
    """
    mesh = job.mesh
    queries = math.prod(transformer.patch_grid(config.transformer, shape)) + sound_frames
    prompts = -(-job.batch // mesh.get("data", 1))
    as_one = job.guidance and is_one_batch(job.batch * queries, mesh)
    at_once = 2 // mesh.get("cfg", 1) if as_one else 1
    heads = config.transformer.num_attention_heads // ways(mesh, TOKENS)
    return at_once * prompts, heads, queries, queries + job.text_tokens


def generation_bytes(config: Config, job: Job) -> dict[str, int]:
    """Memory of one generation on each device in bytes: what needs it, each stage's sum, and the
    `peak`.

    Args:
        config: the checkpoint's, as loaded: the weights of its sound count whether or not the job
            has sound.
        job: on more than one device this is arithmetic alone, and nothing of it was measured.

    Returns:
        `und`, `gen`, `video_vae`[, `sound_vae`]: weights. `condition`, `latents`, `trajectory`,
        `pixels`, `waveform`, `clean pixels`: arrays that go from stage to stage. `logits`: of one
        attention, where no kernel does without. `... work`: what a stage's program needs for
        itself. `... stage`: all that is on the device in it. `peak`: of the stages.

    Raises:
        ValueError: on a size that no video can have.
    """
    itemsize, model, vae = jnp.dtype(job.dtype).itemsize, config.transformer, config.video_vae
    num_frames, height, width, mesh = job.num_frames, job.height, job.width, job.mesh
    shape = video_vae.pixel_to_latent_shape(vae, num_frames, height, width)
    check_fps(job.fps)
    sound_frames = 0
    if job.sound:
        sound_frames = sound_vae.sound_latent_length(config.sound_vae, num_frames, job.fps)
    attention = _attention(config, job, shape, sound_frames)
    by_tokens, by_rows = ways(mesh, TOKENS), ways(mesh, ROWS)
    fused = fused_obstacle(jnp.dtype(job.dtype), model.head_dim, job.device) is None
    logits = 0 if fused else logit_bytes(*attention)
    batch = -(-job.batch // mesh.get("data", 1))
    at_once, tokens = attention[0] // batch, batch * -(-attention[2] // by_tokens)
    branches = max(at_once, (1 + job.guidance) // mesh.get("cfg", 1))
    weights = {part: _tree_bytes(tree, itemsize) for part, tree in _trees(config).items()}
    gathered = 0
    if (fsdp := mesh.get("fsdp", 1)) > 1:
        layers = _tree_bytes({"layers": _trees(config)["gen"]["layers"]}, itemsize)
        gathered = GATHERED_LAYERS * layers // model.num_hidden_layers
        weights |= {part: weights[part] // fsdp for part in ("und", "gen")}

    key_value = 2 * model.num_key_value_heads * model.head_dim
    keys_values = (
        itemsize * model.num_hidden_layers * batch * job.text_tokens * key_value // by_tokens
    )
    video_latents = 4 * batch * math.prod(shape) * model.latent_channel
    latents = video_latents + 4 * batch * sound_frames * (model.sound_dim or 0)
    condition = keys_values + 4 * tokens * model.head_dim + video_latents
    samples = batch * sound_frames * config.sound_vae.samples_per_latent if job.sound else 0
    arrays = {
        "condition": branches * condition,
        "latents": latents,
        "trajectory": 2 * job.trajectory_steps * latents,
        "pixels": 4 * 3 * batch * num_frames * height * width // by_rows,
        "waveform": 4 * (config.sound_vae.dec_out_channels if job.sound else 0) * samples,
        "clean pixels": 4 * 3 * batch * job.clean_frames * height * width,
        "logits": logits,
    }

    # A token at the end of the SwiGLU: residual, gate and up, their product.
    token = itemsize * (model.hidden_size + 3 * model.intermediate_size)
    text_layers = {name: x for name, x in _trees(config)["und"].items() if name != "embed"}
    layer = _tree_bytes(text_layers, itemsize)
    decoder = _tree_bytes(_trees(config)["video_vae"]["decoder"], itemsize)
    chunk = job.decode_chunk_size or video_vae.decode_chunk_size(*shape[1:], job.device)
    frames, chunk = min(vae.scale_factor_temporal, num_frames), min(chunk, shape[0])
    rows = vae.scale_factor_spatial * -(-height // vae.scale_factor_spatial // by_rows)
    pixel_features = itemsize * batch * rows * width // vae.patch_size**2  # of one frame
    last_stage = pixel_features * frames * vae.decoder_base_dim
    first_stage = pixel_features * min(vae.scale_factor_temporal, job.clean_frames) * vae.base_dim
    work = {
        # Tensors of the first stage, one frame or four at a time.
        "video encoding work": ENCODER_TENSORS * first_stage,
        # One layer's weights, and both prompts in it.
        "text work": layer // model.num_hidden_layers + branches * batch * job.text_tokens * token,
        # Beside the SwiGLU two more residuals, and one for a branch that waits for the other. Six
        # latents are the sampler's state and its update. As one batch, the branches' conditions
        # are joined, which copies them.
        "denoising work": at_once * tokens * (token + 2 * itemsize * model.hidden_size)
        + (branches - at_once) * tokens * itemsize * model.hidden_size
        + 6 * latents
        + (branches * condition if at_once == 2 else 0)
        + LOGIT_COPIES * logits
        + gathered
        + arrays["trajectory"],
        # The kernels with time folded into their channels, and tensors of the last stage.
        "video decoding work": decoder + (7 + 10 * chunk) * last_stage,
        # Not measured, never the largest: four tensors of the waveform's length.
        "sound decoding work": 4 * itemsize * samples * config.sound_vae.dec_dim
        if job.sound
        else 0,
    }
    noise, trajectory = latents, arrays["trajectory"]
    beside = {
        "und": arrays["condition"] + work["text work"],
        "gen": arrays["condition"] + noise + latents + trajectory + work["denoising work"],
    }
    kept = latents + trajectory + arrays["pixels"]
    if job.decode:
        beside["video_vae"] = kept + work["video decoding work"]
    if job.decode and job.sound:
        beside["sound_vae"] = kept + arrays["waveform"] + work["sound decoding work"]

    def held(part: str) -> int:
        return weights[part] if job.offload else sum(weights.values())

    stages = {STAGES[part]: size + held(part) for part, size in beside.items()}
    if job.clean_frames:
        encoding = arrays["clean pixels"] + video_latents + work["video encoding work"]
        stages[ENCODING] = held("video_vae") + encoding
    return weights | arrays | work | stages | {"peak": max(stages.values())}


def ways(mesh: Mapping[str, int], axes: tuple[str, ...]) -> int:
    """Into how many parts these axes of a mesh divide an array."""
    return math.prod(mesh.get(name, 1) for name in axes)


def _tree_bytes(tree: dict, itemsize: int) -> int:
    """Bytes of a part's weights; the timestep embedding stays float32."""
    return sum(
        math.prod(shape) * (4 if "time_embedder" in path else itemsize)
        for path, shape in leaf_shapes(tree).items()
    )
