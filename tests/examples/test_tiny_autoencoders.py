"""The tiny world's autoencoders: folders for diffusers, clips to learn from, runs that resume."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import torch
from autoencoder_cases import (
    SMALL,
    SMALL_SOUND,
    SMALL_VIDEO,
    TOLERANCE,
    each,
    perturbed,
    random,
    waveforms,
)
from diffusers import AutoencoderKLWan, Cosmos3AVAEAudioTokenizer
from rounding import check, relative_l2

from cosmos3_jax.models import sound_vae, video_vae
from cosmos3_jax.training import autoencoders as ae
from examples.tiny import autoencoder_check, grammar, train_autoencoders, world
from examples.tiny import scenes as sc
from examples.tiny.autoencoder_models import (
    AUTOENCODERS,
    SOUND_CONFIG,
    VIDEO_CONFIG,
    read_public,
    sound_clips,
    video_clips,
    write_public,
)
from examples.tiny.train_autoencoders import Run

# ---- folders in the public layout ----


@torch.no_grad()
def test_diffusers_reads_the_video_folder(record_property, tmp_path):
    config = dataclasses.replace(
        SMALL_VIDEO, latents_mean=(0.1, -0.2, 0.3, 0.0), latents_std=(0.5, 1.0, 2.0, 1.5)
    )
    model = dataclasses.replace(SMALL["video"], config=config)
    write_public(tmp_path / "vae", model, perturbed(model))
    stored, params = read_public(tmp_path / "vae", SMALL["video"])
    assert stored.config == config
    theirs = AutoencoderKLWan.from_pretrained(tmp_path / "vae", torch_dtype=torch.float32)
    assert tuple(theirs.config.latents_std) == config.latents_std
    video = np.random.default_rng(0).random((1, 3, 5, 16, 16), np.float32)
    moments = theirs.encode(torch.tensor(2 * video - 1)).latent_dist
    encode = jax.jit(lambda p, x: video_vae.posterior(p, config, x))
    check(record_property, TOLERANCE, encode, params, video, name="encode")
    mean, deviation = encode(params, video)
    for ours, expected in ((mean, moments.mean), (deviation, moments.std)):
        assert relative_l2(np.moveaxis(ours, -1, 1), expected) < TOLERANCE
    plain, latents = ae.without_normalization(config), np.asarray(mean)
    decode = jax.jit(lambda p, z: 2 * video_vae.decode(p, plain, z) - 1)
    check(record_property, TOLERANCE, decode, params, latents, name="decode")
    expected = theirs.decode(torch.tensor(latents).movedim(-1, 1)).sample
    assert relative_l2(decode(params, latents), expected) < TOLERANCE


@torch.no_grad()
def test_diffusers_reads_the_sound_folder(record_property, tmp_path):
    model, params = SMALL["sound"], perturbed(SMALL["sound"])
    params["decoder"]["conv2"]["kernel"] *= 0.03  # below 1: the cut-off must not hide an error
    write_public(tmp_path / "sound_tokenizer", model, params)
    stored, params = read_public(tmp_path / "sound_tokenizer", model)
    assert stored.config == SMALL_SOUND
    theirs = Cosmos3AVAEAudioTokenizer.from_pretrained(
        tmp_path / "sound_tokenizer", torch_dtype=torch.float32
    )
    moments = theirs.encode(torch.tensor(waveforms())).latent_dist
    encode = jax.jit(lambda p, x: sound_vae.posterior(p, SMALL_SOUND, x))
    check(record_property, TOLERANCE, encode, params, waveforms(), name="encode")
    mean, deviation = encode(params, waveforms())
    for ours, expected in ((mean, moments.mean), (deviation, moments.std)):
        assert relative_l2(np.moveaxis(ours, -1, 1), expected) < TOLERANCE
    decode = jax.jit(lambda p, z: sound_vae.decode(p, SMALL_SOUND, z))
    check(record_property, TOLERANCE, decode, params, np.asarray(mean), name="decode")
    decoded = decode(params, mean)
    expected = theirs.decode(torch.tensor(np.asarray(mean)).movedim(-1, 1))
    assert 0.01 < np.std(decoded) and np.mean(np.abs(decoded) == 1) < 0.02
    assert relative_l2(decoded, expected) < TOLERANCE


def test_the_real_ones_fit_the_checkpoint():
    """12 of the 25 MB that the whole tiny checkpoint may have, in bfloat16."""
    count = {
        what: sum(int(np.prod(x.shape)) for x in jax.tree.leaves(model.shapes(model.config)))
        for what, model in AUTOENCODERS.items()
    }
    assert max(count.values()) < 3e6, count
    assert VIDEO_CONFIG.scale_factor_temporal == 4 and VIDEO_CONFIG.scale_factor_spatial == 16
    assert SOUND_CONFIG.samples_per_latent == world.SAMPLES_PER_LATENT


# ---- clips and runs ----


def test_training_clips_are_parts_of_the_world(monkeypatch):
    """A clip that begins later is the whole clip from there on: pixels and samples."""
    monkeypatch.setattr("examples.tiny.autoencoder_models.ANY_COLOUR", 0.0)
    monkeypatch.setattr("examples.tiny.autoencoder_models.ANY_PITCH", 0.0)
    scenes = world.stack(grammar.training_batch(np.random.default_rng(0), 3)[0])
    videos, _ = world.render_batch(scenes, size=16, samples=1)
    _, sounds = world.render_batch(scenes, frames=1, size=8, samples=world.sound_samples())
    parts = video_clips(scenes, jax.random.key(0), 5, size=16)
    for whole, part in zip(np.moveaxis(videos, -1, 1), np.asarray(parts), strict=True):
        starts = range(sc.FRAMES - 4)
        errors = [np.abs(whole[:, s : s + 5] - part).max() for s in starts]
        assert min(errors) < 1e-3
    parts = np.asarray(sound_clips(scenes, jax.random.key(1), 24))
    assert parts.shape == (3, 2, 24 * 1920)
    for whole, part, times in zip(np.asarray(sounds), parts, scenes["times"], strict=True):
        if times[0] < 2:  # the first tone is in the part, as loud as in the whole
            assert np.abs(part).max() == pytest.approx(np.abs(whole).max(), abs=0.02)
    monkeypatch.setattr("examples.tiny.autoencoder_models.ANY_COLOUR", 1.0)
    other = video_clips(scenes, jax.random.key(0), 5, size=16)
    assert not np.allclose(other, video_clips(scenes, jax.random.key(2), 5, size=16))


@each
def test_run_resumes_to_the_same_numbers(what, tmp_path, monkeypatch):
    """A run that is killed halfway, for sound between its two phases; a state of another run; and
    what is written at the end.
    """
    step = train_autoencoders.train_step.__wrapped__
    static = ("run", "model", "length", "batch")
    monkeypatch.setattr(
        train_autoencoders, "train_step", jax.jit(step, static_argnames=static, donate_argnums=0)
    )
    algorithm = train_autoencoders.DEFAULTS[what]["algorithm"]  # another for each
    run = Run(what, 4, 2, 1e-2, 1e-3, "float32", algorithm, pool=8, every=1, save_every=2)
    model = SMALL[what]
    save, saved = train_autoencoders.save, []

    def die(out, run, state):
        save(out, run, state)
        if not saved:
            saved.append(int(state["step"]))
            raise KeyboardInterrupt

    whole = train_autoencoders.train(run, model, tmp_path / "whole")
    monkeypatch.setattr(train_autoencoders, "save", die)
    with pytest.raises(KeyboardInterrupt):
        train_autoencoders.train(run, model, tmp_path / "killed")
    with (tmp_path / "killed" / "log.jsonl").open("a") as file:
        file.write('{"step": 3, "seconds": 1.0}\n')  # what it did after it saved, and lost
    resumed = train_autoencoders.train(run, model, tmp_path / "killed")
    assert saved == [2]
    for ours, expected in zip(jax.tree.leaves(resumed), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(ours, expected)
    logs = [(tmp_path / name / "log.jsonl").read_text() for name in ("whole", "killed")]
    logs = [[json.loads(line) for line in log.splitlines()] for log in logs]
    assert [line["step"] for line in logs[0]] == [1, 2, 3, 4]
    assert [line["loss"] for line in logs[0]] == [line["loss"] for line in logs[1]]
    with pytest.raises(ValueError, match="choose another folder or remove it"):
        other = dataclasses.replace(run, seed=1)
        train_autoencoders.train(other, model, tmp_path / "killed")
    check_a_state_on_disk(run, tmp_path / "killed", resumed)
    channels = 4
    mean, deviation = random(5, channels), np.full((5, channels), 0.5)
    monkeypatch.setattr(autoencoder_check, "posteriors", lambda *_: (mean, deviation))
    params = resumed["ema"]
    final = train_autoencoders.finish(run, model, params, tmp_path / "killed", scenes=2)
    final, stored = read_public(tmp_path / "killed" / model.folder, final)
    centre, scale = ae.latent_statistics(mean, deviation)
    kernel, gain = params["encoder"], 1.0
    if what == "video":
        np.testing.assert_allclose(final.config.latents_mean, centre, rtol=1e-6)
        np.testing.assert_allclose(final.config.latents_std, scale, rtol=1e-6)
        kernel, found = kernel["quant_conv"]["kernel"], stored["encoder"]["quant_conv"]["kernel"]
    else:
        kernel, found = kernel["layers_5"]["kernel"], stored["encoder"]["layers_5"]["kernel"]
        gain = np.concatenate([1 / scale, np.ones(channels)])
    # bfloat16: 2^-8 of a weight, and as much of its weight-norm gain.
    np.testing.assert_allclose(found, kernel * gain, rtol=2**-6, atol=1e-6)


def check_a_state_on_disk(run, folder, state):
    """What is not finite is not written; what is damaged is not read."""
    bad = state | {"ema": jax.tree.map(lambda x: x * np.nan, state["ema"])}
    with pytest.raises(FloatingPointError, match="the state of step 4 is not finite: ema/"):
        train_autoencoders.save(folder, run, bad)
    path = folder / train_autoencoders.STATE_FILE
    whole = path.read_bytes()
    for damaged in (whole[:-9], whole[:99], b"", whole[:-999] + b"?" + whole[-998:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{path} is not a state of .*; remove it to begin"):
            train_autoencoders.restore(folder, run, state)
    path.write_bytes(whole)


def test_report_of_reconstructions(tmp_path, monkeypatch):
    """The judge sees the true video and hears what an untrained decoder makes: nothing."""
    monkeypatch.setattr(autoencoder_check, "NOISE", (0.0, 0.1))
    model = SMALL["sound"]
    params = model.init(model.config, jax.random.key(0))
    report = autoencoder_check.report("sound", model, params, 2, tmp_path)
    rows = {row["attribute"]: row["share"] for row in report["noise"]["0.0"]["judge"]}
    assert rows["colour and shape"] == 1 and rows["pitch"] == 0
    assert report["noise"]["0.0"]["snr"] == pytest.approx(0, abs=1e-3)
    assert report["noise"].keys() == {"0.0", "0.1"} and report["new"]["judge"]
    assert len(report["latents"]["std"]) == 4
    assert (tmp_path / "sound.png").is_file()
