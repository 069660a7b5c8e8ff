"""What only a CUDA GPU can show: attention kernels, TF32 and the device's own cosines."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rounding import relative_l2

from cosmos3_jax.config import TransformerConfig, VideoVAEConfig
from cosmos3_jax.models import attention as attention_module
from cosmos3_jax.models import flash_attention, rope, transformer, video_vae
from cosmos3_jax.models.attention import Projected, attention, attention_of_product

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def kernels(dry, monkeypatch):
    """With --dry XLA's attention stands for cuDNN's, and for our kernel."""
    if dry:
        monkeypatch.setattr(attention_module, "cudnn_attention", attention_module.xla_attention)


def cudnn(*arguments):
    return attention_module.cudnn_attention(*arguments)


# Two roundings to bfloat16, of 1.7e-3 each on average.
SAME_IN_BFLOAT16 = 5e-3


def attention_inputs(media: int, text: int):
    """Queries, keys and values of the media tokens, keys and values of padded text; 8 heads on
    2.
    """
    shapes = [(1, media, 8, 128), *[(1, media, 2, 128)] * 2, *[(1, text, 2, 128)] * 2]
    return [jax.random.normal(jax.random.key(i), s, jnp.bfloat16) for i, s in enumerate(shapes)]


def masked(query, key, value, text_key, text_value, length):
    """One attention over all keys with a mask."""
    keys, values = (jnp.concatenate(pair, 1) for pair in ((key, text_key), (value, text_value)))
    return cudnn(query, keys, values, key.shape[1] + length)


def float32_rows(query, key, value, text_key, text_value, length, rows):
    """Exact attention of a few query rows."""
    key, value = (
        jnp.concatenate([a, b[:, :length]], 1).astype(jnp.float32)
        for a, b in ((key, text_key), (value, text_value))
    )
    with jax.default_matmul_precision("highest"):
        return jax.nn.dot_product_attention(query[:, rows].astype(jnp.float32), key, value)


# Whole numbers of key and query blocks, and not; text that ends inside a block, and at its end.
@pytest.mark.parametrize("media", [1024, 2880, 33089])
@pytest.mark.parametrize("length", [1, 300, 512])
def test_flash_attention_is_exact(media, length, dry):
    media = media // 64 if dry else media
    arrays = attention_inputs(media, 512)
    lengths = jnp.array([length])
    obstacle = flash_attention.obstacle(arrays[1], jax.devices()[0])
    assert dry or obstacle is None, "these tests need a Hopper GPU"
    ours = attention(*arrays[:3], text=(*arrays[3:], lengths))
    library = masked(*arrays, lengths)
    rows = np.unique([*np.linspace(0, media - 1, 64, dtype=int), media - 2])
    exact = float32_rows(*arrays, length, rows)
    error = relative_l2(ours[:, rows], exact)
    # The same two roundings, of the probabilities and of the result; measured within 1%.
    assert error <= 1.1 * relative_l2(library[:, rows], exact)
    assert error < 5e-3


@pytest.mark.parametrize("media", [1024, 2889, 33089])
def test_attention_of_a_product_is_exact(media, dry):
    """Queries and keys that the kernels norm and rotate."""
    media = media // 64 if dry else media
    query, key, value, *text = attention_inputs(media, 512)
    product = jnp.concatenate([3 * query, 3 * key, value], axis=2)
    scale = jnp.linspace(0.5, 2, 128, dtype=jnp.bfloat16)[None]
    angles = jnp.arange(300, 300 + media)[None, :, None] * 10.0 ** -jnp.linspace(0, 4, 64)
    table = jnp.cos(angles), jnp.sin(angles)
    projected = Projected(product, scale, scale[:, ::-1], table, 2, 1e-6)
    in_float32 = jax.tree.map(lambda x: x.astype(jnp.float32), projected)
    rows = np.linspace(0, media - 1, 64, dtype=int)
    exact = float32_rows(*in_float32.parts(), *text, 300, rows)
    lengths = jnp.array([300])
    library = masked(*projected.parts(), *text, lengths)
    ours = attention_of_product(projected, (*text, lengths))
    assert relative_l2(ours[:, rows], exact) <= 1.1 * relative_l2(library[:, rows], exact)


def test_flash_attention_of_peaked_logits():
    """Every row's maximum moves from block to block: what was summed before must shrink."""
    query, key, value, *text = attention_inputs(1000, 128)
    key = key * jnp.linspace(0, 8, 1000)[None, :, None, None].astype(key.dtype)
    lengths = jnp.array([77])
    ours = attention(query, key, value, text=(*text, lengths))
    exact = float32_rows(query, key, value, *text, 77, np.arange(1000))
    library = masked(query, key, value, *text, lengths)
    assert relative_l2(ours, exact) <= 1.1 * relative_l2(library, exact)


def test_flash_attention_of_a_batch_and_under_vmap():
    """Examples of a batch, and those of vmap, have their own lengths and their own text."""
    arrays = [jnp.concatenate([x, x[:, ::-1], 2 * x]) for x in attention_inputs(600, 256)]
    lengths = jnp.array([256, 3, 131])
    whole = attention(*arrays[:3], text=(*arrays[3:], lengths))
    query, *others = (x[:, None] for x in arrays)
    mapped = jax.vmap(lambda q, k, v, tk, tv, n: attention(q, k, v, text=(tk, tv, n)))(
        query, *others, lengths[:, None]
    )
    for b in range(3):
        alone = attention(
            *(x[b : b + 1] for x in arrays[:3]),
            text=(*(x[b : b + 1] for x in arrays[3:]), lengths[b : b + 1]),
        )
        # Every block of queries is computed alike, whatever the batch; XLA may fuse its scaling
        # otherwise. Mixed-up lengths or text cost more than 0.1.
        assert relative_l2(whole[b], alone[0]) <= SAME_IN_BFLOAT16
        assert relative_l2(mapped[b], alone) <= SAME_IN_BFLOAT16


def test_gradient_of_flash_attention(dry):
    arrays = attention_inputs(91 if dry else 3001, 256)
    lengths = jnp.array([100])
    weights = jax.random.normal(jax.random.key(9), arrays[0].shape, jnp.float32)
    gradient = jax.grad(
        lambda *x: jnp.sum(weights * attention(*x[:3], text=(*x[3:], lengths))), range(5)
    )
    expected = gradient(*(x.astype(jnp.float32) for x in arrays))  # by XLA's kernel
    for ours, theirs in zip(gradient(*arrays), expected, strict=True):
        assert ours.dtype == jnp.bfloat16
        assert relative_l2(ours, theirs) < 1e-2  # two or three roundings of bfloat16, of 2e-3 each


@pytest.mark.parametrize("tokens", [256, 257])
def test_gradient_of_cudnn_attention(tokens):
    """The text tower's: causal, without lengths, of any number of tokens."""
    query, key, value, *_ = attention_inputs(tokens, 1)
    weights = jax.random.normal(jax.random.key(9), query.shape, jnp.float32)
    gradient = jax.grad(lambda *x: jnp.sum(weights * attention(*x, causal=True)), range(3))
    expected = gradient(*(x.astype(jnp.float32) for x in (query, key, value)))
    for ours, theirs in zip(gradient(query, key, value), expected, strict=True):
        assert relative_l2(ours, theirs) < 1e-2


def test_rotary_table_at_production_positions():
    """The device's cosines of float32 angles near 15,600 radians, against float64 of the same
    angles.
    """
    config = TransformerConfig()
    table = jax.jit(
        lambda fps, length: rope.rope_table(
            config, rope.video_positions(config, (48, 4, 4), fps, length)
        )
    )
    fps, length = jnp.array([24.0, 29.97]), jnp.array([300, 1500])
    positions = jax.jit(lambda f, n: rope.video_positions(config, (48, 4, 4), f, n))(fps, length)
    per_slot = np.asarray(positions)[:, rope.axis_of_slot(config)].swapaxes(1, 2)
    angles = (per_slot * rope.inverse_frequencies(config)).astype(np.float64)
    for ours, exact in zip(table(fps, length), (np.cos(angles), np.sin(angles)), strict=True):
        assert (
            np.abs(np.asarray(ours) - exact).max() < 3e-7
        )  # two or three float32 roundings near 1


def test_float32_does_not_fall_to_tf32():
    """A float32 tower and VAE on the GPU agree with the CPU; TF32 would be a thousand times further
    off.
    """
    config = TransformerConfig(
        hidden_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=32, intermediate_size=256, vocab_size=64, rope_axes_dim=(6, 5, 5),
    )  # fmt: skip
    vae = VideoVAEConfig(base_dim=8, decoder_base_dim=8)

    def random(shapes):
        leaves, tree = jax.tree.flatten(shapes)
        rng = np.random.RandomState(0)
        return tree.unflatten(
            [rng.standard_normal(x.shape).astype(np.float32) * 0.1 for x in leaves]
        )

    params = random(transformer.param_shapes(config))
    vae_params = random(video_vae.param_shapes(vae))
    video = np.random.RandomState(1).standard_normal((1, 2, 5, 3, 48)).astype(np.float32)
    sound = np.random.RandomState(2).standard_normal((1, 7, 64)).astype(np.float32)
    ids, mask = np.arange(8, dtype=np.int32)[None], np.ones((1, 8), bool)

    def run():
        condition = transformer.encode_condition(
            params["und"], config, ids, mask, video_shape=(2, 5, 3), fps=24.0, sound_frames=7
        )
        latents = {"video": video, "sound": sound}
        out = transformer.velocity(params["gen"], config, condition, latents, 500)
        return out["video"], out["sound"], video_vae.decode(vae_params, vae, video)

    on_gpu = jax.jit(run)()  # with --dry on the CPU, too
    with jax.default_device(jax.devices("cpu")[0]):
        on_cpu = jax.jit(run)()
    for ours, expected in zip(on_gpu, on_cpu, strict=True):
        assert relative_l2(ours, expected) < 2e-5  # float32; TF32 gives about 1e-3


def test_attention_without_cudnn_refuses_what_cannot_fit(dry):
    query = jax.ShapeDtypeStruct((1, 44160, 32, 128), jnp.float32)
    key = jax.ShapeDtypeStruct((1, 44160, 8, 128), jnp.float32)
    reason = "device is a CPU" if dry else "dtype is float32, not bfloat16 or float16"
    with pytest.raises(ValueError, match=reason):
        jax.eval_shape(attention, query, key, key)
