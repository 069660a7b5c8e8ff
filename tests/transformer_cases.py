"""The oracle's transformer and ours with its weights, on inputs whose sizes are odd.

The models are small and have Nano's switches: grouped heads, text norms, sound and action weights.
One has Nano's own head dimension and mRoPE section. Latents are 5 x 3: both sizes are odd, as is
the height of Nano's default latents, 45.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import numpy as np
import torch
from diffusers import Cosmos3OmniTransformer
from oracle import TRANSFORMER, oracle_velocity, perturb, tree_from_state_dict
from rounding import farthest

from cosmos3_jax.checkpoint.layouts import transformer_layout
from cosmos3_jax.config import TransformerConfig
from cosmos3_jax.models.transformer import encode_condition, param_shapes, velocity

# Relative L2 distance of a velocity from the oracle's, and from that of another program:
# `test_tolerance`.
TOLERANCES = {"small": 8e-6, "nano_rope": 1.6e-5}
TOLERANCE = TOLERANCES["small"]
# Of one layer or operation; each test that uses it measures what rounding does.
LAYER = 5e-6
# A mistake must stand out from the tolerance by this factor, unless its test says otherwise.
FAR = 1000
BUCKET = 48  # padded length of the text
FRAMES, HEIGHT, WIDTH, SOUND = 6, 5, 3, 9
MODELS = {
    "small": {},
    "nano_rope": dict(head_dim=128, rope_scaling={"mrope_section": [24, 20, 20]}),
}


class Model(NamedTuple):
    oracle: Cosmos3OmniTransformer
    config: TransformerConfig
    params: dict


@dataclasses.dataclass(frozen=True)
class Example:
    """One input: prompt, latents (clean on the `given` frames), and how they are to be read."""

    ids: list[int]
    video: np.ndarray
    sound: np.ndarray | None
    fps: float = 24.0
    given: tuple[int, ...] = ()
    timestep: float = 967

    @property
    def frame_mask(self) -> np.ndarray:
        return np.isin(np.arange(len(self.video)), self.given)

    @property
    def sound_frames(self) -> int:
        return 0 if self.sound is None else len(self.sound)

    def oracle(self, model: Cosmos3OmniTransformer) -> dict:
        return oracle_velocity(model, self.ids, self.video, self.sound, **self.options)

    @property
    def options(self) -> dict:
        return dict(timestep=self.timestep, fps=self.fps, given=self.given)


def example(text=7, sound=True, seed=0, **options) -> Example:
    random = np.random.RandomState(seed)
    ids = random.randint(0, TRANSFORMER["vocab_size"], text).tolist()
    video = random.standard_normal((FRAMES, HEIGHT, WIDTH, TRANSFORMER["latent_channel"]))
    noise = random.standard_normal((SOUND, TRANSFORMER["sound_dim"])).astype(np.float32)
    return Example(ids, video.astype(np.float32), noise if sound else None, **options)


@functools.cache
def build(name: str = "small", seed: int = 0) -> Model:
    options = TRANSFORMER | MODELS[name]
    torch.manual_seed(seed)
    oracle = perturb(Cosmos3OmniTransformer(**options), seed + 1)
    config = TransformerConfig.from_dict(options)
    return Model(oracle, config, load(config, oracle.state_dict()))


def load(config: TransformerConfig, state_dict) -> dict:
    return tree_from_state_dict(transformer_layout(config), state_dict, param_shapes(config))


_encode = jax.jit(encode_condition, static_argnames=("config", "video_shape", "sound_frames"))
_velocity = jax.jit(velocity, static_argnames=("config",))


def padded(*prompts: list[int], bucket: int = BUCKET, padding: int = 0):
    """Prompts of any length as ids and mask, [B, bucket] each."""
    ids = np.full((len(prompts), bucket), padding, np.int32)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = prompt
    return ids, np.arange(bucket) < np.array([[len(prompt)] for prompt in prompts])


def encode(model: Model, *examples: Example, text=None, video_shape=(FRAMES, HEIGHT, WIDTH)):
    """The condition of a batch of examples that agree in everything static."""
    return _encode(
        model.params["und"], model.config, *(text or padded(*(e.ids for e in examples))),
        video_shape=video_shape, sound_frames=examples[0].sound_frames,
        fps=np.array([e.fps for e in examples], np.float32),
        clean={"video": np.stack([e.video for e in examples])},
        given={"video": np.stack([e.frame_mask for e in examples])},
    )  # fmt: skip


def step(model: Model, condition, *examples: Example, timestep=None) -> dict:
    """The velocity of a batch, float32, in the oracle's form; without a batch axis for one."""
    latents = {"video": np.stack([e.video for e in examples])}
    if examples[0].sound is not None:
        latents["sound"] = np.stack([e.sound for e in examples])
    timestep = examples[0].timestep if timestep is None else timestep
    found = _velocity(model.params["gen"], model.config, condition, latents, timestep)
    found = {name: np.asarray(x, np.float32) for name, x in found.items()}
    return found if len(examples) > 1 else {name: x[0] for name, x in found.items()}


def ours(model: Model, *examples: Example, **options) -> dict:
    return step(model, encode(model, *examples, **options), *examples)


def error(found: dict, reference: dict) -> float:
    """The larger of the relative L2 errors of video and sound."""
    assert found.keys() == reference.keys()
    return farthest(found, reference)
