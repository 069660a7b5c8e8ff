"""How programs are compiled, run and timed; how fast is not for tests."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cosmos3_jax.runtime import measure
from cosmos3_jax.sampling import stages, unipc
from cosmos3_jax.sampling.denoise import Steps
from cosmos3_jax.sampling.stages import Stage


def test_a_program_is_compiled_cold_and_then_read_from_the_cache(compilation_cache):
    """The caller's cache is neither read nor written, and is in use again afterwards."""
    x = np.arange(4, dtype=np.float32)
    for _ in range(2):  # cold both times
        events = []

        def listen(event, events=events, **_):
            events.append(event)

        jax.monitoring.register_event_listener(listen)
        program, found = measure.compile_cold_and_cached(lambda x: jnp.sin(x) @ x, x)
        jax.monitoring.unregister_event_listener(listen)
        assert events.count("/jax/compilation_cache/cache_misses") == 1
        assert events[-1] == measure.CACHE_HIT
        assert found.keys() == {"compile_seconds", "compile_seconds_cached"}
        assert all(seconds > 0 for seconds in found.values())
        np.testing.assert_allclose(program(x), np.sin(x) @ x, rtol=1e-6)
    assert not list(compilation_cache.iterdir())
    assert jax.config.jax_compilation_cache_dir == str(compilation_cache)
    jax.jit(lambda x: jnp.cos(x) @ x)(x).block_until_ready()
    assert list(compilation_cache.iterdir())


@pytest.mark.skipif(jax.__version_info__ >= (0, 11), reason="every program is kept")
def test_a_program_that_cannot_be_cached_says_so():
    """JAX 0.10 keeps no program that calls back to the host."""

    def calls_back(x):
        return jax.pure_callback(np.sin, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    _, found = measure.compile_cold_and_cached(calls_back, jnp.arange(3.0))
    assert found["compile_seconds"] > 0 and found["compile_seconds_cached"] is None


def test_runs_are_as_many_as_it_says(monkeypatch):
    runs = []

    def run():
        runs.append(len(runs))
        return runs[-1], float(len(runs))

    assert measure.median_of(run, 3) == (3, {"seconds": 3.0, "samples": [2.0, 3.0, 4.0]})
    monkeypatch.setattr(measure, "LONG_SECONDS", 0)  # any run is a long one
    assert measure.median_of(run, 3) == (4, {"seconds": 5.0, "samples": [5.0]})


def double(params, x, *, config):
    return {"doubled": params["two"] * x * config}


def count_steps(params, state, steps, *, config):
    return {"state": state + params["one"] * jnp.sum(steps.weights)}


STAGES = (
    Stage("double", "a", double, lambda values: (values["x"],)),
    Stage(
        "loop", "b", count_steps, lambda values: (values["state"], values["steps"]), loop=True,
        donated=0,
    ),
)  # fmt: skip


@pytest.mark.parametrize(("block_steps", "programs"), [(1, 1), (2, 2), (5, 1)])
def test_stages_are_run_and_measured(block_steps, programs):
    """Each run makes every step once, from the state that the loop began with."""
    parts = {"a": {"two": jnp.float32(2)}, "b": {"one": jnp.float32(1)}}
    steps = Steps(unipc.tableau(unipc.sigmas("native", 5)), np.ones((5, 1), np.float32))
    told, count = [], 3
    measured = measure.Measure(
        parts, count, repeats=2, block_steps=block_steps,
        report=lambda name, found: told.append(name),
        inspect=lambda stage, compiled: {"programs": len(compiled)},
    )  # fmt: skip
    values = {"x": jnp.arange(4.0), "state": jnp.float32(0), "steps": steps}
    values = stages.walk(values, measured, STAGES)
    assert values["doubled"].tolist() == [0, 6, 12, 18] and float(values["state"]) == 5
    assert told == list(measured.stages) == ["double", "loop"]
    assert [found["programs"] for found in measured.stages.values()] == [1, programs]
    for found in measured.stages.values():
        assert len(found["samples"]) == 2 and min(found["samples"]) > 0
        assert found["output_gib"] > 0 and found["temporary_gib"] >= 0
        assert found["compile_seconds"] > 0 and found["compile_seconds_cached"] > 0
        assert found["joules"] is None  # a CPU


def test_the_energy_is_that_of_the_runs_that_count(monkeypatch):
    """Not of the warm-up, which is read like them."""
    read = iter([0, 100, 100, 101, 101, 103, 103, 107])
    monkeypatch.setattr(measure.energy, "joules", lambda devices: next(read))
    measured = measure.Measure({"a": {"two": jnp.float32(2)}}, 3, repeats=3)
    stages.walk({"x": jnp.arange(4.0)}, measured, STAGES[:1])
    assert measured.stages["double"]["joules"] == 2 and next(read, None) is None
