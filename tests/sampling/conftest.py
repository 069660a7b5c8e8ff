"""The pure function on one request."""

from functools import partial

import jax
import pytest
from generate_cases import PROMPT, SETTINGS

from cosmos3_jax import generate


@pytest.fixture(scope="module")
def request_(model):
    return model.prepare(PROMPT, **SETTINGS)


@pytest.fixture(scope="module")
def jitted(model):
    """`generate` to latents, jitted once for the whole module."""
    return jax.jit(partial(generate, config=model.config, output="latents"))


@pytest.fixture(scope="module")
def run(jitted, model):
    return partial(jitted, model.params)
