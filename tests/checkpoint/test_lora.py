"""LoRA: applied, merged, taken back, trained, and read by the pipeline and the command line."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checkpoint_files import assert_same_tree
from lora_cases import KERNELS, LATENTS, MERGED, TOLERANCE, trained, velocity
from rounding import check, farthest, relative_l2
from safetensors.numpy import load_file, save_file
from training_cases import params
from training_run import CONFIG, compiled_step, make_batch

from cosmos3_jax import Cosmos3
from cosmos3_jax.checkpoint import lora, lora_files
from cosmos3_jax.checkpoint.rules import CheckpointError, leaf_shapes
from cosmos3_jax.cli import main as cli
from cosmos3_jax.cli.generate import parse_lora
from cosmos3_jax.models.transformer import param_shapes, unstack_layers
from cosmos3_jax.parallel import device
from cosmos3_jax.training.params import cast_params
from cosmos3_jax.training.step import init_state


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


def test_training_one():
    """Frozen weights in bfloat16 get no gradient, and a layer that is not adapted stays so."""
    adapter = lora.init(
        jax.random.key(0), CONFIG, patterns=[r"layers\.[02]\.self_attn\.add_", "^proj_out"], rank=2
    )
    frozen = cast_params(params(), jnp.bfloat16, CONFIG)
    combine = functools.partial(lora.attach, config=CONFIG)
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
    monkeypatch.setattr(device, "use_compilation_cache", lambda *_: None)
    file = lora_files.save(trained(), tmp_path, CONFIG)
    out = tmp_path / "frame.png"
    settings = dict(num_frames=1, height=32, width=32, num_inference_steps=1, guidance_scale=1.0)
    options = "--num-frames 1 --height 32 --width 32 --steps 1 --guidance-scale 1 --seed 3".split()
    options += ["--checkpoint", public_checkpoint, "--prompt", "A ball", "--out", out]
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
    assert [(str(p), f) for p, f in map(parse_lora, ("a/b.safetensors:0.5", "dir", "c:/x"))] == [
        ("a/b.safetensors", 0.5), ("dir", 1.0), ("c:/x", 1.0),
    ]  # fmt: skip
