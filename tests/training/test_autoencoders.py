"""Training of the autoencoders: losses against torch, latents' scale, and folders that diffusers
reads, at sizes that compile in seconds.
"""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, Cosmos3AVAEAudioTokenizer
from rounding import check, relative_l2

from cosmos3_jax.config import SoundVAEConfig, VideoVAEConfig
from cosmos3_jax.models import sound_vae, video_vae, video_vae_modules
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

# One stage of everything; the sizes and switches of the real ones are tested by their own modules.
SMALL_VIDEO = VideoVAEConfig(
    base_dim=8, decoder_base_dim=8, z_dim=4, dim_mult=(1, 1), num_res_blocks=1,
    temperal_downsample=(True,), scale_factor_spatial=4, scale_factor_temporal=2,
    latents_mean=(0.0,) * 4, latents_std=(1.0,) * 4,
)  # fmt: skip
SMALL_SOUND = SoundVAEConfig(
    enc_dim=8, enc_c_mults=(1, 2), enc_strides=(10, 12), enc_num_blocks=1, dec_dim=4,
    dec_c_mults=(1, 2), dec_strides=(40, 48), vocoder_input_dim=4, enc_latent_dim=8,
    normalize_volume=False,
)  # fmt: skip
SMALL = {
    "video": dataclasses.replace(
        AUTOENCODERS["video"],
        config=SMALL_VIDEO,
        clips=functools.partial(video_clips, size=16),
        lengths=(3,),
    ),
    "sound": dataclasses.replace(AUTOENCODERS["sound"], config=SMALL_SOUND, lengths=(2, 4)),
}
each = pytest.mark.parametrize("what", SMALL)
# Relative L2 distance from torch's, and from another program's: float32 through a dozen layers.
# Each test measures what one unit in the last place does. A wrong value is of order 1.
TOLERANCE = 1.5e-5


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def waveforms(batch: int = 2, samples: int = 3840, seed: int = 0) -> np.ndarray:
    return np.clip(0.3 * random(batch, 2, samples, seed=seed), -1, 1)


def perturbed(model) -> dict:
    """Initial parameters with no leaf at 0 or 1, so that each of them matters."""
    params = model.init(model.config, jax.random.key(0))
    leaves, tree = jax.tree.flatten(params)
    return jax.tree.unflatten(
        tree, [np.asarray(x) + 0.1 * random(*x.shape, seed=i) for i, x in enumerate(leaves)]
    )


# ---- the arithmetic of training ----


@pytest.mark.parametrize("stride, padding", [(1, ((1, 1), (1, 1))), (2, ((0, 1), (0, 1)))])
def test_products_are_the_convolution(record_property, stride, padding):
    """Values and gradients by pictures and kernel."""
    x, kernel = random(2, 6, 8, 3), random(3, 3, 3, 4, seed=1)
    theirs = video_vae_modules.Convolution()

    def loss(convolve, x, kernel):
        return jnp.sum(jnp.sin(convolve(x, kernel, padding, stride)) ** 2)

    run, others = (
        jax.value_and_grad(functools.partial(loss, convolve), (0, 1))
        for convolve in (ae.convolve, functools.partial(theirs.apply, {}, method="convolve"))
    )
    check(record_property, TOLERANCE, run, x, kernel)
    ours, expected = run(x, kernel), others(x, kernel)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        assert relative_l2(one, other) < TOLERANCE


def test_the_video_loss_has_no_convolution():
    """Or the products are not used, and the tests of their values say nothing."""
    model = SMALL["video"]
    shapes = jax.eval_shape(lambda: model.init(model.config, jax.random.key(0)))
    video = jax.ShapeDtypeStruct((1, 3, 5, 16, 16), jnp.float32)

    def loss(params, video):
        return ae.video_loss(params, model.config, video, jax.random.key(0))[0]

    assert "conv_general_dilated" not in str(jax.make_jaxpr(loss)(shapes, video))


@pytest.mark.parametrize("dilation", [1, 3, 9])
def test_the_gradients_of_dilated_convolutions(record_property, dilation):
    x, kernel = random(2, 40, 3), random(7, 3, 3, seed=1)

    def plain(x, kernel, dilation):
        return jax.lax.conv_general_dilated(
            x, kernel, (1,), [(3 * dilation,) * 2], rhs_dilation=(dilation,),
            dimension_numbers=("NWC", "WIO", "NWC"),
        )  # fmt: skip

    def loss(convolve, x, kernel):
        return jnp.sum(jnp.sin(convolve(x, kernel, dilation)))

    gradient = jax.grad(functools.partial(loss, sound_vae._dilated), (0, 1))
    check(record_property, TOLERANCE, gradient, x, kernel)
    for ours, expected in zip(
        gradient(x, kernel),
        jax.grad(functools.partial(loss, plain), (0, 1))(x, kernel),
        strict=True,
    ):
        assert relative_l2(ours, expected) < TOLERANCE


# ---- losses ----


def test_kl_equals_torch(record_property):
    mean, deviation = random(30, 5), np.exp(random(30, 5, seed=1))
    normal = torch.distributions.Normal
    theirs = torch.distributions.kl_divergence(
        normal(torch.tensor(mean), torch.tensor(deviation)), normal(0.0, 1.0)
    ).mean()

    def of_rows(*arrays):  # a single number may come out the same
        return [ae.kl_divergence(*row) for row in zip(*arrays, strict=True)]

    check(record_property, TOLERANCE, of_rows, mean, deviation)
    assert relative_l2(ae.kl_divergence(mean, deviation), theirs) < TOLERANCE
    assert abs(ae.kl_divergence(jnp.zeros(4), jnp.ones(4))) < 1e-6


def torch_magnitudes(waveform: torch.Tensor, size: int) -> torch.Tensor:
    window = torch.hann_window(size)
    flat = waveform.reshape(-1, waveform.shape[-1])
    spectrum = torch.stft(
        flat, size, size // 4, window=window, pad_mode="constant", return_complex=True
    )
    return torch.sqrt(torch.abs(spectrum / window.sum()) ** 2 + ae.FLOOR**2)


# Where a bin's error is near 0, rounding decides the gradient's sign.
SPECTRAL_GRADIENT = 1e-3


def test_spectral_loss_and_gradient_equal_torch(record_property):
    """Against torch.stft."""
    ours, target = waveforms(seed=1), waveforms(seed=2)

    def torch_loss(x, y):
        def channels(z):
            return torch.stack([z[:, 0], z[:, 1], (z[:, 0] + z[:, 1]) / 2, (z[:, 0] - z[:, 1]) / 2])

        total = 0.0
        for size in (240, 960, 3840):
            a, b = torch_magnitudes(channels(x), size), torch_magnitudes(channels(y), size)
            total += (torch.linalg.norm(a - b) / torch.linalg.norm(b)) / 3
            total += torch.mean(torch.abs(torch.log(a) - torch.log(b))) / 3
        return total

    variable = torch.tensor(ours, requires_grad=True)
    theirs = torch_loss(variable, torch.tensor(target))
    theirs.backward()
    loss = jax.jit(jax.value_and_grad(lambda x, y: sum(ae.spectral_loss(x, y))))

    def values(clips):  # a single number may come out the same
        return [loss(clip, target)[0] for clip in clips]

    clips = [waveforms(seed=seed) for seed in range(3, 15)]
    check(record_property, TOLERANCE, values, clips, name="values")
    check(record_property, SPECTRAL_GRADIENT, lambda *x: loss(*x)[1], ours, target, name="grad")
    value, gradient = loss(ours, target)
    assert relative_l2(value, theirs.detach()) < TOLERANCE
    assert relative_l2(gradient, variable.grad) < SPECTRAL_GRADIENT


def test_spectral_loss_hears_places_and_silence():
    """Left and right exchanged is an error, and silence is no division by zero."""
    target = waveforms()
    target[:, 1] *= 0.1
    loss = jax.jit(lambda x, y: sum(ae.spectral_loss(x, y)))
    assert loss(target, target) < 1e-4 < 0.5 < loss(target[:, ::-1], target)
    silence = np.zeros_like(target)
    for pair in ((silence, target), (target, silence), (silence, silence)):
        value, gradient = jax.jit(jax.value_and_grad(lambda x, y: sum(ae.spectral_loss(x, y))))(
            *pair
        )
        assert np.isfinite(value) and np.all(np.isfinite(gradient))


def test_magnitudes_of_a_tone():
    """A full tone has 0.5 at its frequency, whatever the window; sizes that do not fit are told."""
    tone = np.sin(2 * np.pi * 1000 / 48_000 * np.arange(3840), dtype=np.float32)
    for size in (240, 960):
        found = ae.magnitudes(tone, size, size // 4)
        assert found.shape == (3840 // (size // 4) + 1, size // 2 + 1)
        assert found[5].max() == pytest.approx(0.5, rel=1e-3)
        assert np.argmax(found[5]) == 1000 * size // 48_000
    with pytest.raises(ValueError, match="a window of 960 and 3841 samples must be multiples of"):
        ae.magnitudes(np.zeros(3841), 960, 240)


def test_relative_error():
    """By hand, and of silence, whose root has a gradient too."""
    target = np.array([[3.0, 4.0]], np.float32)
    assert ae.relative_error(0 * target, target) == pytest.approx(1, rel=1e-4)
    assert ae.relative_error(target + np.array([[0.3, 0.4]]), target) == pytest.approx(
        0.1, rel=1e-3
    )
    assert np.all(np.isfinite(jax.grad(ae.relative_error)(0 * target, 0 * target)))


def test_video_losses():
    """By hand: a flat error is all pixel loss; a moving edge is seen by the gradient loss."""
    target = np.zeros((1, 3, 3, 8, 8), np.float32)
    assert ae.pixel_loss(target + 0.5, target) == pytest.approx(0.5, rel=1e-5)
    assert ae.gradient_loss(target + 0.5, target) == 0
    assert ae.pixel_loss(target, target) == pytest.approx(ae.SMOOTH, rel=1e-5)
    edge = target.copy()
    edge[:, :, 1:, :, 4:] = 1  # from frame 1 on: an edge in x in 2 of 3 frames, half changes once
    assert ae.gradient_loss(edge, target) == pytest.approx(2 / 3 / 7 + 0.5 / 2, rel=1e-5)
    assert ae.psnr(target + 0.1, target) == pytest.approx(20, abs=1e-3)


@each
def test_gradients_reach_every_parameter(what):
    """Of a silent and of a plain clip too: finite, and none is zero but where symmetry says so."""
    model = SMALL[what]
    params = perturbed(model)
    shape = (2, 3, 3, 16, 16) if what == "video" else (2, 2, 3840)
    clips = np.random.default_rng(0).random(shape, np.float32) - (what == "sound") * 0.5
    grad = jax.jit(jax.grad(lambda p, x: model.loss(p, model.config, x, jax.random.key(0))[0]))
    gradient = grad(params, clips)
    dead = [
        jax.tree_util.keystr(path)
        for path, leaf in jax.tree_util.tree_leaves_with_path(gradient)
        if not np.any(leaf)
    ]
    assert dead == []
    for values in (gradient, grad(params, 0 * clips)):
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(values))


def test_volume_must_not_be_normalised():
    config = dataclasses.replace(SMALL_SOUND, normalize_volume=True)
    with pytest.raises(ValueError, match="normalize_volume=True hides the volume"):
        ae.sound_loss({}, config, jnp.zeros((1, 2, 1920)), jax.random.key(0))


# ---- latents ----


def test_latent_statistics():
    """Of samples: what deviations add to the means' spread; a channel that says nothing stays 1."""
    rng = np.random.default_rng(0)
    mean = rng.normal([2.0, 0.0], [3.0, 0.0], (50, 400, 2))
    deviation = np.broadcast_to([0.5, 1.0], mean.shape)
    centre, scale = ae.latent_statistics(mean, deviation)
    samples = (mean + deviation * rng.standard_normal(mean.shape)).reshape(-1, 2)
    # 20,000 samples: their own mean and deviation scatter by 0.7%.
    np.testing.assert_allclose(centre, samples.mean(0), atol=0.1)
    np.testing.assert_allclose(scale, samples.std(0), rtol=0.03)
    np.testing.assert_allclose(scale, [np.hypot(3.0, 0.5), 1.0], rtol=0.03)


def test_rescaled_sound_latents_sound_the_same(record_property):
    model = SMALL["sound"]
    params, deviation = perturbed(model), np.array([0.2, 3.0, 1.0, 7.0], np.float32)
    rescaled = ae.rescale_sound_latents(params, SMALL_SOUND, deviation)
    encode = jax.jit(lambda p, x: sound_vae.posterior(p, SMALL_SOUND, x))
    decode = jax.jit(lambda p, z: sound_vae.decode(p, SMALL_SOUND, z))
    mean, spread = encode(params, waveforms())
    check(record_property, TOLERANCE, encode, params, waveforms(), name="encode")
    check(record_property, TOLERANCE, decode, params, np.asarray(mean), name="decode")
    new_mean, new_spread = encode(rescaled, waveforms())
    assert relative_l2(new_mean, mean / deviation) < TOLERANCE
    assert relative_l2(new_spread, spread) < TOLERANCE
    assert relative_l2(decode(rescaled, new_mean), decode(params, mean)) < TOLERANCE
    for wrong in (np.ones(3), np.array([1, 1, 0, 1.0]), np.array([1, 1, np.nan, 1])):
        with pytest.raises(ValueError, match="must be 4 positive, finite numbers"):
            ae.rescale_sound_latents(params, SMALL_SOUND, wrong)


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


@each
def test_first_parameters(what):
    """Of one type, or the second step would compile again; and the first clip is empty."""
    params = SMALL[what].init(SMALL[what].config, jax.random.key(0))
    assert all(x.dtype == jnp.float32 and not x.weak_type for x in jax.tree.leaves(params))
    last = params["decoder"]["conv_out" if what == "video" else "conv2"]
    assert not np.any(last["kernel"])
