"""Every script in `benchmarks/` runs dry: its own lines, tiny sizes, on a CPU.

A script that calls what is no longer there, or is not called that way, fails here by its name. So
does one without an entry in `RUNS`: give it `--dry`, and a function that says what it must write.
"""

import ast
import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from cosmos3_jax.checkpoint import load
from cosmos3_jax.runtime.programs import block_length

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
FILES = {path.stem: path.read_text("utf-8") for path in sorted(BENCHMARKS.glob("*.py"))}
SCRIPTS = [name for name, text in FILES.items() if "__main__" in text]
MESHES = ("one", "one@3", "cfg=2,seq=2", "data=2,fsdp=2")
STEPS = 12

pytestmark = [
    pytest.mark.dry,
    pytest.mark.filterwarnings("ignore:.*TF32:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning"),
]


@pytest.fixture
def report(tmp_path):
    """(script, *arguments) -> what it writes in a dry run in this process."""

    def run(name: str, *arguments: str) -> dict:
        out = tmp_path / f"{name}.json"
        command = [*arguments, "--dry", "--out", str(out)]
        returned = importlib.import_module(name).main(command)
        assert not returned or isinstance(returned, dict)  # the exit status is 0
        return json.loads(out.read_text("utf-8"))

    return run


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """What `random_checkpoint.py` writes, for those that read one."""
    folder = tmp_path_factory.mktemp("random") / "checkpoint"
    importlib.import_module("random_checkpoint").main([str(folder), "--dry"])
    return folder


def numbers(value) -> list[float]:
    if isinstance(value, dict | list):
        inner = value.values() if isinstance(value, dict) else value
        return [n for entry in inner for n in numbers(entry)]
    return [value] if isinstance(value, int | float) and not isinstance(value, bool) else []


def positive(*values) -> bool:
    found = numbers(list(values))
    return bool(found) and all(0 < value < math.inf for value in found)


def blocks(report, request):
    found = report("blocks", "--steps", "4", "--lengths", "1,4", "--repeats", "1")
    assert found["lengths"].keys() == {"1", "4"}
    assert all(positive(one["seconds"]) for one in found["lengths"].values())


def compare_diffusers(report, request):
    """Both sides in this process: what starts them elsewhere is in `test_compare_diffusers.py`."""
    monkeypatch = request.getfixturevalue("monkeypatch")
    compare, summary = (importlib.import_module(f"compare_{x}") for x in ("diffusers", "report"))
    monkeypatch.setenv("JAX_PLATFORMS", os.environ.get("JAX_PLATFORMS", ""))  # it sets that
    monkeypatch.setattr(compare, "in_child", lambda run, *arguments: run(*arguments))
    jax.config.update("jax_disable_most_optimizations", True)  # half the time to compile
    try:
        found = report("compare_diffusers", "--skip-compiled")
    finally:
        jax.config.update("jax_disable_most_optimizations", False)
    assert not found["failed"] and found["environment"].keys() == {"ours", "diffusers"}
    entry, job = found["sizes"][compare.TINY], compare.TINY_JOB
    eager = entry["diffusers"]["eager"]
    assert entry["ours"]["work"] == eager["work"] == {
        "text_tokens": 41, "negative_tokens": 37, "video_tokens": 3 * 2 * 3, "video": [9, 64, 96],
        "passes_per_step": 2,
    }  # fmt: skip
    for side in (entry["ours"], eager):
        assert side["steps_timed"] == job.steps and side["passes"] == 2 * job.steps
        assert side["finite"]
    assert entry["total_formed_by"] == {
        "ours": "condition + one loop of all 2 steps + decode",
        "diffusers": "all 2 steps of one call + decode",
    }
    assert entry["ratios"]["same_work"] and entry["ratios"]["compared_with"] == "eager"
    assert entry["variants_run"] == ["eager"] and len(eager["step_samples"]) == job.steps
    assert positive(entry["ours"], eager, entry["ratios"])
    assert eager["attention_seconds"][eager["backend"]] > 0
    lines = summary.table(found).splitlines()
    assert any("compared with" in line for line in lines)
    assert f"{compare.TINY} compiled: not run" in lines
    assert f"{compare.TINY} eager: not run" not in lines


def gpu_numerics(report, request):
    found = report("gpu_numerics")
    assert found["complete"] and not found["unfinished"] and not found["failures"]
    parts = [row["part"] for row in found["rows"]]
    rows = {"rope": 4, "transformer": 2, "sound_tokenizer": 2, "vae": 2}
    assert {part: parts.count(part) for part in parts} == rows
    assert positive([row["ratio"] for row in found["rows"]], found["seconds"])


def image_to_video(report, request):
    folder, modes = request.getfixturevalue("checkpoint"), ["t2v", "i2v", "v2v"]
    found = report("image_to_video", str(folder), "--steps", "2", "--modes", ",".join(modes))
    assert [run.pop("mode") for run in found["runs"]] == modes
    assert found["job"]["num_frames"] == 5 and found["job"]["num_inference_steps"] == 2
    assert {mode: one["pixel_frames"] for mode, one in found["encoding"].items()} == {
        "i2v": 1, "v2v": 3,
    }  # fmt: skip
    assert list(found["warmup_seconds"]) == modes
    for run, first in zip(found["runs"], ([], ["video encode"], ["video encode"]), strict=True):
        parts = ["prepare", *first, "condition", "denoise", "video decode"]
        assert list(run["stages"]) == parts and positive(run["seconds"], run["stages"])
    assert positive(found["encoding"], found["warmup_seconds"])


def kernels(report, request):
    found = report("kernels")
    assert found["complete"]
    gemm, attention, conv = (found[kind] for kind in ("gemm", "attention", "conv"))
    assert [len(rows) for rows in (gemm, attention, conv)] == [2, 9 + 5, 2 * 3 + 1]
    assert positive(gemm, conv)
    if jax.default_backend() == "cpu":  # lowered for a GPU
        assert {row["ms"] for row in attention} == {None}


def loading(report, request):
    found = report("loading", str(request.getfixturevalue("checkpoint")))
    parts = ("gen", "und", "video_vae", "sound_vae")
    loads = ("all", "all, not looked at")
    assert found["rates"].keys() == {"first read", "second read", "link", *loads, *parts}
    assert found["peak_gib"].keys() == {"one part at a time", "all"} and positive(found["rates"])
    size = sum(found["rates"][part]["gib"] for part in parts)
    assert [found["rates"][name]["gib"] for name in loads] == pytest.approx([size, size])


def on_devices(count: int, name: str, out: Path, *arguments: str) -> tuple[dict, str]:
    """What a script writes in a dry run in a process of its own, on simulated devices, and says."""
    script = str(BENCHMARKS / f"{name}.py")
    command = [sys.executable, script, *arguments, "--dry", "--out", str(out)]
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={count}"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return json.loads(out.read_text("utf-8")), done.stdout


def lora(report, request):
    """On two devices, each with an example."""
    out = request.getfixturevalue("tmp_path") / "lora.json"
    found, _ = on_devices(2, "lora", out, "--mesh", "data=2", "--repeats", "1")
    assert found["model"] == "dry" and found["job"]["num_frames"] == 5 and found["devices"] == 2
    assert found["video_tokens"] == 2 * 3 * 2 * 3 and found["text_tokens"] == 2 * 300
    assert len(found["samples"]) == 1 and len(found["losses"]) == 3 + 1
    named = ("samples", "losses", "tflop", "product_tflops_per_second", "frozen_gib")
    assert positive([found[name] for name in named])


def quality(report, request):
    """Without the row of the other precision: bfloat16 takes a CPU long to compile."""
    folder, sheet = (request.getfixturevalue(name) for name in ("checkpoint", "tmp_path"))
    found = report(
        "quality", "--checkpoint", str(folder), "--b", "num_inference_steps=3", "--count", "2",
        "--seeds", "1", "--batch", "2", "--skip", "precision", "--sheet", str(sheet / "sheet.png"),
    )  # fmt: skip
    titles = ["b against a", "a, another seed", "a against 3 steps", "b against 3 steps"]
    assert list(found["rows"]) == titles and (sheet / "sheet.png").stat().st_size
    errors = {title: row["measures"]["latents"]["mean"] for title, row in found["rows"].items()}
    assert errors[titles[3]] == 0 < errors[titles[0]] < errors[titles[1]]
    for row in found["rows"].values():
        assert row["measures"].keys() == row["clips"].keys() and "spectral" in row["clips"]
        assert all(len(values) == 2 for values in row["clips"].values())
    assert "velocity_errors" not in found["rows"][titles[0]]  # nothing but the steps differs
    assert found["a"]["num_inference_steps"] == 2 and len(found["prompts"]) == 2


def random_checkpoint(report, request):
    folder = request.getfixturevalue("checkpoint")
    config = load.load_config(folder)
    assert config == importlib.import_module("dry").CONFIG
    assert len(load.open_components(folder, config)) == 3  # every tensor is there, in its shape


def scaling(report, request):
    """What the programs send is what paper says."""
    out = request.getfixturevalue("tmp_path") / "scaling.json"
    arguments = ("--steps", str(STEPS), "--repeats", "1", "--meshes", ";".join(MESHES))
    found, _ = on_devices(4, "scaling", out, *arguments)
    assert found["options"]["model"] == "dry"
    runs = {key.removeprefix("16x24 "): run for key, run in found["runs"].items()}
    assert tuple(runs) == MESHES
    for mesh, run in runs.items():
        assert positive(run["seconds"], run["weights_gib"], run["speed_up"] if "=" in mesh else 1)
        assert run["stages"].keys() == {"condition", "denoise", "video decode"}
        denoise = run["stages"]["denoise"]
        sent, paper = denoise["sent_bytes"], denoise["sent_bytes_on_paper"]
        assert sent.pop("all-to-all") == paper["all-to-all"], mesh
        # Small weights are not divided, nor gathered; every block's results are, once more.
        results = 2 * 3 * 4 * 6 * 48 * 4  # bytes: latents and their clean prediction
        blocks = STEPS // block_length(STEPS)
        bound = 0.01 * paper["all-gather"] + blocks * results
        assert abs(sent.pop("all-gather") - paper["all-gather"]) <= bound, mesh
        assert not any(sent.values()), mesh
    assert runs["data=2,fsdp=2"]["prompts"] == 2 and runs["cfg=2,seq=2"]["devices"] == 4
    whole, divided = runs["one"]["weights_gib"], runs["data=2,fsdp=2"]["weights_gib"]
    assert divided < 0.6 * whole
    for mesh, kinds in {"one": 0, "cfg=2,seq=2": 2, "data=2,fsdp=2": 2}.items():
        paper = runs[mesh]["stages"]["denoise"]["sent_bytes_on_paper"]
        assert len([size for size in paper.values() if size]) == kinds
    slowest = max(runs["one"]["seconds"], runs["one@3"]["seconds"])
    divided = runs["cfg=2,seq=2"]
    assert divided["speed_up"] == pytest.approx(slowest / divided["seconds"])
    assert divided["stages"]["video decode"]["speed_up"] > 0
    # What is there is not made again.
    del found["runs"]["16x24 one@3"]
    out.write_text(json.dumps(found), "utf-8")
    again, said = on_devices(4, "scaling", out, *arguments)
    assert said.count("16x24") == 1 and again["runs"]["16x24 one"] == found["runs"]["16x24 one"]


RUNS = {
    run.__name__: run
    for run in (
        blocks, compare_diffusers, gpu_numerics, image_to_video, kernels, loading, lora,
        quality, random_checkpoint, scaling,
    )
}  # fmt: skip


@pytest.mark.parametrize("name", SCRIPTS)
def test_dry_run(name, report, request):
    if name not in RUNS:
        pytest.fail(f"benchmarks/{name}.py has no dry run: give it --dry, and RUNS a function")
    RUNS[name](report, request)


@pytest.mark.parametrize("name", [name for name in FILES if name not in SCRIPTS])
def test_any_other_file_belongs_to_a_script(name):
    def imported(text: str) -> set[str]:
        nodes = list(ast.walk(ast.parse(text)))
        plain = [alias.name for x in nodes if isinstance(x, ast.Import) for alias in x.names]
        named = [x for x in nodes if isinstance(x, ast.ImportFrom)]
        inside = [alias.name for x in named if x.module == "benchmarks" for alias in x.names]
        return {*plain, *inside, *((x.module or "").split(".")[-1] for x in named)}

    assert any(name in imported(FILES[script]) for script in SCRIPTS)
