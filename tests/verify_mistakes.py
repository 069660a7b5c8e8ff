"""Mistakes that `test_verify_mutations.py` makes in tensors and in code, and how it checks them."""

import dataclasses
import json
from pathlib import Path

import numpy as np
from checkpoint_files import CONVERTED, link_checkpoint, read_tensors, replace_file
from safetensors.numpy import save

from convert.verify import cli
from cosmos3_jax.config import VideoVAEConfig
from cosmos3_jax.models import video_vae_modules


def verify(tmp_path: Path, checkpoint: Path, component: str, *options: str) -> tuple[int, dict]:
    """The exit status and the report."""
    report = tmp_path / "report"
    arguments = [checkpoint, "--component", component, "--dtype", "float32", "--report", report]
    status = cli.main([str(argument) for argument in (*arguments, *options)])
    return status, json.loads((report / "verify.json").read_text())


def spoil(converted: Path, target: Path, component: str, change) -> Path:
    """A copy of the converted checkpoint in which `change` has worked on a component's tensors."""
    folder = link_checkpoint(converted, target) / component
    tensors = read_tensors(folder)
    change(tensors)
    contiguous = {key: np.ascontiguousarray(value) for key, value in tensors.items()}
    [shard] = folder.glob(f"{CONVERTED}-*.safetensors")
    replace_file(shard, save(contiguous, {"format": "pt"}))
    return target


def exchange(tensors: dict, one: str, other: str) -> None:
    tensors[one], tensors[other] = tensors[other], tensors[one]


def transpose_square(tensors: dict, key: str) -> None:
    kernel = tensors[key]
    square = kernel.reshape(kernel.shape[-1], -1)
    assert square.shape[0] == square.shape[1]
    tensors[key] = square.T.reshape(kernel.shape)


def turn(kernel: np.ndarray) -> np.ndarray:
    """The rows of a convolution for its columns."""
    assert kernel.shape[1] == kernel.shape[2]
    return kernel.swapaxes(1, 2)


def blamed(report: dict) -> list[str]:
    """The operations of all places, in order."""
    return [place["operation"] for place in report["places"]]


def fold_over_the_first_axis(direction, gain):
    """As if the first axis were not the one that is kept."""
    norm = np.sqrt(np.sum(np.square(direction.swapaxes(0, 1)), (1, *range(2, direction.ndim))))
    shape = (1, -1) + (1,) * (direction.ndim - 2)
    return gain * direction / norm.reshape(shape)


def wrong_patch_order(array, pattern, **sizes):
    """Height before width within a pixel's patch, in both directions."""
    return RIGHT_REARRANGE(array, pattern.replace("(C w h)", "(C h w)"), **sizes)


RIGHT_REARRANGE = video_vae_modules.rearrange


def with_other_statistics(monkeypatch, change):
    """Our parser makes wrong statistics of the latents of the configuration."""
    right = VideoVAEConfig.from_file.__func__

    def wrong(kind, path):
        config = right(kind, path)
        return dataclasses.replace(config, latents_std=change(config.latents_std))

    monkeypatch.setattr(VideoVAEConfig, "from_file", classmethod(wrong))
