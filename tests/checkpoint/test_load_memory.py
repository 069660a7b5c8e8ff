"""Host memory: converting and loading need little, however large the checkpoint is."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_files import link_checkpoint, update_json, write_tensors

from cosmos3_jax.checkpoint.layouts import transformer_layout
from cosmos3_jax.checkpoint.rules import leaf_shapes
from cosmos3_jax.config import TransformerConfig
from cosmos3_jax.models import transformer

MEBIBYTE = 2**20
WIDE = dict(
    hidden_size=1024, num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=2,
    head_dim=128, intermediate_size=4096, vocab_size=264, rope_axes_dim=[24, 20, 20],
    latent_channel=6, patch_latent_dim=24, sound_gen=False,
)  # fmt: skip


@pytest.fixture(scope="module")
def large_checkpoint(silent_checkpoint, tmp_path_factory):
    """A transformer of 323 MiB in bfloat16: wide layers, arbitrary bytes."""
    folder = tmp_path_factory.mktemp("large") / "checkpoint"
    link_checkpoint(silent_checkpoint, folder)
    update_json(folder / "transformer" / "config.json", **WIDE)
    config = TransformerConfig.from_dict(WIDE)
    leaves = leaf_shapes(transformer.param_shapes(config))
    supply = np.random.RandomState(0).randint(0, 2**14, 4096 * 1024).astype(np.uint16)
    supply = supply.view(jnp.bfloat16)  # small positive numbers
    tensors = {
        key: supply[: int(np.prod(shape))].reshape(shape)
        for rule in transformer_layout(config).rules
        for key, shape in rule.public_shapes(leaves[rule.leaf]).items()
    }
    write_tensors(folder / "transformer", tensors)
    yield folder
    shutil.rmtree(folder.parent)


# Sizes are resident bytes, whose peak the kernel keeps. Weights are read without mapping them, so
# pages of files are not among them. A small checkpoint goes first, for libraries and compilation.
PEAK = """
import sys
from pathlib import Path
import jax
import jax.numpy as jnp
from cosmos3_jax.checkpoint import load
from cosmos3_jax.checkpoint.convert import convert_checkpoint

def status(name):
    [line] = [x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name)]
    return int(line.split()[1]) * 1024

def read(folder):
    return load.load_params(load.open_components(folder, load.load_config(folder)), jnp.bfloat16)

small, large, target = map(Path, sys.argv[1:])
"""


def peak(script: str, *folders: Path) -> int:
    """What a script prints: bytes of growth."""
    command = [sys.executable, "-c", PEAK + script, *folders]
    # What is freed goes back at once, so that it is not counted with what is needed.
    environment = dict(os.environ, MALLOC_MMAP_THRESHOLD_="1000000")
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measured in /proc")


@needs_proc
def test_conversion_needs_little_memory(silent_checkpoint, large_checkpoint, tmp_path):
    """A shard of 32 MiB and a tensor of 8 MiB, whatever the size of the checkpoint, here 323 MiB.

    Measured: 41 MiB. A second copy of the shard would make it 72, a stacked leaf 96 and more.
    """
    script = """
convert_checkpoint(small, target / "small")
before = status("VmRSS")
convert_checkpoint(large, target / "large", max_shard_bytes=32 * 2**20)
print(status("VmHWM") - before)
"""
    growth = peak(script, silent_checkpoint, large_checkpoint, tmp_path)
    shutil.rmtree(tmp_path / "large")
    assert growth < 60 * MEBIBYTE


@needs_proc
def test_loading_needs_little_memory_beyond_the_weights(
    silent_checkpoint, large_checkpoint, tmp_path
):
    """On a CPU the weights stay in host memory; above them come 16 MiB that are read ahead, and the
    tensor that is placed, of 16 MiB and in the public layout once more, transposed.

    Measured: 66 to 70 MiB. A leaf, of 96 MiB, is never there twice.
    """
    script = """
from cosmos3_jax.checkpoint import place
place.READ_AHEAD_BYTES = 16 * 2**20
read(small)
before = status("VmRSS")
params = read(large)
size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
print(status("VmHWM") - before - size)
"""
    growth = peak(script, silent_checkpoint, large_checkpoint, tmp_path)
    assert growth < 90 * MEBIBYTE
