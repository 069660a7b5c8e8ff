"""Rates of the products, attentions and convolutions that the full-size model is made of.

One formulation beside another: what to choose is decided here, before the model is changed.

python benchmarks/kernels.py [gemm attention conv] --out FILE.json
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
from jax._src.cudnn.fused_attention_stablehlo import MaskType
from jax._src.cudnn.fused_attention_stablehlo import dot_product_attention as cudnn_attention

from cosmos3_jax.flash_attention import flash_attention

TOKENS = {"720p": 44160, "480p": 18720, "256p": 5760}  # 256p: both guidance branches as one batch
GEMMS = {"qkv": (4096, 6144), "out": (4096, 4096), "gate_up": (4096, 24576), "down": (12288, 4096)}


def random(shape: tuple[int, ...], seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


def seconds(function: Callable, *arguments, repeats: int = 5, inner: int = 4) -> float:
    """Median time of one call, several calls a sample so that dispatch hides."""
    function = jax.jit(function)
    jax.block_until_ready(function(*arguments))
    jax.block_until_ready(function(*arguments))
    samples = []
    for _ in range(repeats):
        start = time.perf_counter()
        results = [function(*arguments) for _ in range(inner)]
        jax.block_until_ready(results[-1])
        samples.append((time.perf_counter() - start) / inner)
        del results
    return statistics.median(samples)


def row(name: str, duration: float, flops: float) -> dict:
    print(f"{name:60} {duration * 1e3:9.3f} ms {flops / duration / 1e12:8.1f} TFLOP/s", flush=True)
    return {"name": name, "ms": duration * 1e3, "tflops": flops / duration / 1e12}


def gemm() -> list[dict]:
    rows = []
    for size, tokens in TOKENS.items():
        for name, (k, n) in GEMMS.items():
            x = random((tokens, k))
            for layout, equation, shape in (
                ("kn", "sk,kn->sn", (k, n)),
                ("nk", "sk,nk->sn", (n, k)),
            ):
                w = random(shape, 1) * k**-0.5
                duration = seconds(lambda x, w, e=equation: jnp.einsum(e, x, w), x, w)
                rows.append(
                    row(
                        f"gemm {size} {name} {tokens}x{k}x{n} weight {layout}",
                        duration,
                        2 * tokens * k * n,
                    )
                )
    return rows


def attend(q, k, v, length=None, residual=False):
    lengths = {}
    if length is not None:
        lengths = {
            "q_seqlen": jnp.full((q.shape[0],), q.shape[1], jnp.int32),
            "kv_seqlen": jnp.full((q.shape[0],), length, jnp.int32),
        }
    return cudnn_attention(
        q, k, v, scale=q.shape[-1] ** -0.5, return_residual=residual,
        mask_type=MaskType.NO_MASK if length is None else MaskType.PADDING, **lengths,
    )  # fmt: skip


def split(q, k, v, large: int, length: int):
    """Video keys without a mask, the rest with one, merged by their log-sum-exps."""
    a, la = attend(q, k[:, :large], v[:, :large], residual=True)
    b, lb = attend(q, k[:, large:], v[:, large:], length, residual=True)
    weight = jnp.swapaxes(jax.nn.sigmoid(lb - la), 1, 2)[..., None]
    return (a + weight * (b - a)).astype(q.dtype)


def attention() -> list[dict]:
    rows = []
    for size, tokens in (("720p", 44160), ("480p", 18720), ("256p", 2880)):
        batch = 2 if size == "256p" else 1
        cases = {
            "video only, aligned": (tokens, tokens, None, None),
            "+512, no mask": (tokens, tokens + 512, None, None),
            "+500, no mask": (tokens, tokens + 500, None, None),
            "+512, mask at 500": (tokens, tokens + 512, tokens + 500, None),
            "+512, split, mask at 500": (tokens, tokens + 512, 500, tokens),
            "+1536, mask at 1400": (tokens, tokens + 1536, tokens + 1400, None),
            "+1536, split, mask at 1400": (tokens, tokens + 1536, 1400, tokens),
            "sound, +197+512 padded to 768, split": (tokens + 197, tokens + 768, 697, tokens),
            "sound, queries padded to 256": (tokens + 256, tokens + 768, 697, tokens),
        }
        for name, (queries, keys, length, large) in cases.items():
            q = random((batch, queries, 32, 128))
            k, v = random((batch, keys, 8, 128), 1), random((batch, keys, 8, 128), 2)
            if large is None:
                run = lambda q, k, v, n=length: attend(q, k, v, n)  # noqa: E731
            else:
                run = lambda q, k, v, n=length, m=large: split(q, k, v, m, n)  # noqa: E731
            flops = 4 * batch * queries * keys * 32 * 128
            rows.append(
                row(f"attention {size} {name}", seconds(run, q, k, v, repeats=3, inner=2), flops)
            )
            if large is None:
                real = jnp.full((batch,), length or keys, jnp.int32)
                duration = seconds(flash_attention, q, k, v, real, repeats=3, inner=2)
                rows.append(row(f"attention {size} {name}, our kernel", duration, flops))
    return rows


def conv3d(x, w):  # x [B, T + 2, H, W, C], w [3, 3, 3, C, D]
    dims = ("NDHWC", "DHWIO", "NDHWC")
    return jax.lax.conv_general_dilated(
        x, w, (1, 1, 1), ((0, 0), (1, 1), (1, 1)), dimension_numbers=dims
    )


def conv2d(x, w):  # x [B, T, H, W, C], w [3, 3, C, D]
    flat = x.reshape(-1, *x.shape[2:])
    y = jax.lax.conv_general_dilated(
        flat, w, (1, 1), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return y.reshape(*x.shape[:2], *y.shape[1:])


def conv_folded(x, w):
    """Three frames side by side in the channels, one convolution a frame."""
    frames = x.shape[1] - 2
    folded = jnp.concatenate([x[:, i : i + frames] for i in range(3)], axis=-1)
    return conv2d(folded, jnp.concatenate([w[0], w[1], w[2]], axis=2))


def conv_summed(x, w):
    """A convolution for each of the kernel's three frames, added."""
    frames = x.shape[1] - 2
    return sum(conv2d(x[:, i : i + frames], w[i]) for i in range(3))


def conv() -> list[dict]:
    rows = []
    shapes = [
        (2, 90, 160, 1024, 1024),
        (4, 180, 320, 1024, 512),
        (4, 180, 320, 512, 512),
        (4, 360, 640, 512, 256),
        (4, 360, 640, 256, 256),
    ]
    for frames, height, width, channels, features in shapes:
        for chunk in (1, 2):
            t = frames * chunk
            x = random((1, t + 2, height, width, channels))
            w = random((3, 3, 3, channels, features), 1) * (27 * channels) ** -0.5
            flops = 2 * 27 * channels * features * t * height * width
            for form in (conv3d, conv_folded, conv_summed):
                name = f"conv {t}x{height}x{width} {channels}->{features} {form.__name__}"
                rows.append(row(name, seconds(form, x, w, repeats=3), flops))
    x, w = random((1, 4, 360, 640, 512)), random((3, 3, 512, 512), 1) * (9 * 512) ** -0.5
    rows.append(
        row("conv2d 4x360x640 512->512", seconds(conv2d, x, w), 2 * 9 * 512 * 512 * 4 * 360 * 640)
    )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*", default=["gemm", "attention", "conv"])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device = jax.devices()[0].device_kind
    result = {"device": device, "jax": jax.__version__}
    for kind in options.kinds:
        start = time.perf_counter()
        result[kind] = globals()[kind]()
        print(f"{kind}: {time.perf_counter() - start:.0f} s in all", flush=True)
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
