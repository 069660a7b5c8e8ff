"""A step of training against itself, in parts and resumed."""

import functools
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from rounding import check, farthest, relative_l2
from training_cases import params
from training_run import CONFIG, OPTIMIZER, compiled_step, make_batch, run, start

from cosmos3_jax.models import attention
from cosmos3_jax.training.checkpoints import Checkpoints
from cosmos3_jax.training.params import cast_params, join_params, split_params
from cosmos3_jax.training.step import TrainOptions, TrainState, check_finite, train_step

# Relative L2 distance of a step's metrics and gradient from those of another program.
STEP = 1e-5


def gradient(state: TrainState) -> np.ndarray:
    """Of the first step, all in one: Adam's first moment is a tenth of it."""
    moments = jax.tree.leaves(state.opt_state[0].mu)
    return 10 * np.concatenate([np.ravel(x) for x in moments])


def test_in_parts_and_with_remat_it_is_the_same_step(record_property):
    """Microbatches of one example each, one of them with a given frame and half the weight."""
    batch = make_batch()

    def step(*arguments):
        state, metrics = compiled_step()(*arguments)
        return metrics, gradient(state)

    check(record_property, STEP, step, *start(), batch)
    whole, metrics = compiled_step()(*start(), batch)
    parts, again = compiled_step(microbatches=2, remat=True)(*start(), batch)
    for name, value in metrics.items():
        assert relative_l2(again[name], value) <= STEP, name
    assert relative_l2(gradient(parts), gradient(whole)) <= STEP
    assert relative_l2(np.linalg.norm(gradient(whole)), metrics["grad_norm"]) <= STEP
    with pytest.raises(ValueError, match="a batch of 2 cannot go through in 3 equal parts"):
        compiled_step(microbatches=3)(*start(), batch)


def test_attention_is_not_computed_again(monkeypatch):
    """With cuDNN: a layer's other values are, its attention's are kept. Traced, as on a GPU."""

    def obstacle(dtype, *_):  # shapes are traced in float32
        return None if dtype == jnp.bfloat16 else "the dtype"

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91300)
    monkeypatch.setattr(attention, "fused_obstacle", obstacle)
    options = TrainOptions(dtype="bfloat16")
    step = functools.partial(train_step, config=CONFIG, optimizer=OPTIMIZER, options=options)
    state, frozen = start()
    with pytest.raises(ValueError, match="gen/layers/.* in float32, .* in bfloat16; cast it by"):
        step(state, {"gen": {"layers": frozen["gen"]["layers"]}}, make_batch())
    blurred = jax.tree.map(lambda x: x.astype(jnp.bfloat16), frozen)
    with pytest.raises(ValueError, match="gen/time_embedder/.* in bfloat16, and .* in float32"):
        step(state, blurred, make_batch())
    frozen = cast_params(frozen, jnp.bfloat16, CONFIG)
    text = str(jax.make_jaxpr(step)(state, frozen, make_batch()))
    # one of either in each tower's scan over layers
    for kernel in ("dot_product_attention_fwd_wrapper", "dot_product_attention_bwd_wrapper"):
        assert len(re.findall(rf"= {kernel}\[", text)) == 2
    assert attention.keeps_attention(cudnn._dot_product_attention_fwd_p_wrapper)


AVERAGE = 1e-6  # relative L2 distance of averaged weights


def test_the_average(record_property):
    """min(0.9, 1 / 10), then min(0.9, 2 / 11), of the old one; masters are float32 copies."""
    state, frozen = start()
    masters = [jax.tree.map(np.asarray, state.params)]
    for step in range(2):
        state, _ = compiled_step()(state, frozen, make_batch(step))
        masters.append(jax.tree.map(np.asarray, state.params))

    def average(*masters):
        first = jax.tree.map(lambda a, b: a / 10 + 9 * b / 10, *masters[:2])
        return jax.tree.map(lambda a, b: 2 * a / 11 + 9 * b / 11, first, masters[2])

    check(record_property, AVERAGE, average, *masters)
    assert farthest(state.ema, average(*masters)) <= AVERAGE
    assert state.step == 2 and np.abs(jax.tree.leaves(masters[2])[0]).any()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_step_that_is_not_finite(value):
    """It ruins the state, and says so; or it is skipped, and the next one counts as if alone."""
    batch, (state, frozen) = make_batch(), start()
    video = batch.video.copy()
    video[1, 0, 0, 0, 0] = value
    ruined, metrics = compiled_step()(state, frozen, batch.replace(video=video))
    assert metrics["finite"] == 0 and np.isnan(jax.tree.leaves(ruined.params)[0]).any()
    with pytest.raises(FloatingPointError, match="step 1 is not finite: .*loss nan"):
        check_finite(metrics, ruined.step)

    skip = compiled_step(skip_nonfinite=True)
    skipped, metrics = skip(state, frozen, batch.replace(video=video))
    assert metrics["finite"] == 0 and skipped.step == 1
    same = (skipped.params, skipped.opt_state, skipped.ema)
    jax.tree.map(np.testing.assert_array_equal, same, (state.params, state.opt_state, state.ema))
    after, metrics = skip(skipped, frozen, batch)
    alone, expected = compiled_step()(state.replace(step=skipped.step), frozen, batch)
    assert metrics["finite"] == expected["finite"] == 1
    check_finite(metrics, after.step)
    assert relative_l2(gradient(after), gradient(alone)) <= STEP
    assert np.any(gradient(after)) and after.step == 2


def test_taking_a_tree_apart():
    learns, frozen = split_params(params() | {"video_vae": {}}, ["gen/.*qkv", "^und/embed"])
    assert jax.tree.structure(join_params(learns, frozen)) == jax.tree.structure(params())
    assert set(learns) == {"und", "gen"} and len(jax.tree.leaves(learns)) == 2
    with pytest.raises(ValueError, match="'gen/layer/mlp' matches nothing; near: .*layers/mlp"):
        split_params(params(), ["gen/.*", "gen/layer/mlp"])
    with pytest.raises(ValueError, match="must be a list"):
        split_params(params(), "gen")
    with pytest.raises(ValueError, match="nothing would change"):
        split_params(params(), [])


# ---------------------------------------------------------------- killed and resumed


def test_a_killed_run_continues_to_the_same_numbers(tmp_path):
    """A process is killed while it saves its third state or a later one; then another goes on."""
    program = [sys.executable, str(Path(__file__).parents[1] / "training_run.py")]
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "JAX_PLATFORMS": "cpu"}
    reference = run(tmp_path / "whole", 6)
    folder, lines = tmp_path / "killed", []
    with subprocess.Popen(
        [*program, folder, "100000"], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        for line in process.stdout:
            lines.append(line.split())
            if line.startswith("saving 3"):
                os.kill(process.pid, signal.SIGKILL)
                break
    assert process.returncode == -signal.SIGKILL
    assert [float(loss) for _, _, loss in lines] == reference[:3]
    (folder / "9.orbax-checkpoint-tmp" / "default").mkdir(parents=True)
    with Checkpoints(folder) as checkpoints:
        last = checkpoints.last
    assert last in (1, 2, 3)  # saving goes on in the background
    assert not list(folder.glob("*tmp*"))
    assert run(folder, 6) == reference[last:]
    with Checkpoints(folder, keep=2) as checkpoints:
        assert checkpoints.last == 6
        template, _ = start()
        state = checkpoints.restore(template, step=5)
        assert state.step == 5 and state.ema is not None
        with pytest.raises(FileNotFoundError, match="no state of step 4"):  # two are kept
            checkpoints.restore(template, step=4)
        with pytest.raises(ValueError, match=r"(?s)only on disk.*opt_state/0/mu"):
            checkpoints.restore(start(optax.sgd(1e-3))[0])
        halved = jax.tree.map(lambda x: x[..., ::2], template.params)
        with pytest.raises(
            ValueError, match=r"(?s)params/gen/layers/mlp/down/kernel: .*96, 64\).*32\)"
        ):
            checkpoints.restore(template.replace(params=halved))


def small_state(step: int, dtype=jnp.float32) -> TrainState:
    return TrainState(jnp.int32(step), {"w": jnp.zeros(2, dtype)}, (), None, jax.random.key(0))


def test_a_state_that_cannot_be_kept_or_restored_as_it_is(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        for step in (2, 4):
            checkpoints.save(small_state(step))
        state = checkpoints.restore(small_state(0), step=2)
        with pytest.raises(ValueError, match="already has step 4, so that step 3 would not be"):
            checkpoints.save(state.replace(step=state.step + 1))
        checkpoints.save(small_state(4))  # is there
        checkpoints.save(small_state(5))
        with pytest.raises(
            ValueError, match=r"params/w: float32 \(2,\) on disk, bfloat16 \(2,\) in"
        ):
            checkpoints.restore(small_state(0, jnp.bfloat16))
