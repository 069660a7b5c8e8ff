"""Attention, norms and the embedding of the timestep by themselves."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.models.normalization import RMSNorm as OracleRMSNorm
from rounding import check, relative_l2
from transformer_cases import LAYER, build

from cosmos3_jax.models.attention import attention
from cosmos3_jax.models.layers import RMSNorm, TimestepEmbedding


def of_the_worst_row(found, reference) -> float:
    rows = np.linalg.norm(found - reference, axis=1) / np.linalg.norm(reference, axis=1)
    return float(rows.max())


def test_timestep_embedding_at_every_timestep(record_property):
    model = build()
    timesteps = np.arange(1000)

    def embed(params):
        return np.asarray(TimestepEmbedding(model.config).apply({"params": params}, timesteps))

    params = model.params["gen"]["time_embedder"]
    check(record_property, LAYER, embed, params, distance=of_the_worst_row)
    found = embed(params)
    with torch.no_grad():
        waves = model.oracle.time_proj(torch.from_numpy(timesteps) * model.config.timestep_scale)
        reference = model.oracle.time_embedder(waves).numpy()
    assert of_the_worst_row(found, reference) <= LAYER
    # neighbours are 1e-3 apart, of 7
    assert (np.linalg.norm(np.diff(reference, axis=0), axis=1) > 1e-3).all()


# ---------------------------------------------------------------- layers


def plain_attention(query, key, value, group_of, causal=False) -> np.ndarray:
    """Attention of one example [S, N, H], head by head and query by query, in float64."""
    out = np.zeros(query.shape)
    for head in range(query.shape[1]):
        for i in range(len(query)):
            seen = i + 1 if causal else len(key)
            k, v = (x[:seen, group_of(head)].astype(np.float64) for x in (key, value))
            logits = k @ query[i, head] / np.sqrt(query.shape[-1])
            weights = np.exp(logits - logits.max())
            out[i, head] = weights @ v / weights.sum()
    return out


@pytest.mark.parametrize("kind", ["full", "causal", "with text"])
def test_attention_by_hand(record_property, kind):
    """Query head i reads key head i // group, and of the text the real tokens; not i % heads."""
    heads, groups, tokens = 6, 2, 5
    random = np.random.RandomState(0)
    query, key, value, text_key, text_value = (
        random.standard_normal((2, tokens, n, 8)).astype(np.float32)
        for n in (heads, groups, groups, groups, groups)
    )
    lengths = np.array([tokens, 3], np.int32) if kind == "with text" else np.array([0, 0])
    text = (text_key, text_value, lengths) if kind == "with text" else None

    def run(query, key, value):
        return attention(query, key, value, text=text, causal=kind == "causal")

    check(record_property, LAYER, run, query, key, value)
    found = run(query, key, value)
    for row, length in enumerate(lengths):
        keys = np.concatenate([key[row], text_key[row, :length]])
        values = np.concatenate([value[row], text_value[row, :length]])
        arguments = (query[row], keys, values)
        expected = plain_attention(*arguments, lambda i: i // (heads // groups), kind == "causal")
        assert relative_l2(found[row], expected) <= LAYER
        mistaken = plain_attention(*arguments, lambda i: i % groups, kind == "causal")
        assert relative_l2(found[row], mistaken) > 0.1


def test_rms_norm_epsilon(record_property):
    """Epsilon is added to the mean square, under the root: visible where values are as small."""
    x = 1e-3 * np.random.RandomState(0).standard_normal((4, 64)).astype(np.float32)
    scale = np.linspace(0.5, 2, 64, dtype=np.float32)

    def norm(x, scale):
        return RMSNorm(1e-6, jnp.float32).apply({"params": {"scale": scale}}, x)

    check(record_property, LAYER, norm, x, scale)
    found = norm(x, scale)
    square = np.mean(np.square(x, dtype=np.float64), axis=-1, keepdims=True)
    assert relative_l2(found, x / np.sqrt(square + 1e-6) * scale) <= LAYER
    for mistaken in (np.sqrt(square), np.sqrt(square) + 1e-6, np.sqrt(square + 1e-5)):
        assert relative_l2(found, x / mistaken * scale) > 5e-4


def test_rms_norm_rounds_before_the_scale():
    """The normalised value is rounded to bfloat16, then scaled; the other order often differs."""
    random = np.random.RandomState(0)
    x, scale = (
        torch.from_numpy(random.standard_normal(shape)).bfloat16() for shape in ((64, 64), 64)
    )
    norm = OracleRMSNorm(64, eps=1e-6)
    norm.weight.data = scale
    with torch.no_grad():
        expected = norm(x).float().numpy()
        exact = torch.nn.functional.rms_norm(x.float(), (64,), scale.float(), eps=1e-6)
    params = {"params": {"scale": jnp.asarray(scale.float().numpy(), jnp.bfloat16)}}
    found = RMSNorm(1e-6, jnp.bfloat16).apply(params, jnp.asarray(x.float().numpy(), jnp.bfloat16))
    found = np.asarray(found, np.float32)
    # a last-bit difference of the two float32 roots crosses a bfloat16 boundary once in 10,000
    assert (found != expected).mean() <= 1e-3
    assert (found != exact.bfloat16().float().numpy()).mean() > 0.1
