"""Fixtures that several test files share."""

import functools

import pytest
from oracle import load_pipeline, save_pipeline


@pytest.fixture(scope="session")
def public_checkpoint(tmp_path_factory):
    """A small checkpoint with sound, saved by the oracle in the public layout."""
    folder = tmp_path_factory.mktemp("public") / "checkpoint"
    save_pipeline(folder)
    return folder


@pytest.fixture(scope="session")
def silent_checkpoint(tmp_path_factory):
    """The same without sound."""
    folder = tmp_path_factory.mktemp("silent") / "checkpoint"
    save_pipeline(folder, sound_gen=False)
    return folder


@pytest.fixture(scope="module")
def oracle(public_checkpoint):
    """(schedule, dtype) -> the oracle's pipeline on that checkpoint, loaded once."""
    return functools.cache(functools.partial(load_pipeline, public_checkpoint))
