"""Trees taken apart and put together by the paths of their leaves."""

import pytest

from cosmos3_jax.training.params import join_params


def test_trees_that_share_a_leaf_are_not_joined():
    """Or frozen weights would hide those that learn, and nothing would be learnt."""
    learns = {"gen": {"a": {"kernel": 1}}}
    assert join_params(learns, {"gen": {"a": {"bias": 2}}}) == {
        "gen": {"a": {"kernel": 1, "bias": 2}}
    }
    with pytest.raises(ValueError, match="both trees have gen/a/kernel"):
        join_params(learns, {"gen": {"a": {"kernel": 3}}})
