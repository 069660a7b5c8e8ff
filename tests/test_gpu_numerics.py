"""`benchmarks/gpu_numerics.py` on a few of its sizes: bfloat16 beside diffusers', float32, rotary
tables. Run with -m gpu.

The transformer is at full width, since that is where every run spends its time; the autoencoders
are at a quarter, which compiles in seconds.
"""

import dataclasses
import importlib.util
import os
from pathlib import Path

import jax
import pytest
import torch

# Before JAX takes hold of the GPU: torch needs a share of it, which JAX would take at once.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu_numerics.py"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:.*TF32:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning"),
]


@pytest.fixture(scope="module")
def numerics():
    if jax.default_backend() != "gpu" or not torch.cuda.is_available():
        pytest.skip("no GPU for both JAX and torch")
    spec = importlib.util.spec_from_file_location("gpu_numerics", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def sizes(numerics):
    config = numerics.NANO.config
    config = dataclasses.replace(
        config,
        video_vae=dataclasses.replace(config.video_vae, base_dim=40, decoder_base_dim=64),
        sound_vae=dataclasses.replace(config.sound_vae, enc_dim=48, dec_dim=80),
    )
    cases = (numerics.Case((5, 45, 80), 1500, True, 4), numerics.Case((48, 12, 20), 300, False, 2))
    return numerics.NANO._replace(config=config, cases=cases, video=(2, 9, 15), sound=50)


@pytest.fixture(scope="module")
def folder(numerics, sizes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("numerics")
    numerics.save_checkpoint(folder, sizes.config)
    return folder


@pytest.mark.parametrize("part", ["rope", "transformer", "sound_vae", "video_vae"])
def test_rounding_is_no_worse_than_diffusers(numerics, sizes, folder, part):
    """The bars and their reasons stand in the script; they hold as they are at these sizes too."""
    rows = list(numerics.PARTS[part](sizes, folder))
    assert rows
    assert [failure for row in rows for failure in numerics.failures(row)] == []


def test_a_mistake_misses_its_bar(numerics, sizes, folder, monkeypatch):
    """Positions one frame off are an error that the ratio shows, and float32 even more so."""
    right = numerics.rope.video_positions
    monkeypatch.setattr(
        numerics.rope, "video_positions", lambda *a, **k: right(*a, **k).at[:, 0].add(1)
    )
    jax.clear_caches()
    case = numerics.Case((2, 5, 8), 40, False, 1)
    rows = list(numerics.PARTS["transformer"](sizes._replace(cases=(case,)), folder))
    jax.clear_caches()
    found = [failure for row in rows for failure in numerics.failures(row)]
    assert any("ratio" in failure for failure in found)
    assert any("float32" in failure for failure in found)
