"""The oracle's transformer, its weights as ours, and its loss of our batches."""

import functools

import jax
import numpy as np
import torch
from diffusers import Cosmos3OmniTransformer
from oracle import TRANSFORMER, perturb, tree_from_state_dict
from training_oracle import oracle_loss
from training_run import CONFIG, compiled

from cosmos3_jax.checkpoint.layouts import transformer_layout
from cosmos3_jax.models.transformer import Latents, param_shapes
from cosmos3_jax.training import flow


def new_oracle() -> Cosmos3OmniTransformer:
    torch.manual_seed(0)
    return perturb(Cosmos3OmniTransformer(**TRANSFORMER), 1)


oracle = functools.cache(new_oracle)


@functools.cache
def params() -> dict:
    state_dict = oracle().state_dict()
    return tree_from_state_dict(transformer_layout(CONFIG), state_dict, param_shapes(CONFIG))


WEIGHTS = flow.LossWeights(video=1.0, sound=0.3)
loss_and_gradients = compiled(
    jax.value_and_grad(
        functools.partial(flow.flow_loss, config=CONFIG, weights=WEIGHTS), has_aux=True
    )
)


def reference(batch: flow.Batch, noise: Latents, sigma: np.ndarray, model=None):
    """The same by the oracle. Its prompts are lists, so there is no padding to get wrong."""
    examples = []
    for i in range(len(batch.video)):
        sounds = [None if x is None else x[i] for x in (batch.sound, noise.get("sound"))]
        examples.append(
            dict(
                ids=batch.text_ids[i][batch.text_mask[i]].tolist(),
                video=batch.video[i],
                sound=sounds[0],
                noise=noise["video"][i],
                sound_noise=sounds[1],
                sigma=sigma[i],
                timestep=int(np.float32(sigma[i]) * np.float32(1000)),
                fps=float(batch.fps[i]),
                given=np.flatnonzero(batch.frame_mask[i]).tolist(),
                weight=float(batch.weight[i]),
            )
        )
    return oracle_loss(model or oracle(), examples, vars(WEIGHTS))


# Relative distances from the oracle's, of the loss and its parts and of any gradient:
# `test_tolerances`.
LOSS, GRADIENT = 1e-5, 1e-4
