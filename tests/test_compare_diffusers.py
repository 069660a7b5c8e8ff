"""The comparison with diffusers: both sides do the same work, on weights that are all there."""

import dataclasses
import json
import math
import sys
from pathlib import Path

import jax
import pytest
import torch
from diffusers import AutoencoderKLWan, Cosmos3OmniTransformer

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import compare_diffusers as compare  # noqa: E402
import oracle_model  # noqa: E402

from cosmos3_jax import bench, transformer, video_vae  # noqa: E402
from cosmos3_jax.config import Config  # noqa: E402

JOB = dataclasses.replace(compare.TINY_JOB, text_tokens=41, negative_tokens=37)


@pytest.fixture(scope="module")
def config():
    """The tiny sizes, less what would only make the compiler work longer."""
    tiny = bench.silent(compare.tiny_config())
    vae = dataclasses.replace(tiny.video_vae, num_res_blocks=1)
    return dataclasses.replace(tiny, video_vae=vae)


@pytest.fixture(scope="module")
def pipeline(config):
    return oracle_model.build_pipeline(config, "float32", JOB)


@pytest.fixture(scope="module")
def report(config):
    """Both sides in this process, every step of the job."""
    report = compare.new_report({"tiny": JOB}, {})
    jax.config.update("jax_disable_most_optimizations", True)  # half the time to compile
    try:
        for run in (compare.run_ours, compare.run_diffusers):
            for event in run(config, {"tiny": JOB}, "float32", compiled=False):
                compare.merge(report, event)
    finally:
        jax.config.update("jax_disable_most_optimizations", False)
    return report


def numbers(value):
    if isinstance(value, dict):
        return [n for entry in value.values() for n in numbers(entry)]
    if isinstance(value, list):
        return [n for entry in value for n in numbers(entry)]
    return [value] if isinstance(value, (int, float)) and not isinstance(value, bool) else []


def test_both_sides_do_the_same_work_and_say_how_long(report):
    entry = json.loads(json.dumps(report))["sizes"]["tiny"]
    eager = entry["diffusers"]["eager"]
    assert not report["failed"] and entry["steps_timed"] == JOB.steps
    assert entry["ours"]["work"] == eager["work"] == {
        "text_tokens": 41, "negative_tokens": 37, "video_tokens": 3 * 2 * 3, "video": [9, 64, 96],
        "passes": 2 * JOB.steps,
    }  # fmt: skip
    assert entry["ratios"]["same_work"] and entry["ratios"]["compared_with"] == "eager"
    assert len(eager["step_samples"]) == JOB.steps
    assert entry["ours"]["finite"] and eager["finite"]
    found = numbers([entry["ours"], eager, entry["ratios"]])
    assert len(found) > 20 and all(0 < value < math.inf for value in found)
    assert eager["attention_seconds"][eager["backend"]] > 0
    assert "compared with" in compare.table(report)


def test_our_side_from_a_file(report, tmp_path, monkeypatch):
    """`--only diffusers --ours FILE`: whole jobs measured before, their side now."""
    eager = report["sizes"]["tiny"]["diffusers"]["eager"]
    stage = {"seconds": 0.1, "samples": [0.1, 0.2, 0.1]}
    measured = {
        "job": dataclasses.asdict(compare.TINY_JOB),
        "stages": {"condition": stage, "one step": {"seconds": 0.5}, "video decode": stage},
        "peak_gib": None,
    }
    ours, out = tmp_path / "ours.json", tmp_path / "out.json"
    ours.write_text(json.dumps({"device": "a chip", "results": {"tiny": measured}}))
    event = {"size": "tiny", "side": "eager", "found": eager}
    monkeypatch.setattr(compare, "in_child", lambda run, *arguments: iter([event]))
    command = ["--tiny", "--only", "diffusers", "--ours", str(ours), "--out", str(out)]
    found = compare.main(command)["sizes"]["tiny"]
    assert found == json.loads(out.read_text())["sizes"]["tiny"]
    seconds = 0.1 + 2 * 0.5 + 0.1  # condition, two steps, decode
    assert found["ours"]["total_seconds"] == pytest.approx(seconds)
    assert found["ratios"]["eager"]["ratio"] == pytest.approx(eager["total_seconds"] / seconds)
    measured["job"]["steps"] += 1
    ours.write_text(json.dumps({"results": {"tiny": measured}}))
    with pytest.raises(ValueError, match="measured on another job"):
        compare.main(command)


def test_few_steps_leave_out_the_first_and_decode_the_whole_video(pipeline):
    job = dataclasses.replace(JOB, steps=5)
    found = oracle_model.measure_job(pipeline, job, 2)
    assert len(found["step_samples"]) == 2 and found["work"]["passes"] == 4
    assert found["work"]["video"] == [9, 64, 96] and found["finite"]
    samples, steps = found["step_samples"], compare.summed(found, job.steps)
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
    sizes, build = bench.silent(Config()), oracle_model.build_random
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
            "step_median_seconds": total / 10, "decode_seconds": total / 5, "work": {"passes": 4},
        }  # fmt: skip

    variants = {"eager": row(6.0, 1.0), "compiled": row(5.0, 1.0)}
    found = compare.ratios(row(4.0, 0.0), variants)
    assert found["compared_with"] == "compiled" and found["ratio"] == 1.25
    assert found["ratio_with_preparation"] == 1.5 and found["eager"]["ratio"] == 1.5
    found = compare.ratios(row(4.0, 0.0), variants | {"compiled": {"error": "no compiler"}})
    assert found["compared_with"] == "eager" and found["same_work"]
    assert not compare.ratios(row(4.0, 0.0) | {"work": {"passes": 2}}, variants)["same_work"]
    assert compare.ratios({"error": "no memory"}, variants) == {}


def test_a_failure_is_kept_and_ends_nothing(capsys):
    report = compare.new_report({"tiny": JOB}, {})

    def fails():
        raise MemoryError("all of it")

    compare.merge(report, {"size": "tiny", "side": "eager", "found": compare._try(fails)})
    assert report["failed"] == ["tiny eager: MemoryError: all of it"]
    assert report["failed"][0] in compare.table(report)


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
