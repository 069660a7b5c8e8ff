"""The measures of `quality.py`, where the answer is known.

That it runs is in `test_benchmarks.py`.
"""

import json
import math
import re
from pathlib import Path

import dry
import jax
import numpy as np
import pytest

from benchmarks import quality, quality_clips
from benchmarks import quality_measures as measures
from benchmarks.quality_measures import Clip
from cosmos3_jax import Cosmos3
from cosmos3_jax.cli import bench
from cosmos3_jax.runtime.job import Job
from cosmos3_jax.runtime.random_inputs import random_params
from cosmos3_jax.sampling import denoise, unipc
from examples.tiny import grammar, judge
from examples.tiny.hearing import Heard
from examples.tiny.sight import Seen, Sight

RESULTS = Path(quality.__file__).parent / "results"


def pictures(*levels: int) -> np.ndarray:
    """A frame of 16 x 16 of each grey."""
    return np.stack([np.full((16, 16, 3), level, np.uint8) for level in levels])


def test_relative_l2_is_of_each_clip():
    a, b = np.array([[[3.0, 4.0]], [[2.0, 0.0]]]), np.array([[[3.0, 9.0]], [[2.0, 0.0]]])
    np.testing.assert_allclose(measures.relative_l2(a, b), [1, 0])


def test_psnr():
    a, b = pictures(100, 100), pictures(105, 95)
    assert measures.psnr(a, b) == pytest.approx(20 * math.log10(255 / 5), abs=1e-4)
    assert measures.psnr(a, a) == measures.MOST_PSNR


def test_ssim_of_flat_pictures_compares_their_means():
    a, b = 100.0, 180.0
    c = (0.01 * 255) ** 2
    found = measures.ssim(pictures(100), pictures(180))
    assert found == pytest.approx((2 * a * b + c) / (a * a + b * b + c), rel=1e-4)


def test_ssim_of_one_window_is_its_formula():
    x, y = np.random.default_rng(0).integers(0, 256, (2, 1, 11, 11, 1)).repeat(3, -1)
    line = np.exp(-np.square(np.arange(-5, 6)) / (2 * 1.5**2))
    weights = np.outer(line, line) / line.sum() ** 2

    def covariance(p, q):
        return np.sum(weights * (p - np.sum(weights * p)) * (q - np.sum(weights * q)))

    p, q = (image[0, ..., 0].astype(np.float64) for image in (x, y))
    means = np.sum(weights * p), np.sum(weights * q)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    alike = (2 * means[0] * means[1] + c1) * (2 * covariance(p, q) + c2)
    expected = alike / (
        (means[0] ** 2 + means[1] ** 2 + c1) * (covariance(p, p) + covariance(q, q) + c2)
    )
    assert measures.ssim(x, y) == pytest.approx(expected, rel=1e-4)
    assert measures.ssim(x, x) == pytest.approx(1)
    with pytest.raises(ValueError, match="smaller than the window"):
        measures.ssim(x[:, :9], y[:, :9])


def test_flicker_is_the_largest_change_from_a_frame_to_the_next():
    assert measures.flicker(pictures(0, 10, 40, 35)) == pytest.approx(30 / 255)
    assert measures.flicker(pictures(0)) == 0
    found = measures.compare(Clip(pictures(0, 20, 20)), Clip(pictures(0, 0, 30)))
    assert found["flicker"] == pytest.approx(1.5) and "spectral" not in found


def test_spectral_distance_of_a_sound_at_half_its_level():
    sound = np.random.default_rng(0).standard_normal((2, 9600)).astype(np.float32)
    assert measures.spectral_distance(sound, sound) == 0
    found = measures.spectral_distance(sound, 0.5 * sound)
    assert found == pytest.approx(0.5 + math.log(2), rel=1e-4)
    tone = np.sin(2 * np.pi * np.arange(9600) * np.array([[440.0], [880.0]]) / 48_000)
    assert measures.spectral_distance(tone, tone[::-1]) > 1  # which channel it is in counts


def test_summary_has_the_interval_of_the_mean_and_the_worst():
    found = measures.summary([1.0, 2.0, 6.0])
    half = 1.96 * math.sqrt(7 / 3)
    assert found == pytest.approx({
        "mean": 3, "low": 3 - half, "high": 3 + half, "median": 2, "worst": 6,
    })  # fmt: skip
    assert measures.summary([1.0, 2.0], min)["worst"] == 1
    assert measures.summary([2.0])["low"] == 2


def test_paired_difference():
    """Of 21 children, one only before, seven only after (Fagerland et al., 2014, table 6)."""
    found = measures.paired_difference(7, 1, 21)
    assert found == pytest.approx((-6 / 21, -0.508, -0.013), abs=5e-4)
    _, low, high = measures.paired_difference(0, 0, 200)
    assert low == pytest.approx(-high) and -0.03 < low < 0  # a loss of 3 points is excluded
    assert measures.paired_difference(0, 0, 15)[1] < -0.1  # and of so few clips it is not


def test_the_judge_is_compared_clip_by_clip():
    a = [{"x": True}, {"x": True}, {"x": False}, {"x": None}]
    b = [{"x": True}, {"x": False}, {"x": False}, {"x": True}]
    (row,) = measures.judged(a, b)
    assert (row["clips"], row["only_a"], row["only_b"]) == (3, 1, 0)
    assert (row["a"], row["b"]) == pytest.approx((2 / 3, 1 / 3))
    assert row["difference"] == pytest.approx(-1 / 3)


def test_marks_are_the_judges_of_each_attribute(monkeypatch):
    (scene, _), *_ = grammar.held_out_sentences(1)
    blank = Clip(np.zeros((49, 96, 96, 3), np.uint8), np.zeros((2, 9600), np.float32))
    found = measures.marks(scene, blank)
    assert found["colour"] is False and found["pitch"] is False and scene.pitch
    assert found["nothing touches or sounds"] is None

    words = scene.colour, scene.shape, scene.size, scene.direction, scene.speed
    shape = Seen(*words, [], np.zeros((49, 2)))
    sight = Sight([shape], [], scene.background, scene.pattern)
    verdict = judge.Verdict(sight, Heard([], scene.pitch, None))
    monkeypatch.setattr(judge, "judge", lambda *_: verdict)
    seen = measures.marks(scene, blank)
    assert {name for name, mark in seen.items() if mark} == {
        "colour", "shape", "colour and shape", "size", "direction", "speed", "background",
        "pattern", "pitch",
    }  # fmt: skip


def test_a_file_has_null_for_what_is_no_number():
    assert measures.plain({"a": [math.nan, 1 / 3, np.float32(2)], "b": "x"}) == {
        "a": [None, 0.333333, 2.0], "b": "x",
    }  # fmt: skip


def test_settings_of_the_command_line():
    given = ["num_inference_steps=18", "sigmas=[0.9,0.5,0]", "schedule=karras"]
    assert quality.read_given(given) == {
        "num_inference_steps": 18, "sigmas": [0.9, 0.5, 0], "schedule": "karras",
    }  # fmt: skip
    assert quality.read_given(["exact"]) == {"speed": "exact"}
    assert quality.read_given(["fast", "seed=3"]) == {"speed": "fast", "seed": 3}
    with pytest.raises(ValueError, match="write exact, fast or KEY=VALUE"):
        quality.read_given(["slow"])


def test_velocities_along_a_trajectory_are_the_packages():
    """The harness steps as the package does; a model along its own trajectory has no error."""
    job = Job(num_frames=5, height=16, width=24, steps=3, text_tokens=9, negative_tokens=7)
    request = bench.random_request(dry.SILENT, job)
    model = Cosmos3(dry.SILENT, random_params(dry.SILENT, "float32"), None)
    points = quality_clips.trajectory(model, request)
    assert [float(point.timestep) for point in points] == list(
        unipc.tableau(unipc.sigmas("native", 3)).timestep
    )
    assert max(quality_clips.velocity_errors(points, model, request)["video"]) < 1e-6
    expected, _ = model.denoise(request, progress=False)
    start = quality_clips.begin(model, request)
    state = start.state
    for point, row in zip(points, start.rows, strict=True):
        np.testing.assert_allclose(point.latents["video"], state.latents["video"], atol=1e-4)
        state = quality_clips.solve(state, point.velocity, row)
    found = denoise.channels_first(state.latents)
    np.testing.assert_allclose(found["video"], expected["video"], atol=1e-4)
    model.params = jax.tree.map(lambda x: 1.01 * x, model.params)
    assert min(quality_clips.velocity_errors(points, model, request)["video"]) > 1e-3


# The figures of docs/fast.md
# --------------------------------------------------------------------------------------------------


ROWS = {
    "text to video, 18 of 35 (`fast`)": "grid35/t2v/18", "text to video, 18 of 24": "own/t2v/18",
    "text to video, 12 of 24 (`fast`)": "own/t2v/12", "text to video, 12 of 35": "grid35/t2v/12",
    "image to video, 18 of 35 (`fast`)": "grid35/i2v/18",
    "image to video, 12 of 24 (`fast`)": "own/i2v/12", "image to video, 12 of 35": "grid35/i2v/12",
}  # fmt: skip


def test_the_docs_have_the_results_figures():
    """Mean and median of each cell that is not empty, in per cent, rounded as they are written."""
    rows = json.loads((RESULTS / "step_contest_tiny.json").read_text("utf-8"))["rows"]
    lines = (RESULTS.parents[1] / "docs" / "fast.md").read_text("utf-8").splitlines()
    tables = [[x.strip() for x in line.strip("|").split("|")] for line in lines if line[:1] == "|"]
    compared = 0
    for label, key in ROWS.items():
        [[_, *cells]] = [cells for cells in tables if cells[0] == label]
        case = key.rpartition("/")[0]
        names = f"{key}/eased", f"{key}/native", f"{case}/bfloat16", f"{case}/another seed"
        for cell, name in zip(cells, names, strict=True):
            error = rows[name]["measures"]["latents"]
            written = re.findall(r"[\d.]+", cell)  # of another seed the mean alone
            for text, found in zip(written, (error["mean"], error["median"]), strict=False):
                half = 0.51 * 10 ** -len(text.partition(".")[2])
                assert float(text) == pytest.approx(100 * found, abs=half), (label, name)
                compared += 1
    assert compared >= 2 * 2 * len(ROWS)
