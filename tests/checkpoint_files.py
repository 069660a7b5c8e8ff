"""Checkpoints on disk as tests handle them: read by hand, damaged on purpose, compared."""

import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

from cosmos3_jax.checkpoint import load

PUBLIC, CONVERTED = "diffusion_pytorch_model", "params"
INDEX = f"{PUBLIC}.safetensors.index.json"
SHARD_BYTES = 200_000  # several shards for each component of the small checkpoints


def read_tensors(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of a component folder, by the name it is stored under."""
    shards = sorted(folder.glob("*.safetensors"))
    assert shards, folder
    return {key: value for shard in shards for key, value in load_file(shard).items()}


def load_tree(folder: Path, dtype: str = "float32", load_sound: bool | None = None) -> dict:
    config = load.load_config(folder, load_sound)
    return load.load_params(load.open_components(folder, config), jnp.dtype(dtype))


def open_checkpoint(folder: Path, load_sound: bool | None = None) -> list[load.Component]:
    return load.open_components(folder, load.load_config(folder, load_sound))


def link_checkpoint(source: Path, target: Path) -> Path:
    """A copy whose files can be removed and replaced, but not changed in place."""
    return shutil.copytree(source, target, copy_function=os.link)


def write_tensors(folder: Path, tensors: dict[str, np.ndarray]) -> None:
    """Replace the weights of a public component by these, in one file."""
    for path in (*folder.glob("*.safetensors"), *folder.glob("*.index.json")):
        path.unlink()
    contiguous = {key: np.ascontiguousarray(value) for key, value in tensors.items()}
    save_file(contiguous, folder / f"{PUBLIC}.safetensors")


def replace_file(path: Path, content: bytes) -> None:
    """Give a linked file other content, leaving what it was linked to alone."""
    path.unlink()
    path.write_bytes(content)


def update_json(path: Path, **values) -> None:
    changed = json.loads(path.read_text()) | values
    replace_file(path, json.dumps(changed).encode())


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, by its path inside it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def assert_same_folder(folder: Path, expected: Path) -> None:
    """The same files with the same bytes, hidden ones included."""
    ours, theirs = contents(folder), contents(expected)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == []


def assert_same_tree(tree: dict, expected: dict) -> None:
    """The same leaves with the same dtypes and the same bits."""
    assert jax.tree.structure(tree) == jax.tree.structure(expected)
    for (path, ours), theirs in zip(
        jax.tree.leaves_with_path(tree), jax.tree.leaves(expected), strict=True
    ):
        name = jax.tree_util.keystr(path)
        assert ours.dtype == theirs.dtype, name
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs), err_msg=name)
