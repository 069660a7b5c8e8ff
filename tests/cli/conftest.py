"""Fixtures of the command line's tests."""

import pytest

from cosmos3_jax import Cosmos3


@pytest.fixture(scope="module")
def model(own_cache):
    """The model that `--checkpoint random` opens."""
    return Cosmos3.from_pretrained("random", dtype="float32")
