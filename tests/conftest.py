"""Fixtures that several test files share."""

import pytest
from oracle import save_pipeline


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
