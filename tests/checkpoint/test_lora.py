"""LoRA: applied, merged, taken back, and exchanged with diffusers' own loader both ways."""

import functools
import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from checkpoint_files import assert_same_tree
from diffusers import Cosmos3OmniTransformer
from oracle import TRANSFORMER, oracle_velocity, perturb, tree_from_state_dict
from peft import LoraConfig
from rounding import check, farthest, relative_l2
from safetensors.numpy import load_file, save_file
from training_run import (
    BUCKET,
    CONFIG,
    FRAMES,
    HEIGHT,
    SOUND,
    WIDTH,
    compiled,
    compiled_step,
    make_batch,
)

from cosmos3_jax import Cosmos3
from cosmos3_jax.checkpoint import lora, lora_files
from cosmos3_jax.checkpoint.rules import CheckpointError, leaf_shapes
from cosmos3_jax.checkpoint.transformer_layout import transformer_layout
from cosmos3_jax.cli import bench
from cosmos3_jax.cli import main as cli
from cosmos3_jax.cli.generate import _lora
from cosmos3_jax.models.transformer import (
    Latents,
    encode_condition,
    param_shapes,
    unstack_layers,
)
from cosmos3_jax.models.transformer import velocity as our_velocity
from cosmos3_jax.training.flow import Batch
from cosmos3_jax.training.params import cast_params
from cosmos3_jax.training.step import TrainOptions, init_state, train_step

# Relative L2 distances, by `test_tolerance`: of a velocity from the oracle's, of kernels from those
# that another program merged, and of latents from those of another program.
TOLERANCE = 1e-5
KERNELS = 1e-6
LATENTS = 1e-5
# Of a velocity with the adapter merged from one with it applied: they differ in the rounding of the
# sum of a kernel and its adapter. Measured, 8.5e-7; one unit in the last place moves it by 6.1e-7.
MERGED = 6e-6
TIMESTEP = 700


def new_oracle() -> Cosmos3OmniTransformer:
    torch.manual_seed(0)
    return perturb(Cosmos3OmniTransformer(**TRANSFORMER), 1)


@functools.cache
def params() -> dict:
    state_dict = new_oracle().state_dict()
    return tree_from_state_dict(transformer_layout(CONFIG), state_dict, param_shapes(CONFIG))


def trained(patterns=(".",), rank: int = 3, alpha: float = 6.0) -> lora.Lora:
    """An adapter whose B is not zero, as after training; by default one of every linear map."""
    adapter = lora.init(jax.random.key(0), CONFIG, patterns=patterns, rank=rank, alpha=alpha)
    random = np.random.RandomState(1)
    adapters = {
        name: pair | {"b": jnp.float32(0.2 * random.standard_normal(pair["b"].shape))}
        for name, pair in adapter.adapters.items()
    }
    return adapter.replace(adapters=adapters)


IDS = [5, 6, 7, 200, 9]
RANDOM = np.random.RandomState(2)
VIDEO = np.float32(RANDOM.standard_normal((FRAMES, HEIGHT, WIDTH, CONFIG.latent_channel)))
SOUNDS = np.float32(RANDOM.standard_normal((SOUND, CONFIG.sound_dim)))


@compiled
def _velocity(tree: dict) -> Latents:
    ids = np.zeros((1, BUCKET), np.int32)
    ids[0, : len(IDS)] = IDS
    mask, shape = np.arange(BUCKET)[None] < len(IDS), VIDEO.shape[:3]
    condition = encode_condition(
        tree["und"], CONFIG, ids, mask, video_shape=shape, fps=24.0, sound_frames=SOUND
    )
    latents = {"video": VIDEO[None], "sound": SOUNDS[None]}
    return our_velocity(tree["gen"], CONFIG, condition, latents, TIMESTEP)


def velocity(tree: dict) -> np.ndarray:
    found = _velocity(tree)
    return np.concatenate([np.ravel(found["video"]), np.ravel(found["sound"])])


def oracles(model: Cosmos3OmniTransformer) -> np.ndarray:
    found = oracle_velocity(model, IDS, VIDEO, SOUNDS, timestep=TIMESTEP)
    return np.concatenate([np.ravel(found["video"]), np.ravel(found["sound"])])


def test_tolerance(record_property):
    def merge(adapter, tree):
        return lora.merge(adapter, tree, CONFIG)[0]

    check(record_property, KERNELS, merge, trained(), params(), name="kernels")
    check(record_property, TOLERANCE, velocity, merge(trained(), params()), name="velocity")


def test_merging_equals_applying_and_can_be_undone():
    adapter = trained()
    merged, replaced = lora.merge(adapter, params(), CONFIG)
    applied = velocity(lora.attach(adapter, params(), CONFIG))
    assert relative_l2(velocity(merged), applied) <= MERGED
    assert relative_l2(applied, velocity(params())) > 0.05  # and it does something
    assert jax.tree.structure(merged) == jax.tree.structure(params())
    assert set(replaced) == {path for path in leaf_shapes(params()) if path.endswith("/kernel")}
    assert_same_tree(lora.unmerge(merged, replaced), params())
    # and so it is with the layers apart, as `Cosmos3` holds them
    apart = params() | {"gen": unstack_layers(params()["gen"])}
    merged_apart, replaced = lora.merge(adapter, apart, CONFIG)
    expected = merged | {"gen": unstack_layers(merged["gen"])}
    assert farthest(merged_apart, expected) <= KERNELS
    assert_same_tree(lora.unmerge(merged_apart, replaced), apart)


def test_a_new_adapter_covers_what_its_patterns_choose():
    adapter = lora.init(jax.random.key(0), CONFIG, rank=2)
    names = {
        f"self_attn.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    }
    names |= {f"mlp_moe_gen.{name}_proj" for name in ("gate", "up", "down")}
    assert set(adapter.adapters) == {f"layers.*.{name}" for name in names}
    pair = adapter.adapters["layers.*.self_attn.add_k_proj"]
    assert pair["a"].shape == (3, 64, 2) and pair["b"].shape == (3, 2, 32)
    assert pair["a"].any() and not pair["b"].any() and adapter.scale == 1
    one = lora.init(jax.random.key(0), CONFIG, patterns=[r"layers\.1\.mlp\.up"], rank=4, alpha=2)
    [[name, pair]] = one.adapters.items()
    assert name == "layers.*.mlp.up_proj" and one.scale == 0.5
    # the text tower's last layer has keys and values alone: two of its layers are stacked
    assert [bool(layer.any()) for layer in pair["a"]] == [False, True]
    last = lora.init(jax.random.key(0), CONFIG, patterns=[r"\.to_k$"], rank=4).adapters
    assert {name: pair["a"].ndim for name, pair in last.items()} == {
        "layers.*.self_attn.to_k": 3, "layers.2.self_attn.to_k": 2,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(patterns=["to_query"]), "'to_query' matches nothing; near: .*to_q"),
        (dict(patterns=["embed_tokens"]), "matches nothing"),
        (dict(rank=0), "rank=0"),
        (dict(alpha=0), "alpha=0 would change nothing"),
        (dict(alpha=float("nan")), "alpha=nan must be finite"),
    ],
)
def test_an_adapter_of_nothing(options, message):
    with pytest.raises(ValueError, match=message):
        lora.init(jax.random.key(0), CONFIG, **options)


def test_an_adapter_that_changes_nothing_is_an_error(tmp_path):
    new = lora.init(jax.random.key(0), CONFIG)
    saved = lambda new, params, config: lora_files.save(new, tmp_path, config)  # noqa: E731
    for act in (lora.merge, lora.attach, saved):
        with pytest.raises(ValueError, match="changes nothing: every A or every B is zero"):
            act(new, params(), CONFIG)
    # added to weights of bfloat16 it may be lost in rounding
    small = trained(["layers.0.mlp.down_proj"]).replace(scale=1e-6)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params())
    with pytest.raises(ValueError, match="changes nothing: .* weight of bfloat16"):
        lora.merge(small, half, CONFIG)
    lora.merge(small, params(), CONFIG)
    file = lora_files.save(trained(), tmp_path, CONFIG)
    tensors = load_file(file)
    save_file({k: 0 * v if "lora_B" in k else v for k, v in tensors.items()}, file)
    with pytest.raises(ValueError, match="pytorch_lora_weights.safetensors: .* changes nothing"):
        lora_files.load(tmp_path, CONFIG)
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"its scale is 0\.0"):
        lora_files.load_scaled([(file, 0.0)], CONFIG)


def test_an_adapter_that_is_not_finite_is_an_error(tmp_path):
    good = trained(["layers.0.mlp.down_proj"])
    file = lora_files.save(good, tmp_path, CONFIG)
    for factor in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"safetensors: its scale is {factor}"):
            lora_files.load_scaled([(file, factor)], CONFIG)
        with pytest.raises(ValueError, match=f"scale, or factor, is {factor}"):
            lora.attach(good.replace(scale=factor), {}, CONFIG)
    [[name, pair]] = good.adapters.items()
    bad = good.replace(adapters={name: pair | {"a": pair["a"].at[0, 0, 0].set(jnp.nan)}})
    with pytest.raises(
        ValueError, match=r"A of layers\.\*\.mlp\.down_proj has values that are not"
    ):
        lora.merge(bad, {}, CONFIG)
    tensors = load_file(file)
    alpha = {"transformer.layers.0.mlp.down_proj.alpha": np.array(np.nan, np.float32)}
    save_file(tensors | alpha, file)
    with pytest.raises(ValueError, match="pytorch_lora_weights.safetensors: .* not finite"):
        lora_files.load(file, CONFIG)


@pytest.mark.parametrize("apart", [False, True])
def test_a_second_adapter_beside_the_first_is_an_error(apart):
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), param_shapes(CONFIG))
    tree = zeros | {"gen": unstack_layers(zeros["gen"])} if apart else zeros
    first, second = trained(["gen/layers/mlp/down", "^proj_out"]), trained(["^proj_out"])
    attached = lora.attach(first, tree, CONFIG)
    for act in (lora.attach, lora.merge):
        with pytest.raises(ValueError, match="already have an adapter beside gen/proj_out/kernel"):
            act(second, {"gen": {"proj_out": attached["gen"]["proj_out"]}}, CONFIG)
        with pytest.raises(ValueError, match="already have an adapter beside gen/layers/.*down/"):
            act(trained(["gen/layers/mlp/down"]), attached, CONFIG)
    merged, _ = lora.merge(first, tree, CONFIG)
    lora.attach(second, merged, CONFIG)


def test_diffusers_reads_what_we_write(tmp_path):
    """By its real loader; every kind of linear map, a scale other than 1, one layer left out."""
    adapter = trained()
    key = "layers.*.self_attn.to_add_out"
    pair = jax.tree.map(lambda x: x.at[1].set(0), adapter.adapters[key])
    adapter = adapter.replace(adapters=adapter.adapters | {key: pair})
    file = lora_files.save(adapter, tmp_path / "file.safetensors", CONFIG)
    names = load_file(file).keys()
    assert "transformer.layers.0.self_attn.to_add_out.lora_A.weight" in names
    assert "transformer.layers.1.self_attn.to_add_out.lora_A.weight" not in names
    model = new_oracle()
    model.load_lora_adapter(str(file))
    merged, _ = lora.merge(adapter, params(), CONFIG)
    assert relative_l2(velocity(merged), oracles(model)) <= TOLERANCE
    assert relative_l2(velocity(params()), oracles(model)) > 0.05
    again, _ = lora.merge(lora_files.load(file, CONFIG), params(), CONFIG)
    assert farthest(again, merged) <= KERNELS
    # a reader that knows nothing of our metadata sees the same model
    model = new_oracle()
    model.load_lora_adapter({k: torch.tensor(x) for k, x in load_file(file).items()})
    assert relative_l2(velocity(merged), oracles(model)) <= TOLERANCE


def test_we_read_what_diffusers_writes(tmp_path):
    """Ranks and alphas that differ between modules and layers, as PEFT's patterns say them."""
    model = new_oracle()
    modules = ["to_q", "add_v_proj", "to_add_out", "down_proj", "audio_proj_in", "linear_2"]
    model.add_adapter(
        LoraConfig(
            r=2, lora_alpha=6, target_modules=modules, init_lora_weights=False,
            rank_pattern={"layers.1.self_attn.add_v_proj": 4}, alpha_pattern={"linear_2": 1},
        )
    )  # fmt: skip
    model.save_lora_adapter(tmp_path, weight_name=lora_files.FILE_NAME)
    file = tmp_path / lora_files.FILE_NAME
    with pytest.raises(CheckpointError, match="unexpected"):  # the adapter of unread modules
        lora_files.load(_prefixed(file), CONFIG)
    unread = ("transformer.layers.2.self_attn.to_q.", "transformer.layers.2.mlp.")
    merged, _ = lora.merge(lora_files.load(_prefixed(file, unread), CONFIG), params(), CONFIG)
    found = oracles(model)
    assert relative_l2(velocity(merged), found) <= TOLERANCE
    assert relative_l2(velocity(params()), found) > 0.05


def _prefixed(file, without: tuple[str, ...] = ("-",)):
    """A model's own adapter file as a pipeline's, which has `transformer.` before every name."""
    from safetensors import safe_open

    with safe_open(file, framework="np") as opened:
        metadata = opened.metadata()
    tensors = {f"transformer.{key}": value for key, value in load_file(file).items()}
    settings = json.loads(metadata["lora_adapter_metadata"])
    settings = {f"transformer.{key}": value for key, value in settings.items()}
    metadata["lora_adapter_metadata"] = json.dumps(settings)
    kept = {key: value for key, value in tensors.items() if not key.startswith(without)}
    save_file(kept, file.with_name("prefixed.safetensors"), metadata)
    return file.with_name("prefixed.safetensors")


def test_a_file_that_does_not_fit_is_told_from_end_to_end(tmp_path):
    file = lora_files.save(trained(["gen/layers/mlp"]), tmp_path, CONFIG)
    tensors = load_file(file)
    first = "transformer.layers.0.mlp_moe_gen.gate_proj"
    del tensors[f"{first}.lora_A.weight"]
    tensors["transformer.layers.9.mlp_moe_gen.up_proj.lora_A.weight"] = np.ones((3, 64), "f")
    tensors["transformer.layers.1.mlp_moe_gen.up_proj.lora_B.weight"] = np.ones((96, 4), "f")
    save_file(tensors, file)
    with pytest.raises(CheckpointError) as caught:
        lora_files.load(file, CONFIG)
    message = str(caught.value)
    assert "layers.0.mlp_moe_gen.gate_proj: only lora_B" in message
    assert "layers.9.mlp_moe_gen.up_proj.lora_A.weight; near: layers.0.mlp_moe_gen" in message
    assert "layers.1.mlp_moe_gen.up_proj: A (3, 64) and B (96, 4), expected (R, 64)" in message
    save_file({"lora_te.weight": np.ones(3, "f")}, file)
    with pytest.raises(CheckpointError, match="lora_te.weight"):
        lora_files.load(file, CONFIG)
    with pytest.raises(CheckpointError, match="missing.safetensors is missing"):
        lora_files.load(tmp_path / "missing.safetensors", CONFIG)


def test_training_one():
    """Frozen weights in bfloat16 get no gradient, and a layer that is not adapted stays so."""
    adapter = lora.init(
        jax.random.key(0), CONFIG, patterns=[r"layers\.[02]\.self_attn\.add_", "^proj_out"], rank=2
    )
    frozen = cast_params(params(), jnp.bfloat16, CONFIG)
    combine = functools.partial(_combine, config=CONFIG)
    optimizer = optax.adam(3e-3)
    step = compiled_step(optimizer=optimizer, combine=combine, dtype="bfloat16", remat=True)
    state = init_state(adapter, optimizer, jax.random.key(1))
    for _ in range(2):
        state, metrics = step(state, frozen, make_batch())
    lora.check_changes(state.params)
    for name, pair in state.params.adapters.items():
        assert pair["a"].dtype == pair["b"].dtype == jnp.float32
        if name.startswith("layers"):
            assert [bool(b.any()) for b in pair["b"]] == [True, False, True], name
            assert not pair["a"][1].any()
    assert metrics["grad_norm"] > 0


def _combine(adapter, frozen, config):
    return lora.attach(adapter, frozen, config)


def test_a_pipeline_with_adapters_merged_as_it_is_read(public_checkpoint, tmp_path):
    adapter = trained()
    file = lora_files.save(adapter, tmp_path, CONFIG)
    plain = Cosmos3.from_pretrained(public_checkpoint, "float32", offload=False)
    once, _ = lora.merge(adapter, plain.params, plain.config.transformer)
    # two adapters add up; and each part is read when it is used
    scaled = adapter.replace(scale=adapter.scale / 2)
    twice, _ = lora.merge(scaled, once, plain.config.transformer)
    model = Cosmos3.from_pretrained(
        public_checkpoint, "float32", offload=True, lora=[file, (file, 0.5)]
    )
    with model.weights.borrow("gen") as gen:
        assert farthest(gen, twice["gen"]) <= KERNELS
    # in bfloat16 the sum is rounded once, but for one value in ten thousand at a boundary
    half = Cosmos3.from_pretrained(public_checkpoint, "bfloat16", offload=False, lora=tmp_path)
    ours, theirs = (tree["und"]["layers"]["mlp"]["down"]["kernel"] for tree in (half.params, once))
    assert np.mean(np.asarray(ours) != np.asarray(theirs).astype(jnp.bfloat16)) < 1e-3
    with pytest.raises(CheckpointError, match="is missing"):
        Cosmos3.from_pretrained(public_checkpoint, lora=tmp_path / "other")
    # which may leave nothing of it
    few = lora_files.save(trained(["layers.0.mlp.down_proj"]), tmp_path / "few", CONFIG)
    small = [(few, 1e-12)]
    with pytest.raises(ValueError, match="changes nothing: .* any weight of bfloat16"):
        Cosmos3.from_pretrained(public_checkpoint, "bfloat16", offload=False, lora=small)


def test_on_the_command_line(record_property, public_checkpoint, tmp_path, monkeypatch):
    """The latents of one frame are those of a pipeline with the adapter, and not those without.

    It adapts the sound's projections too, which a silent run does not read.
    """
    monkeypatch.setattr(cli.device, "use_compilation_cache", lambda *_: None)
    file = lora_files.save(trained(), tmp_path, CONFIG)
    out = tmp_path / "frame.png"
    settings = dict(num_frames=1, height=32, width=32, num_inference_steps=1, guidance_scale=1.0)
    options = [
        "--num-frames",
        1,
        "--height",
        32,
        "--width",
        32,
        "--steps",
        1,
        "--guidance-scale",
        1,
    ]
    options += ["--checkpoint", public_checkpoint, "--prompt", "A ball", "--seed", 3, "--out", out]
    options += ["--dtype", "float32", "--save-latents", tmp_path / "latents.npz"]
    assert cli.main(["generate", *map(str, options), "--lora", f"{file}:0.5"]) == 0
    found = np.load(tmp_path / "latents.npz")["video"]
    adapted, plain = (
        Cosmos3.from_pretrained(public_checkpoint, "float32", offload=False, lora=adapters)
        for adapters in ([(file, 0.5)], None)
    )

    def latents(params):
        model = Cosmos3(adapted.config, params, adapted.tokenizer)
        return model.generate("A ball", seed=3, output="latents", **settings)["video"]

    check(record_property, LATENTS, latents, adapted.params)
    expected, others = (np.asarray(latents(x.params)) for x in (adapted, plain))
    assert relative_l2(found, expected) <= LATENTS
    assert relative_l2(found, others) > 0.01
    [record] = json.loads(out.with_suffix(".json").read_text())["lora"]
    assert record["factor"] == 0.5 and record["path"] == str(file)
    assert cli.main(["generate", *map(str, options), "--overwrite", "--lora", f"{file}:0"]) != 0


def test_the_command_lines_factor():
    assert [(str(p), f) for p, f in map(_lora, ("a/b.safetensors:0.5", "dir", "c:/x"))] == [
        ("a/b.safetensors", 0.5), ("dir", 1.0), ("c:/x", 1.0),
    ]  # fmt: skip


# ---------------------------------------------------------------- the benchmark's arithmetic


def test_the_benchmark_counts_what_a_step_computes(monkeypatch):
    """Nano at 256p: the matrix products of the traced step, those of loops as often as they run.

    On a CPU the backward pass has the logits that it computed again; on a GPU it computes them
    once more. Not counted on paper: zeros between the adapters of one kernel, half a per cent.
    """
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    spec = importlib.util.spec_from_file_location(
        "lora_benchmark", Path(__file__).parents[2] / "benchmarks" / "lora.py"
    )
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    config, model = benchmark.NANO, benchmark.NANO.transformer
    job = bench.Job(height=192, width=320, text_tokens=512, negative_tokens=0, steps=1)
    request = bench.random_request(config, job)
    adapter = jax.eval_shape(lambda: lora.init(jax.random.key(0), model))
    monkeypatch.setattr(benchmark, "ATTENTION_AGAIN", 0.5)
    flops = benchmark.step_flops(config, request, adapter)

    optimizer = optax.sgd(1.0)
    combine = functools.partial(_combine, config=model)
    step = functools.partial(
        train_step, config=model, optimizer=optimizer, options=TrainOptions(), combine=combine
    )
    frozen = jax.eval_shape(lambda x: cast_params(x, jnp.bfloat16, model), param_shapes(model))
    state = jax.eval_shape(
        lambda adapter: init_state(adapter, optimizer, jax.random.key(0)), adapter
    )
    video = np.zeros((1, *request.video_shape, model.latent_channel), np.float32)
    batch = Batch(request.text_ids, request.text_mask, video)
    counted = products(jax.make_jaxpr(step)(state, frozen, batch).jaxpr)
    assert counted == pytest.approx(flops["useful"] + flops["again"], rel=0.01)
    assert flops["useful"] == sum(flops[x] for x in ("forward", "backward", "text", "lora"))


def products(jaxpr) -> float:
    """Multiplications and additions of the matrix products of a program."""
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            inner = np.prod([equation.invars[0].aval.shape[axis] for axis in contracted])
            total += 2.0 * inner * np.prod(equation.outvars[0].aval.shape)
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inside = getattr(value, "jaxpr", value)  # closed over constants or not
            if hasattr(inside, "eqns"):
                total += times * products(inside)
    return total
