"""Starting from an image or a clip: encoding and sampling against the oracle's."""

import functools
import warnings

import jax
import numpy as np
import pytest
import torch
from clip_cases import write_clip
from conditioning_cases import CLIP, HEIGHT, WIDTH, picture
from oracle import NEGATIVE, PROMPT, SETTINGS, prepare, run_oracle
from PIL import Image
from rounding import check, relative_l2

from cosmos3_jax import Cosmos3, generate
from cosmos3_jax.io import media
from cosmos3_jax.io.conditioning import resolve_condition_frames
from cosmos3_jax.runtime import programs
from cosmos3_jax.sampling import stages

encode_given = programs.program(stages.encode_given)
# Relative L2 distance of latents from the oracle's, and from those of another program: float32
# rounding that guidance 6 amplifies, see `test_tolerance`. Latents without what is given are at
# more than a hundred times as much.
TOLERANCE = 1e-5


@pytest.mark.parametrize("mode", ["I2V", "V2V, both ends"])
def test_tolerance(record_property, model, mode):
    def latents(params, request):
        return Cosmos3(model.config, params, model.tokenizer).denoise(request)[0]

    request = prepare(model, sound=True, **MODES[mode][0])
    check(record_property, TOLERANCE, latents, model.params, request)


def oracle_given(pipe, request, given, **settings):
    """The oracle's run from what is given; it takes `latents=` for the mixture with noise."""
    encoded = []

    def catch(video):
        encoded.append(encode(video))
        return encoded[-1]

    encode, pipe._encode_video = pipe._encode_video, catch
    try:
        run_oracle(pipe, request, latents_only=True, **settings | dict(num_inference_steps=1))
        frames = np.isin(np.arange(3), given)[None, None, :, None, None]
        mixture = request.replace(noise=np.where(frames, encoded[0].numpy(), request.noise))
        return run_oracle(pipe, mixture, latents_only=True, **settings)
    finally:
        pipe._encode_video = encode


MODES = {
    "I2V": (dict(image=picture(100, 130)), [0]),
    "V2V": (dict(video=CLIP), [0, 1]),
    "V2V, last": (dict(video=CLIP, keep="last"), [0, 1]),
    "V2V, one later frame": (dict(video=CLIP, condition_frames=[1]), [1]),
    "V2V, both ends": (dict(video=CLIP, condition_frames=[0, -1]), [0, 2]),
}


@pytest.mark.parametrize("sound", [False, True], ids=["", "with sound"])
@pytest.mark.parametrize("mode", MODES)
def test_agrees_with_the_oracle(model, oracle, mode, sound):
    """Five steps with guidance. Both get the same pictures; each resizes, encodes and samples.

    A clip is of the video's size already, as the oracle would stretch another (see `clip_pixels`).
    """
    settings, given = MODES[mode]
    theirs = dict(settings)
    if "image" in theirs:
        theirs["image"] = Image.fromarray(theirs["image"])
    else:
        theirs["video"] = torch.from_numpy(CLIP).movedim(-1, 1) / 255
        theirs["condition_frame_indexes_vision"] = given
        theirs["condition_video_keep"] = theirs.pop("keep", "first")
        theirs.pop("condition_frames", None)
    request = prepare(model, sound=sound, **settings)
    reference = oracle_given(oracle("native"), request, given, **theirs)
    latents, _ = model.denoise(request)
    assert latents.keys() == reference.latents.keys()
    for name, expected in reference.latents.items():
        assert relative_l2(latents[name], expected) <= TOLERANCE, name

    free = [t for t in range(3) if t not in given]
    alone, _ = model.denoise(prepare(model, sound=sound))
    assert relative_l2(alone["video"][:, :, free], latents["video"][:, :, free]) > 100 * TOLERANCE


def test_bfloat16_is_as_good_as_the_oracles(public_checkpoint, model, oracle):
    """Our error against the oracle in float32, over the oracle's own, of several images."""
    half, errors = Cosmos3.from_pretrained(public_checkpoint), {"ours": 0.0, "theirs": 0.0}
    for seed in range(6):
        image = picture(HEIGHT, WIDTH, seed)
        request = prepare(model, image=image, seed=seed)
        settings = dict(image=Image.fromarray(image))
        exact = oracle_given(oracle("native"), request, [0], **settings).latents["video"]
        with torch.backends.mkldnn.flags(enabled=False):  # its bfloat16 convolutions are wrong
            low = oracle("native", torch.bfloat16)
            rounded = oracle_given(low, request, [0], **settings).latents["video"]
        errors["theirs"] += np.sum((rounded - exact) ** 2)
        errors["ours"] += np.sum((np.asarray(half.denoise(request)[0]["video"]) - exact) ** 2)
    assert np.sqrt(errors["ours"] / errors["theirs"]) <= 1.2


@pytest.mark.parametrize("mode", MODES)
def test_what_is_given_comes_out_unchanged(model, mode):
    """Bit for bit what the encoder made of it, and the encoder saw no more than it needed."""
    settings, given = MODES[mode]
    request = prepare(model, **settings)
    needed = 4 * max(given) + 1
    assert request.clean_video.shape == (1, 3, needed, HEIGHT, WIDTH)
    clean = encode_given(
        model.params["video_vae"], request.clean_video, request.frame_mask, config=model.config
    )["given"]["clean_latents"]
    latents, _ = model.denoise(request)
    ours, clean = np.asarray(latents["video"]), np.asarray(clean)
    np.testing.assert_array_equal(ours[:, :, given], clean[:, :, given])
    assert np.std(clean[:, :, given]) > 0.1
    assert not clean[:, :, max(given) + 1 :].any()


@pytest.mark.parametrize("progress", [False, True])
def test_bit_for_bit_in_bfloat16_too(public_checkpoint, progress):
    half = Cosmos3.from_pretrained(public_checkpoint)
    request = prepare(half, image=picture(60, 60))
    pixels = request.clean_video, request.frame_mask
    clean = encode_given(half.params["video_vae"], *pixels, config=half.config)["given"]
    latents, _ = half.denoise(request, progress=progress)
    np.testing.assert_array_equal(latents["video"][:, :, 0], clean["clean_latents"][:, :, 0])


def test_a_mask_reaches_no_further_than_the_pixels(model):
    """Or zeros would be taken for given latents."""
    request = prepare(model, image=picture(60, 60))
    further = request.replace(frame_mask=np.array([[True, False, True]]))
    np.testing.assert_array_equal(
        model.denoise(further)[0]["video"], model.denoise(request)[0]["video"]
    )


def test_a_clip_gives_its_first_or_its_last_frames(model, tmp_path):
    first, last = (prepare(model, video=CLIP, keep=keep).clean_video for keep in ("first", "last"))
    frames = CLIP.transpose(0, 3, 1, 2) / np.float32(255)
    np.testing.assert_allclose(first[0].swapaxes(0, 1), frames[:5], atol=1e-6)
    np.testing.assert_allclose(last[0].swapaxes(0, 1), frames[-5:], atol=1e-6)
    images = [Image.fromarray(frame) for frame in CLIP]
    np.testing.assert_array_equal(prepare(model, video=images, keep="last").clean_video, last)
    video = {"video": CLIP[None].transpose(0, 4, 1, 2, 3) / np.float32(255)}
    path = media.save_mp4(video, tmp_path / "a.mp4", fps=24, crf=0)
    decoded = prepare(model, video=path, keep="last").clean_video
    assert np.abs(decoded - last).mean() < 0.05  # as 4:2:0 has it; other frames are at 0.2
    assert np.abs(decoded - first).mean() > 0.1


def test_the_speed_of_a_clip_is_spoken_of(model, tmp_path):
    video = {"video": CLIP[None].transpose(0, 4, 1, 2, 3) / np.float32(255)}
    path = media.save_mp4(video, tmp_path / "a.mp4", fps=12)
    with pytest.warns(UserWarning, match="12 frames per second, the video 24"):
        prepare(model, video=path)


@pytest.mark.parametrize(
    ("fps", "advice"),
    [
        (12, r"pass fps=12 \(--fps\) to keep it"),
        (30, r"pass fps=30 \(--fps\)"),
        (60, r"convert it to 24 first \(ffmpeg.* -r 24 .*trained with 10 to 30"),
        (8, "convert it to 24 first"),
    ],
)
def test_the_advice_on_speed_is_a_rate_of_training(model, tmp_path, fps, advice):
    video = {"video": CLIP[None].transpose(0, 4, 1, 2, 3) / np.float32(255)}
    path = media.save_mp4(video, tmp_path / "a.mp4", fps=fps)
    with pytest.warns(UserWarning, match=f"{fps} frames per second, the video 24.*; {advice}"):
        prepare(model, video=path)


def test_an_uneven_clip_is_sampled_at_the_rate_of_the_video(model, tmp_path):
    """Its third frame is shown for four: at 24 frames per second nothing changes its speed."""
    path = write_clip(tmp_path / "a.mkv", CLIP[:6], times=[0, 1, 2, 6, 7, 8], to="bgr0")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*frames per second, the video")
        pixels = prepare(model, video=path).clean_video
    np.testing.assert_array_equal(pixels, prepare(model, video=CLIP[[0, 1, 2, 2, 2]]).clean_video)


def test_a_batch_starts_from_one_image_or_from_one_each(model):
    images = [picture(60, 60, seed) for seed in (1, 2)]
    prompts = ["Rain", PROMPT]
    both, _ = model.denoise(prepare(model, prompts, image=images, seed=[3, 4]))
    for i, prompt in enumerate(prompts):
        alone, _ = model.denoise(prepare(model, prompt, image=images[i], seed=3 + i))
        assert relative_l2(both["video"][i : i + 1], alone["video"]) <= TOLERANCE
    shared = prepare(model, prompts, image=images[0]).clean_video
    np.testing.assert_array_equal(shared[0], shared[1])
    assert prepare(model, prompts, video=CLIP).clean_video.shape[0] == 2


def test_each_prompt_goes_on_from_its_own_video(model):
    """From what `generate` returned for both."""
    made = np.stack([CLIP, CLIP[::-1]]).transpose(0, 4, 1, 2, 3) / np.float32(255)
    request = prepare(model, ["Rain", PROMPT], video=made, keep="last")
    for b in range(2):
        np.testing.assert_allclose(request.clean_video[b], made[b, :, -5:], atol=1e-6)
    with pytest.raises(ValueError, match="2 clips for 3 prompts"):
        prepare(model, ["Rain"] * 3, video=made)


def test_any_latents_may_be_given(model):
    """The general form: what `image=` does, done by hand, and a video between two images."""
    image = picture(HEIGHT, WIDTH, 1)
    request = prepare(model, image=image)
    clean = np.zeros((1, 6, 3, 3, 5), np.float32)
    clean[:, :, :1] = model.encode_video(request.clean_video)
    mask = np.array([[True, False, False]])
    by_hand = model.denoise(prepare(model, clean_latents=clean, frame_mask=mask))[0]["video"]
    # Two programs encode the image.
    assert relative_l2(by_hand, model.denoise(request)[0]["video"]) <= TOLERANCE
    ends = [image, *[picture(HEIGHT, WIDTH, 2)] * 8]
    between = prepare(model, video=ends, condition_frames=(0, -1))
    np.testing.assert_array_equal(between.frame_mask, [[True, False, True]])
    assert between.clean_video.shape[2] == 9


def test_the_pure_function_encodes_what_is_given(model):
    """It is jitted as a whole, and the video has a gradient by the image that it begins with."""
    request = prepare(model, image=picture(60, 60), sound=True)
    pure = jax.jit(functools.partial(generate, config=model.config, output="latents"))
    ours, reference = pure(model.params, request), model.denoise(request)[0]
    for name, expected in reference.items():
        assert relative_l2(ours[name], expected) <= TOLERANCE

    short = prepare(model, image=picture(60, 60), num_inference_steps=1)

    def last_frame(pixels):
        result = pure(model.params, short.replace(clean_video=pixels))
        return (result["video"][:, :, -1] ** 2).mean()

    gradient = np.asarray(jax.grad(last_frame)(short.clean_video))
    assert np.isfinite(gradient).all() and (gradient != 0).mean() > 0.5


def test_with_and_without_an_image_the_loop_is_one_program(model, compiled):
    settings = SETTINGS | dict(output="latents", num_inference_steps=4, negative_prompt=NEGATIVE)
    jax.clear_caches()
    model.generate(PROMPT, **settings)
    model.generate(PROMPT, image=picture(60, 60), **settings)
    model.generate(PROMPT, video=CLIP, **settings)
    assert compiled.count("jit(advance)") == 1
    assert compiled.count("jit(encode_given)") == 2  # of one frame and of five


def test_progress_and_offload_change_nothing(public_checkpoint, model):
    settings = SETTINGS | dict(image=picture(60, 60), negative_prompt=NEGATIVE, output="latents")
    plain = model.generate(PROMPT, **settings)["video"]
    offloaded = Cosmos3.from_pretrained(public_checkpoint, "float32", offload=True)
    offloaded.warmup(PROMPT, **settings)
    assert relative_l2(offloaded.generate(PROMPT, **settings)["video"], plain) <= TOLERANCE
    shown = model.generate(PROMPT, progress=True, **settings)["video"]
    assert relative_l2(shown, plain) <= TOLERANCE


def test_condition_frames():
    assert resolve_condition_frames(None, 3) == [0, 1]
    assert resolve_condition_frames((2, 0, -1), 3) == [0, 2]
    assert resolve_condition_frames(np.array([1]), 3) == [1]
    assert resolve_condition_frames(1, 3) == resolve_condition_frames(np.array(1), 3) == [1]
    assert resolve_condition_frames(torch.tensor([0, 1]), 3) == [0, 1]
