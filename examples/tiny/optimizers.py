"""Optimizers of the three trainings. Video autoencoder and towers: Muon for what multiplies, Adam
for everything else. Sound autoencoder: Adam.

Muon (Jordan et al., 2024) makes each update of a matrix orthogonal: it learns in all directions
alike, where Adam follows the few that have most of the gradient. On the video autoencoder's first
frames it has 25 dB where Adam has 19 (README). Updates have the size of Adam's (Liu
et al., "Muon is Scalable for LLM Training", 2025), so learning rates are of the same order.
"""

import math
from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers, muon

NARROW = 4  # fewer inputs or outputs than that are no matrix worth its name
MOMENTUM = 0.95
ADAM_B2 = 0.98
UPDATE = 0.2  # root mean square of an update before the learning rate, about Adam's


def optimizer(
    learning_rate: Any, adam_share: float = 1.0, weight_decay: float = 0.0
) -> optax.GradientTransformation:
    """Gradients of norm 1 at most, then Muon and Adam.

    Args:
        learning_rate: a number, an array or a schedule, of matrices.
        adam_share: Adam's learning rate by that of Muon.
        weight_decay: of matrices, by the learning rate; nothing else decays.
    """
    adam_rate = _scaled(learning_rate, adam_share)
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        muon(
            learning_rate,
            beta=MOMENTUM,
            weight_decay=weight_decay,
            consistent_rms=UPDATE,
            adam_learning_rate=adam_rate,
            adam_b2=ADAM_B2,
            muon_weight_dimension_numbers=matrices,
        ),
    )


def adam(learning_rate: Any) -> optax.GradientTransformation:
    """Gradients of norm 1 at most, then Adam for all."""
    clip = optax.clip_by_global_norm(1.0)
    return optax.chain(clip, optax.adam(learning_rate, b2=0.99))


def _scaled(rate: Any, share: float) -> Any:
    return (lambda step: share * rate(step)) if callable(rate) else share * rate


def matrices(params: dict) -> dict:
    """For each kernel, which axes add up and which are outputs; None for what is no matrix.

    A kernel is [..., inputs, outputs]; the taps of a convolution count as inputs, the layers of a
    stack are matrices of their own, and attention has axes for its heads.
    """
    return jax.tree_util.tree_map_with_path(_matrix, params)


def _matrix(path: tuple, leaf: jax.Array) -> MuonDimensionNumbers | None:
    names = [entry.key for entry in path]
    if names[-1] != "kernel":
        return None
    first = int("layers" in names)  # stacked
    inputs = _inputs(names, leaf.ndim - first)
    axes = tuple(range(first, leaf.ndim))
    reduction, output = axes[:inputs], axes[inputs:]
    sizes = [math.prod(leaf.shape[axis] for axis in each) for each in (reduction, output)]
    if min(sizes) < NARROW or "dwconv_1" in names:  # one kernel a channel
        return None
    return MuonDimensionNumbers(reduction_axis=reduction, output_axis=output)


def _inputs(names: list[str], ndim: int) -> int:
    """How many of a kernel's axes are inputs: all but the last, or as attention and MLP have it."""
    return {"qkv": 1, "kv": 1, "gate_up": 1, "out": 2}.get(names[-2], ndim - 1)
