"""Tokens, examples and runs of the tiny world's towers."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from checkpoint_files import assert_same_tree
from diffusers import Cosmos3OmniPipeline
from rounding import relative_l2
from tiny_cases import COUNT, RECIPE, RUN, hurried
from transformers import AutoTokenizer, Qwen2TokenizerFast

from cosmos3_jax.config import TransformerConfig
from cosmos3_jax.io.prepare import prepare_request
from cosmos3_jax.models import sound_vae, video_vae
from cosmos3_jax.models.tokenizer import Tokenizer
from cosmos3_jax.models.transformer import param_shapes
from examples.tiny import data, grammar, model, optimizers, train_towers
from examples.tiny import tokenizer as tiny_tokenizer
from examples.tiny.autoencoder_models import SOUND_CONFIG, VIDEO_CONFIG
from examples.tiny.pacing import Pacer

pytestmark = pytest.mark.usefixtures("programs_made_in_a_hurry")


@pytest.fixture(scope="module")
def step(frontend):
    """One program for all runs of these tests."""
    config, tokenizer = frontend
    negatives = jax.tree.map(jax.numpy.asarray, data.negative_ids(tokenizer, config.recipe))
    return hurried(train_towers.make_step(RUN, config, negatives))


@pytest.fixture
def trained(base, bank, step, monkeypatch):
    """(folder, step, **settings) -> train a run in it."""

    def train(folder, step=step, **settings):
        monkeypatch.setattr(train_towers, "make_step", lambda *_: step)
        settings = dict(steps=6, evaluations=2, every=2, save_every=2) | settings
        return train_towers.train(RUN, base, folder, bank, **settings)

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


def test_a_killed_run_continues_to_the_same_numbers(
    trained, step, tmp_path, monkeypatch, base, bank
):
    whole = trained(tmp_path / "whole")
    log = read_log(tmp_path / "whole")
    assert [line["step"] for line in log] == [2, 4, 6]
    assert log[-1]["loss"] < log[0]["loss"]  # it learns: here from 2.1 to 1.0
    taken = []

    def dies(*arguments):
        taken.append(1)
        if len(taken) == 6:
            raise KeyboardInterrupt
        return step(*arguments)

    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "killed", dies)
    again = trained(tmp_path / "killed")
    again, whole = (x.replace(key=jax.random.key_data(x.key)) for x in (again, whole))
    assert_same_tree(again, whole)
    lines = read_log(tmp_path / "killed")
    assert [(line["step"], line.get("resumed")) for line in lines] == [
        (2, None), (4, None), (4, True), (6, None),
    ]  # fmt: skip
    other = dataclasses.replace(RUN, batch=5)
    with pytest.raises(ValueError, match="is of {'run': .*; choose another folder"):
        train_towers.train(other, base, tmp_path / "killed", bank, steps=6)
    monkeypatch.setattr(data, "digest", lambda _: "other")
    with pytest.raises(ValueError, match="is of {'base': .*choose another folder"):
        trained(tmp_path / "killed")


def test_a_run_that_was_killed_at_its_very_end_still_writes_its_checkpoint(
    trained, tmp_path, monkeypatch
):
    def full(*_):
        raise OSError("no space")

    with monkeypatch.context() as patch:
        patch.setattr(train_towers.assemble, "write_trained", full)
        with pytest.raises(OSError, match="no space"):
            trained(tmp_path, steps=2, evaluations=1)
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
