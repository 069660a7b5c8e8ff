"""`benchmarks/gpu_numerics.py`: a run that is cut off shows, on any machine. With -m gpu, a few of
its sizes: bfloat16 beside diffusers', float32, rotary tables.

At a quarter of Nano's width, which compiles in seconds; the script itself takes the whole.
"""

import dataclasses
import importlib
import json
import os

import jax
import pytest
import torch

# Before JAX takes hold of the GPU: torch needs a share of it, which JAX would take at once.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*TF32:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning"),
]


@pytest.fixture(scope="module")
def script():
    return importlib.import_module("gpu_numerics")


@pytest.fixture(scope="module")
def numerics(script, dry):
    assert dry or torch.cuda.is_available(), "torch sees no GPU, and its result is the oracle"
    return script


@pytest.fixture(scope="module")
def sizes(numerics, dry):
    if dry:
        return numerics.DRY
    config = numerics.NANO.config
    config = dataclasses.replace(
        config,
        transformer=dataclasses.replace(
            config.transformer, hidden_size=1024, num_attention_heads=8, num_key_value_heads=2,
            intermediate_size=3072,
        ),
        video_vae=dataclasses.replace(config.video_vae, base_dim=40, decoder_base_dim=64),
        sound_vae=dataclasses.replace(config.sound_vae, enc_dim=48, dec_dim=80),
    )  # fmt: skip
    cases = (numerics.Case((5, 45, 80), 1500, True, 4), numerics.Case((48, 12, 20), 300, False, 2))
    return numerics.NANO._replace(config=config, cases=cases, video=(2, 9, 15), sound=50)


@pytest.fixture(scope="module")
def folder(numerics, sizes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("numerics")
    numerics.models.save_checkpoint(folder, sizes.config)
    return folder


@pytest.mark.gpu
@pytest.mark.parametrize("part", ["rope", "transformer", "sound_vae", "video_vae"])
def test_rounding_is_no_worse_than_diffusers(numerics, sizes, folder, part, dry):
    """The bars and their reasons stand in the script; they hold as they are at these sizes too.

    With --dry, errors of a few hundred values scatter, and only their size is looked at.
    """
    rows = list(numerics.PARTS[part](sizes, folder))
    assert rows
    if dry:
        assert all(0.3 < row["ratio"] < 3 for row in rows)
    else:
        assert [failure for row in rows for failure in numerics.failures(row)] == []


@pytest.mark.gpu
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


def test_a_run_that_is_cut_off_shows(script, tmp_path, monkeypatch):
    out, row = tmp_path / "out.json", {"part": "rope", "case": "a", "ratio": 1.0}
    row["max_abs"] = {"our_cosine": 0.0}

    def cut_off(sizes, folder):
        yield row
        raise KeyboardInterrupt

    monkeypatch.setattr(script.models, "save_checkpoint", lambda folder, config: None)
    monkeypatch.setitem(script.PARTS, "rope", lambda sizes, folder: iter([row]))
    monkeypatch.setitem(script.PARTS, "video_vae", cut_off)
    command = ["--dry", "--out", str(out), "--parts", "rope,video_vae"]
    with pytest.raises(KeyboardInterrupt):
        script.main(command)
    found = json.loads(out.read_text())
    assert found["complete"] is False and found["unfinished"] == ["video_vae"]
    assert found["rows"] == [row, row] and found["failures"] == []
    environments = (found, found["diffusers"])
    assert all(part["device"] and part["versions"] for part in environments)
    assert "driver" in found and found["diffusers"]["versions"]["torch"]

    def cut_off_at_once(folder, config):
        raise MemoryError

    monkeypatch.setattr(script.models, "save_checkpoint", cut_off_at_once)
    with pytest.raises(MemoryError):
        script.main(command)
    found = json.loads(out.read_text())  # no rows of the run before
    assert found["complete"] is False and found["rows"] == []


def test_a_run_to_the_end_is_complete(script, tmp_path, monkeypatch):
    out = tmp_path / "out.json"
    command = ["--dry", "--out", str(out), "--parts", "rope"]
    assert script.main(command) == 0
    found = json.loads(out.read_text())
    assert found["complete"] is True and found["parts"] == ["rope"] and not found["unfinished"]
    assert len(found["rows"]) == 4 and found["seconds"].keys() == {"save", "rope"}
    monkeypatch.setattr(script, "COSINE", 0.0)
    assert script.main(command) == 1
    missed = json.loads(out.read_text())
    assert missed["complete"] is True and len(missed["failures"]) == 4
    with pytest.raises(SystemExit):
        script.main([*command[:-1], "rope,mistyped"])
