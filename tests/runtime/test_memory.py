"""The estimate against what was measured on a GPU, and what is said when a video does not fit."""

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from cosmos3_jax.cli import bench
from cosmos3_jax.config import Config
from cosmos3_jax.parallel import device
from cosmos3_jax.parallel.device import PlannedGPU
from cosmos3_jax.runtime import memory, random_inputs
from cosmos3_jax.runtime.job import Job
from cosmos3_jax.sampling import denoise, stages

NANO = Config()
GIB = 2**30
# GiB that XLA's programs need beside arguments and results: bfloat16, 189 frames, prompts padded to
# 384 tokens (benchmarks/results/bench_h200.json; at 256p four latent frames are decoded at a time).
MEASURED = {
    (192, 320): {"text": 0.4251, "denoising": 0.6459, "video decoding": 2.4099},
    (480, 832): {"text": 0.4163, "denoising": 3.6270, "video decoding": 4.2654},
    (720, 1280): {"text": 0.3906, "denoising": 4.4832, "video decoding": 8.4914},
}
# GiB of the conditions that the text tower hands on, and of the video: exact.
HANDED_ON = {
    (192, 320): (0.1123, 0.1298), (480, 832): (0.1501, 0.8435), (720, 1280): (0.2094, 1.9466),
}  # fmt: skip


def job(height, width, **changes):
    sizes = dict(num_frames=189, height=height, width=width, device=PlannedGPU())
    prompts = dict.fromkeys(("text_tokens", "negative_tokens"), changes.pop("text_tokens", 384))
    return Job(**sizes | prompts | changes)


@pytest.mark.parametrize("size", MEASURED, ids=str)
def test_each_stage_is_within_a_tenth_of_what_was_measured(size):
    """Measured: within 5%."""
    found = memory.generation_bytes(NANO, job(*size))
    for stage, gib in MEASURED[size].items():
        assert found[f"{stage} work"] / GIB == pytest.approx(gib, rel=0.1), stage
    condition, pixels = HANDED_ON[size]
    assert found["condition"] / GIB == pytest.approx(condition, abs=1e-4)
    assert found["pixels"] / GIB == pytest.approx(pixels, abs=1e-4)


# GiB that the encoder needs beside its arguments and result (results/image_to_video_h200.json).
ENCODING = [((192, 320), 1, 0.0366), ((192, 320), 5, 0.1419), ((720, 1280), 1, 0.5493)]


@pytest.mark.parametrize("size, clean_frames, gib", ENCODING, ids=str)
def test_encoding_is_within_a_tenth_of_what_was_measured(size, clean_frames, gib):
    found = memory.generation_bytes(NANO, job(*size, clean_frames=clean_frames))
    assert found["video encoding work"] / GIB == pytest.approx(gib, rel=0.1)
    assert found["clean pixels"] == 4 * 3 * clean_frames * size[0] * size[1]
    without = memory.generation_bytes(NANO, job(*size))
    assert memory.ENCODING not in without
    assert without["peak"] == found["peak"]  # encoding is not the largest stage


# Without sound, everything resident and of the autoencoder the decoder alone (the same file); and
# with offload, the largest clip of `results/offload_22gib_h200.json`, whose prompts fill 4,224.
PEAKS = [
    (dict(height=480, width=832), 32.917),
    (dict(height=720, width=1280), 38.264),
    (dict(height=480, width=832, num_frames=93, text_tokens=4224, offload=True), 16.636),
]


@pytest.mark.parametrize("change, gib", PEAKS, ids=str)
def test_measured_peaks_of_a_process(change, gib):
    """Within 10% is promised. These were predicted 0.8% to 3% too large, before they were run."""
    silent = NANO.silent()
    found = memory.generation_bytes(silent, job(**change))
    assert found["peak"] / GIB == pytest.approx(gib, rel=0.04)


def test_offload_takes_the_other_parts_off():
    resident = memory.generation_bytes(NANO, job(720, 1280, sound=True))
    offloaded = memory.generation_bytes(NANO, job(720, 1280, sound=True, offload=True))
    weights = sum(resident[part] for part in memory.STAGES)
    assert 28e9 < weights < 33e9
    for part, stage in memory.STAGES.items():
        assert resident[stage] - offloaded[stage] == weights - resident[part]
        assert resident["peak"] >= resident[stage] and offloaded["peak"] >= offloaded[stage]
    assert offloaded["peak"] < 24 * GIB * 0.92 and resident["peak"] < 48 * GIB * 0.92


@pytest.mark.parametrize(
    "change",
    [
        dict(batch=2), dict(num_frames=193), dict(sound=True), dict(text_tokens=512),
        dict(dtype="float32"), dict(trajectory_steps=2), dict(height=208),
    ],
    ids=str,
)  # fmt: skip
def test_more_of_anything_needs_more(change):
    small = job(192, 320, offload=True)
    less = memory.generation_bytes(NANO, small)
    more = memory.generation_bytes(NANO, small.replace(**change))
    assert more["denoising stage"] > less["denoising stage"]


def test_logits_count_where_no_kernel_does_without():
    """Temporary memory of a compiled loop in float32, where XLA holds all logits."""
    model = dataclasses.replace(NANO.transformer, num_hidden_layers=2, vocab_size=512)
    config = dataclasses.replace(NANO, transformer=model).silent()
    made = Job(num_frames=61, height=192, width=320, text_tokens=128, negative_tokens=128)
    request = bench.random_request(config, made)
    shapes = random_inputs.weight_shapes(config, jnp.float32)
    handed_on = jax.eval_shape(partial(stages.encode_text, config=config), shapes["und"], request)
    loop = jax.jit(partial(denoise.advance, config=config), donate_argnums=2)
    steps = denoise.all_steps(request)
    program = loop.lower(shapes["gen"], *handed_on.values(), steps).compile()
    found = memory.generation_bytes(config, made.replace(dtype="float32"))
    assert found["logits"] == 4 * 2 * 32 * 960 * (960 + 128)
    measured = program.memory_analysis().temp_size_in_bytes
    # Three copies of the logits are counted where 2.0 to 2.7 were seen: rather too many than few.
    assert 0.9 * measured < found["denoising work"] < 1.5 * measured
    fused = made.replace(device=PlannedGPU())
    assert memory.generation_bytes(config, fused)["logits"] == 0


def test_given_pixels_are_counted():
    """A clip that is encoded whole, four times over."""
    clips = job(720, 1280, clean_frames=189, offload=True, batch=4)
    needed = memory.generation_bytes(NANO, clips)
    assert needed[memory.ENCODING] == needed["video_vae"] + sum(
        needed[name] for name in ("clean pixels", "latents", "video encoding work")
    )
    resident = memory.generation_bytes(NANO, clips.replace(offload=False))
    weights = sum(resident[part] for part in memory.STAGES)
    assert resident[memory.ENCODING] - needed[memory.ENCODING] == weights - needed["video_vae"]


def test_too_many_logits_are_refused_whatever_the_memory():
    large = job(720, 1280, dtype="float32")
    with pytest.raises(ValueError, match=r"234 GiB of logits \(limit 16\).*dtype is float32"):
        memory.check_fits(NANO, None, large)
    # nor does it make a checkpoint offload, which would not help
    assert not memory.should_offload(NANO, 100 * GIB, large)


def test_no_limit_refuses_nothing():
    assert jax.default_backend() != "cpu" or device.memory_limit() is None
    memory.check_fits(NANO, None, job(720, 1280))
    assert not memory.should_offload(NANO, None, job(720, 1280))


def refusal(limit, job):
    with pytest.raises(memory.OutOfDeviceMemory) as caught:
        memory.check_fits(NANO, limit, job)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_offload_is_the_way_out_where_it_is_enough():
    large = job(720, 1280)
    needed = memory.generation_bytes(NANO, large)["peak"]
    memory.check_fits(NANO, needed, large)
    message = refusal(needed - 1, large)
    for said in (
        "189 frames of 720x1280 need 39.48 GiB", "video decoding stage", "JAX may use 39.48 GiB",
        "It fits with offload=True (--offload yes), which needs 17.84 GiB",
    ):  # fmt: skip
        assert said in message
    assert memory.should_offload(NANO, needed - 1, large)


@pytest.mark.parametrize("offload", [False, True])
def test_the_largest_settings_that_fit_are_named(offload):
    """What is named fits, and the next larger does not."""
    large, limit = job(720, 1280, batch=3, offload=offload), 17 * GIB
    message = refusal(limit, large)
    assert ("with offload=True" in message) is not offload

    def fits(**change):
        found = memory.generation_bytes(NANO, large.replace(offload=True, **change))
        return found["peak"] <= limit

    said = message.partition("What fits")[2]
    frames = int(re.search(r"3 videos of (\d+) frames? of 720x1280", said)[1])
    assert fits(num_frames=frames) and not fits(num_frames=frames + 4)
    height, width = map(int, re.search(r"189 frames of (480|192)x(832|320)", said).groups())
    assert fits(height=height, width=width)
    if (height, width) == (192, 320):
        assert not fits(height=480, width=832)


def test_nothing_fits():
    assert "Nothing smaller fits either" in refusal(8 * GIB, job(720, 1280, offload=True))


@pytest.mark.parametrize(
    "change, limit, way_out",
    [
        (dict(decode_chunk_size=16), 80, "It fits with decode_chunk_size=1, which needs 39.48"),
        (dict(trajectory_steps=35), 40, "It fits without the trajectory, which needs 39.48 GiB."),
        (
            dict(trajectory_steps=35), 19,
            "It fits without the trajectory and with offload=True (--offload yes), which needs",
        ),
        (
            dict(text_tokens=60032, height=192, width=320, num_frames=5), 40,
            "It fits with prompts of at most 2048 tokens, which needs",
        ),
        (dict(height=1280, width=720), 16.5, "or 189 frames of 320x192"),
        (dict(decode_chunk_size=16), 17, "with decode_chunk_size=1 and with offload=True"),
    ],
    ids=str,
)  # fmt: skip
def test_the_way_out_is_the_slightest_change(change, limit, way_out):
    assert way_out in refusal(limit * GIB, job(720, 1280).replace(**change))


def test_an_exhausted_device_is_explained():
    large = job(720, 1280)
    with pytest.raises(
        memory.OutOfDeviceMemory, match="ran out of memory.*--offload yes"
    ) as caught:
        with memory.exhaustion_explained(NANO, None, large):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nand more\nlines")
    assert "\n" not in str(caught.value)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        with memory.exhaustion_explained(NANO, None, large):
            raise jax.errors.JaxRuntimeError("INTERNAL: something else")
