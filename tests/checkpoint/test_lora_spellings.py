"""One LoRA in every spelling is the same weights; what is no LoRA, or an odd one, is refused."""

import functools
import json

import jax
import ml_dtypes
import numpy as np
import pytest
from checkpoint_files import assert_same_tree
from rounding import farthest
from safetensors.numpy import load_file, save_file
from training_run import CONFIG

from cosmos3_jax.checkpoint import lora, lora_files, lora_spellings
from cosmos3_jax.checkpoint.rules import CheckpointError
from cosmos3_jax.models.transformer import param_shapes

# Of both towers, stacked and not, with a rank and an alpha of their own. 5 / 3 is no power of two.
RANK, ALPHA = 3, 5.0
RANKS = {"layers.2.self_attn.add_k_proj": 2}
ALPHAS = {"layers.1.mlp.down_proj": 7.0}
MODULES = [
    "layers.0.self_attn.to_q", "layers.1.mlp.down_proj", "layers.2.self_attn.to_v", "proj_out",
    "layers.2.self_attn.add_k_proj", "layers.0.mlp_moe_gen.gate_proj", "time_embedder.linear_1",
    "audio_proj_in",
]  # fmt: skip
UNREAD = "layers.2.mlp.up_proj"  # of the text tower's last layer
SIZES = {m: family.sizes for family in lora.families(CONFIG).values() for m in family.modules}


@functools.cache
def matrices() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    random = np.random.RandomState(0)
    found = {}
    for module in [*MODULES, UNREAD]:
        inputs, outputs = SIZES.get(module, SIZES["layers.0.mlp.up_proj"])
        rank = RANKS.get(module, RANK)
        shapes = (rank, inputs), (outputs, rank)
        found[module] = tuple(np.float32(random.standard_normal(shape)) for shape in shapes)
    return found


@functools.cache
def weights() -> dict:
    random = np.random.RandomState(1)
    return jax.tree.map(lambda x: np.float32(random.standard_normal(x.shape)), param_shapes(CONFIG))


def merged(path) -> dict:
    return lora.merge(lora_files.load(path, CONFIG), weights(), CONFIG)[0]


def expected() -> dict:
    """By the adapter itself, without a file."""
    adapters = {}
    for name, family in lora.families(CONFIG).items():
        if not set(family.modules) & set(MODULES):
            continue
        inputs, outputs = family.sizes
        rank = max(RANKS.get(m, RANK) for m in family.modules if m in MODULES)
        layers = (len(family.modules),) if family.stacked else ()
        a = np.zeros((*layers, inputs, rank), np.float32)
        b = np.zeros((*layers, rank, outputs), np.float32)
        for i, module in enumerate(family.modules):
            if module in MODULES:
                down, up = matrices()[module]
                layer = i if family.stacked else ...
                a[layer] = down.T
                b[layer] = up.T * np.float32(ALPHAS.get(module, ALPHA) / len(down))
        adapters[name] = {"a": a, "b": b}
    return lora.merge(lora.Lora(adapters), weights(), CONFIG)[0]


def settings(prefix: str = "", **fields) -> dict:
    """PEFT's, as diffusers and PEFT write them."""
    found = {
        "peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "bias": "none", "use_dora": False,
        "rank_pattern": {f"^{m}": r for m, r in RANKS.items()},
        "alpha_pattern": {m.removeprefix("layers."): a for m, a in ALPHAS.items()},
        "use_rslora": False, "loftq_config": {}, "modules_to_save": None,
    }  # fmt: skip
    return {f"{prefix}{name}": value for name, value in (found | fields).items()}


def write(path, names, alpha: str | None = None, metadata=None, modules=None):
    """A file of tensors named by `names`, patterns of A's and of B's, and `alpha`, of its own."""
    tensors = {}
    for module, halves in matrices().items():
        if modules is not None and module not in modules:
            continue
        words = {"m": module, "u": module.replace(".", "_")}
        for pattern, tensor in zip(names, halves, strict=True):
            tensors[pattern.format(**words)] = tensor
        if alpha is not None:
            tensors[alpha.format(**words)] = np.array(ALPHAS.get(module, ALPHA), np.float32)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = None if metadata is None else {"lora_adapter_metadata": json.dumps(metadata)}
    save_file(tensors, path, text)
    return path


PEFT = ("base_model.model.{m}.lora_A.weight", "base_model.model.{m}.lora_B.weight")
MODEL = ("{m}.lora_A.weight", "{m}.lora_B.weight")
PIPELINE = ("transformer.{m}.lora_A.weight", "transformer.{m}.lora_B.weight")
WITH_SETTINGS = {
    "diffusers' models": (MODEL, ""),
    "diffusers' pipelines": (PIPELINE, "transformer."),
    "an adapter's name": (("{m}.lora_A.default.weight", "{m}.lora_B.default.weight"), ""),
}
WITH_ALPHA = {
    "ComfyUI": ("diffusion_model.{m}", ".lora_A", ".lora_B"),
    "ComfyUI, of checkpoints": ("model.diffusion_model.{m}", ".lora_A", ".lora_B"),
    "ComfyUI, of checkpoints, down": ("model.diffusion_model.{m}", ".lora_down", ".lora_up"),
    "musubi-tuner": ("diffusion_model.{m}", ".lora_down", ".lora_up"),
    "kohya": ("lora_unet_{u}", ".lora_down", ".lora_up"),
    "kohya, of transformers": ("lora_transformer_{u}", ".lora_down", ".lora_up"),
    "LyCORIS": ("lycoris_{u}", ".lora_down", ".lora_up"),
    "diffusers before PEFT": ("transformer.{m}", ".lora.down", ".lora.up"),
    "its attention processors": ("transformer.{m}", "_lora.down", "_lora.up"),
    "its text encoders": ("{m}", ".lora_linear_layer.down", ".lora_linear_layer.up"),
    "PyTorch's wrappers": ("module.transformer._orig_mod.{m}", ".lora_A", ".lora_B"),
    "PEFT, with tensors of alpha": ("base_model.model.{m}", ".lora_A.one", ".lora_B.one"),
}


def check_same(path) -> None:
    assert_same_tree(merged(path), expected())


@pytest.mark.parametrize("spelling", WITH_SETTINGS)
def test_names_with_settings_in_the_metadata(tmp_path, spelling):
    names, prefix = WITH_SETTINGS[spelling]
    check_same(write(tmp_path / "any.safetensors", names, metadata=settings(prefix)))


@pytest.mark.parametrize("spelling", WITH_ALPHA)
def test_names_with_tensors_of_alpha(tmp_path, spelling):
    module, down, up = WITH_ALPHA[spelling]
    names = (f"{module}{down}.weight", f"{module}{up}.weight")
    check_same(write(tmp_path / "any.safetensors", names, f"{module}.alpha"))


def test_files_and_folders(tmp_path):
    """PEFT's folder, its file, and a folder's only file; with settings at both places."""
    file = write(tmp_path / "peft" / "adapter_model.safetensors", PEFT)
    with pytest.raises(CheckpointError, match="adapter_config.json, whose lora_alpha is the scale"):
        lora_files.load(file, CONFIG)
    file.with_name("adapter_config.json").write_text(json.dumps(settings()))
    check_same(file.parent)
    check_same(file)
    check_same(file.rename(file.with_name("renamed.safetensors")))
    check_same(file.parent)
    check_same(write(tmp_path / "one" / "style.safetensors", MODEL, metadata=settings()).parent)
    write(file, PEFT, metadata=settings())
    check_same(file)
    with pytest.raises(CheckpointError, match="several LoRA files: pytorch_lora.*, adapter_model"):
        write(tmp_path / "two" / "adapter_model.safetensors", PEFT)
        lora_files.load(write(tmp_path / "two" / lora_files.FILE_NAME, MODEL).parent, CONFIG)
    (tmp_path / "none").mkdir()
    with pytest.raises(CheckpointError, match="none/pytorch_lora_weights.safetensors is missing"):
        lora_files.load(tmp_path / "none", CONFIG)
    file = tmp_path / "lora.pt"
    file.write_bytes(b"PK\x03\x04 pickled")
    with pytest.raises(CheckpointError, match="lora.pt: .*pickled .bin or .pt, save it as safe"):
        lora_files.load(file, CONFIG)


@pytest.mark.parametrize(
    "key",
    [
        "text_encoder.layers.0.self_attn.q_proj.lora_A.weight",
        "text_encoder_2.text_model.encoder.layers.0.mlp.fc1.lora_B.weight",
        "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight",
        "lora_te2_layers_0_mlp_up_proj.alpha",
        "text_encoders.qwen.layers.0.mlp.up_proj.lora_up.weight",
    ],
)
def test_a_text_encoders_lora_is_refused_by_name(tmp_path, key):
    file = write(tmp_path / "a.safetensors", PIPELINE)
    tensors = load_file(file) | {key: np.ones((2, 2), np.float32)}
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match="has no separate text encoder: save") as error:
        lora_files.load(file, CONFIG)
    assert key in str(error.value)


@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "model.diffusion_model."])
@pytest.mark.parametrize(("ending", "kind"), [("diff", "a whole weight"), ("diff_b", "a bias")])
def test_whole_changes_are_refused_by_name(tmp_path, prefix, ending, kind):
    file = tmp_path / "a.safetensors"
    save_file({f"{prefix}{ONE}.{ending}": np.ones((2, 2), np.float32)}, file)
    with pytest.raises(CheckpointError, match=f"no plain LoRA.*\n.*{kind}") as error:
        lora_files.load(file, CONFIG)
    assert f"{ONE}.{ending}" in str(error.value)


@pytest.mark.parametrize("prefix", lora_spellings.PREFIXES)
def test_no_prefix_is_of_another_kind(prefix):
    assert lora_spellings.other_kind(f"{prefix}{ONE}.lora_A.weight") is None


def test_a_hub_id_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="^someone/style-lora is missing.*not fetched.*downl"):
        lora_files.load("someone/style-lora", CONFIG)
    (tmp_path / "runs").mkdir()
    for path in ("runs/style", "a/style.safetensors", "style", tmp_path / "b" / "style"):
        with pytest.raises(CheckpointError, match="is missing: give the LoRA's file or folder$"):
            lora_files.load(path, CONFIG)


def test_the_scale_counts(tmp_path):
    """Each way to say it, said otherwise, is another adapter; said nowhere, it is 1."""
    right = expected()
    file = tmp_path / "any.safetensors"
    others = [
        dict(lora_alpha=3.0), dict(alpha_pattern={}), dict(use_rslora=True),
        dict(alpha_pattern={"proj_out": 7.0}),
    ]  # fmt: skip
    for other in others:
        write(file, MODEL, metadata=settings(**other))
        assert farthest(merged(file), right) > 0.01, other
    write(file, MODEL)
    plain = merged(file)
    assert farthest(plain, right) > 0.01
    alphas = {module: RANKS.get(module, RANK) for module in MODULES}
    write(file, MODEL, metadata=settings(alpha_pattern=alphas))
    assert_same_tree(merged(file), plain)
    # alpha / sqrt(R)
    alphas = {module: np.sqrt(RANKS.get(module, RANK)) for module in MODULES}
    write(file, MODEL, metadata=settings(alpha_pattern=alphas, use_rslora=True))
    assert farthest(merged(file), plain) < 1e-6


@pytest.mark.parametrize("prefix", lora_spellings.UNDERSCORE_PREFIXES)
def test_names_with_underscores_are_of_one_module_each(prefix):
    for module in [*SIZES, UNREAD]:
        name = lora_spellings.parse(f"{prefix}{module.replace('.', '_')}.alpha", CONFIG)
        assert name == (module, "alpha", "")


ONE = "layers.0.self_attn.to_q"


def one(**more) -> dict[str, np.ndarray]:
    """The tensors of one module, and others by their name without it."""
    a, b = matrices()[ONE]
    tensors = {f"{ONE}.lora_A.weight": a, f"{ONE}.lora_B.weight": b}
    return tensors | {f"{ONE}.{name}": x for name, x in more.items()}


def check_refused(path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        lora_files.load(path, CONFIG)
    assert str(path) in str(caught.value)


VECTOR = np.ones(64, np.float32)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {"lora_magnitude_vector": VECTOR},
            "no plain LoRA: .*train a plain LoRA:\n  DoRA .1.:\n    layers.0",
        ),
        ({"lora_magnitude_vector.default.weight": VECTOR}, r"DoRA \(1\):"),
        ({"dora_scale": VECTOR}, r"DoRA \(1\):"),
        ({"lokr_w1": VECTOR}, r"LoKr \(1\):"),
        ({"lokr_w2_a": VECTOR, "alpha": VECTOR}, r"LoKr \(1\):"),
        ({"hada_w1_a": VECTOR}, r"LoHa \(1\):"),
        ({"oft_blocks": VECTOR}, r"OFT \(1\):"),
        ({"lora_mid.weight": VECTOR}, r"a Tucker decomposition \(1\):"),
        ({"lora_B.bias": VECTOR}, r"a bias \(1\):"),
        ({"lora_embedding_A": VECTOR}, r"a LoRA of an embedding \(1\):"),
        ({"lora_C.weight": VECTOR}, r"unexpected \(1\):\n.*lora_C.weight; near: layers.0"),
        ({"alpha": np.float32(np.nan)}, f"{ONE}.alpha is nan, which is not finite"),
        ({"alpha": np.float32(np.inf)}, f"{ONE}.alpha is inf, which is not finite"),
        ({"alpha": np.float32(0)}, f"{ONE}.alpha is 0"),
        ({"alpha": VECTOR}, r"wrong shape \(1\):\n.*to_q: alpha \(64,\)"),
        ({"lora_A.weight": np.ones((0, 64), "f"), "lora_B.weight": np.ones((64, 0), "f")}, "R > 0"),
        ({"lora_A.weight": np.ones((4, 64), "f")}, r"A \(4, 64\) and B \(\d+, 3\), expected"),
        ({"lora_A.weight": VECTOR}, r"A \(64,\) and B"),
        ({"lora_A.weight": np.ones((3, 64), np.int8)}, r"stored otherwise \(1\):\n.*I8"),
        ({"lora_A.weight": np.ones((3, 64), ml_dtypes.float8_e4m3fn)}, "lora_A.weight: F8_E4M3"),
        ({"lora_down.weight": np.ones((3, 64), "f")}, "in two spellings"),
        ({"lora_A.b.weight": VECTOR}, "several adapters in one file"),
    ],
)
def test_tensors_that_are_refused(tmp_path, tensors, message):
    file = tmp_path / "any.safetensors"
    save_file({key: np.asarray(x) for key, x in one(**tensors).items()}, file)
    check_refused(file, message)


def test_half_a_pair_and_other_models_are_refused(tmp_path):
    file = tmp_path / "any.safetensors"
    for half, told in (("A", "only lora_A"), ("B", "only lora_B")):
        key = f"{ONE}.lora_{half}.weight"
        save_file({key: one()[key]}, file)
        check_refused(file, f"{ONE}: {told}")
    save_file({f"{ONE}.alpha": np.float32([1])}, file)
    check_refused(file, f"{ONE}: only alpha")
    a, b = (f"{ONE}.lora_{half}" for half in "AB")
    two = {f"{key}.{name}.weight": one()[f"{key}.weight"] for key in (a, b) for name in ("x", "y")}
    save_file(two, file)
    check_refused(file, "several adapters in one file; save each in its own .*:\n    x, y")
    for other in ("text_encoder.layers.0.q_proj.lora_A.weight", "lora_te_q.lora_down.weight"):
        save_file(one() | {other: VECTOR}, file)
        check_refused(file, f"unexpected .*:\n    {other}; near: ")
    save_file({}, file)
    check_refused(file, "no <module>.lora_A.weight")
    save_file({key: 0 * x for key, x in one().items()}, file)
    with pytest.raises(ValueError, match=f"{file}: the adapter changes nothing"):
        lora_files.load(file, CONFIG)


ODD = [
    ("[]", r"is \[\], not a JSON object"),
    ("null", "is null, not a JSON object"),
    ('"x"', 'is "x", not a JSON object'),
    ("3", "is 3, not a JSON object"),
    ("{", "is not valid JSON"),
    ("", "is not valid JSON"),
    ("[" * 100_000, "is not valid JSON"),
    ({"r": 3}, "has no lora_alpha"),
    ({"lora_alpha": 3}, "has no r, by"),
    ({"lora_alpha": "x"}, 'lora_alpha is "x", not a number'),
    ({"lora_alpha": None}, "lora_alpha is null, not a number"),
    ({"lora_alpha": True}, "lora_alpha is true, not a number"),
    ({"lora_alpha": [3]}, r"lora_alpha is \[3\], not a number"),
    ({"lora_alpha": float("nan")}, "lora_alpha is nan, which is not finite"),
    ({"lora_alpha": float("-inf")}, "lora_alpha is -inf, which is not finite"),
    ({"lora_alpha": 10**400}, "lora_alpha is inf, which is not finite"),
    ({"lora_alpha": 0}, "lora_alpha is 0"),
    ({"r": 0}, "r is 0, not a whole number of at least 1"),
    ({"r": -3}, "r is -3, not"),
    ({"r": 3.0}, "r is 3.0, not"),
    ({"r": "3"}, 'r is "3", not'),
    ({"r": 4}, "says rank 4, and its matrices have rank 3"),
    ({"rank_pattern": {"to_q": 2}}, "says rank 2, and its matrices have rank 3"),
    ({"rank_pattern": []}, r"rank_pattern is \[\], not an object"),
    ({"rank_pattern": {"to_q": 0}}, "rank_pattern: to_q is 0, not"),
    ({"alpha_pattern": "to_q"}, 'alpha_pattern is "to_q", not an object'),
    ({"alpha_pattern": {"(": 1}}, r'alpha_pattern: "\(" is not a regular expression'),
    ({"alpha_pattern": {"a{99999999999}": 1}}, "is not a regular expression"),
    ({"alpha_pattern": {"to_k": "x"}}, 'alpha_pattern: to_k is "x", not a number'),
    ({"use_rslora": "false"}, 'use_rslora is "false", not true or false'),
    ({"use_dora": True}, r"use_dora is true \(DoRA\); only W \+ scale B A is read"),
    ({"lora_bias": True}, "lora_bias is true"),
    ({"bias": "all"}, 'bias is "all"'),
    ({"modules_to_save": ["proj_in"]}, r'modules_to_save is \["proj_in"\]'),
    ({"init_lora_weights": "pissa_niter_4"}, "a change of the weights before training"),
    ({"peft_type": "LOKR"}, 'peft_type is "LOKR"; only W'),
    ({"peft_type": ["LORA"]}, r"peft_type is \[.LORA.\]"),
]


@pytest.mark.parametrize(("said", "message"), ODD, ids=lambda x: str(x)[:40])
def test_odd_settings_are_refused(tmp_path, said, message):
    """In the metadata, as a pipeline writes it too, and in PEFT's file."""
    plain = {"r": 3, "lora_alpha": 3}
    if isinstance(said, dict) and len(said) == 1 and "has no" not in message:
        said = plain | said
    text = said if isinstance(said, str) else json.dumps(said)
    texts = [text]
    if isinstance(said, dict):
        texts.append(json.dumps({f"transformer.{name}": x for name, x in said.items()}))
    file = tmp_path / "adapter_model.safetensors"
    for each in texts:
        save_file(one(), file, {"lora_adapter_metadata": each})
        check_refused(file, f"lora_adapter_metadata.*{message}")
    save_file(one(), file)
    file.with_name("adapter_config.json").write_text(text)
    check_refused(file, f"adapter_config.json.*{message}")


def test_settings_that_contradict_each_other(tmp_path):
    file = tmp_path / "adapter_model.safetensors"
    beside = file.with_name("adapter_config.json")
    said = {"r": 3, "lora_alpha": 4, "use_rslora": None, "rank_pattern": None}

    def write_both(in_file, beside_it, **tensors):
        text = {"lora_adapter_metadata": json.dumps(in_file)} if in_file else None
        save_file(one(**tensors), file, text)
        beside.write_text(json.dumps(beside_it))

    write_both(said, said | {"lora_alpha": 5})
    check_refused(file, "lora_adapter_metadata says alpha 4.0 and adapter_config.json says alpha 5")
    write_both(said, said | {"use_rslora": True})
    check_refused(file, "lora_adapter_metadata says False and adapter_config.json says True")
    write_both(None, said, alpha=np.array(6, np.int64))
    check_refused(file, f"says alpha 4.0 and {ONE}.alpha says alpha 6.0")
    write_both({"text_encoder.r": 1}, said, alpha=np.array(4, np.int64))  # they agree
    lora_files.load(file, CONFIG)
    beside.write_bytes(b"\xff\xfe{")
    check_refused(file, "adapter_config.json is not valid JSON")
