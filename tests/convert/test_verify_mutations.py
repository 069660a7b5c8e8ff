"""Every mistake that loads without an error is caught by `convert.verify`, and named where it is.

Ours is spoilt, in the tensors of a converted checkpoint or in the code that reads and uses them;
the reference is not. Each test asks for all mismatches: the mistake is named, and nothing else. A
tensor is named with our leaf; a computation by its layer.
"""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from verify_mistakes import (
    blamed,
    exchange,
    fold_over_the_first_axis,
    spoil,
    transpose_square,
    turn,
    verify,
    with_other_statistics,
    wrong_patch_order,
)

from convert.verify import autoencoders, cli, our_transformer
from cosmos3_jax.checkpoint import layouts, rules
from cosmos3_jax.checkpoint.convert import convert_checkpoint
from cosmos3_jax.models import (
    attention,
    rope,
    transformer,
    video_vae_modules,
)
from cosmos3_jax.sampling import unipc


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """Most of the time here is compilation: without optimisations, of fewer shapes. The one case of
    the transformer has an odd grid, padding, a given frame and a frame rate that is not the base.
    """
    jax.config.update("jax_disable_most_optimizations", True)
    case = our_transformer.Case("hard", (2, 3, 5), (13, 9), 3, 30.0, (0,))
    with (
        mock.patch.object(our_transformer, "CASES", (case,)),
        mock.patch.object(our_transformer, "INPUTS", 2),
        mock.patch.object(autoencoders, "GRID", (2, 3, 5)),
    ):
        yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def converted(public_checkpoint, tmp_path_factory):
    """The checkpoint in our layout, float32: a tensor a leaf and layer, in one shard."""
    target = tmp_path_factory.mktemp("converted") / "checkpoint"
    return convert_checkpoint(public_checkpoint, target, dtype="float32")


@pytest.fixture(scope="module", autouse=True)
def clean(public_checkpoint, converted, quick_compilation, tmp_path_factory):
    """A comparison without a mistake, first: spoilt tensors use the programs that it compiles.

    All but the whole pipeline, which is spoilt nowhere here.
    """
    parts = [name for name in cli.COMPONENTS if name != "pipeline"]
    with mock.patch.object(cli, "COMPONENTS", parts):
        folder = tmp_path_factory.mktemp("clean")
        return verify(folder, public_checkpoint, "all", "--converted", str(converted))


@pytest.fixture
def new_programs(clean):
    """A mistake in our code is compiled, rather than the programs from before it used again."""
    our_transformer.run_layer.clear_cache()
    yield
    our_transformer.run_layer.clear_cache()


GATE_UP, OUT = "layers/mlp/gate_up/kernel", "layers/attention/out/kernel"
MOVED = "ours holds its values in another order: transposed, reversed or moved"
# What is done to the tensors; the first tensor that is named, our leaf and the hint; then all
# tensors that are named.
TENSORS = {
    "text and media towers exchanged": (
        lambda t: exchange(t, f"und/{GATE_UP}/1", f"gen/{GATE_UP}/1"),
        "und/layers/mlp/gate_up/kernel[1]",
        "ours holds layers.1.mlp_moe_gen.gate_proj.weight",
        ["layers.1.mlp.gate_proj.weight", "layers.1.mlp.up_proj.weight",
         "layers.1.mlp_moe_gen.gate_proj.weight", "layers.1.mlp_moe_gen.up_proj.weight"],
    ),
    "norms of the towers exchanged": (
        lambda t: exchange(t, *(f"{x}/layers/attention/k_norm/scale/0" for x in ("und", "gen"))),
        "gen/layers/attention/k_norm/scale[0]",
        "ours holds layers.0.self_attn.norm_k.weight",
        ["layers.0.self_attn.norm_added_k.weight", "layers.0.self_attn.norm_k.weight"],
    ),
    "square kernel transposed": (
        lambda t: transpose_square(t, f"gen/{OUT}/2"),
        "gen/layers/attention/out/kernel[2]", MOVED, ["layers.2.self_attn.to_add_out.weight"],
    ),
    "gate and up exchanged": (
        lambda t: t.update({f"gen/{GATE_UP}/0": t[f"gen/{GATE_UP}/0"][:, ::-1]}),
        "gen/layers/mlp/gate_up/kernel[0]",
        "ours holds layers.0.mlp_moe_gen.up_proj.weight",
        ["layers.0.mlp_moe_gen.gate_proj.weight", "layers.0.mlp_moe_gen.up_proj.weight"],
    ),
    "a norm dropped": (
        lambda t: t["und/layers/post_attention_norm/scale/1"].fill(1),
        "und/layers/post_attention_norm/scale[1]", "ours is all ones",
        ["layers.1.post_attention_layernorm.weight"],
    ),
    "two layers exchanged": (
        lambda t: exchange(t, f"gen/{OUT}/0", f"gen/{OUT}/1"),
        "gen/layers/attention/out/kernel[0]", "ours holds layers.1.self_attn.to_add_out.weight",
        ["layers.0.self_attn.to_add_out.weight", "layers.1.self_attn.to_add_out.weight"],
    ),
    "the last text layer's keys for its values": (  # the heads come in the other order too
        lambda t: t.update({"und/last_layer/kv/kernel": t["und/last_layer/kv/kernel"][:, ::-1]}),
        "und/last_layer/kv/kernel", "ours holds layers.2.self_attn.to_v.weight",
        ["layers.2.self_attn.to_k.weight", "layers.2.self_attn.to_v.weight"],
    ),
    "an embedding off by one": (
        lambda t: t.update({"und/embed/embedding": np.roll(t["und/embed/embedding"], 1, 0)}),
        "und/embed/embedding", MOVED, ["embed_tokens.weight"],
    ),
    "the final norm dropped": (
        lambda t: t["gen/norm/scale"].fill(1),
        "gen/norm/scale", "ours is all ones", ["norm_moe_gen.weight"],
    ),
    "an embedding that no prompt reads": (
        lambda t: t["und/embed/embedding"][261].fill(0),
        "und/embed/embedding", "1 of 264 rows differ: 261", ["embed_tokens.weight"],
    ),
    "a bias dropped": (
        lambda t: t["gen/proj_in/bias"].fill(0),
        "gen/proj_in/bias", "ours is all zeros", ["proj_in.bias"],
    ),
    "the sound modality dropped": (
        lambda t: t["gen/sound_modality_embed"].fill(0),
        "gen/sound_modality_embed", "ours is all zeros", ["audio_modality_embed"],
    ),
    "time embedder transposed": (
        lambda t: transpose_square(t, "gen/time_embedder/linear_2/kernel"),
        "gen/time_embedder/linear_2/kernel", MOVED, ["time_embedder.linear_2.weight"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", TENSORS)
def test_a_spoilt_transformer_tensor_is_named(public_checkpoint, converted, tmp_path, mistake):
    change, leaf, hint, names = TENSORS[mistake]
    folder = spoil(converted, tmp_path / "spoilt", "transformer", change)
    options = ["--converted", str(folder)]
    if not any(name.startswith(("layers.1", "layers.2")) for name in names):
        options += ["--layers", "1"]
    status, report = verify(tmp_path, public_checkpoint, "transformer", *options)
    first = report["places"][0]
    assert status == 1 and not report["passed"]
    assert (first["tensors"], first["leaf"], first["hint"]) == ([names[0]], leaf, hint)
    assert blamed(report) == names
    # The velocity shows it as well, unless no prompt reads it.
    assert all(row["passed"] for row in report["rows"]) == ("no prompt" in mistake)


def test_nothing_is_blamed_without_a_mistake(clean):
    """What the other tests would not notice if everything were blamed."""
    status, report = clean
    assert status == 0 and report["passed"] and report["places"] == []
    components = {row["component"] for row in report["rows"]}
    assert components == {*cli.FOLDERS, "sampler"}
    assert all(report["details"][name]["operations"] for name in cli.FOLDERS)


# ---------------------------------------------------------------- mistakes in our code


def test_a_wrong_rule_is_named(public_checkpoint, tmp_path, monkeypatch):
    """The weights are then what the layout says they are, and still wrong."""
    towers = dict(layouts.TOWERS)
    q, k, v, *others = towers["und"]
    towers["und"] = (q, v, k, *others)
    monkeypatch.setattr(layouts, "TOWERS", towers)
    status, report = verify(tmp_path, public_checkpoint, "transformer", "--layers", "1")
    first = report["places"][0]
    assert status == 1
    assert first["tensors"] == ["layers.0.self_attn.to_k.weight"]
    assert first["leaf"] == "und/layers/attention/qkv/kernel[0]"
    assert first["hint"] == "ours holds layers.0.self_attn.to_v.weight"
    assert blamed(report) == ["layers.0.self_attn.to_k.weight", "layers.0.self_attn.to_v.weight"]


def test_shifted_rotary_sections_are_named(public_checkpoint, tmp_path, monkeypatch):
    right = rope.axis_of_slot
    monkeypatch.setattr(rope, "axis_of_slot", lambda config: np.roll(right(config), 1))
    status, report = verify(tmp_path, public_checkpoint, "transformer", "--layers", "1")
    assert status == 1
    # Text counts alike on all axes: only media positions show it.
    assert len(report["places"]) == 2
    for place, which in zip(report["places"], ("cos", "sin"), strict=True):
        assert place["operation"].startswith(f"rotary_emb: {which} of media positions, slots off")
        assert "1 (time)" in place["operation"]


MEDIA_INPUT = "layers.0, its media input (patches, time, sums)"
BOTH = ["layers.0, text tower: its computation", "layers.0, media tower: its computation"]


def replace_attention(monkeypatch, by):
    """Of heads that are normed and rotated, and of those that are not yet."""

    def of_product(projected, text, **options):
        return by(*projected.parts(), text=text, **options)

    monkeypatch.setattr(transformer, "attention", by)
    monkeypatch.setattr(transformer, "attention_of_product", of_product)


@pytest.mark.parametrize(
    "change",
    [
        lambda query, key, value: (query, jnp.roll(key, 1, axis=2), value),
        lambda query, key, value: (1.1 * query, key, value),
    ],
    ids=["key heads", "scale"],
)
def test_wrong_attention_is_named(public_checkpoint, tmp_path, monkeypatch, new_programs, change):
    def wrong(query, key, value, **options):
        return attention.attention(*change(query, key, value), **options)

    replace_attention(monkeypatch, wrong)
    status, report = verify(tmp_path, public_checkpoint, "transformer", "--layers", "1")
    assert status == 1 and not any(row["passed"] for row in report["rows"])
    assert blamed(report) == BOTH


def test_attention_to_padding_is_named(public_checkpoint, tmp_path, monkeypatch, new_programs):
    def wrong(query, key, value, *, text=None, **others):
        if text is not None:
            text = (*text[:2], jnp.full_like(text[2], text[0].shape[1]))
        return attention.attention(query, key, value, text=text, **others)

    replace_attention(monkeypatch, wrong)
    status, report = verify(tmp_path, public_checkpoint, "transformer", "--layers", "1")
    assert status == 1 and not any(row["passed"] for row in report["rows"])
    assert blamed(report) == BOTH[1:]


def test_a_frame_rate_that_is_ignored_is_named(public_checkpoint, tmp_path, monkeypatch):
    right = rope.video_positions
    monkeypatch.setattr(
        rope, "video_positions", lambda c, grid, fps, *n: right(c, grid, 0 * fps + 24, *n)
    )
    status, report = verify(tmp_path, public_checkpoint, "transformer", "--layers", "1")
    assert status == 1
    assert [name[:36] for name in blamed(report)] == [
        "rotary_emb: cos of media positions, ", "rotary_emb: sin of media positions, "
    ]  # fmt: skip


def test_a_given_frame_that_gets_time_is_named(public_checkpoint, tmp_path, monkeypatch):
    class Wrong(transformer.MediaTower):
        def __call__(self, latents, timestep, condition):
            given = jax.tree.map(jnp.zeros_like, condition.given)
            condition = condition.replace(given=given)
            return super().__call__(latents, timestep, condition)

    monkeypatch.setattr(transformer, "MediaTower", Wrong)
    status, report = verify(tmp_path, public_checkpoint, "transformer", "--layers", "1")
    assert status == 1
    assert blamed(report) == [
        MEDIA_INPUT, "velocity, video: final norm, projection, patches"
    ]  # fmt: skip


def test_another_layers_text_is_named(public_checkpoint, converted, tmp_path, monkeypatch):
    """Every layer by itself is right, so only the whole towers show it."""
    right = transformer.MediaTower.apply

    def wrong(self, variables, latents, timestep, condition, **options):
        key = jnp.roll(condition.key, 1, axis=0)
        condition = condition.replace(key=key)
        return right(self, variables, latents, timestep, condition, **options)

    monkeypatch.setattr(transformer.MediaTower, "apply", wrong)
    status, report = verify(
        tmp_path, public_checkpoint, "transformer", "--converted", str(converted)
    )
    assert status == 1 and all(row["passed"] for row in report["rows"])
    assert blamed(report)[0].startswith("layers.0 to 2 as one tower, stacked: velocity, video")
    assert all("as one tower" in operation for operation in blamed(report))


def test_another_shape_is_named(public_checkpoint, tmp_path, monkeypatch):
    """Though nothing can be run behind it."""
    right = transformer.patchify

    def wrong(config, video):
        return jnp.pad(right(config, video), ((0, 0), (0, int(video.shape[1] > 1)), (0, 0)))

    monkeypatch.setattr(transformer, "patchify", wrong)
    status, report = verify(tmp_path, public_checkpoint, "transformer", "--layers", "1")
    assert status == 1
    [operation] = blamed(report)
    assert operation.startswith("what enters layers.0: TypeError: ") and "(2, 13, 64)" in operation
    assert "stopped by" in report["skipped"][-1]


def test_rotation_the_other_way_is_named(public_checkpoint, tmp_path, monkeypatch, new_programs):
    right = rope.apply_rope
    monkeypatch.setattr(rope, "apply_rope", lambda x, table: right(x, (table[0], -table[1])))
    status, report = verify(tmp_path, public_checkpoint, "transformer", "--layers", "1")
    assert status == 1
    assert blamed(report) == BOTH


def test_patches_in_the_wrong_order_are_named(public_checkpoint, tmp_path, monkeypatch):
    right = transformer.patchify

    def wrong(config, video):
        shape = (2, 2, config.latent_channel)
        patches = right(config, video)
        apart = patches.reshape(*patches.shape[:2], *shape)
        return apart.swapaxes(2, 3).reshape(patches.shape)

    monkeypatch.setattr(transformer, "patchify", wrong)
    status, report = verify(tmp_path, public_checkpoint, "transformer", "--layers", "1")
    assert status == 1 and blamed(report) == [MEDIA_INPUT]


def test_weight_norm_over_the_wrong_axis_is_named(public_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(rules, "fold_weight_norm", fold_over_the_first_axis)
    status, report = verify(tmp_path, public_checkpoint, "sound_vae")
    first = report["places"][0]
    assert status == 1 and first["operation"] == "decoder.block.0.conv_t1.weight"
    assert first["tensors"] == [f"decoder.block.0.conv_t1.weight_{part}" for part in "gv"]
    assert first["leaf"] == "decoder/block_0/conv_t1/kernel"
    named = blamed(report)
    assert "decoder.conv1.weight" in named and "encoder.layers.0.weight" in named
    assert not any("snake" in name or "pwconv" in name for name in named)


def test_spoilt_convolution_kernels_are_named(public_checkpoint, converted, tmp_path):
    square, turned = "decoder/block_1/res_unit2/conv2/kernel", "decoder/block_2/conv_t1/kernel"
    folder = spoil(
        converted,
        tmp_path / "spoilt",
        "sound_tokenizer",
        lambda t: t.update({square: t[square].swapaxes(-1, -2), turned: t[turned][::-1]}),
    )
    status, report = verify(tmp_path, public_checkpoint, "sound_vae", "--converted", str(folder))
    assert status == 1
    assert blamed(report) == [
        "decoder.block.1.res_unit2.conv2.weight", "decoder.block.2.conv_t1.weight"
    ]  # fmt: skip
    assert [place["hint"] for place in report["places"]] == [MOVED, MOVED]
    assert [row["passed"] for row in report["rows"]] == [False, True]  # decode, encode


HALVES = ["decode: the computation of the decoder", "encode: the computation of the encoder"]


def test_the_video_vaes_kernels_and_patches_are_named(
    public_checkpoint, converted, tmp_path, monkeypatch
):
    """A half with other weights is not blamed for its computation."""
    monkeypatch.setattr(video_vae_modules, "rearrange", wrong_patch_order)
    key = "decoder/mid_block/resnets_0/conv1/kernel"
    folder = spoil(converted, tmp_path / "spoilt", "vae", lambda t: t.update({key: turn(t[key])}))
    with_other_statistics(monkeypatch, lambda std: std[::-1])  # and so no program from before
    status, report = verify(tmp_path, public_checkpoint, "video_vae", "--converted", str(folder))
    assert status == 1 and not any(row["passed"] for row in report["rows"])
    assert blamed(report) == ["decoder.mid_block.resnets.0.conv1.weight", HALVES[1]]
    assert report["places"][0]["leaf"] == key and report["places"][0]["hint"] == MOVED


def test_the_statistics_of_latents_are_named(public_checkpoint, tmp_path, monkeypatch):
    with_other_statistics(monkeypatch, lambda std: (*std[1:], std[0]))
    status, report = verify(tmp_path, public_checkpoint, "video_vae")
    assert status == 1 and blamed(report) == HALVES


def test_a_wrong_timestep_is_named(public_checkpoint, tmp_path, monkeypatch):
    right = unipc.tableau

    def rounded(levels):
        return right(levels).replace(timestep=np.rint(1000 * levels[:-1]).astype(np.float32))

    monkeypatch.setattr(unipc, "tableau", rounded)
    status, report = verify(tmp_path, public_checkpoint, "sampler")
    assert status == 1
    assert blamed(report)[0] == "native schedule, 1 steps: timesteps of step 0"
