"""Fixtures of the checkpoints' tests."""

import pytest
from checkpoint_files import SHARD_BYTES, link_checkpoint

from cosmos3_jax.checkpoint.convert import convert_checkpoint


@pytest.fixture(scope="module")
def converted(public_checkpoint, tmp_path_factory):
    """The checkpoint in our layout, in bfloat16 and several shards."""
    target = tmp_path_factory.mktemp("converted") / "nested" / "checkpoint"
    return convert_checkpoint(public_checkpoint, target, max_shard_bytes=SHARD_BYTES)


@pytest.fixture
def broken(public_checkpoint, tmp_path):
    """A checkpoint that a test may damage."""
    return link_checkpoint(public_checkpoint, tmp_path / "broken")
