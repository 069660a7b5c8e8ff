"""Starting from an image or a clip: resizing, encoding and sampling against the oracle's."""

import functools
import warnings

import av
import jax
import numpy as np
import pytest
import torch
from diffusers.pipelines.cosmos import pipeline_cosmos3_omni as oracle_module
from oracle import NEGATIVE, PROMPT, SETTINGS, prepare, run_oracle
from PIL import Image
from rounding import check, relative_l2

from cosmos3_jax import Cosmos3, generate
from cosmos3_jax.checkpoint import find
from cosmos3_jax.io import media
from cosmos3_jax.io.conditioning import (
    clip_pixels,
    image_pixels,
    resize_and_crop,
    resolve_condition_frames,
)
from cosmos3_jax.io.prepare import prepare_request
from cosmos3_jax.runtime import programs
from cosmos3_jax.sampling import denoise, stages

encode_given = programs.program(stages.encode_given)
HEIGHT, WIDTH = SETTINGS["height"], SETTINGS["width"]
# Relative L2 distance of latents from the oracle's, and from those of another program: float32
# rounding that guidance 6 amplifies, see `test_tolerance`. Latents without what is given are at
# more than a hundred times as much.
TOLERANCE = 1e-5
# Of pixels of a resized clip, from 0 to 255.
RESIZED = 2e-6


@pytest.fixture(scope="module")
def model(public_checkpoint):
    return Cosmos3.from_pretrained(public_checkpoint, dtype="float32")


@pytest.mark.parametrize("mode", ["I2V", "V2V, both ends"])
def test_tolerance(record_property, model, mode):
    def latents(params, request):
        return Cosmos3(model.config, params, model.tokenizer).denoise(request)[0]

    request = prepare(model, sound=True, **MODES[mode][0])
    check(record_property, TOLERANCE, latents, model.params, request)


@pytest.mark.parametrize("size", [(96, 160), (31, 200)], ids=str)
def test_tolerance_of_resizing(record_property, size):
    frames = np.stack([picture(*size, seed) for seed in range(2)]).astype(np.float32)
    check(record_property, RESIZED, lambda x: resize_and_crop(x, HEIGHT, WIDTH), frames)


def picture(height: int, width: int, seed: int = 0, channels: int = 3) -> np.ndarray:
    """uint8 [height, width, channels]: waves with noise on them, so that every pixel counts."""
    rng = np.random.RandomState(seed)
    y, x = np.mgrid[: height / 20 : height * 1j, : width / 20 : width * 1j]
    waves = np.stack([np.sin(x + k) * np.cos(y - k + seed) for k in range(channels)], axis=-1)
    return np.uint8(np.clip(128 + 80 * waves + rng.normal(0, 20, waves.shape), 0, 255))


# Larger and smaller, wide and upright, one side exact, exact, odd remainders to crop, one pixel.
SIZES = [(96, 160), (480, 300), (31, 200), (200, 31), (48, 101), (48, 80), (47, 79), (1, 1)]
FITTED = [(size, (HEIGHT, WIDTH)) for size in SIZES] + [((1080, 1620), (720, 1280))]


@pytest.mark.parametrize("size, target", FITTED, ids=str)
def test_an_image_is_resized_as_the_oracle_does(size, target):
    """Within one of 255 levels: where the oracle is at half a level, so are we, give or take."""
    image = picture(*size)
    theirs = oracle_module._preprocess_conditioning_image(Image.fromarray(image), *target)
    theirs = np.rint((theirs[0].numpy() + 1) * 127.5)
    ours = image_pixels(Image.fromarray(image), *target) * 255
    assert ours.shape == (3, 1, *target)
    np.testing.assert_allclose(ours, np.rint(ours), atol=1e-4)  # 8 bits
    difference = np.abs(ours[:, 0] - theirs)
    assert difference.max() <= 1.001
    assert (difference > 0.5).mean() <= 1e-3  # measured: none


def test_another_crop_or_filter_would_be_seen():
    image = picture(96, 200)
    right = 255 * image_pixels(image, HEIGHT, WIDTH)
    for wrong in (
        255 * image_pixels(image[:, 2:], HEIGHT, WIDTH),
        np.asarray(Image.fromarray(image).resize((WIDTH, HEIGHT))).transpose(2, 0, 1)[:, None],
    ):
        assert np.abs(right - wrong).max() > 20


@pytest.mark.parametrize(
    "source",
    [
        lambda image, folder: image,
        lambda image, folder: np.moveaxis(image, -1, 0),
        lambda image, folder: image.astype(np.float32) / 255,
        lambda image, folder: np.dstack([image, image[..., :1]]),
        lambda image, folder: Image.fromarray(image).convert("RGBA"),
        lambda image, folder: save(image, folder / "a.png"),
        lambda image, folder: str(save(image, folder / "a.png")),
    ],
    ids=["array", "channels first", "float", "RGBA", "RGBA image", "path", "name"],
)
def test_an_image_may_come_in_any_form(source, tmp_path):
    image = picture(90, 200)
    np.testing.assert_array_equal(
        image_pixels(source(image, tmp_path), 32, 64), image_pixels(image, 32, 64)
    )


def save(image: np.ndarray, path):
    Image.fromarray(image).save(path)
    return path


def test_a_grey_and_a_rotated_image(tmp_path):
    grey = picture(90, 200, channels=1)[..., 0]
    np.testing.assert_array_equal(
        image_pixels(grey, 32, 64), image_pixels(np.dstack([grey] * 3), 32, 64)
    )
    image = picture(90, 200)
    exif = Image.Exif()
    exif[0x0112] = 6  # taken with the camera on its side
    Image.fromarray(image).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(
        image_pixels(tmp_path / "a.png", 32, 64), image_pixels(np.rot90(image, -1), 32, 64)
    )


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_clip_is_resized_by_the_antialiased_filter(size):
    """Against PyTorch's, which cosmos-framework uses: float32 weights in another order. Nothing is
    rounded to 8 bits.
    """
    frames = np.stack([picture(*size, seed) for seed in range(2)])
    scale = max(WIDTH / size[1], HEIGHT / size[0])
    resized = [int(np.ceil(scale * side)) for side in size]
    planes = torch.from_numpy(frames).movedim(-1, 1).float()
    theirs = torch.nn.functional.interpolate(
        planes, size=resized, mode="bilinear", antialias=True, align_corners=False
    )
    top, left = round((resized[0] - HEIGHT) / 2), round((resized[1] - WIDTH) / 2)
    theirs = theirs[..., top : top + HEIGHT, left : left + WIDTH].movedim(1, -1).numpy()
    ours = resize_and_crop(frames, HEIGHT, WIDTH)
    assert relative_l2(ours, theirs) <= RESIZED
    pixels, fps = clip_pixels(frames, 2, HEIGHT, WIDTH)
    assert relative_l2(pixels * 255, ours.transpose(3, 0, 1, 2)) <= RESIZED
    assert fps is None
    if resized != list(size) and size != (1, 1):
        assert (np.abs(ours - np.rint(ours)) > 0.1).mean() > 0.3


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


CLIP = np.stack([picture(HEIGHT, WIDTH, seed) for seed in range(12)])
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


def test_with_and_without_an_image_the_loop_is_one_program(model):
    settings = SETTINGS | dict(output="latents", num_inference_steps=4, negative_prompt=NEGATIVE)
    model.generate(PROMPT, **settings)
    loop = programs.program(denoise.advance, 1, ("trajectory",))
    count = loop._cache_size()
    model.generate(PROMPT, image=picture(60, 60), **settings)
    model.generate(PROMPT, video=CLIP, **settings)
    assert loop._cache_size() == count


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


ONE, LATENTS = picture(60, 60), np.zeros((1, 6, 3, 3, 5), np.float32)
MASK = np.array([[True, False, False]])
BAD = {
    "both": (dict(image=ONE, video=CLIP), "image and video are given"),
    "latents too": (dict(image=ONE, clean_latents=LATENTS), "image and clean_latents are given"),
    "image for an image": (dict(image=ONE, num_frames=1), "num_frames=1 makes an image"),
    "video for an image": (dict(video=CLIP, num_frames=1), "num_frames=1 makes an image"),
    "short": (dict(video=CLIP[:4]), "has 4 frames and 5 are needed"),
    "short for the end": (dict(video=CLIP[:8], condition_frames=[-1]), "8 frames and 9 are needed"),
    "frame 3 of 3": (dict(video=CLIP, condition_frames=[0, 3]), "has 3, but .* frames 0 to 2"),
    "frame -4 of 3": (dict(video=CLIP, condition_frames=[-4]), "has -4, but .* frames 0 to 2"),
    "no frame": (dict(video=CLIP, condition_frames=[]), "at least one"),
    "half a frame": (dict(video=CLIP, condition_frames=[0.5]), "whole numbers"),
    "frames in words": (dict(video=CLIP, condition_frames="0,1"), "whole numbers"),
    "frames alone": (dict(condition_frames=[0]), "condition_frames belongs to video"),
    "frames of an image": (dict(image=ONE, condition_frames=[0]), "give video instead of image"),
    "end alone": (dict(image=ONE, keep="last"), "keep belongs to video, which is not given"),
    "true": (dict(video=CLIP, condition_frames=[True]), "whole numbers"),
    "all frames": (dict(video=CLIP, num_frames=5), "all 2 latent frames are given"),
    "neither end": (dict(video=CLIP, keep="middle"), "keep='middle'"),
    "five channels": (dict(image=np.zeros((9, 9, 5), np.uint8)), "channels, 1 to 4"),
    "clip of five channels": (dict(video=np.zeros((9, 9, 9, 5), np.uint8)), "channels, 1 to 4"),
    "floats to 255": (dict(image=ONE.astype(np.float32)), "divide by 255"),
    "empty image": (dict(image=np.zeros((0, 9, 3), np.uint8)), "none empty"),
    "no frames": (dict(video=[]), "no frames"),
    "frames of two sizes": (dict(video=[ONE, CLIP[0], ONE, ONE, ONE]), "one size"),
    "images for others": (dict(image=[ONE, ONE]), "2 images for 1 prompts"),
    "no images": (dict(image=[]), "0 images for 1 prompts"),
    "mask alone": (dict(frame_mask=MASK), "frame_mask belongs to clean_latents"),
    "mask of numbers": (dict(clean_latents=LATENTS, frame_mask=MASK * 1), "holds int64: give bool"),
    "latents alone": (dict(clean_latents=LATENTS), "without frame_mask"),
    "mask of two": (dict(clean_latents=LATENTS, frame_mask=MASK[:, :2]), "frame_mask has shape"),
    "latents of two": (dict(clean_latents=LATENTS[:, :, :2], frame_mask=MASK), "has shape"),
    "NaN": (dict(clean_latents=LATENTS * np.nan, frame_mask=MASK), "NaN"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_before_weights_are_read(public_checkpoint, name):
    settings, message = BAD[name]
    config, tokenizer = find.open_folder(public_checkpoint)
    with pytest.raises(ValueError, match=message):
        prepare_request(config, tokenizer, PROMPT, **SETTINGS | settings)


def broken_files(folder) -> dict:
    """Files that are no image or no clip, by what is wrong with them."""
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("not a picture")
    save(ONE, folder / "whole.png")
    Image.fromarray(ONE[..., 0].astype(np.uint16)).save(folder / "16bit.png")
    size = (30000).to_bytes(4, "little") * 2  # a header of 900 megapixels, and no pixels
    (folder / "bomb.bmp").write_bytes(
        b"BM" + bytes(12) + b"\x28\0\0\0" + size + b"\1\0\x18" + bytes(25)
    )
    (folder / "cut.png").write_bytes((folder / "whole.png").read_bytes()[:200])
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "noise.mp4").write_bytes(np.random.RandomState(0).bytes(4000))
    with av.open(folder / "sound.mp4", "w") as container:
        stream = container.add_stream("aac", rate=48000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 48000
        container.mux([*stream.encode(frame), *stream.encode()])
    return {
        "image": [
            "empty.png",
            "text.png",
            "cut.png",
            "16bit.png",
            "bomb.bmp",
            "sound.mp4",
            "absent.png",
            ".",
        ],
        "video": ["empty.mp4", "noise.mp4", "sound.mp4", "text.png", "absent.mp4", "."],
    }


@pytest.mark.parametrize("kind", ["image", "video"])
def test_broken_files_are_refused_by_name(public_checkpoint, tmp_path, kind):
    config, tokenizer = find.open_folder(public_checkpoint)
    for name in broken_files(tmp_path)[kind]:
        with pytest.raises((ValueError, OSError)) as caught:
            path = tmp_path / name
            prepare_request(config, tokenizer, PROMPT, **SETTINGS | {kind: path})
        assert str(path) in str(caught.value), name


def test_a_clip_that_is_cut_off(model, tmp_path):
    """It says how long it should be; what is at its end cannot be known."""
    video = {"video": np.repeat(CLIP, 8, axis=0)[None].transpose(0, 4, 1, 2, 3) / np.float32(255)}
    path = media.save_mp4(video, tmp_path / "a.mp4", fps=24)
    (tmp_path / "cut.mp4").write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.warns(UserWarning, match="cut.mp4 should have 96 frames and .* can be read"):
        prepare(model, video=tmp_path / "cut.mp4", keep="last")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepare(model, video=path, keep="last")
        prepare(model, video=tmp_path / "cut.mp4")


def test_requests_of_research_code_are_checked(model):
    """Its arrays come without `prepare`."""
    request = prepare(model, image=ONE)
    run = functools.partial(generate, model.params, config=model.config, output="latents")
    for change, message in (
        (dict(frame_mask=None), "frame_mask goes with one of"),
        (dict(clean_latents=LATENTS), "frame_mask goes with one of"),
        (dict(frame_mask=np.array([[1, 0, 0]])), "frame_mask holds int64: give bool"),
        (dict(clean_video=request.clean_video[:, :, :, 16:]), r"needs \(1, 3, 'T', 48, 80\)"),
        (dict(clean_video=np.zeros((1, 3, 3, 48, 80), np.float32)), "has 3 frames; give 4k"),
        (dict(clean_video=np.zeros((1, 3, 13, 48, 80), np.float32)), "at most the video's 9"),
        (dict(clean_video=np.zeros((1, 3, 1, 48, 80), np.uint8)), "holds uint8: give floats"),
        (dict(clean_video=request.clean_video[0]), "has shape"),
    ):
        with pytest.raises(ValueError, match=message):
            run(request.replace(**change))


def test_the_autoencoders_refuse_other_arrays(model):
    video, latents = np.zeros((1, 3, 5, 48, 80), np.float32), LATENTS
    sound, waveform = np.zeros((1, 5, 4), np.float32), np.zeros((1, 2, 4000), np.float32)
    for method, array, message in (
        (model.encode_video, video[0], r"\[B, 3, T, H, W\]"),
        (model.encode_video, video.astype(np.uint8), "divided by 255"),
        (model.encode_video, np.moveaxis(video, 1, -1), "with 3 channels"),
        (model.decode_video, latents[0], r"\[B, C, t, h, w\]"),
        (model.decode_video, np.moveaxis(latents, 1, -1), "with 6 channels"),
        (model.decode_sound, sound[0], r"\[B, C_sound, s\]"),
        (model.decode_sound, np.moveaxis(sound, 1, -1), "with 5 channels"),
        (model.encode_sound, waveform[0], r"\[B, channels, samples\]"),
        (model.encode_sound, waveform.astype(np.int16), "int16: give floats"),
    ):
        with pytest.raises(ValueError, match=message):
            method(array)
