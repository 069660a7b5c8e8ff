"""One optimizer step as a pure function of a state, what is frozen, and a batch.

Masters, optimizer state and averages are float32; both passes compute in bfloat16. What does not
learn is an argument of its own: it has no masters, no optimizer state and no gradient. Nothing here
names a device: under `jax.set_mesh` the step runs on the mesh, see `placement`.

Axes: B batch.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import Array
from jax.tree_util import keystr, tree_leaves_with_path

from cosmos3_jax.config import TransformerConfig
from cosmos3_jax.models.transformer import Latents
from cosmos3_jax.parallel.sharding import mesh_sizes
from cosmos3_jax.training.flow import (
    Batch,
    LossWeights,
    NoiseLevels,
    check_batch,
    example_counts,
    fill_batch,
    flow_loss,
    sample_dropout,
    sample_noise,
)
from cosmos3_jax.training.params import cast_params, join_params
from cosmos3_jax.training.placement import check_examples, divide_batch, divide_state

Tree = Any  # of arrays: parameters, or a LoRA


@struct.dataclass
class TrainState:
    """All that changes from step to step.

    Attributes:
        step: int32, how many were taken.
        params: what learns, float32.
        opt_state: the optimizer's.
        ema: an exponential moving average of `params`, or None.
        key: constant; a step's randomness is drawn from it and the step's number.
    """

    step: Array
    params: Tree
    opt_state: optax.OptState
    ema: Tree | None
    key: Array


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """What is fixed while a step is compiled.

    Attributes:
        levels, weights: see `flow.NoiseLevels` and `flow.LossWeights`.
        text_dropout: the probability of learning an example without its prompt.
        microbatches: the batch goes through in so many parts, one after the other. The gradients
            are those of the whole, to rounding.
        remat: keep one activation a layer, and compute the others twice.
        dtype: what both passes compute in.
        ema_decay: of the average, lower at first: min(decay, (1 + step) / (10 + step)).
        skip_nonfinite: leave parameters, optimizer state and average as they are where the loss or
            a gradient is NaN or infinite; only `step` goes on, to other randomness. Else such a
            step ruins the state, as the metric `finite` says.
    """

    levels: NoiseLevels = NoiseLevels()
    weights: LossWeights = LossWeights()
    text_dropout: float = 0.0
    microbatches: int = 1
    remat: bool = True
    dtype: str = "bfloat16"
    ema_decay: float = 0.9999
    skip_nonfinite: bool = False


def init_state(
    params: Tree, optimizer: optax.GradientTransformation, key: Array, *, ema: bool = False
) -> TrainState:
    """The state before the first step. It holds copies, so that it can be donated.

    Under `jax.set_mesh` it lies on the mesh, see `placement`. Place the parameters first, with
    `sharding.place_params`: those of the host would go to every device whole.
    """

    def init(params: Tree, key: Array) -> TrainState:
        def copy() -> Tree:
            return jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), params)

        masters = copy()
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=masters,
            opt_state=optimizer.init(masters),
            ema=copy() if ema else None,
            key=jnp.copy(key),
        )

    if not mesh_sizes():
        return init(params, key)
    return jax.jit(lambda *given: divide_state(init(*given)))(params, key)


def make_train_step(
    config: TransformerConfig,
    optimizer: optax.GradientTransformation,
    options: TrainOptions = TrainOptions(),
    combine: Callable[[Tree, dict], dict] = join_params,
) -> Callable[[TrainState, dict, Batch], tuple[TrainState, dict[str, Array]]]:
    """`train_step` compiled, (state, frozen, batch) -> (state, metrics); the state is donated."""
    step = partial(train_step, config=config, optimizer=optimizer, options=options, combine=combine)
    return jax.jit(step, donate_argnums=0)


def train_step(
    state: TrainState,
    frozen: dict,
    batch: Batch,
    *,
    config: TransformerConfig,
    optimizer: optax.GradientTransformation,
    options: TrainOptions = TrainOptions(),
    combine: Callable[[Tree, dict], dict] = join_params,
) -> tuple[TrainState, dict[str, Array]]:
    """One step.

    Args:
        state: see `TrainState`.
        frozen: the parameters that do not learn, `{}` if all do; in `options.dtype`, but for those
            that `params.cast_params` keeps in float32.
        batch: see `flow.Batch`.
        config: the transformer's.
        optimizer: any of optax's.
        options: see `TrainOptions`.
        combine: (what learns, frozen) -> `{"und", "gen"}`. `join_params` for parameters taken apart
            by `split_params`; for a LoRA, `lora.attach`.

    Returns:
        The next state, and float32 metrics: `loss`, its `video` and `sound` parts, `grad_norm`,
        before whatever the optimizer does to it, and `finite`: 1, or 0 if the loss or a gradient is
        NaN or infinite. See `check_finite`.

    Raises:
        ValueError: the batch does not fit the model, or cannot be split as asked, or over the mesh;
            or `frozen` is in another dtype.
    """
    _check_dtypes(frozen, options.dtype, config)
    check_batch(batch, config, options.text_dropout)
    check_examples(len(batch.video), options.microbatches)
    for_noise, for_text = jax.random.split(jax.random.fold_in(state.key, state.step))
    batch = sample_dropout(for_text, divide_batch(fill_batch(batch)), options.text_dropout)
    examples = divide_batch((batch, *sample_noise(for_noise, batch, options.levels)))
    counts = example_counts(batch)

    def loss(params: Tree, part: tuple[Batch, Latents, Array]) -> tuple[Array, dict[str, Array]]:
        # Divided once more, so that it is the cast weights that are gathered, half the bytes.
        params = divide_state(cast_params(params, jnp.dtype(options.dtype), config))
        return flow_loss(
            combine(params, frozen), *part, config,
            weights=options.weights, counts=counts, remat=options.remat,
        )  # fmt: skip

    gradients_of = partial(jax.value_and_grad(loss, has_aux=True), state.params)
    (value, metrics), gradients = _sum(gradients_of, examples, options.microbatches)

    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if ema is not None:
        decay = jnp.minimum(options.ema_decay, (1 + state.step) / (10 + state.step))
        ema = jax.tree.map(lambda old, new: old + (1 - decay) * (new - old), ema, params)
    norm = optax.tree.norm(gradients)
    finite = jnp.isfinite(value) & jnp.isfinite(norm)
    metrics = {"loss": value, **metrics, "grad_norm": norm, "finite": finite.astype(jnp.float32)}
    learned = params, opt_state, ema
    if options.skip_nonfinite:
        # Known before the optimizer runs, so that what is donated is still updated in place.
        # `optax.apply_if_finite` has counters of its own in the saved state, leaves out the
        # average, and gives in after a number of steps.
        before = state.params, state.opt_state, state.ema
        learned = jax.tree.map(lambda new, old: jnp.where(finite, new, old), learned, before)
    return divide_state(TrainState(state.step + 1, *learned, state.key)), metrics


def check_finite(metrics: dict[str, Array], step: int | Array) -> None:
    """Raise FloatingPointError, with the metrics, unless a step's loss and gradients are finite.

    It waits for the step: a loop that asks every so many steps keeps its speed. What is saved
    meanwhile `Checkpoints.save` looks at.
    """
    if not metrics["finite"]:
        values = ", ".join(f"{name} {float(value):g}" for name, value in metrics.items())
        raise FloatingPointError(f"step {int(step)} is not finite: {values}")


def _check_dtypes(frozen: dict, dtype: str, config: TransformerConfig) -> None:
    """Raise ValueError if a leaf is not in the dtype that it is to be computed in.

    It would be computed in its own, without a word: in float32 at a fraction of the speed.
    """
    wanted = jax.eval_shape(lambda tree: cast_params(tree, jnp.dtype(dtype), config), frozen)
    leaves = zip(tree_leaves_with_path(frozen), jax.tree.leaves(wanted), strict=True)
    for (path, leaf), like in leaves:
        if jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype != like.dtype:
            raise ValueError(
                f"frozen has {keystr(path, simple=True, separator='/')} in {leaf.dtype}, and "
                f"a step of dtype={dtype!r} computes it in {like.dtype}; cast it by "
                f"params.cast_params, or read it by load_towers(..., dtype={dtype!r})"
            )


def _sum(function: Callable[[Tree], Tree], batch: Tree, count: int) -> Tree:
    """The sum of `function` over `count` parts of a batch, one part in memory at a time."""
    if count == 1:
        return divide_state(function(batch))
    parts = _split(batch, count)
    shapes = jax.eval_shape(function, jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def add(total: Tree, part: Tree) -> tuple[Tree, None]:
        return divide_state(jax.tree.map(jnp.add, total, function(part))), None

    return jax.lax.scan(add, divide_state(zeros), parts)[0]


def _split(batch: Tree, count: int) -> Tree:
    """[B, ...] -> [count, B / count, ...]; part i has the examples i, i + count, ...

    So a batch that lies on several devices is split within each of them.
    """
    parts = jax.tree.map(lambda x: jnp.swapaxes(x.reshape(-1, count, *x.shape[1:]), 0, 1), batch)
    return divide_batch(parts, axis=1)
