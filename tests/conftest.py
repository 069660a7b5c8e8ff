"""Fixtures that several test files share."""

import functools

import pytest
import torch
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


@pytest.fixture(scope="module")
def one_torch_thread():
    """At these sizes a second thread only waits for the first, and takes the core from others."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
