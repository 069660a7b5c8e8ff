"""The loss against PyTorch's on the oracle's modules; the step against itself, in parts, resumed.

The model is the oracle's small one: odd latent sizes, sound, given frames, texts of two lengths.
"""

import functools

import jax
import numpy as np
import pytest
import torch
from diffusers import Cosmos3OmniTransformer
from oracle import TRANSFORMER, perturb, relative_l2, tree_from_state_dict
from training_oracle import oracle_loss

from cosmos3_jax.checkpoint.rules import leaf_shapes
from cosmos3_jax.checkpoint.transformer_layout import transformer_layout
from cosmos3_jax.config import TransformerConfig
from cosmos3_jax.training import flow
from cosmos3_jax.transformer import Latents, param_shapes

CONFIG = TransformerConfig.from_dict(TRANSFORMER)
FRAMES, HEIGHT, WIDTH, SOUND = 3, 3, 5, 4
LENGTHS, BUCKET = (5, 11), 12

pytestmark = pytest.mark.usefixtures("one_torch_thread")


@functools.cache
def oracle() -> Cosmos3OmniTransformer:
    torch.manual_seed(0)
    return perturb(Cosmos3OmniTransformer(**TRANSFORMER), 1)


@functools.cache
def params() -> dict:
    return tree_from_state_dict(
        transformer_layout(CONFIG), oracle().state_dict(), param_shapes(CONFIG)
    )


def leaf(tree: dict, path: str):
    return functools.reduce(lambda node, name: node[name], path.split("/"), tree)


def make_batch(seed: int = 0, count: int = 2, sound: bool = True) -> flow.Batch:
    """Two prompt lengths in turn; the first example's frame 0 is given."""
    random = np.random.RandomState(seed)
    normal = functools.partial(_normal, random)
    mask = np.arange(BUCKET) < np.resize(LENGTHS, count)[:, None]
    frame_mask = np.zeros((count, FRAMES), bool)
    frame_mask[0, 0] = True
    return flow.Batch(
        text_ids=random.randint(0, TRANSFORMER["vocab_size"], (count, BUCKET)).astype(np.int32),
        text_mask=mask,
        video=normal(count, FRAMES, HEIGHT, WIDTH, TRANSFORMER["latent_channel"]),
        sound=normal(count, SOUND, TRANSFORMER["sound_dim"]) if sound else None,
        fps=np.resize(np.float32([24, 30]), count),
        frame_mask=frame_mask,
        uncond_ids=np.array([3, 1, 4], np.int32),
        uncond_mask=np.ones(3, bool),
        weight=np.resize(np.float32([1, 2]), count),
    )


def _normal(random, *shape) -> np.ndarray:
    return random.standard_normal(shape).astype(np.float32)


def draw(batch: flow.Batch, seed: int = 1) -> tuple[Latents, np.ndarray]:
    random = np.random.RandomState(seed)
    sound = None if batch.sound is None else _normal(random, *batch.sound.shape)
    sigma = random.uniform(0.1, 0.99, len(batch.video)).astype(np.float32)
    return Latents(_normal(random, *batch.video.shape), sound), sigma


@functools.partial(jax.jit, static_argnames=("config", "weights", "remat"))
def loss_and_gradients(params, batch, noise, sigma, config, weights, remat=False):
    return jax.value_and_grad(flow.flow_loss, has_aux=True)(
        params, batch, noise, sigma, config, weights=weights, remat=remat
    )


def reference(batch: flow.Batch, noise: Latents, sigma: np.ndarray, weights: flow.LossWeights):
    """The same by the oracle. Its prompts are lists, so there is no padding to get wrong."""
    examples = []
    for i in range(len(batch.video)):
        sounds = [None if x is None else x[i] for x in (batch.sound, noise.sound)]
        examples.append(
            dict(
                ids=np.asarray(batch.text_ids)[i][np.asarray(batch.text_mask)[i]].tolist(),
                video=batch.video[i],
                sound=sounds[0],
                noise=noise.video[i],
                sound_noise=sounds[1],
                sigma=sigma[i],
                timestep=int(np.float32(sigma[i]) * np.float32(1000)),
                fps=float(batch.fps[i]),
                given=np.flatnonzero(batch.frame_mask[i]).tolist(),
                weight=float(batch.weight[i]),
            )
        )
    return oracle_loss(oracle(), examples, {"video": weights.video, "sound": weights.sound})


@pytest.mark.parametrize("sound", [True, False], ids=["sound", "silent"])
def test_loss_and_gradients_are_the_oracles(sound):
    """Two float32 programs that sum in different orders: measured 1e-7 and 3e-6 at most."""
    weights = flow.LossWeights(video=1.0, sound=0.3)
    batch = make_batch(sound=sound)
    noise, sigma = draw(batch)
    if sound:  # the second example has lost its prompt
        batch = jax.tree.map(np.asarray, flow.drop_text(batch, np.array([False, True])))
    (loss, metrics), gradients = loss_and_gradients(params(), batch, noise, sigma, CONFIG, weights)
    expected, means, expected_gradients = reference(batch, noise, sigma, weights)
    assert abs(loss - expected) <= 1e-5 * expected
    for name, mean in means.items():
        assert abs(metrics[name] - mean) <= 1e-5 * mean
    worst = 0.0
    for rule in transformer_layout(CONFIG).rules:
        found = rule.to_public(np.asarray(leaf(gradients, rule.leaf)))
        if not sound and rule.key.startswith("audio_"):
            assert not found.any() and rule.key not in expected_gradients
            continue
        error = relative_l2(found, expected_gradients[rule.key])
        worst = max(worst, error)
        assert error <= 1e-4, rule.key
    print(f"loss {abs(loss - expected) / expected:.1e}, gradients {worst:.1e}")
    assert len(leaf_shapes(gradients)) == len(leaf_shapes(params()))
