"""The tiny world's checkpoint from its parts to its table, at a miniature size of every part.

The autoencoders here are random, the towers are trained for a few steps, and the picture has 32
pixels a side; all else is as in a real run.
"""

import dataclasses
import functools
import json
import sys

import jax
import numpy as np
import pytest
import quick
import torch
from checkpoint_files import assert_same_tree
from diffusers import AutoencoderKLWan, Cosmos3AVAEAudioTokenizer, Cosmos3OmniPipeline
from oracle import VIDEO_VAE, perturb, run_oracle
from PIL import Image
from rounding import check, relative_l2
from transformers import AutoTokenizer, Qwen2TokenizerFast

from cosmos3_jax import Cosmos3
from cosmos3_jax.checkpoint import lora_files
from cosmos3_jax.checkpoint.find import open_folder
from cosmos3_jax.config import TransformerConfig
from cosmos3_jax.io.prepare import prepare_request
from cosmos3_jax.models import sound_vae, video_vae
from cosmos3_jax.models.tokenizer import Tokenizer
from cosmos3_jax.models.transformer import param_shapes
from cosmos3_jax.training.params import load_towers
from examples.tiny import (
    assemble,
    curves,
    data,
    evaluate,
    finetune_lora,
    grammar,
    model,
    optimizers,
    train_towers,
)
from examples.tiny import judge as jd
from examples.tiny import tokenizer as tiny_tokenizer
from examples.tiny.autoencoder_models import SOUND_CONFIG, VIDEO_CONFIG
from examples.tiny.pacing import Pacer
from examples.tiny.watch import Watch

pytestmark = pytest.mark.usefixtures("programs_made_in_a_hurry")

SIZES = model.TRANSFORMER | dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
    intermediate_size=32, rope_scaling={"mrope_section": [4, 2, 2]},
)  # fmt: skip
RECIPE = model.RECIPE | dict(height=32, width=32, num_inference_steps=2)
RUN = train_towers.Run(batch=4, warmup=2, dtype="float32", learning_rate=1e-2, ema_decay=0.5)
COUNT = 8  # clips


@pytest.fixture(scope="module")
def programs_made_in_a_hurry():
    """Training runs for milliseconds here, and compiles for seconds."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def parts(tmp_path_factory, programs_made_in_a_hurry):
    """Folders of two random autoencoders."""
    folder, video = tmp_path_factory.mktemp("parts"), VIDEO_VAE | {"num_res_blocks": 1}
    torch.manual_seed(0)
    vae = AutoencoderKLWan(**video | dict(base_dim=4, decoder_base_dim=4, dim_mult=[1, 1, 1, 1]))
    sound = Cosmos3AVAEAudioTokenizer(
        dec_dim=2, enc_dim=4, vocoder_input_dim=5, enc_latent_dim=10, dec_c_mults=[1, 1, 1, 1, 1],
        normalize_volume=False,
    )  # fmt: skip
    perturb(vae, 1, 0.02).to(torch.bfloat16).save_pretrained(folder / "vae")
    perturb(sound, 2, 0.02).to(torch.bfloat16).save_pretrained(folder / "sound_tokenizer")
    return folder


@pytest.fixture(scope="module")
def base(parts):
    vaes = parts / "vae", parts / "sound_tokenizer"
    run_base[:] = [assemble.write_base(parts / "base", *vaes, sizes=SIZES, recipe=RECIPE)]
    return run_base[0]


@pytest.fixture(scope="module")
def frontend(base):
    return open_folder(base)


@pytest.fixture(scope="module")
def vaes(base):
    return data.load_vaes(base, "float32")


@pytest.fixture(scope="module")
def bank(base, vaes):
    return data.get_bank(base, base.parent / "bank", vaes, COUNT, chunk=4, dtype="float32")


@functools.cache
def compiled_step(run, config):
    """One program for all runs of these tests."""
    tokenizer = Tokenizer.from_folder(run_base[0] / "text_tokenizer")
    negatives = data.negative_ids(tokenizer, config.recipe)
    return hurried(original_step(run, config, jax.tree.map(jax.numpy.asarray, negatives)))


def hurried(step):
    """The same program, in a tenth of the time to compile."""
    return jax.jit(step.__wrapped__, donate_argnums=0, compiler_options=quick.OPTIONS)


original_step, run_base = train_towers.make_step, []


@pytest.fixture(scope="module")
def trained(base, bank):
    """(folder, **settings) -> train a run in it, with one compiled step for all."""

    def train(folder, **settings):
        train_towers.make_step = lambda run, config, _: compiled_step(run, config)
        try:
            settings = dict(steps=6, evaluations=2, every=2, save_every=2) | settings
            return train_towers.train(RUN, base, folder, bank, **settings)
        finally:
            train_towers.make_step = original_step

    return train


# ---------------------------------------------------------------- tokens


def test_tokens_are_those_of_transformers(tmp_path):
    """Whole sentences with their chat, and text that is not of this world."""
    folder = tiny_tokenizer.write(tmp_path)
    ours = Tokenizer.from_folder(folder)
    texts = [ours.render_chat(text) for _, text in grammar.held_out_sentences(100)]
    texts += ["An orange ball's\n\nüber  東京 96", "The user is <|im_end|>", "overt, Overt, theory"]
    for kind in (AutoTokenizer, Qwen2TokenizerFast):
        theirs = kind.from_pretrained(folder)
        for text in texts:
            ids = ours.backend.encode(text, add_special_tokens=False).ids
            assert theirs(text, add_special_tokens=False)["input_ids"] == ids, (kind, text)
            assert theirs.decode(ids) == text.replace("u\u0308", "ü")


def test_a_word_is_a_token(tmp_path):
    """All of the grammar's, kept ones too; a note is a letter and a digit."""
    ours = Tokenizer.from_folder(tiny_tokenizer.write(tmp_path))
    for word in grammar.vocabulary():
        if word.isalpha():
            assert len(ours.backend.encode(f" {word}").ids) == 1, word
    assert len(ours.backend.encode(" E6").ids) == 2
    assert len(ours.backend.encode(" zebra").ids) > 2


def test_training_reads_what_generation_reads(base, frontend):
    """The ids of both branches are the pipeline's, ours and diffusers'; none is held out."""
    config, tokenizer = frontend
    pipe = Cosmos3OmniPipeline.from_pretrained(base, enable_safety_checker=False)
    both = data.negative_ids(tokenizer, config.recipe)
    negatives = [row[:length].tolist() for row, length in zip(*both, strict=True)]
    for _, sentence in grammar.held_out_sentences(20):
        ids, _ = data.prompt_ids(tokenizer, config.recipe, sentence)
        request = prepare_request(config, tokenizer, sentence, sound=True)
        assert request.text_ids[request.text_mask].tolist() == ids
        assert request.neg_text_ids[request.neg_text_mask].tolist() == negatives[0]
        shape = {name: RECIPE[name] for name in ("num_frames", "height", "width", "fps")}
        assert pipe.tokenize_prompt(sentence, **shape) == (ids, negatives[1])
        assert len(ids) <= model.MAX_TOKENS
    assert negatives[0] != negatives[1]
    long = 20 * " a small red circle"
    with pytest.raises(ValueError, match=f"the limit is {model.MAX_TOKENS}"):
        data.pad_ids([tokenizer.encode_chat(long)])


# ---------------------------------------------------------------- examples


def test_the_bank_is_a_function_of_its_seed(base, vaes, bank, frontend, monkeypatch):
    """Kept on disk, found again, made anew for other settings."""
    folder = base.parent / "bank"
    monkeypatch.setattr(data, "build_bank", None)  # it must not be called
    again = data.get_bank(base, folder, vaes, COUNT, chunk=4, dtype="float32")
    assert_same_tree(again, bank)
    assert data.load_bank(folder, {"another": 1}) is None
    config, tokenizer = frontend
    rng = np.random.default_rng((0, 1))  # the second chunk
    scenes = [grammar.sample(rng) for _ in range(4)]
    assert not any(grammar.held_out(grammar.combination(scene)) for scene in scenes)
    ids, _ = data.prompt_ids(tokenizer, config.recipe, grammar.sentence(scenes[0], rng))
    assert bank.ids[4, 0, : bank.lengths[4, 0]].tolist() == ids
    assert len({tuple(row) for row in bank.ids[4].tolist()}) > 1  # phrasings
    assert bank.video.shape == (COUNT, 13, 2, 2, 6) and bank.sound.shape == (COUNT, 52, 5)
    scenes = jax.tree.map(np.asarray, data.world.stack(scenes))
    video, sound = data.encode_clips(vaes, scenes, config, "float32")
    for latents, kept in ((video, bank.video[4:]), (sound, bank.sound[4:])):
        assert relative_l2(latents, kept) < 1e-3  # float16: 11 bits


def test_a_batch(bank, frontend):
    """Text, clip and given frames belong together; nothing beyond `count` is drawn."""
    config, tokenizer = frontend
    negatives = jax.tree.map(np.asarray, data.negative_ids(tokenizer, config.recipe))
    few = bank.replace(count=np.int32(3))
    draw = jax.jit(data.draw_batch, static_argnums=3)
    batch = draw(few, jax.tree.map(jax.numpy.asarray, negatives), jax.random.key(0), 2000, 24.0)
    rows = {np.asarray(bank.ids[i, p])[: int(bank.lengths[i, p])].tobytes(): i
            for i in range(COUNT) for p in range(data.PHRASINGS)}  # fmt: skip
    ids, mask = np.asarray(batch.text_ids, np.int16), np.asarray(batch.text_mask)
    chosen = np.array([rows[row[real].tobytes()] for row, real in zip(ids, mask, strict=True)])
    assert set(chosen) == {0, 1, 2}
    np.testing.assert_array_equal(np.asarray(batch.video), np.asarray(bank.video)[chosen])
    given = np.asarray(batch.frame_mask).sum(axis=1)
    assert set(given) == {0, 1, 2} and np.asarray(batch.frame_mask)[given == 1][:, 0].all()
    # three standard errors of 2,000
    assert abs((given == 1).mean() - data.GIVEN_ONE) < 0.021
    assert abs((given == 2).mean() - data.GIVEN_TWO) < 0.015
    lengths = np.asarray(batch.uncond_mask).sum(axis=1)
    assert abs((lengths == negatives[1][1]).mean() - data.OTHER_NEGATIVE) < 0.03


# ---------------------------------------------------------------- training


def read_log(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_killed_run_continues_to_the_same_numbers(trained, tmp_path, monkeypatch, base):
    whole = trained(tmp_path / "whole")
    log = read_log(tmp_path / "whole")
    assert [line["step"] for line in log] == [2, 4, 6]
    assert log[-1]["loss"] < log[0]["loss"]  # it learns: here from 2.1 to 1.0
    taken, step = [], compiled_step(RUN, open_folder(base)[0])

    def dies(*arguments):
        taken.append(1)
        if len(taken) == 6:
            raise KeyboardInterrupt
        return step(*arguments)

    monkeypatch.setattr(sys.modules[__name__], "compiled_step", lambda run, config: dies)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "killed")
    monkeypatch.undo()
    again = trained(tmp_path / "killed")
    again, whole = (x.replace(key=jax.random.key_data(x.key)) for x in (again, whole))
    assert_same_tree(again, whole)
    lines = read_log(tmp_path / "killed")
    assert [(line["step"], line.get("resumed")) for line in lines] == [
        (2, None), (4, None), (4, True), (6, None),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="is of .*; choose another folder"):
        train_towers._record(tmp_path / "killed", dataclasses.replace(RUN, batch=5), {})
    with pytest.raises(ValueError, match="is of {'base': .*choose another folder"):
        train_towers._record(tmp_path / "killed", RUN, {"base": "other"})


def test_a_run_that_was_killed_at_its_very_end_still_writes_its_checkpoint(
    trained, tmp_path, monkeypatch
):
    def full(*_):
        raise OSError("no space")

    monkeypatch.setattr(train_towers.assemble, "write_trained", full)
    with pytest.raises(OSError, match="no space"):
        trained(tmp_path, steps=2, evaluations=1)
    monkeypatch.undo()
    trained(tmp_path, steps=2, evaluations=1)
    assert (tmp_path / "checkpoint" / "model_index.json").is_file()
    written = (tmp_path / "checkpoint" / "transformer" / "config.json").stat().st_mtime_ns
    trained(tmp_path, steps=2, evaluations=1)  # nothing is left to do
    assert (tmp_path / "checkpoint" / "transformer" / "config.json").stat().st_mtime_ns == written


def test_what_is_a_matrix():
    """For Muon: which axes add up, and which are outputs."""
    sizes = {"latent_channel": 4, "patch_latent_dim": 4, "sound_dim": 8, "vocab_size": 40}
    towers = param_shapes(TransformerConfig.from_dict(model.TRANSFORMER | sizes))
    found = optimizers.matrices(towers)
    attention, mlp = (found["gen"]["layers"][name] for name in ("attention", "mlp"))
    assert attention["qkv"]["kernel"] == ((1,), (2, 3))
    assert attention["out"]["kernel"] == ((1, 2), (3,))
    assert mlp["gate_up"]["kernel"] == ((1,), (2, 3)) and mlp["down"]["kernel"] == ((1,), (2,))
    assert found["und"]["last_layer"]["kv"]["kernel"] == ((0,), (1, 2))
    assert attention["q_norm"]["scale"] is found["und"]["embed"]["embedding"] is None
    vae = optimizers.matrices(video_vae.param_shapes(VIDEO_CONFIG))
    assert vae["decoder"]["conv_in"]["kernel"] == ((0, 1, 2, 3), (4,))
    sound = optimizers.matrices(sound_vae.param_shapes(SOUND_CONFIG, with_encoder=True))
    block = sound["encoder"]["layers_1"]
    assert block["dwconv_1"]["kernel"] is None and block["pwconv1"]["kernel"] == ((0, 1), (2,))
    assert sound["decoder"]["conv2"]["kernel"] is None  # two channels


def test_the_learning_rate():
    """Before the end of the warm-up it knows nothing of the number of steps."""
    run = train_towers.Run(warmup=10, learning_rate=1.0)
    assert [train_towers.rate(run, i, n) for i in (0, 9) for n in (20, 10**9)] == [0.1, 0.1, 1, 1]
    assert train_towers.rate(run, 100, 100) == pytest.approx(0.01)
    assert train_towers.rate(run, 55, 100) == pytest.approx((1 + 0.01) / 2)


def test_the_plan_of_a_timed_run():
    """Ten steps a second after a slow first interval; an evaluation is no part of their pace."""
    now = [0.0]
    pacer = Pacer(0, 100.0, clock=lambda: now[0])
    now[0] = 30.0
    assert pacer.interval(50) == 0.6 and pacer.plan(50, None, 1000, 0) is None
    assert Pacer(0, 2000.0).plan(0, None, 1000, 0) == 0  # the time is over
    now[0] = 35.0
    assert pacer.interval(100) == pytest.approx(0.1)
    # 865 s are left, less two evaluations of 5 s
    assert pacer.plan(100, None, 1000, 2) == 100 + int(855 / 0.103)
    assert pacer.plan(100, 8300, 1000, 2) == 8300  # near enough
    now[0] = 45.0
    pacer.paused(5.0)
    assert pacer.interval(150) == pytest.approx(0.1)
    assert pacer.plan(150, 20_000, 1000, 0) == 150 + int(855 / 0.103)


# ---------------------------------------------------------------- the checkpoint


@pytest.fixture(scope="module")
def perturbed(base):
    """A checkpoint none of whose towers' weights is 0 or 1: at first they predict nothing."""
    params, _ = load_towers(base, "float32")
    random = np.random.RandomState(0)
    noisy = jax.tree.map(lambda x: x + 0.1 * random.standard_normal(x.shape), params)
    return assemble.write_trained(base.parent / "trained", noisy, base, "Not at all.")


# Relative L2 distance of latents, pixels and samples from diffusers'; and the share of 8-bit values
# that rounding may move by one step. That share is how far a value moves on average, in steps.
TOLERANCE, SHARE = 1e-5, 1e-3


@pytest.fixture(scope="module")
def ours(perturbed):
    return Cosmos3.from_pretrained(perturbed, "float32")


@pytest.fixture(scope="module")
def request_for_two(ours):
    _, sentence = grammar.held_out_sentences(1)[0]
    return ours.prepare([sentence] * 2, sound=True, prompt_style="diffusers", system_prompt="")


def test_tolerance(record_property, ours, request_for_two):
    def make(params, request):
        moved = Cosmos3(ours.config, params, ours.tokenizer)
        latents, _ = moved.denoise(request)
        media = moved.decode(latents)
        return [latents, media["video"], media["sound"]]

    def share(moved, expected):
        return 255 * np.abs(np.asarray(moved[1]) - expected[1]).mean()

    inputs = ours.params, request_for_two
    check(record_property, TOLERANCE, make, *inputs)
    check(record_property, SHARE, make, *inputs, name="8 bits", distance=share)


def test_diffusers_makes_the_same_clip(ours, request_for_two, perturbed):
    """As it comes: its scheduler, its schedule and no system prompt are what the recipe says."""
    pipe = Cosmos3OmniPipeline.from_pretrained(
        perturbed, enable_safety_checker=False, torch_dtype=torch.float32
    )
    pipe.set_progress_bar_config(disable=True)
    _, sentence = grammar.held_out_sentences(1)[0]
    request = request_for_two
    latents, _ = ours.denoise(request)
    result = ours.decode(latents)
    one = jax.tree.map(lambda x: x[:1] if np.ndim(x) > 1 and len(x) == 2 else x, request)
    names = ("num_frames", "height", "width", "fps", "num_inference_steps", "guidance_scale")
    settings = {name: RECIPE[name] for name in names}
    reference = run_oracle(pipe, one, sentence, None, **settings)
    for name in ("video", "sound"):
        assert np.std(reference.media[name]) > 1e-3
        assert relative_l2(latents[name][:1], reference.latents[name]) <= TOLERANCE, name
        assert relative_l2(result[name][:1], reference.media[name]) <= TOLERANCE, name


def test_the_notice_and_the_limits(perturbed, tmp_path, monkeypatch):
    notice = (perturbed / assemble.NOTICE_FILE).read_text()
    assert "49 frames of 32 x 32 pixels" in notice and "316 of 3552" in notice
    assert notice.rstrip().endswith("Not at all.")
    size = assemble.check(perturbed)
    assert size == sum(path.stat().st_size for path in perturbed.rglob("*") if path.is_file())
    monkeypatch.setattr(model, "MAX_BYTES", size - 1)
    with pytest.raises(ValueError, match=f"has {size:,} bytes"):
        assemble.check(perturbed)


def test_the_size_of_the_real_one(parts, tmp_path):
    """Towers, tokenizer and the rest leave room for both autoencoders in 25 MB.

    Theirs are 5.24 million numbers in bfloat16.
    """
    folder = assemble.write_base(tmp_path / "real", parts / "vae", parts / "sound_tokenizer")
    towers = sum(
        path.stat().st_size
        for path in folder.rglob("*")
        if path.is_file() and path.parent.name not in ("vae", "sound_tokenizer")
    )
    float32 = 2 * 192 * (256 + 192 + 2)  # the trained timestep embedding has twice the bytes
    assert 12e6 < towers < model.MAX_BYTES - 2 * 5.3e6 - float32


# ---------------------------------------------------------------- the table


def share_that_differs(clip: evaluate.Clip, other: evaluate.Clip, steps: int = 0) -> float:
    """The share of 8-bit values that are more than `steps` apart."""
    return np.mean(np.abs(clip.video.astype(int) - other.video.astype(int)) > steps)


def test_evaluate(ours, perturbed, tmp_path, monkeypatch, capsys):
    """Two clips, judged; each has noise of its own, whatever the batch."""
    arguments = f"--checkpoint {perturbed} --out {tmp_path} --count 2 --batch 2 --dtype float32"
    arguments += f" --workers 0 --clips 1 --beside same={perturbed}"
    monkeypatch.setattr(sys, "argv", ["evaluate", *arguments.split()])
    evaluate.main()
    report = json.loads((tmp_path / "table.json").read_text())
    assert report["count"] == 2 and report["recipe"]["negative_prompt"] == ""
    assert report["table"] == report["beside"]["same"]
    assert capsys.readouterr().out == (tmp_path / "table.md").read_text()
    assert (tmp_path / "sheet.png").is_file() and (tmp_path / "clips" / "0000.mp4").is_file()
    texts = [text for _, text in grammar.held_out_sentences(3)]
    together = list(evaluate.generate(ours, texts, batch=2))
    assert len(together) == 3
    [alone] = evaluate.generate(ours, texts[1:2], batch=2, seed=evaluate.SEED + 1)
    assert share_that_differs(alone, together[1]) <= SHARE
    assert share_that_differs(alone, together[1], 1) == 0
    assert share_that_differs(*together[:2], 1) > 100 * SHARE


def test_tuning_is_not_done_on_the_test(ours, monkeypatch):
    tried = []

    def judged(model, test, batch, pool, **settings):
        assert not any(grammar.held_out(grammar.combination(scene)) for scene, _ in test)
        tried.append(settings)
        rows = [jd.Row("pitch", 1, 2, settings["flow_shift"], 0, 1, 0, 0, 0.9)]
        return rows, []

    monkeypatch.setattr(evaluate, "evaluate", judged)
    found = evaluate.tune(ours, 3, 1, None)
    assert len(found) == len(tried) == 9
    assert found[0]["settings"]["flow_shift"] == max(evaluate.SHIFTS)
    assert tried[-1]["flow_shift"] == max(evaluate.SHIFTS)


def test_what_is_watched(base, vaes):
    """The averaged towers are what is judged, and training may go on with their arrays."""
    lines = []
    watch = Watch(base, vaes, 2, None, lines.append, "float32")
    towers, _ = load_towers(base, "float32")
    watch.start(7, towers)
    watch.finish()
    [line] = lines
    assert line["step"] == 7 and line["shares"]["colour"] == 0 and not watch.waiting
    assert set(watch.model.params) == {"und", "gen", "video_vae", "sound_vae"}


# ---------------------------------------------------------------- a new word


def test_new_words():
    rng = np.random.default_rng(0)
    for held_out in (False, True):
        scenes = finetune_lora.with_new_words(rng, ("orange", "E6"), 40, held_out)
        assert {grammar.held_out(grammar.combination(scene)) for scene in scenes} == {held_out}
        new = [(scene.colour == "orange", scene.pitch == "E6") for scene in scenes]
        assert set(new) == {(True, False), (False, True)}
    with pytest.raises(ValueError, match="choose of the kept words, orange, E6"):
        finetune_lora.Tuning(("red",))


def test_fine_tuning(perturbed, vaes, tmp_path):
    """The adapter learns, is read again, and changes what is made."""
    config, tokenizer = open_folder(perturbed)
    tuning = finetune_lora.Tuning(("orange",), steps=4, batch=4, rank=2, clips=4)
    bank = finetune_lora.clips(tuning, perturbed, config, vaes)
    negatives = data.negative_ids(tokenizer, config.recipe)
    towers, _ = load_towers(perturbed, "float32")
    lines = []
    negatives = jax.tree.map(jax.numpy.asarray, negatives)
    step = hurried(finetune_lora.make_step(tuning, config, negatives))
    adapter = finetune_lora.train(tuning, towers, bank, config, step, lines.append, every=1)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(np.isfinite(line["loss"]) for line in lines)
    path = lora_files.save(adapter, tmp_path, config.transformer)
    names = set(lora_files.load(path, config.transformer).adapters)
    assert {"layers.*.self_attn.to_k", "layers.*.self_attn.add_k_proj"} <= names  # both towers
    [(_, sentence)] = finetune_lora.test_sentences(("orange",), 1)
    assert "orange" in sentence
    before, after = (
        next(
            evaluate.generate(
                Cosmos3.from_pretrained(perturbed, "float32", lora=lora), [sentence], batch=2
            )
        )
        for lora in (None, path)
    )
    assert share_that_differs(before, after) > 100 * SHARE  # measured 300


def test_curves_of_the_logs_that_are_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no log of sound, video or towers"):
        curves.read(tmp_path)
    lines = {
        "sound": [{"step": 50 * i, "snr": 0.1 * i} for i in range(5)],
        "towers": [{"device": "a GPU"}, {"step": 9, "shares": {"pitch": 0.5}}]
        + [{"step": i, "loss": 2.0, "video": 1.0, "sound": 1.0} for i in range(12)],
    }
    for name, log in lines.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.jsonl").write_text("\n".join(map(json.dumps, log)))
    assert curves.read(tmp_path) == lines
    curves.draw(curves.read(tmp_path), tmp_path / "curves.png")
    image = np.asarray(Image.open(tmp_path / "curves.png").convert("RGB"), int)
    for part in np.array_split(image, 3, axis=1):  # a panel each, with a coloured line
        assert (part.max(axis=2) - part.min(axis=2)).max() > 50
