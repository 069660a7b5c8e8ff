"""What was trained in the tiny world: the checkpoint, its table, and an adapter for a new word."""

import json
import sys

import jax
import numpy as np
import pytest
import torch
from diffusers import Cosmos3OmniPipeline
from oracle import run_oracle
from rounding import check, relative_l2
from tiny_cases import RECIPE, hurried, share_that_differs

from cosmos3_jax import Cosmos3
from cosmos3_jax.checkpoint import lora_files
from cosmos3_jax.checkpoint.find import open_folder
from cosmos3_jax.training.params import load_towers
from examples.tiny import assemble, data, evaluate, finetune_lora, grammar, model
from examples.tiny import judge as jd
from examples.tiny.watch import Watch

# Relative L2 distance of latents, pixels and samples from diffusers'; and the share of 8-bit values
# that rounding may move by one step. That share is how far a value moves on average, in steps.
TOLERANCE, SHARE = 1e-5, 1e-3


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
