"""Preparing: what is judged before noise is drawn and pixels are read, and what a batch is."""

import collections
import types

import numpy as np
import pytest

from cosmos3_jax import Cosmos3
from cosmos3_jax.io import conditioning, prepare
from cosmos3_jax.parallel import device
from cosmos3_jax.runtime import memory
from cosmos3_jax.runtime.job import Job
from cosmos3_jax.runtime.memory import OutOfDeviceMemory

SETTINGS = dict(num_frames=9, height=32, width=48)


@pytest.fixture(scope="module")
def opened(public_checkpoint):
    return Cosmos3.open(public_checkpoint)


@pytest.fixture
def undrawn(monkeypatch):
    """Whoever draws noise or reads pixels fails the test."""
    monkeypatch.setattr(prepare, "initial_noise", lambda *_: pytest.fail("noise was drawn"))
    monkeypatch.setattr(conditioning, "image_pixels", lambda *_: pytest.fail("pixels were read"))


def noise(value, dtype=np.float64):
    return np.full((1, 6, 3, 2, 3), value, dtype)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(noise=noise(1e30)), r"noise holds 1e\+30, beyond the limit of 10000"),
        (dict(noise=noise(-1e30)), r"noise holds 1e\+30, beyond the limit of 10000"),
        (dict(noise=noise(1e39)), "noise holds NaN or infinity"),
        (dict(noise=noise(np.nan)), "noise holds NaN or infinity"),
        (
            dict(clean_latents=noise(1e30), frame_mask=np.array([[True, False, False]])),
            r"clean_latents holds 1e\+30, beyond the limit of 10000",
        ),
        (dict(guidance_scale=1e39), "guidance_scale=1e.39 is beyond the limit"),
        (dict(guidance_scale=np.float32(np.inf)), "guidance_scale=inf must be a finite number"),
        (dict(fps=1e-300), "fps=1e-300 is not within 0.01 to 10000: take the video's own rate"),
        (dict(sigmas=np.linspace(0.999, 0, 1002)), "steps=1001 is beyond the limit of 1000"),
        (dict(seed=[1] * 10**3), "1000 seeds for 1 prompts"),
        (dict(negative_prompt="a" * (2**20 + 1)), "letters of the negative or system prompt="),
    ],
    ids=lambda x: str(x)[:30],
)
def test_numbers_are_judged_as_they_are_computed_with(opened, settings, message):
    with pytest.raises(ValueError, match=message):
        opened.prepare("A red ball", **SETTINGS | settings)


def test_noise_of_other_types_is_taken(opened):
    for given in (noise(1, np.float16), noise(1, np.int32), noise(1).tolist()):
        request = opened.prepare("A red ball", noise=given, **SETTINGS)
        assert request.noise.dtype == np.float32 and (request.noise == 1).all()


@pytest.mark.parametrize(
    "prompt",
    [
        {"a": 1},
        types.MappingProxyType({"a": "b"}),
        collections.Counter("ab"),
        {"a", "b"},
        b"a",
        None,
    ],
    ids=lambda x: type(x).__name__,
)
def test_what_is_no_prompt_is_no_batch_of_them(opened, prompt):
    with pytest.raises(TypeError, match=f"the prompt is a {type(prompt).__name__}, not a string"):
        opened.prepare(prompt, **SETTINGS)


def test_a_batch_is_a_list_or_whatever_else_has_texts_in_order(opened):
    texts = ["A red ball", "A cat"]
    for batch in (texts, tuple(texts), iter(texts), np.array(texts)):
        assert len(opened.prepare(batch, **SETTINGS).text_ids) == 2
    with pytest.raises(ValueError, match="batch=1025 is beyond the limit of 1024"):
        opened.prepare(["a"] * 1025, **SETTINGS)
    with pytest.raises(ValueError, match="letters of the prompt=1048577 is beyond the limit"):
        opened.prepare("a" * (2**20 + 1), **SETTINGS)


def test_noise_is_held_to_the_hosts_memory_first(opened, undrawn, monkeypatch):
    needed = 4 * 6 * 3 * 2 * 3
    monkeypatch.setattr(device, "host_memory", lambda: needed - 1)
    with pytest.raises(ValueError, match="the noise alone needs 0.00 GiB, and this machine has"):
        opened.prepare("A red ball", image=np.zeros((4, 4, 3), np.uint8), **SETTINGS)


def test_noise_is_drawn_when_the_video_is_known_to_fit(model, undrawn, monkeypatch):
    for method in (model.generate, model.warmup):
        with monkeypatch.context() as patch:
            patch.setattr(device, "memory_limit", lambda: 2**10)
            with pytest.raises(OutOfDeviceMemory, match="need .* of device memory"):
                method("A red ball", **SETTINGS)
    monkeypatch.setattr(device, "host_memory", lambda: 2**16)
    with pytest.raises(OutOfDeviceMemory, match="for latents and pixels alone, and this machine"):
        model.generate("A red ball", **SETTINGS)


def test_a_cpu_holds_latents_and_pixels_and_no_more_is_asked(model, monkeypatch):
    job = Job(**SETTINGS, sound=True, text_tokens=128, negative_tokens=128)
    found = memory.generation_bytes(model.config, job)
    arrays = sum(found[name] for name in memory.ARRAYS)
    assert found["pixels"] == 4 * 3 * 9 * 32 * 48 < arrays < found["peak"]
    monkeypatch.setattr(device, "host_memory", lambda: arrays)
    memory.check_fits(model.config, None, job)
    monkeypatch.setattr(device, "host_memory", lambda: arrays - 1)
    with pytest.raises(OutOfDeviceMemory, match="9 frames of 32x48 with sound need"):
        memory.check_fits(model.config, None, job)


def test_memory_of_a_container_counts(tmp_path, monkeypatch):
    whole = device.host_memory()
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(device, "GROUP_LIMITS", (limit, tmp_path / "none"))
    for text, expected in (("4096\n", 4096), (str(2**62), None), ("max\n", None)):
        limit.write_text(text)
        assert device.host_memory() == expected or (
            expected is None and device.host_memory() >= whole
        )
