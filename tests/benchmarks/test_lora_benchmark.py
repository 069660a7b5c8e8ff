"""The arithmetic of the LoRA benchmark."""

import functools

import jax
import jax.numpy as jnp
import lora as benchmark
import numpy as np
import optax
import pytest

from cosmos3_jax.checkpoint import lora
from cosmos3_jax.cli import bench
from cosmos3_jax.models.transformer import param_shapes
from cosmos3_jax.runtime.job import Job
from cosmos3_jax.training.flow import Batch
from cosmos3_jax.training.params import cast_params
from cosmos3_jax.training.step import TrainOptions, init_state, train_step


def test_the_benchmark_counts_what_a_step_computes(monkeypatch):
    """Nano at 256p: the matrix products of the traced step, those of loops as often as they run.

    On a CPU the backward pass has the logits that it computed again; on a GPU it computes them
    once more. Not counted on paper: zeros between the adapters of one kernel, half a per cent.
    """
    config, model = benchmark.NANO, benchmark.NANO.transformer
    job = Job(num_frames=189, height=192, width=320, steps=1, text_tokens=512, negative_tokens=0)
    request = bench.random_request(config, job)
    adapter = jax.eval_shape(lambda: lora.init(jax.random.key(0), model))
    monkeypatch.setattr(benchmark, "ATTENTION_AGAIN", 0.5)
    flops = benchmark.step_flops(config, request, adapter)

    optimizer = optax.sgd(1.0)
    combine = functools.partial(lora.attach, config=model)
    step = functools.partial(
        train_step, config=model, optimizer=optimizer, options=TrainOptions(), combine=combine
    )
    frozen = jax.eval_shape(lambda x: cast_params(x, jnp.bfloat16, model), param_shapes(model))
    state = jax.eval_shape(
        lambda adapter: init_state(adapter, optimizer, jax.random.key(0)), adapter
    )
    video = np.zeros((1, *request.video_shape, model.latent_channel), np.float32)
    batch = Batch(request.text_ids, request.text_mask, video)
    counted = products(jax.make_jaxpr(step)(state, frozen, batch).jaxpr)
    assert counted == pytest.approx(flops["useful"] + flops["again"], rel=0.01)
    assert flops["useful"] == sum(flops[x] for x in ("forward", "backward", "text", "lora"))


def products(jaxpr) -> float:
    """Multiplications and additions of the matrix products of a program."""
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            inner = np.prod([equation.invars[0].aval.shape[axis] for axis in contracted])
            total += 2.0 * inner * np.prod(equation.outvars[0].aval.shape)
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inside = getattr(value, "jaxpr", value)  # closed over constants or not
            if hasattr(inside, "eqns"):
                total += times * products(inside)
    return total
