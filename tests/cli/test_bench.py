"""The benchmark: what it runs, what it counts and what it writes. How fast is not for tests."""

import json
import math
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from hopper import Hopper
from jax.extend.core import jaxprs_in_params
from small_config import CONFIG

from cosmos3_jax.cli import bench
from cosmos3_jax.cli import main as cli
from cosmos3_jax.config import Config
from cosmos3_jax.models import transformer
from cosmos3_jax.parallel import device
from cosmos3_jax.runtime import random_inputs
from cosmos3_jax.runtime.job import Job
from cosmos3_jax.sampling import denoise, stages

JOB = Job(num_frames=5, height=48, width=80, steps=3, text_tokens=20, negative_tokens=130)
REPEATS = 2
SHAPE = ["--num-frames", "5", "--height", "48", "--width", "80", "--steps", "2", "--repeats", "1"]
TINY = ["bench", "--checkpoint", "random", *SHAPE]

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def params():
    return random_inputs.random_params(CONFIG, jnp.dtype(jnp.float32))


@pytest.fixture
def no_weights(monkeypatch, unloaded):
    """Whoever makes or loads weights fails the test."""
    monkeypatch.setattr(random_inputs, "leaf_program", lambda *_: pytest.fail("weights were made"))


def product_flops(jaxpr) -> int:
    """Twice the multiplications of all matrix products, those of a loop as often as it runs."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            contracted = equation.params["dimension_numbers"][0][0]
            left = equation.invars[0].aval.shape
            inner = math.prod(left[axis] for axis in contracted)
            total += 2 * inner * equation.outvars[0].aval.size
        assert equation.primitive.name not in ("while", "cond", "conv_general_dilated")
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        total += times * sum(map(product_flops, jaxprs_in_params(equation.params)))
    return total


@pytest.mark.parametrize("sound", [False, True])
@pytest.mark.parametrize("negative", [0, 128, 256])
def test_the_arithmetic_is_that_of_the_traced_loop(sound, negative):
    """Exactly, where nothing is padded: both prompts fill their buckets, and those are equal, or
    there is one branch. Padding is then the only difference.
    """
    job = JOB.replace(sound=sound, text_tokens=128, negative_tokens=negative)
    request = bench.random_request(CONFIG, job)
    shapes = transformer.param_shapes(CONFIG.transformer)
    encode = partial(stages.encode_text, config=CONFIG)
    begun = jax.eval_shape(encode, shapes["und"], request)
    loop = partial(denoise.advance, config=CONFIG)
    arguments = shapes["gen"], begun["conditions"], begun["state"], denoise.all_steps(request)
    traced = product_flops(jax.make_jaxpr(loop)(*arguments).jaxpr)

    model, tokens = CONFIG.transformer, 2 * 2 * 3 + request.sound_frames
    heads = model.num_attention_heads * model.head_dim
    a_key = 4 * job.steps * model.num_hidden_layers * heads * tokens
    padding = 128 * a_key if negative == 256 else 0  # the prompt, padded to the negative one
    assert bench.denoise_flops(CONFIG, request) == traced - padding
    shorter = bench.random_request(CONFIG, job.replace(text_tokens=100))
    assert bench.denoise_flops(CONFIG, shorter) == traced - padding - 28 * a_key


def test_every_stage_is_measured(params):
    """With sound; the command line below is run without."""
    job = JOB.replace(sound=True)
    result = json.loads(json.dumps(bench.run_bench(CONFIG, params, job, REPEATS)))
    check_result(result, job, REPEATS)
    # on this backend, where memory_stats is None
    assert result["peak_gib"] is result["peak_gib_before"] is None
    flops = bench.denoise_flops(CONFIG, bench.random_request(CONFIG, job))
    assert result["denoise_tflop"] == pytest.approx(flops / 1e12)
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert result["weights_gib"] == pytest.approx(weights / 2**30)
    video = 3 * 5 * 48 * 80 * 4 / 2**30
    assert result["stages"]["video decode"]["output_gib"] == pytest.approx(video, rel=1e-3)


def check_result(result: dict, job: Job, repeats: int) -> None:
    assert result["job"] == bench.describe(job) | {"repeats": repeats}
    stages = result["stages"]
    names = ["condition", "denoise", "video decode", "one step"]
    if job.sound:
        names[3:] = ["sound decode", "one step", "one step without sound"]
    assert list(stages) == names
    for name, stage in stages.items():
        if job.sound or name != "one step":
            assert len(stage["samples"]) == repeats
            assert 0 < min(stage["samples"]) <= stage["seconds"] <= max(stage["samples"])
        if not name.startswith("one step"):
            assert stage["temporary_gib"] >= 0 and stage["output_gib"] > 0
            assert stage["compile_seconds"] > 0 and stage["compile_seconds_cached"] > 0
    if not job.sound:
        assert stages["one step"] == {"seconds": stages["denoise"]["seconds"] / job.steps}
    whole = ("condition", "denoise", "video decode", "sound decode")
    assert result["seconds"] == sum(stages[name]["seconds"] for name in whole if name in stages)
    rate = result["denoise_tflop"] / stages["denoise"]["seconds"]
    assert result["denoise_tflops_per_second"] == pytest.approx(rate)
    assert result["estimated_gib"] > result["weights_gib"] > 0


def test_without_guidance_there_is_one_branch():
    request = bench.random_request(CONFIG, JOB.replace(negative_tokens=0))
    assert request.neg_text_ids is request.neg_text_mask is None


def job_of(**fields) -> Job:
    """A job with the prompts that the command has by default."""
    return Job(**{"text_tokens": 300, "negative_tokens": 300} | fields)


def test_jobs_come_from_the_recipe_smallest_first():
    [(name, job)] = bench.jobs(Config()).items()
    assert (name, job) == ("720p", job_of(num_frames=189, height=720, width=1280))
    jobs = bench.jobs(Config(), sizes="720p,256p", num_frames=5, steps=2, fps=30.0, sound=True)
    assert list(jobs) == ["256p", "720p"]
    made = job_of(num_frames=5, height=192, width=320, fps=30.0, steps=2, sound=True)
    assert jobs["256p"] == made
    assert list(bench.jobs(Config(), height=48, width=80)) == ["48x80"]


def test_the_command_line_end_to_end(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
    out = tmp_path / "deep" / "tiny.json"
    assert cli.main([*TINY, "--text-tokens", "30", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    record = json.loads(out.read_text())
    assert list(record["results"]) == ["48x80"]
    job = job_of(num_frames=5, height=48, width=80, steps=2, text_tokens=30)
    check_result(record["results"]["48x80"], job, repeats=1)
    assert said == bench.table("48x80", record["results"]["48x80"]) + "\n"
    for stage in record["results"]["48x80"]["stages"]:
        assert f"\n  {stage} " in said
    assert (record["weights"], record["dtype"], record["backend"]) == ("random", "float32", "cpu")
    assert record["device"] == jax.devices()[0].device_kind
    assert record["settings"]["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.9"
    assert "XLA_FLAGS" in record["settings"]
    assert {"cosmos3_jax", "python", "jax", "jaxlib"} <= record["versions"].keys()
    assert {"driver", "power_limit", "machine", "platform_version"} <= record.keys()
    assert [path.name for path in out.parent.iterdir()] == ["tiny.json"]


def test_each_size_is_written_when_it_is_done(tmp_path, capsys, monkeypatch):
    """Random weights of Nano's sizes, in words: nothing is made of them here."""
    monkeypatch.setattr(device, "default_device", Hopper)
    out, done = tmp_path / "a.json", []

    def stop_at_the_second(config, params, job, repeats):
        if done:
            raise KeyboardInterrupt
        done.append((config, params, job, repeats))
        return {"job": bench.describe(job)}

    monkeypatch.setattr(random_inputs, "random_params", lambda config, dtype: {"dtype": str(dtype)})
    monkeypatch.setattr(bench, "run_bench", stop_at_the_second)
    monkeypatch.setattr(bench, "table", lambda name, result: name)
    command = ["bench", "--size", "480p,256p", "--dtype", "bfloat16", "--out", str(out)]
    assert cli.main(command) == 130
    assert capsys.readouterr().out == "256p\n"
    job = job_of(num_frames=189, height=192, width=320)
    assert done == [(Config().silent(), {"dtype": "bfloat16"}, job, 3)]
    record = json.loads(out.read_text())
    assert record["results"] == {"256p": {"job": bench.describe(job)}}
    assert (record["weights"], record["dtype"]) == ("random nano", "bfloat16")

    assert cli.main(command) == 2  # refused: what is there stays
    assert f"{out} exists; pass overwrite=True (--overwrite)" in capsys.readouterr().err
    assert json.loads(out.read_text()) == record
    done.clear()
    assert cli.main([*command, "--sound", "--overwrite"]) == 130
    assert json.loads(out.read_text())["results"]["256p"]["job"]["sound"]
    assert done[0][0] == Config()


BAD_ARGUMENTS = [
    ("--steps 0", "steps=0 must be at least 1"),
    ("--repeats 0", "repeats=0 must be at least 1"),
    ("--text-tokens 0", "text_tokens=0 must be at least 1"),
    ("--negative-tokens -1", "negative_tokens=-1 must be at least 0"),
    ("--decode-chunk-size 0", "decode_chunk_size=0 must be at least 1"),
    ("--size 1080p", "size '1080p' is unknown; choose from 256p, 480p, 720p"),
    ("--size 256p,,480p", "size '' is unknown; choose from 256p, 480p, 720p"),
    ("--size 256p --height 48", "size 256p sets height and width: give either those or the size"),
    ("--num-frames 190", "num_frames=190 is not 4k+1; nearest are 189 and 193"),
    ("--width 8", "width=8 is not a multiple of 16; nearest are 16 and 32"),
    ("--fps 0", "fps=0.0 must be positive and finite"),
    ("--fps nan", "fps=nan must be positive and finite"),
    ("--sound --num-frames 1", "num_frames=1 makes an image, which has no sound"),
    (
        "--checkpoint {tmp}/none",
        "there is no folder {tmp}/none; a checkpoint is a folder, a Hub",
    ),
    ("--sound --checkpoint {silent}", "has no sound (sound_gen is False"),
    ("--out {tmp}/a.txt", "the suffix '.txt' is not supported here; use .json"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_ARGUMENTS, ids=[a for a, _ in BAD_ARGUMENTS])
def test_bad_arguments_are_one_line_before_any_work(
    tmp_path, silent_checkpoint, capsys, no_weights, arguments, message
):
    arguments = arguments.format(tmp=tmp_path, silent=silent_checkpoint)
    assert cli.main(["bench", *arguments.split()]) == 2
    said = capsys.readouterr()
    assert message.format(tmp=tmp_path) in said.err
    assert said.err.startswith("cosmos3-jax: error: ") and said.err.count("\n") == 1
    assert not said.out


def test_a_checkpoint_and_random_weights_exclude_each_other(capsys, no_weights):
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", "--checkpoint", "random", "--random", "nano"])
    assert stop.value.code == 2 and "not allowed with argument" in capsys.readouterr().err


def test_what_does_not_fit_is_refused_before_weights_are_made(monkeypatch, capsys):
    monkeypatch.setattr(random_inputs, "random_params", lambda *_: pytest.fail("weights were made"))
    monkeypatch.setattr(device, "memory_limit", lambda: 20 * 2**30)
    sizes = ["--num-frames", "5", "--height", "64", "--width", "96", "--dtype", "bfloat16"]
    assert cli.main(["bench", *sizes]) == 2
    assert "5 frames of 64x96 need" in capsys.readouterr().err
    monkeypatch.setattr(device, "memory_limit", lambda: None)
    assert cli.main(["bench", "--size", "720p"]) == 2  # on a CPU
    assert "of logits (limit 16)" in capsys.readouterr().err


def test_sound_is_refused_where_the_sizes_have_none():
    job = JOB.replace(sound=True)
    with pytest.raises(ValueError, match="sound is asked for, but these weights have none"):
        bench.random_request(CONFIG.silent(), job)


def test_sizes_as_elsewhere():
    """Names of before stay names; another spelling of one is that one."""
    made = bench.jobs(Config(), sizes="832x480,256p,704p,96x64")
    assert list(made) == ["64x96", "256p", "480p", "704x1280"]
    assert (made["64x96"].height, made["64x96"].width) == (64, 96)


def test_a_fast_job_has_half_the_evaluations():
    made = bench.jobs(Config(), sizes="480p,256p", speeds="exact,fast")
    steps = {name: job.steps for name, job in made.items()}
    assert steps == {"256p": 35, "256p fast": 18, "480p": 35, "480p fast": 18}
    with pytest.raises(ValueError, match="speed 'quick' is unknown"):
        bench.jobs(Config(), speeds="quick")
