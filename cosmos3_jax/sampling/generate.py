"""The pure generate function: conditions -> scan over steps -> latents -> pixels, waveform.

It composes with `jax.jit`, `jax.grad`, `jax.vmap` and sharding. Only shapes and the number of steps
are static: prompts (of one padded length), noise, guidance scale, fps and sigmas are arrays, and
changing them compiles nothing.

Axes: B batch, S text tokens; latents t frames, h rows, w columns, C channels; s sound frames; K
steps.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial

import einops
import jax
import jax.numpy as jnp
from jax import Array

from cosmos3_jax.config import Config
from cosmos3_jax.models import sound_vae, video_vae
from cosmos3_jax.models.transformer import (
    Condition,
    Latents,
    encode_condition,
    velocity,
)
from cosmos3_jax.parallel import sharding
from cosmos3_jax.sampling import unipc
from cosmos3_jax.sampling.request import T2VRequest, check_request, draw_noise

# Media tokens up to which both guidance branches run as one batch. Beyond, each fills a GPU alone,
# and one after the other is faster and takes half the memory; measured in benchmarks/NOTES.md.
ONE_BATCH_TOKENS = 32768


def generate(
    params: dict,
    request: T2VRequest,
    *,
    config: Config,
    output: str = "media",
    return_trajectory: bool = False,
    on_step: Callable[[int], None] | None = None,
    decode_chunk_size: int | None = None,
) -> dict:
    """Generate a video, or a video with sound, from noise and from what is given.

    Args:
        params: `{"und", "gen", "video_vae", "sound_vae"}`; the autoencoders are read only for
            media, and the video's encoder for `clean_video`.
        request: see `T2VRequest`.
        config: the checkpoint's.
        output: `media` (pixels and waveform) or `latents` (final normalised latents).
        return_trajectory: adds `trajectory`: under `latents` and `clean`, every step's latents and
            clean predictions, stacked on a leading axis K.
        on_step: called on the host with each finished step's index; see `unipc.sample`.
        decode_chunk_size: latent frames decoded at a time, see `video_vae.decode`.

    Returns:
        `video`: float32 [B, 3, T, H, W] in [0, 1], or latents [B, C, t, h, w]; with sound also
        `sound`: float32 [B, channels, samples] in [-1, 1], or latents [B, C_sound, s].

    Raises:
        ValueError: if the request's arrays do not fit one another or the model.
    """
    if output not in ("media", "latents"):
        raise ValueError(f"output={output!r} is unknown; choose media or latents")
    check_request(request, config)
    latents, trajectory = denoise(params, request, config, on_step, return_trajectory)
    if output == "media":
        result = decode(params, latents, config, decode_chunk_size)
    else:
        result = channels_first(latents)
    if trajectory is not None:
        result["trajectory"] = {
            name: jax.vmap(channels_first)(states) for name, states in trajectory.items()
        }
    return result


def denoise(
    params: dict,
    request: T2VRequest,
    config: Config,
    on_step: Callable[[int], None] | None = None,
    return_trajectory: bool = False,
) -> tuple[Latents, dict[str, Latents] | None]:
    """Initial noise -> final latents, channels last, and the trajectory if asked for."""
    if request.clean_video is not None:
        given = encode_given(params["video_vae"], request.clean_video, request.frame_mask, config)
        request = request.replace(**given)
    conditions = encode_conditions(params["und"], request, config)
    return sample_latents(params["gen"], conditions, request, config, on_step, return_trajectory)


def sample_latents(
    params: dict,
    conditions: list[Condition],
    request: T2VRequest,
    config: Config,
    on_step: Callable[[int], None] | None = None,
    return_trajectory: bool = False,
) -> tuple[Latents, dict[str, Latents] | None]:
    """The loop over steps alone: `params` are the media tower's, see `encode_conditions`."""
    conditions, noise = start_sampling(conditions, request, config)
    final, trajectory = unipc.sample(
        partial(guided_velocity, params, config, conditions, request.guidance_scale),
        noise,
        sampler(request),
        on_step=on_step,
        return_trajectory=return_trajectory,
    )
    keep = partial(keep_given, conditions)
    if trajectory is not None:
        states = {"latents": trajectory.latents, "clean": trajectory.clean}
        trajectory = {name: jax.vmap(keep)(state) for name, state in states.items()}
    return _divided(keep(final)), trajectory


def start_sampling(
    conditions: list[Condition], request: T2VRequest, config: Config
) -> tuple[list[Condition], Latents]:
    """What the loop over steps starts from: its conditions and the initial latents.

    Where that is faster, the conditions of both guidance branches become one, of batch 2 B; and
    where a mesh divides the branches.
    """
    noise = _divided(keep_given(conditions, _initial_latents(request, config)))
    tokens = len(noise.video) * conditions[0].rope[0].shape[1]
    if len(conditions) == 2 and is_one_batch(tokens, sharding.mesh_sizes()):
        conditions = [_concatenate(*conditions)]
    return conditions, noise


def is_one_batch(tokens: int, mesh: Mapping[str, int]) -> bool:
    """Whether both guidance branches run as one batch.

    Args:
        tokens: media tokens of all prompts.
        mesh: sizes of the axes of the mesh.
    """
    each = -(-tokens // math.prod(mesh.get(name, 1) for name in ("data", *sharding.TOKENS)))
    return mesh.get("cfg", 1) > 1 or each <= ONE_BATCH_TOKENS


def _divided(latents: Latents) -> Latents:
    """The sampler's state: each device has its prompts' whole, which is little."""
    return jax.tree.map(
        lambda x: sharding.constrain(x, sharding.PROMPTS, *[None] * (x.ndim - 1)), latents
    )


def guided_velocity(
    params: dict,
    config: Config,
    conditions: list[Condition],
    scale: Array | float,
    latents: Latents,
    timestep: Array,
) -> Latents:
    """The velocity of one step, guided if there are two branches; see `start_sampling`."""
    branches = []
    for condition in conditions:
        count = len(condition.frame_mask) // len(latents.video)
        batch = jax.tree.map(lambda x, count=count: sharding.join(*[x] * count), latents)
        velocities = velocity(params, config.transformer, condition, batch, timestep)
        leaves, tree = jax.tree.flatten(velocities)
        split = [sharding.part(leaf, count) for leaf in leaves]
        branches += [tree.unflatten(branch) for branch in zip(*split, strict=True)]
    return _divided(jax.tree.map(partial(_guide, scale=scale), *branches))


def keep_given(conditions: list[Condition], latents: Latents) -> Latents:
    """The given frames in their places, bit for bit."""
    batch = len(latents.video)
    mask, clean = conditions[0].frame_mask, conditions[0].clean_latents
    if sharding.mesh_sizes():
        count = len(mask) // batch
        mask, clean = (sharding.part(x, count)[0] for x in (mask, clean))
    given = mask[:batch, :, None, None, None]
    return latents.replace(video=jnp.where(given, clean[:batch], latents.video))


def sampler(request: T2VRequest) -> unipc.Tableau:
    """The request's tableau, or the one that stands for None."""
    if request.sampler is not None:
        return request.sampler
    return unipc.tableau(unipc.sigmas("native", request.num_inference_steps))


def decode(params: dict, latents: Latents, config: Config, chunk_size: int | None = None) -> dict:
    """Channels-last latents -> `video` and, where there is sound, `sound` (see `generate`)."""
    vae = params["video_vae"]
    video = video_vae.decode(
        vae,
        config.video_vae,
        latents.video,
        chunk_size=chunk_size,
        dtype=params_dtype(vae),
        video_dtype=jnp.float32,
    )
    result = {"video": video}
    if latents.sound is not None:
        vae = params["sound_vae"]
        result["sound"] = sound_vae.decode(
            vae, config.sound_vae, latents.sound, dtype=params_dtype(vae)
        )
    return result


def channels_first(latents: Latents) -> dict[str, Array]:
    """Latents as they leave the package: `video` [B, C, t, h, w] and, if there is sound, `sound`
    [B, C, s].
    """
    arrays = {"video": einops.rearrange(latents.video, "b t h w c -> b c t h w")}
    if latents.sound is not None:
        arrays["sound"] = einops.rearrange(latents.sound, "b s c -> b c s")
    return arrays


def channels_last(video: Array, sound: Array | None = None) -> Latents:
    """The inverse of `channels_first`."""
    video = einops.rearrange(video, "b c t h w -> b t h w c")
    return Latents(video, None if sound is None else einops.rearrange(sound, "b c s -> b s c"))


def encode_given(
    params: dict, clean_video: Array, frame_mask: Array, config: Config
) -> dict[str, Array | None]:
    """The fields of a request that gives pixels -> those of one that gives latents.

    Args:
        params: the video VAE's.
        clean_video, frame_mask: see `T2VRequest`.
        config: the checkpoint's.

    Returns:
        `clean_latents` [B, C, t, h, w] in float32, zero behind what the pixels reach; `frame_mask`
        [B, t], False there; `clean_video` None.
    """
    dtype = params_dtype(params)
    latents = video_vae.encode(params, config.video_vae, clean_video, dtype=dtype)
    latents = einops.rearrange(latents.astype(jnp.float32), "b t h w c -> b c t h w")
    reach, frames = latents.shape[2], frame_mask.shape[1]
    return {
        "clean_latents": jnp.pad(latents, [(0, 0), (0, 0), (0, frames - reach), (0, 0), (0, 0)]),
        "frame_mask": frame_mask & (jnp.arange(frames) < reach),
        "clean_video": None,
    }


def encode_conditions(params: dict, request: T2VRequest, config: Config) -> list[Condition]:
    """The prompt's condition and, with guidance, the negative's; `params` are the text tower's."""
    clean = request.clean_latents
    shared = {
        "video_shape": request.video_shape,
        "fps": request.fps,
        "sound_frames": request.sound_frames,
        "clean_latents": None if clean is None else channels_last(clean).video,
        "frame_mask": request.frame_mask,
    }

    def encode(ids: Array, mask: Array) -> Condition:
        return encode_condition(params, config.transformer, ids, mask, **shared)

    conditions = [encode(request.text_ids, request.text_mask)]
    if request.neg_text_ids is not None:
        conditions.append(encode(request.neg_text_ids, request.neg_text_mask))
    return conditions


def _concatenate(first: Condition, second: Condition) -> Condition:
    """Two conditions as one batch; the shorter text is padded, which its length masks."""
    longest = max(first.key.shape[2], second.key.shape[2])

    def join(a: Array, b: Array) -> Array:  # [L, B, S, K, H]
        padded = [
            jnp.pad(x, [(0, 0), (0, 0), (0, longest - x.shape[2]), (0, 0), (0, 0)]) for x in (a, b)
        ]
        joined = sharding.join(*padded, axis=1)
        return sharding.constrain(joined, None, sharding.BRANCHES, None, sharding.HEADS, None)

    batched = jax.tree.map(
        sharding.join,
        first.replace(key=None, value=None),
        second.replace(key=None, value=None),
    )
    return batched.replace(key=join(first.key, second.key), value=join(first.value, second.value))


def _guide(prompt: Array, negative: Array | None = None, scale: Array | float = 1.0) -> Array:
    """Classifier-free guidance (Ho & Salimans, 2022) in float32; none without a negative."""
    if negative is None:
        return prompt
    prompt, negative = prompt.astype(jnp.float32), negative.astype(jnp.float32)
    scale = jnp.asarray(scale, jnp.float32).reshape(-1, *[1] * (prompt.ndim - 1))
    return negative + scale * (prompt - negative)


def _initial_latents(request: T2VRequest, config: Config) -> Latents:
    batch = request.text_ids.shape[0]
    channels = (config.transformer.latent_channel, config.transformer.sound_dim)
    video, sound = request.noise, request.sound_noise
    if video is None:
        video = draw_noise(request.seed, batch, (channels[0], *request.video_shape))
    if not request.sound_frames:
        sound = None
    elif sound is None:
        sound = draw_noise(request.seed, batch, (channels[1], request.sound_frames))
    return channels_last(video, sound)


def params_dtype(params: dict) -> jnp.dtype:
    """The dtype that an autoencoder computes in: that of its weights."""
    return jax.tree.leaves(params)[0].dtype
