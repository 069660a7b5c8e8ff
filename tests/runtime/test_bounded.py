"""What a process keeps of the programs that it compiled."""

import functools
import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hopper import Hopper

from cosmos3_jax.config import Config, SoundVAEConfig
from cosmos3_jax.models import sound_vae
from cosmos3_jax.parallel import device
from cosmos3_jax.runtime import bounded, programs
from cosmos3_jax.sampling import stages

BOUND = 3


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """A process that keeps three programs; what others have compiled stays as it is."""
    kept = functools.lru_cache(BOUND)(bounded.wrapper.__wrapped__)
    monkeypatch.setattr(bounded, "wrapper", kept)


def alive() -> int:
    gc.collect()
    return len(jax.devices()[0].client.live_executables())


def test_the_programs_used_last_are_kept(compiled):
    def twice(x, *, factor):
        return factor * x

    run = bounded.BoundedJit(twice, static_argnames="factor")

    def call(length: int, factor: int = 2) -> int:
        """How many programs a call compiles."""
        compiled.clear()
        x = np.ones(length, np.float32)
        np.testing.assert_array_equal(run(x, factor=factor), factor * x)
        return len(compiled)

    before = alive()
    assert [call(length) for length in (1, 2, 3)] == [1, 1, 1]
    assert [call(length) for length in (1, 2, 3, 1)] == [0, 0, 0, 0]
    assert call(1, factor=3) == 1  # the least used, of length 2, goes
    assert [call(length) for length in (1, 3)] == [0, 0] and call(2) == 1
    for length in range(10, 20):
        call(length)
    assert alive() - before == BOUND


def test_what_was_compiled_ahead_is_found(compiled):
    run = bounded.BoundedJit(lambda x: x + 1)
    struct = jax.ShapeDtypeStruct((4,), jnp.float32)
    x = np.zeros(4, np.float32)
    assert run.is_new(x) and not run.is_new(x)
    assert programs.compile_for(run, struct).shape == (4,) and compiled
    compiled.clear()
    run(x)
    assert not compiled
    for length in range(5, 5 + BOUND):
        assert run.is_new(np.zeros(length, np.float32))
    assert run.is_new(x)  # it went


def test_a_process_does_not_grow_with_each_size():
    """The sound decoder, small, for clips of four lengths."""
    small = SoundVAEConfig(dec_dim=8, dec_c_mults=(1, 2), dec_strides=(40, 48))
    config, shapes = Config(sound_vae=small), sound_vae.param_shapes(small, with_encoder=False)
    params = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes)
    before = alive()
    for length in range(1, 5):
        latents = np.zeros((1, small.vocoder_input_dim, length), np.float32)
        made = programs.program(stages.decode_sound)(params, latents, config=config)["sound"]
        assert made.shape == (1, 2, 1920 * length)
    assert alive() - before <= BOUND


def test_the_bound_of_the_environment(caplog):
    assert bounded.read_bound({}) >= 32
    assert bounded.read_bound({bounded.VARIABLE: "7"}) == 7 and not caplog.messages
    for text in ("0", "-1", "many", "", "1.5"):
        caplog.clear()
        assert bounded.read_bound({bounded.VARIABLE: text}) == bounded.read_bound({})
        assert f"COSMOS3_JAX_PROGRAMS={text!r} is no whole number" in caplog.text


def test_a_gpu_leaves_products_to_cublas(monkeypatch):
    """XLA has to know each option by its name, and says so on any machine."""
    monkeypatch.setenv("XLA_FLAGS", "")
    assert device.compiler_options() == {}
    monkeypatch.setattr(device, "default_device", Hopper)
    assert list(device.compiler_options()) == ["xla_gpu_enable_triton_gemm"]
    asked = []

    def jit(function, **options):
        asked.append(options["compiler_options"])
        return of_jax(function, **options)

    of_jax = jax.jit
    monkeypatch.setattr(jax, "jit", jit)
    assert bounded.BoundedJit(lambda x: x + 1)(np.ones(2, np.float32)).tolist() == [2, 2]
    assert asked == [device.compiler_options()]
    with pytest.raises(RuntimeError, match="xla_of_no_such_name"):
        of_jax(lambda x: x, compiler_options={"xla_of_no_such_name": False})(1.0)


def test_a_part_of_another_program_has_no_options_of_its_own(monkeypatch):
    """JAX refuses them there."""
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setattr(device, "default_device", Hopper)
    run, x = bounded.BoundedJit(lambda x: (x * x).sum()), jnp.arange(3.0)
    assert run(x) == 5 and jax.jit(run)(x) == 5 and run(x) == 5
    assert jax.jit(lambda y: y + run(np.arange(3.0)))(1.0) == 6
    np.testing.assert_array_equal(jax.grad(run)(x), [0, 2, 4])
    np.testing.assert_array_equal(jax.vmap(run)(jnp.stack([x, 2 * x])), [5, 20])
    np.testing.assert_array_equal(jax.jit(jax.grad(run))(x), [0, 2, 4])


def test_the_environment_may_say_otherwise(monkeypatch):
    monkeypatch.setattr(device, "default_device", Hopper)
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_triton_gemm=true")
    assert device.compiler_options() == {}
