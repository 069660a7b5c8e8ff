"""Time the full-size model's matrix products, attention and convolutions, each in several forms.

python benchmarks/kernels.py [gemm] [attention] [conv] --out FILE.json [--dry]

Without a name, all three. One form beside another tells what to choose before the model is changed.
Attention needs a Hopper GPU, products and convolutions any with enough memory. `--dry` takes tiny
sizes; without a GPU attention is lowered for one, not run, and its rows have no time.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
from jax import Array

# Not `jax.nn.dot_product_attention`, which returns no log-sum-exps: `split` merges by them.
from jax._src.cudnn import fused_attention_stablehlo
from jax._src.cudnn.fused_attention_stablehlo import MaskType
from jax._src.cudnn.fused_attention_stablehlo import dot_product_attention as cudnn_attention

from cosmos3_jax.models.flash_attention import flash_attention
from cosmos3_jax.parallel.device import default_device
from cosmos3_jax.runtime.measure import environment

CUDNN = 91000  # the version that a lowering without a GPU is for


class Sizes(NamedTuple):
    """What is measured.

    Attributes:
        tokens: of a product, by size of the video.
        gemms: in and out channels of a layer's products.
        video: batch and tokens of attention, by size of the video.
        convs: frames, rows, columns, in and out channels of the decoder's convolutions.
        picture: the same of a convolution of single pictures.
    """

    tokens: dict[str, int]
    gemms: dict[str, tuple[int, int]]
    video: dict[str, tuple[int, int]]
    convs: tuple[tuple[int, int, int, int, int], ...]
    picture: tuple[int, int, int, int, int]


NANO = Sizes(
    tokens={"720p": 44160, "480p": 18720, "256p": 5760},  # 256p: both branches as one batch
    gemms={
        "qkv": (4096, 6144),
        "out": (4096, 4096),
        "gate_up": (4096, 24576),
        "down": (12288, 4096),
    },
    video={"720p": (1, 44160), "480p": (1, 18720), "256p": (2, 2880)},
    convs=(
        (2, 90, 160, 1024, 1024),
        (4, 180, 320, 1024, 512),
        (4, 180, 320, 512, 512),
        (4, 360, 640, 512, 256),
        (4, 360, 640, 256, 256),
    ),
    picture=(4, 360, 640, 512, 512),
)
DRY = Sizes(
    tokens={"dry": 6},
    gemms={"qkv": (8, 12)},
    video={"dry": (2, 256)},
    convs=((2, 3, 4, 8, 4),),
    picture=(2, 3, 4, 8, 8),
)


def random(shape: tuple[int, ...], seed: int = 0) -> Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


def on_gpu() -> bool:
    return default_device().platform == "gpu"


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


def attention_seconds(function: Callable, *arguments) -> float | None:
    """The same of a form that needs a GPU. Without one it is lowered alone: None."""
    if on_gpu():
        return seconds(function, *arguments, repeats=3, inner=2)
    with mock.patch.object(fused_attention_stablehlo, "check_cudnn_version", lambda: CUDNN):
        jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",))
    return None


def row(name: str, duration: float | None, flops: float) -> dict:
    if duration is None:
        print(f"{name:60} lowered", flush=True)
        return {"name": name, "ms": None, "tflops": None}
    print(f"{name:60} {duration * 1e3:9.3f} ms {flops / duration / 1e12:8.1f} TFLOP/s", flush=True)
    return {"name": name, "ms": duration * 1e3, "tflops": flops / duration / 1e12}


def gemm(sizes: Sizes) -> Iterator[dict]:
    """Products of a layer, with the weight stored [in, out] and [out, in]."""
    for size, tokens in sizes.tokens.items():
        for name, (k, n) in sizes.gemms.items():
            x = random((tokens, k))
            layouts = {"kn": ("sk,kn->sn", (k, n)), "nk": ("sk,nk->sn", (n, k))}
            for layout, (equation, shape) in layouts.items():
                w = random(shape, 1) * k**-0.5
                duration = seconds(partial(jnp.einsum, equation), x, w)
                title = f"gemm {size} {name} {tokens}x{k}x{n} weight {layout}"
                yield row(title, duration, 2 * tokens * k * n)


def attend(
    q: Array, k: Array, v: Array, length: int | None = None, residual: bool = False
) -> Array | tuple[Array, Array]:
    """cuDNN's, over the first `length` keys; with `residual` also the log-sum-exps."""
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


def split(q: Array, k: Array, v: Array, large: int, length: int) -> Array:
    """Video keys without a mask, the rest with one, merged by their log-sum-exps."""
    a, la = attend(q, k[:, :large], v[:, :large], residual=True)
    b, lb = attend(q, k[:, large:], v[:, large:], length, residual=True)
    weight = jnp.swapaxes(jax.nn.sigmoid(lb - la), 1, 2)[..., None]
    return (a + weight * (b - a)).astype(q.dtype)


def attention(sizes: Sizes) -> Iterator[dict]:
    """Video over video and text keys: with a mask, without, split, and by our kernel."""
    # What is lowered alone needs no values.
    draw = random if on_gpu() else lambda *x: jax.eval_shape(lambda: random(*x))
    for size, (batch, tokens) in sizes.video.items():
        # Queries, keys, and what the form is told: how many keys are real, how many are the first.
        cases = {
            "video only, aligned": (tokens, tokens, {}),
            "+512, no mask": (tokens, tokens + 512, {}),
            "+500, no mask": (tokens, tokens + 500, {}),
            "+512, mask at 500": (tokens, tokens + 512, {"length": tokens + 500}),
            "+512, split, mask at 500": (tokens, tokens + 512, {"large": tokens, "length": 500}),
            "+1536, mask at 1400": (tokens, tokens + 1536, {"length": tokens + 1400}),
            "+1536, split, mask at 1400": (
                tokens, tokens + 1536, {"large": tokens, "length": 1400},
            ),
            "sound, +197+512 padded to 768, split": (
                tokens + 197, tokens + 768, {"large": tokens, "length": 697},
            ),
            "sound, queries padded to 256": (
                tokens + 256, tokens + 768, {"large": tokens, "length": 697},
            ),
        }  # fmt: skip
        for name, (queries, keys, told) in cases.items():
            q = draw((batch, queries, 32, 128))
            k, v = draw((batch, keys, 8, 128), 1), draw((batch, keys, 8, 128), 2)
            flops = 4 * batch * queries * keys * 32 * 128
            form = partial(split if "large" in told else attend, **told)
            yield row(f"attention {size} {name}", attention_seconds(form, q, k, v), flops)
            if "large" not in told:
                media = [draw((batch, tokens, 8, 128), i) for i in (1, 2)]
                text = [draw((batch, max(keys - tokens, 8), 8, 128), i) for i in (3, 4)]
                real = jnp.full((batch,), told.get("length", keys) - tokens, jnp.int32)
                duration = attention_seconds(flash_attention, q, *media, *text, real)
                yield row(f"attention {size} {name}, our kernel", duration, flops)


def conv3d(x: Array, w: Array) -> Array:  # x [B, T + 2, H, W, C], w [3, 3, 3, C, D]
    dims = ("NDHWC", "DHWIO", "NDHWC")
    return jax.lax.conv_general_dilated(
        x, w, (1, 1, 1), ((0, 0), (1, 1), (1, 1)), dimension_numbers=dims
    )


def conv2d(x: Array, w: Array) -> Array:  # x [B, T, H, W, C], w [3, 3, C, D]
    flat = x.reshape(-1, *x.shape[2:])
    y = jax.lax.conv_general_dilated(
        flat, w, (1, 1), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return y.reshape(*x.shape[:2], *y.shape[1:])


def conv_folded(x: Array, w: Array) -> Array:
    """Three frames side by side in the channels, one convolution a frame."""
    frames = x.shape[1] - 2
    folded = jnp.concatenate([x[:, i : i + frames] for i in range(3)], axis=-1)
    return conv2d(folded, jnp.concatenate([w[0], w[1], w[2]], axis=2))


def conv_summed(x: Array, w: Array) -> Array:
    """A convolution for each of the kernel's three frames, added."""
    frames = x.shape[1] - 2
    return sum(conv2d(x[:, i : i + frames], w[i]) for i in range(3))


def conv(sizes: Sizes) -> Iterator[dict]:
    """The 720p decoder's convolutions, one and two latent frames at a time."""
    for frames, height, width, channels, features in sizes.convs:
        for chunk in (1, 2):
            t = frames * chunk
            x = random((1, t + 2, height, width, channels))
            w = random((3, 3, 3, channels, features), 1) * (27 * channels) ** -0.5
            flops = 2 * 27 * channels * features * t * height * width
            for form in (conv3d, conv_folded, conv_summed):
                name = f"conv {t}x{height}x{width} {channels}->{features} {form.__name__}"
                yield row(name, seconds(form, x, w, repeats=3), flops)
    frames, height, width, channels, features = sizes.picture
    x = random((1, frames, height, width, channels))
    w = random((3, 3, channels, features), 1) * (9 * channels) ** -0.5
    flops = 2 * 9 * channels * features * frames * height * width
    name = f"conv2d {frames}x{height}x{width} {channels}->{features}"
    yield row(name, seconds(conv2d, x, w), flops)


KINDS = {"gemm": gemm, "attention": attention, "conv": conv}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kinds", nargs="*", metavar="kind", help=f"of {', '.join(KINDS)}")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dry", action="store_true", help="tiny sizes")
    options = parser.parse_args(arguments)
    kinds = options.kinds or list(KINDS)
    if unknown := set(kinds) - KINDS.keys():
        parser.error(f"unknown kinds {', '.join(sorted(unknown))}: choose from {', '.join(KINDS)}")
    result = environment() | {"complete": False}
    for kind in kinds:
        start, result[kind] = time.perf_counter(), []
        for found in KINDS[kind](DRY if options.dry else NANO):
            result[kind].append(found)
            options.out.write_text(json.dumps(result, indent=2) + "\n")
        print(f"{kind}: {time.perf_counter() - start:.0f} s in all", flush=True)
    result["complete"] = True
    options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
