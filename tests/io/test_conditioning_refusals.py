"""Images, clips, latents and masks that cannot be used are refused by name."""

import functools
import warnings

import av
import numpy as np
import pytest
from conditioning_cases import CLIP, LATENTS, ONE, save
from oracle import PROMPT, SETTINGS, prepare
from PIL import Image

from cosmos3_jax import generate
from cosmos3_jax.checkpoint import find
from cosmos3_jax.io import media
from cosmos3_jax.io.prepare import prepare_request

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
    Image.fromarray(ONE[..., 0].astype(np.float32)).save(folder / "32bit.tiff")
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
            "32bit.tiff",
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
        warnings.filterwarnings("ignore", "outside of what the model was trained on")
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
