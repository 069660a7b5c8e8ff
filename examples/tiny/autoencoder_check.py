"""How well a trained autoencoder gives back clips of the tiny world, and whether the judge agrees.

Clips of held-out sentences are encoded and decoded as inference does it, from the stored weights.
What the judge still reads right in them is the most that a transformer on these latents can reach,
so the same is asked of latents with noise in them, and of the colour and the pitch that training
sentences never name.

Axes: B batch, T frames, H height, W width, N samples, C channels of latents.
"""

import dataclasses
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cosmos3_jax.models import sound_vae, video_vae
from cosmos3_jax.training import autoencoders as ae
from examples.tiny import grammar, judge, sheets, world
from examples.tiny.autoencoder_models import Autoencoder
from examples.tiny.scenes import Scene

BATCH = 8
NOISE = (0.0, 0.1, 0.2)  # on the latents, in standard deviations
FEWER = 50  # clips of each of the other tables
ROWS = 6  # of the sheet


def posteriors(
    model: Autoencoder, params: dict, scenes: dict[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation of the latents of whole clips, not normalised: [..., C]."""
    count = len(scenes["radius"])
    parts = [
        _posterior(params, jax.tree.map(lambda x, at=start: x[at : at + BATCH], scenes), model)
        for start in range(0, count, BATCH)
    ]
    mean, deviation = (np.concatenate([np.asarray(p[i]) for p in parts]) for i in (0, 1))
    return mean, deviation


@partial(jax.jit, static_argnames="model")
def _posterior(params: dict, scenes: dict, model: Autoencoder) -> tuple[jax.Array, jax.Array]:
    videos, sounds = world.render_batch(scenes)
    if model.folder == "vae":
        return video_vae.posterior(params, model.config, jnp.moveaxis(videos, -1, 1))
    return sound_vae.posterior(params, model.config, sounds)


@partial(jax.jit, static_argnames="model")
def reconstruct(
    params: dict, scenes: dict, key: jax.Array, noise: jax.Array, model: Autoencoder
) -> dict[str, jax.Array]:
    """True clips, what comes back of them, and the latents between, with `noise` added to these.

    Returns `video` [B, T, H, W, 3] and `sound` [B, 2, N] as the judge reads them, one of them
    decoded; `true`, the original of that one; `latents`, without noise.
    """
    videos, sounds = world.render_batch(scenes)
    config = model.config
    if model.folder == "vae":
        latents = video_vae.encode(params, config, jnp.moveaxis(videos, -1, 1))
    else:
        latents = sound_vae.encode(params, config, sounds)
    noisy = latents + noise * jax.random.normal(key, latents.shape)
    if model.folder == "vae":
        decoded = jnp.moveaxis(video_vae.decode(params, config, noisy, chunk_size=1), 1, -1)
        return {"video": decoded, "sound": sounds, "true": videos, "latents": latents}
    decoded = sound_vae.decode(params, config, noisy)
    return {"video": videos, "sound": decoded, "true": sounds, "latents": latents}


def report(
    what: str, model: Autoencoder, params: dict, count: int, out: Path | None = None
) -> dict[str, Any]:
    """Fidelity and the judge's tables on `count` held-out clips, 2 or more, and on the first
    `FEWER` of them with noise and in new words.

    With `out`, a sheet of the first few reconstructions is written there.
    """
    chosen = grammar.held_out_sentences(count)
    scenes = [scene for scene, _ in chosen]
    found: dict[str, Any] = {"what": what, "clips": count, "noise": {}}
    for noise in NOISE:
        some = scenes[: FEWER if noise else None]
        clips, table = _table(f"noise {noise}", what, model, params, some, noise)
        found["noise"][str(noise)] = table
        if noise == 0:
            latents = np.concatenate(
                [c["latents"].reshape(-1, c["latents"].shape[-1]) for c in clips]
            )
            found["latents"] = {"mean": latents.mean(0).tolist(), "std": latents.std(0).tolist()}
            if out is not None:
                shown = zip(clips[:ROWS], chosen, strict=False)
                rows = [(clip["video"], clip["sound"], text) for clip, (_, text) in shown]
                sheets.sheet(rows).save(out / f"{what}.png", optimize=True)
    new = [new_words(scene) for scene in scenes[:FEWER]]
    _, found["new"] = _table("new colour and pitch", what, model, params, new, 0.0)
    return found


def _table(
    title: str, what: str, model: Autoencoder, params: dict, scenes: list[Scene], noise: float
) -> tuple[list[dict[str, np.ndarray]], dict[str, Any]]:
    """The reconstructions of scenes, and what is to be reported of them."""
    clips = list(_clips(model, params, scenes, noise))
    rows = judge.score(scenes, [judge.judge(clip["video"], clip["sound"]) for clip in clips])
    found = fidelity(what, clips)
    print(f"{title}: {found}\n{judge.markdown(rows)}", flush=True)
    return clips, found | {"judge": judge.report(rows)}


def new_words(scene: Scene) -> Scene:
    """The same scene in the colour and the pitch that are kept for fine-tuning."""
    return dataclasses.replace(scene, colour="orange", pitch=scene.pitch and "E6")


def fidelity(what: str, clips: list[dict[str, np.ndarray]]) -> dict[str, float]:
    """Means over clips: `psnr` of videos; `snr` and `log_spectral_distance` of sounds, in dB.

    The distance is that of magnitudes in windows of 1920, smoothed 74 dB below a full tone; silent
    clips have no signal to noise, and `residue` is their loudest sample.
    """
    if what == "video":
        values = [float(ae.psnr(clip["video"], clip["true"])) for clip in clips]
        return {"psnr": float(np.mean(values)), "psnr_least": float(np.min(values))}
    silent = [c for c in clips if not np.any(c["true"])]
    loud = [c for c in clips if np.any(c["true"])]
    distances = []
    for clip in clips:
        pair = np.stack([clip["sound"], clip["true"]])
        ours, theirs = 20 * np.log10(np.asarray(ae.magnitudes(pair, 1920, 480)))
        distances.append(float(np.sqrt(np.mean(np.square(ours - theirs)))))
    return {
        "snr": float(np.mean([float(ae.snr(c["sound"], c["true"])) for c in loud])),
        "log_spectral_distance": float(np.mean(distances)),
        "residue": float(max([np.abs(c["sound"]).max() for c in silent], default=0.0)),
    }


def _clips(
    model: Autoencoder, params: dict, scenes: list[Scene], noise: float
) -> Iterator[dict[str, np.ndarray]]:
    """`reconstruct` for each scene, a few at a time, on the host."""
    for start in range(0, len(scenes), BATCH):
        chosen = scenes[start : start + BATCH]
        padded = chosen + chosen[-1:] * (BATCH - len(chosen))  # one compiled program for all
        key = jax.random.fold_in(jax.random.key(0), start)
        made = reconstruct(params, world.stack(padded), key, jnp.float32(noise), model)
        made = jax.device_get(made)
        yield from ({k: v[i] for k, v in made.items()} for i in range(len(chosen)))
