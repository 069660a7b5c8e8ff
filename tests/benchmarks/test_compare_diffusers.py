"""The comparison with diffusers: its arithmetic, and weights that are all there.

That both sides do the same work is in `test_benchmarks.py`.
"""

import dataclasses
import json
import math

import compare_diffusers as compare
import compare_report
import jax
import oracle_model
import pytest
import torch
from diffusers import AutoencoderKLWan, Cosmos3OmniTransformer
from hopper import Hopper

from cosmos3_jax.checkpoint import random_checkpoint
from cosmos3_jax.cli import bench
from cosmos3_jax.cli import main as cli
from cosmos3_jax.config import Config
from cosmos3_jax.models import transformer, video_vae
from cosmos3_jax.parallel import device
from cosmos3_jax.runtime import random_inputs

SIZE = compare.TINY
JOB = compare.TINY_JOB.replace(text_tokens=40)


@pytest.fixture(scope="module")
def config():
    """The tiny sizes, less what would only make the compiler work longer."""
    tiny = compare.tiny_config().silent()
    vae = dataclasses.replace(tiny.video_vae, num_res_blocks=1)
    return dataclasses.replace(tiny, video_vae=vae)


@pytest.fixture(scope="module")
def pipeline(config):
    return oracle_model.build_pipeline(config, "float32", JOB)


@pytest.fixture
def bench_file():
    """What `cosmos3-jax bench` writes of the tiny job."""
    stage = {"seconds": 0.1, "samples": [0.1, 0.2, 0.1]}
    stages = {name: dict(stage) for name in ("condition", "denoise", "video decode")}
    stages["denoise"]["samples"] = [1.5, 0.5, 1.0]
    job = bench.describe(compare.TINY_JOB)
    result = {"job": job, "stages": stages, "peak_gib": None}
    return {
        "device": "cpu", "weights": "random", "dtype": "bfloat16", "results": {SIZE: result},
    }  # fmt: skip


def test_our_side_from_a_file(pipeline, bench_file, tmp_path, monkeypatch):
    """`--only diffusers --ours FILE`: whole jobs measured before, their side now."""
    eager = oracle_model.measure_job(pipeline, JOB, JOB.steps)
    device = {"device": "another chip"}
    ours, out = tmp_path / "ours.json", tmp_path / "out.json"
    ours.write_text(json.dumps(bench_file))

    def in_child(run, *arguments):
        yield {"side": "diffusers", "environment": device}
        yield {"size": SIZE, "side": "eager", "found": eager}

    monkeypatch.setattr(compare, "in_child", in_child)
    command = ["--dry", "--only", "diffusers", "--ours", str(ours), "--out", str(out)]
    written = compare.main(command)
    found = written["sizes"][SIZE]
    assert written == json.loads(out.read_text())
    seconds = 0.1 + 1.0 + 0.1  # condition, both steps, decode
    assert found["ours"]["total_seconds"] == pytest.approx(seconds)
    assert found["ratios"]["eager"]["ratio"] == pytest.approx(
        compare_report.summed(eager, JOB.steps)["total_seconds"] / seconds
    )
    different, lengths = written["failed"]
    assert "ours on cpu, diffusers on another chip" in different
    assert lengths == f"{SIZE}: the two sides did not do the same work"  # 40 tokens there, 41 here
    assert lengths in compare_report.table(written)
    device["device"] = "cpu"
    assert compare.main(command)["failed"] == [lengths]


def test_a_side_in_a_process_of_its_own(bench_file, config, tmp_path):
    """Its events come one by one; that it failed after the first is an event too."""
    path = tmp_path / "ours.json"
    bench_file["results"][SIZE]["job"]["steps"] = 3
    path.write_text(json.dumps(bench_file))
    jobs = {SIZE: compare.TINY_JOB}
    first, second = compare.in_child(compare.read_ours, path, config, jobs)
    assert first["side"] == "ours" and first["environment"]["dtype"] == "bfloat16"
    assert second == {"failed": "read_ours ended with exit code 1"}


@pytest.mark.parametrize(
    "place, value, message",
    [
        (["weights"], "random nano", "weights is 'random nano', must be 'random'"),
        (["dtype"], "float32", "dtype is 'float32', must be 'bfloat16'"),
        (["results"], {}, rf"list of sizes is \[\], must be \['{SIZE}'\]"),
        (["results", SIZE, "job", "steps"], 3, f"steps at {SIZE} is 3, must be 2"),
        (["results", SIZE, "job", "fps"], 16.0, f"fps at {SIZE} is 16.0, must be 24.0"),
        (["results", SIZE, "job", "decode_chunk_size"], 1, "decode_chunk_size at .* must be None"),
        (["results", SIZE, "job", "repeats"], 1, None),
    ],
)
def test_a_file_of_anything_else_is_refused(bench_file, config, tmp_path, place, value, message):
    path, inner = tmp_path / "ours.json", bench_file
    for name in place[:-1]:
        inner = inner[name]
    inner[place[-1]] = value
    path.write_text(json.dumps(bench_file))
    events = compare.read_ours(path, config, {SIZE: compare.TINY_JOB})
    if message is None:
        assert len(list(events)) == 2
        return
    with pytest.raises(ValueError, match=message) as refused:
        list(events)
    assert str(path) in str(refused.value) and "cosmos3-jax bench" in str(refused.value)


@pytest.mark.parametrize("size", [SIZE, "480p"])
def test_the_command_that_makes_such_a_file(config, monkeypatch, tmp_path, size):
    """The options that a refusal names lead `cosmos3-jax bench` to the job that is wanted."""
    jobs = {SIZE: compare.TINY_JOB} if size == SIZE else bench.jobs(config, sizes=size)
    monkeypatch.setattr(device, "default_device", Hopper)
    ran = []

    def run_bench(config, params, job, repeats):
        ran.append(job)
        stage = {"seconds": 1.0, "samples": [1.0]}
        stages = dict.fromkeys(("condition", "denoise", "video decode"), stage)
        return {"job": bench.describe(job), "stages": stages, "peak_gib": None}

    monkeypatch.setattr(bench, "run_bench", run_bench)
    monkeypatch.setattr(random_inputs, "random_params", lambda config, dtype: {})
    monkeypatch.setattr(bench, "table", lambda name, result: name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    out = tmp_path / "ours.json"
    cli.main(["bench", *compare.bench_options(jobs).split(), "--out", str(out)])
    assert ran == list(jobs.values())
    events = list(compare.read_ours(out, config, jobs))
    assert [event.get("size") for event in events] == [None, size]
    assert events[0]["environment"]["weights"] == (
        random_checkpoint.NAME if size == SIZE else "random nano"
    )


def test_a_total_formed_of_few_steps_says_so():
    """Each side by what it ran itself: here all of ours, as from a file, and three of theirs."""
    job = JOB.replace(steps=35)
    report = compare_report.new_report({"720p": job}, {})
    assert compare.timed_steps("720p", job) == 3
    ours = {
        "loop_samples": [70.0], "condition_seconds": 1.0, "steps_timed": 35, "passes": 70,
        "decode_samples": [4.0], "peak_gib": None, "work": {"passes_per_step": 2},
    }  # fmt: skip
    theirs = {
        "step_samples": [3.0, 9.0, 3.0], "steps_timed": 3, "passes": 6, "decode_samples": [5.0],
        "peak_gib": None, "work": {"passes_per_step": 2},
    }  # fmt: skip
    for side, found in (("ours", ours), ("eager", theirs)):
        compare_report.merge(report, {"size": "720p", "side": side, "found": found})
    entry = report["sizes"]["720p"]
    assert entry["ours"]["total_seconds"] == 75 and entry["ours"]["step_median_seconds"] == 2
    assert entry["diffusers"]["eager"]["total_seconds"] == 35 * 3 + 5
    assert compare_report.summed(theirs, 3)["total_seconds"] == 3 + 9 + 3 + 5  # all that there are
    assert entry["total_formed_by"] == {
        "ours": "condition + one loop of all 35 steps + decode",
        "diffusers": "35 * the median of 3 steps after one to warm up + decode",
    }
    assert entry["ratios"]["same_work"] and not report["failed"]
    few = ours | {"steps_timed": 3, "passes": 6, "loop_samples": [6.0]}
    compare_report.merge(report, {"size": "720p", "side": "ours", "found": few})
    assert entry["ours"]["total_seconds"] == 75
    formed = "condition + 35 * (one loop of 3 steps / 3) + decode"
    assert entry["total_formed_by"]["ours"] == formed
    other = ours | {"work": {"passes_per_step": 1}, "finite": False}
    for _ in range(2):
        compare_report.merge(report, {"size": "720p", "side": "ours", "found": other})
    assert report["failed"] == [
        "720p ours: not all values are finite",
        "720p: the two sides did not do the same work",
    ]


def test_few_steps_leave_out_the_first_and_decode_the_whole_video(pipeline):
    job = JOB.replace(steps=5)
    found = oracle_model.measure_job(pipeline, job, 2)
    assert len(found["step_samples"]) == found["steps_timed"] == 2
    assert found["passes"] == 4 and found["work"]["passes_per_step"] == 2
    assert found["work"]["video"] == [9, 64, 96] and found["finite"]
    samples, steps = found["step_samples"], compare_report.summed(found, job.steps)
    assert steps["denoise_seconds"] == pytest.approx(5 * sum(samples) / 2)
    assert steps["total_seconds"] == steps["denoise_seconds"] + found["decode_samples"][0]


def test_every_weight_is_drawn(pipeline):
    for module in (pipeline.transformer, pipeline.vae):
        for name, parameter in module.named_parameters():
            scale = name.endswith("gamma") or (parameter.ndim == 1 and name.endswith("weight"))
            mean, spread = (1.0, 0.1) if scale else (0.0, 0.02)
            values = parameter.double()
            assert values.isfinite().all() and 0.3 < values.std() / spread < 2, name
            assert abs(values.mean() - mean) < 5 * spread / math.sqrt(values.numel()), name


def test_buffers_are_the_constructors(pipeline):
    model, vae = pipeline.transformer, pipeline.vae
    for built, kind in ((model, Cosmos3OmniTransformer), (vae, AutoencoderKLWan)):
        usual = dict(kind.from_config(built.config).named_buffers())
        found = dict(built.named_buffers())
        assert found.keys() == usual.keys()
        assert all(torch.equal(found[n], usual[n]) for n in usual)
    assert "rotary_emb.inv_freq" in dict(model.named_buffers())


def test_bfloat16_leaves_in_float32_what_a_checkpoint_does(config):
    model = oracle_model.build_transformer(config, "cpu", torch.bfloat16)
    kept = {name for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert kept == {n for n, _ in model.named_parameters() if n.startswith("time_embedder.")}
    assert model.dtype == torch.bfloat16 and model.rotary_emb.inv_freq.dtype == torch.float32


def test_full_size_is_ours():
    sizes, build = Config().silent(), oracle_model.build_random
    model = build(
        Cosmos3OmniTransformer, sizes.transformer, "meta", torch.bfloat16, sound_gen=False
    )
    vae = build(AutoencoderKLWan, sizes.video_vae, "meta", torch.bfloat16)

    def count(shapes: dict) -> int:
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))

    # The text tower's last layer gives keys and values alone, its output and the next word's
    # probabilities nobody reads.
    last = "layers.35."
    unread = (
        "lm_head.", "norm.weight", f"{last}mlp.", f"{last}post_attention_layernorm.",
        f"{last}self_attn.to_q.", f"{last}self_attn.to_out.", f"{last}self_attn.norm_q.",
    )  # fmt: skip
    read = [p.numel() for name, p in model.named_parameters() if not name.startswith(unread)]
    assert sum(read) == count(transformer.param_shapes(sizes.transformer))
    whole = sum(parameter.numel() for parameter in vae.parameters())
    assert whole == count(video_vae.param_shapes(sizes.video_vae))


def test_ratios_compare_with_the_faster_variant():
    def row(total, before):
        return {
            "total_seconds": total, "total_with_preparation_seconds": total + before,
            "step_median_seconds": total / 10, "decode_seconds": total / 5,
            "work": {"video_tokens": 4},
        }  # fmt: skip

    variants = {"eager": row(6.0, 1.0), "compiled": row(5.0, 1.0)}
    found = compare_report.ratios(row(4.0, 0.0), variants)
    assert found["compared_with"] == "compiled" and found["ratio"] == 1.25
    assert found["ratio_with_preparation"] == 1.5 and found["eager"]["ratio"] == 1.5
    found = compare_report.ratios(row(4.0, 0.0), variants | {"compiled": {"error": "no compiler"}})
    assert found["compared_with"] == "eager" and found["same_work"]
    other = row(4.0, 0.0) | {"work": {"video_tokens": 2}}
    assert not compare_report.ratios(other, variants)["same_work"]
    assert compare_report.ratios({"error": "no memory"}, variants) == {}


def test_a_failure_is_kept_and_ends_nothing():
    report = compare_report.new_report({SIZE: JOB}, {})

    def fails():
        raise MemoryError("all of it")

    event = {"size": SIZE, "side": "eager", "found": compare.or_error(fails)}
    compare_report.merge(report, event)
    assert report["failed"] == [f"{SIZE} eager: MemoryError: all of it"]
    assert report["sizes"][SIZE]["variants_run"] == []
    assert report["failed"][0] in compare_report.table(report)


def test_the_blocks_compile_without_a_graph_break(config):
    pipeline = oracle_model.build_pipeline(config, "float32", JOB)
    benchmark = torch.backends.cudnn.benchmark
    try:
        oracle_model.compile_blocks(pipeline, backend="eager")
        found = oracle_model.measure_job(pipeline, JOB, 1)
    finally:
        torch.backends.cudnn.benchmark = benchmark
        torch._dynamo.reset()
    assert found["finite"]
