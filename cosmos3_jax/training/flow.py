"""The flow-matching loss of both towers (Lipman et al., 2023; Liu et al., 2023).

x_sigma = (1 - sigma) x_0 + sigma noise, and the model predicts noise - x_0. An example has one
sigma: video and sound share it, as they share the steps at inference. Given frames enter clean and
count nothing in the loss. `flow_loss` is deterministic; `sample_noise` and `sample_dropout` draw
what it needs from a key.

Axes: B batch, S text tokens; latents t frames, h rows, w columns, C channels; s sound frames.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from cosmos3_jax.config import TransformerConfig
from cosmos3_jax.models.transformer import Latents, encode_condition, velocity
from cosmos3_jax.sampling.unipc import NUM_TRAIN_TIMESTEPS


class Batch(struct.PyTreeNode):
    """Examples to learn from.

    Attributes:
        text_ids: int32 [B, S], padded on the right.
        text_mask: bool [B, S], True on the prompt.
        video: [B, t, h, w, C], clean, normalised and channels last: `video_vae.encode`'s result.
        sound: [B, s, C_sound], clean and channels last, or None for silent examples.
        fps: frames per second of the videos, [B] or a scalar.
        frame_mask: bool [B, t], the latent frames that are given rather than generated; None: none.
        uncond_ids, uncond_mask: [B, S'] or [S'], the prompt that stands for no prompt.
            Needed for text dropout alone.
        weight: [B], how much each example counts; None: all the same.
    """

    text_ids: Array
    text_mask: Array
    video: Array
    sound: Array | None = None
    fps: Array | float = 24.0
    frame_mask: Array | None = None
    uncond_ids: Array | None = None
    uncond_mask: Array | None = None
    weight: Array | None = None

    @property
    def latents(self) -> Latents:
        """By modality: `video` and, if there is any, `sound`."""
        return {"video": self.video} | ({} if self.sound is None else {"sound": self.sound})


@dataclasses.dataclass(frozen=True)
class NoiseLevels:
    """How sigma is drawn: u, then sigma = shift u / (1 + (shift - 1) u) (Esser et al., 2024).

    Attributes:
        kind: `logit_normal`, u = 1 / (1 + exp(-(mean + std n))) with n normal; or `uniform`.
        shift: s >= 1 moves weight to high noise, as `flow_shift` does at inference.
        mean, std: of the logit.

    Raises:
        ValueError: on an unknown kind, or a shift or std that is not positive.
    """

    kind: str = "logit_normal"
    shift: float = 1.0
    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self):
        if self.kind not in ("logit_normal", "uniform"):
            raise ValueError(f"kind={self.kind!r} is unknown; choose logit_normal or uniform")
        for name in ("shift", "std"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)} must be positive and finite")

    def sample(self, key: Array, count: int) -> Array:
        """float32 [count], each in [0, 1]."""
        if self.kind == "uniform":
            u = jax.random.uniform(key, (count,))
        else:
            u = jax.nn.sigmoid(self.mean + self.std * jax.random.normal(key, (count,)))
        return self.shift * u / (1 + (self.shift - 1) * u)


@dataclasses.dataclass(frozen=True)
class LossWeights:
    """What a modality's mean squared error is multiplied by."""

    video: float = 1.0
    sound: float = 1.0


def check_batch(batch: Batch, config: TransformerConfig, text_dropout: float = 0.0) -> None:
    """Raise ValueError unless the arrays fit one another and the model; by shapes alone."""
    shape = batch.video.shape
    if len(shape) != 5 or shape[-1] != config.latent_channel:
        raise ValueError(
            f"video of shape {shape}: expected [B, t, h, w, {config.latent_channel}], channels last"
        )
    expected: dict[str, tuple[int | None, ...]] = {
        "text_ids": (shape[0], None),
        "text_mask": batch.text_ids.shape,
    }
    if batch.sound is not None:
        if not config.sound_gen:
            raise ValueError("the batch has sound, the model has none; leave it out")
        expected["sound"] = (shape[0], None, config.sound_dim)
    if batch.frame_mask is not None:
        expected["frame_mask"] = shape[:2]
    if batch.weight is not None:
        expected["weight"] = shape[:1]
    for name, wanted in expected.items():
        found = getattr(batch, name).shape
        fits = len(found) == len(wanted) and all(
            w in (None, f) for f, w in zip(found, wanted, strict=True)
        )
        if not fits:
            raise ValueError(f"{name} of shape {found}: expected {wanted}")
    if not 0 <= text_dropout <= 1:
        raise ValueError(f"text_dropout={text_dropout} is no probability")
    if text_dropout and (batch.uncond_ids is None or batch.uncond_mask is None):
        raise ValueError(
            f"text_dropout={text_dropout} needs uncond_ids and uncond_mask in the batch"
        )


def fill_batch(batch: Batch) -> Batch:
    """Every optional field but `sound` as an array with a leading B, so that it can be split.

    The prompts, and the unconditional ones if there are any, are padded to one length.
    """
    count, frames = batch.video.shape[:2]
    text = {"text_ids": batch.text_ids, "text_mask": batch.text_mask}
    if batch.uncond_ids is not None and batch.uncond_mask is not None:
        text |= {"uncond_ids": batch.uncond_ids, "uncond_mask": batch.uncond_mask}
    width = max(x.shape[-1] for x in text.values())

    def rows(values: Array) -> Array:
        values = jnp.broadcast_to(jnp.asarray(values), (count, values.shape[-1]))
        return jnp.pad(values, [(0, 0), (0, width - values.shape[-1])])

    mask, weight = batch.frame_mask, batch.weight
    return batch.replace(
        fps=jnp.broadcast_to(jnp.asarray(batch.fps, jnp.float32), (count,)),
        frame_mask=jnp.zeros((count, frames), bool) if mask is None else jnp.asarray(mask, bool),
        weight=jnp.ones(count) if weight is None else jnp.asarray(weight, jnp.float32),
        **{name: rows(values) for name, values in text.items()},
    )


def sample_noise(key: Array, batch: Batch, levels: NoiseLevels) -> tuple[Latents, Array]:
    """Noise, float32, of the shape of the batch's latents; and sigma, float32 [B]."""
    for_sigma, *keys = jax.random.split(key, 3)
    noise = {
        name: jax.random.normal(key, x.shape)
        for key, (name, x) in zip(keys, batch.latents.items(), strict=False)
    }
    return noise, levels.sample(for_sigma, len(batch.video))


def sample_dropout(key: Array, batch: Batch, probability: float) -> Batch:
    """The batch with each example's prompt replaced by the unconditional one, or not."""
    if not probability:
        return batch
    return drop_text(batch, jax.random.bernoulli(key, probability, (len(batch.video),)))


def drop_text(batch: Batch, dropped: Array) -> Batch:
    """The batch with the unconditional prompt where `dropped`, bool [B], says so.

    It is what the negative branch of guidance reads (Ho & Salimans, 2022): ids and length.
    """
    batch = fill_batch(batch)
    return batch.replace(
        text_ids=jnp.where(dropped[:, None], batch.uncond_ids, batch.text_ids),
        text_mask=jnp.where(dropped[:, None], batch.uncond_mask, batch.text_mask),
    )


def timestep(sigma: Array) -> Array:
    """What the model is told of a noise level: 1000 sigma truncated, int32 in 0..999.

    The sampler truncates too (see `unipc.Tableau`), so the model learns the numbers it will be
    given.
    """
    scaled = (sigma * NUM_TRAIN_TIMESTEPS).astype(jnp.int32)
    return jnp.clip(scaled, 0, NUM_TRAIN_TIMESTEPS - 1)


def example_counts(batch: Batch) -> dict[str, Array]:
    """What the sums over examples are divided by: the weights of those that count, a scalar each.

    An example whose frames are all given has no video loss, and does not count for it.
    """
    batch = fill_batch(batch)
    counts = {"video": jnp.sum(batch.weight * ~batch.frame_mask.all(axis=1))}
    if batch.sound is not None:
        counts["sound"] = jnp.sum(batch.weight)
    return counts


def flow_loss(
    params: dict,
    batch: Batch,
    noise: Latents,
    sigma: Array,
    config: TransformerConfig,
    *,
    weights: LossWeights = LossWeights(),
    counts: dict[str, Array] | None = None,
    remat: bool = False,
) -> tuple[Array, dict[str, Array]]:
    """The weighted sum of each modality's mean squared error of the velocity.

    An example's error is its mean over channels and noisy frames; the loss is the mean over
    examples, by their weight. Both towers get gradients, the text tower's through its keys and
    values.

    Args:
        params: `{"und", "gen"}`. They compute in their own dtype; the error is taken in float32.
        batch: see `Batch`.
        noise: of the shapes of the batch's latents.
        sigma: [B] in [0, 1].
        config: the transformer's.
        weights: of the modalities.
        counts: what to divide the sums by, if the batch is part of a larger one (see
            `example_counts`): the losses of the parts then add up to that of the whole.
        remat: see `transformer.encode_condition`.

    Returns:
        The loss, float32, and `{"video"[, "sound"]}`, the unweighted errors that it consists of.
    """
    batch = fill_batch(batch)
    counts = example_counts(batch) if counts is None else counts
    clean = jax.tree.map(lambda x: x.astype(jnp.float32), batch.latents)

    def mix(x: Array, noise: Array) -> Array:
        level = sigma.reshape(-1, *[1] * (x.ndim - 1)).astype(jnp.float32)
        return (1 - level) * x + level * noise

    _, frames, rows, columns, _ = batch.video.shape
    condition = encode_condition(
        params["und"],
        config,
        batch.text_ids,
        batch.text_mask,
        video_shape=(frames, rows, columns),
        fps=batch.fps,
        sound_frames=0 if batch.sound is None else batch.sound.shape[1],
        clean={"video": clean["video"]},
        given={"video": batch.frame_mask},
        remat=remat,
    )
    noisy = jax.tree.map(mix, clean, noise)
    found = velocity(params["gen"], config, condition, noisy, timestep(sigma), remat=remat)
    squares = jax.tree.map(
        lambda v, x, n: jnp.square(v.astype(jnp.float32) - (n - x)), found, clean, noise
    )

    free = ~batch.frame_mask
    by_frame = squares["video"].mean(axis=(2, 3, 4)) * free
    errors = {name: x.mean(axis=range(1, x.ndim)) for name, x in squares.items()}
    errors["video"] = by_frame.sum(axis=1) / jnp.maximum(free.sum(axis=1), 1)
    # No example may count at all: then the sum is zero too, and so is the loss.
    tiny = jnp.finfo(jnp.float32).tiny
    metrics = {
        name: jnp.sum(batch.weight * error) / jnp.maximum(counts[name], tiny)
        for name, error in errors.items()
    }
    loss = sum(getattr(weights, name) * value for name, value in metrics.items())
    return loss, metrics
