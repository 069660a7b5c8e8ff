"""Valid files of every kind, made once: what the fuzzers damage."""

import json
import os
import shutil
import sys
import traceback
from pathlib import Path

import av
import numpy as np
import pytest
from command_line import without_a_model
from PIL import Image
from safetensors.numpy import save_file

from cosmos3_jax.checkpoint import lora_spellings, random_checkpoint
from cosmos3_jax.checkpoint.load import load_config
from cosmos3_jax.checkpoint.lora import families
from cosmos3_jax.cli import main as cli
from cosmos3_jax.io import media

IMAGES = ("png", "jpg", "webp", "gif", "tiff", "bmp", "avif", "ico", "ppm")
VIDEOS = ("mp4", "webm", "mov", "gif", "webp", "mkv")
RANK = 2
STATE = {"samples": np.zeros((1, 4, 3), np.float32), "step": np.int32(3)}


def make(folder: Path, training: bool = True) -> None:
    """Fill a folder, in a process of its own: this one starts no device.

    Raises RuntimeError if that process fails.
    """
    sys.stdout.flush()
    if (child := os.fork()) == 0:
        status = 1
        try:
            _make(folder, training)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    if os.waitpid(child, 0)[1]:
        raise RuntimeError("the originals could not be made")


def _make(folder: Path, training: bool) -> None:
    folder.mkdir(parents=True)
    shutil.copytree(random_checkpoint.cached(), folder / "checkpoint")
    _make_loras(folder / "lora", folder / "checkpoint")
    _make_media(folder / "media")
    random = np.random.RandomState(0)
    noise = random.standard_normal((1, 48, 2, 2, 2)).astype(np.float32)
    np.savez(folder / "noise.npz", noise=noise, sound_noise=noise[:, :, 0, 0])
    identity = {"prompt": json.dumps("a"), "dtype": json.dumps("float32")}
    np.savez(folder / "state.npz", done=np.int32(1), identity=json.dumps(identity), **STATE)
    _make_records(folder / "records")
    if training:
        _make_training(folder / "training")


def _make_loras(folder: Path, checkpoint: Path) -> None:
    """The same adapter in four spellings."""
    config, random = load_config(checkpoint).transformer, np.random.RandomState(0)
    tensors: dict[tuple[str, str], np.ndarray] = {}
    shapes = json.loads((checkpoint / "transformer" / INDEX).read_text())["weight_map"]
    from safetensors import safe_open

    for family in [*families(config).values()][:6]:
        for module in family.modules[:2]:
            key = f"{module}.weight"
            with safe_open(checkpoint / "transformer" / shapes[key], "numpy") as file:
                outputs, inputs = file.get_slice(key).get_shape()
            for half, shape in (("A", (RANK, inputs)), ("B", (outputs, RANK))):
                tensors[module, half] = random.standard_normal(shape).astype(np.float32) / 10
    folder.mkdir()
    peft = {f"base_model.model.{m}.lora_{half}.weight": x for (m, half), x in tensors.items()}
    (folder / "peft").mkdir()
    save_file(peft, folder / "peft" / "adapter_model.safetensors")
    config_file = folder / "peft" / lora_spellings.PEFT_CONFIG
    config_file.write_text(json.dumps(PEFT | {"target_modules": sorted({m for m, _ in tensors})}))
    diffusers = {f"transformer.{m}.lora_{half}.weight": x for (m, half), x in tensors.items()}
    save_file(diffusers, folder / "diffusers.safetensors")
    kinds = {"A": "lora_down", "B": "lora_up"}
    kohya = {
        f"lora_unet_{m.replace('.', '_')}.{kinds[half]}.weight": x
        for (m, half), x in tensors.items()
    }
    alphas = {f"lora_unet_{m.replace('.', '_')}.alpha": np.float32([1.0])[0] for m, _ in tensors}
    save_file(kohya | {name: np.asarray(x) for name, x in alphas.items()},
              folder / "kohya.safetensors")  # fmt: skip
    comfy = {f"diffusion_model.{m}.lora_{half}.weight": x for (m, half), x in tensors.items()}
    save_file(comfy, folder / "comfy.safetensors")


INDEX = "diffusion_pytorch_model.safetensors.index.json"
PEFT = {
    "peft_type": "LORA", "r": RANK, "lora_alpha": 4, "rank_pattern": {}, "alpha_pattern": {},
    "use_rslora": False, "use_dora": False, "bias": "none", "init_lora_weights": True,
    "fan_in_fan_out": False, "modules_to_save": None, "task_type": None,
}  # fmt: skip


def _make_media(folder: Path) -> None:
    folder.mkdir()
    random = np.random.RandomState(1)
    pixels = random.randint(0, 255, (24, 40, 4), np.uint8)
    for suffix in IMAGES:
        mode = "RGBA" if suffix in ("png", "webp", "tiff") else "RGB"
        image = Image.fromarray(pixels[..., : len(mode)]).convert(mode)
        image.save(folder / f"image.{suffix}")
    image = Image.fromarray(pixels[..., 0] % 4, "P")
    image.putpalette(random.randint(0, 255, 768).tolist())
    image.save(folder / "palette.png", transparency=1)
    Image.fromarray(pixels[..., :3]).save(folder / "exif.jpg", exif=Image.Exif())
    video = random.uniform(0, 1, (3, 5, 32, 48)).astype(np.float32)
    sound = random.uniform(-0.5, 0.5, (2, 10_000)).astype(np.float32)
    output = {"video": video, "sound": sound, "sample_rate": 48_000, "fps": 24.0}
    for suffix in ("mp4", "webm", "mov"):
        media.save_video(output, folder / f"video.{suffix}")
    for suffix in ("gif", "webp"):
        media.save_video(video, folder / f"video.{suffix}", fps=24)
    with av.open(folder / "video.mkv", "w") as container:
        stream = container.add_stream("mpeg4", rate=24)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for t in range(5):
            frame = np.ascontiguousarray(np.moveaxis(np.uint8(255 * video[:, t]), 0, -1))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        container.mux(stream.encode())


def _make_records(folder: Path) -> None:
    """Of a video and an image that come of no weights."""
    small = ["generate", "--checkpoint", "random", "--height", "32", "--width", "32", "--steps"]
    with pytest.MonkeyPatch.context() as patch:
        without_a_model(patch)
        for name, frames in (("image.png", "1"), ("video.mp4", "5")):
            out = str(folder / name)
            status = cli.main([*small, "2", "--frames", frames, "--out", out, "a red ball"])
            if status:
                raise RuntimeError(f"{name} was not made")


def _make_training(folder: Path) -> None:
    """Two saved states, as after two steps."""
    import jax.numpy as jnp
    import training_run

    from cosmos3_jax.training.checkpoints import Checkpoints

    state, _ = training_run.start()
    with Checkpoints(folder) as states:
        for step in (1, 2):
            states.save(state.replace(step=jnp.int32(step)))
