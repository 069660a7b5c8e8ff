"""What it costs to start from an image or a clip: whole generations with and without, in turns.

python benchmarks/image_to_video.py CHECKPOINT --out FILE.json [--modes t2v,i2v] [--size 720p]
    [--steps 35] [--dry]

One process, one model, everything compiled beforehand by `Cosmos3.warmup`. Each mode runs once in
the order given, so that a mode named twice is run twice; a whole loop at 720p is minutes long. The
file is rewritten after every run. `--dry` takes tiny sizes, for a tiny checkpoint.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import dry
import jax
import numpy as np

from cosmos3_jax import Cosmos3, bench, device
from cosmos3_jax.bench_measure import GIB, environment
from cosmos3_jax.media import write_text
from cosmos3_jax.programs import encode_given
from cosmos3_jax.request import T2VRequest

PROMPT = "A red sports car drives along a coastal road at sunset, the camera follows. " * 3
NEGATIVE = "Blurry, shaky, overexposed, with compression blocks and a watermark. " * 3
REPEATS = 5


def smooth_frames(count: int, height: int, width: int) -> np.ndarray:
    """uint8 [count, height, width, 3]: coloured waves that move a little."""
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    waves = [
        [np.sin(6 * x + 0.1 * t + k) * np.cos(5 * y - 0.2 * t) for k in range(3)]
        for t in range(count)
    ]
    return np.uint8(127.5 + 127 * np.moveaxis(np.asarray(waves), 1, -1))


def encoding(model: Cosmos3, request: T2VRequest) -> dict:
    """The encoder alone, compiled and warm."""
    pixels = jax.device_put((request.clean_video, request.frame_mask))
    arguments = model.params["video_vae"], *pixels
    memory = encode_given.lower(*arguments, config=model.config).compile().memory_analysis()
    samples = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        jax.block_until_ready(encode_given(*arguments, config=model.config))
        samples.append(time.perf_counter() - start)
    return {
        "pixel_frames": request.clean_video.shape[2],
        "seconds": statistics.median(samples[1:]),
        "samples": samples[1:],
        "temporary_gib": memory.temp_size_in_bytes / GIB,
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--modes", default="t2v,i2v,v2v", help="t2v, i2v, v2v (%(default)s)")
    parser.add_argument("--size", choices=bench.SIZES, default="720p")
    parser.add_argument("--num-frames", type=int, default=189)
    parser.add_argument("--steps", type=int, default=35)
    parser.add_argument("--dry", action="store_true", help="tiny sizes")
    options = parser.parse_args(arguments)
    modes = options.modes.split(",")
    height, width = (dry.HEIGHT, dry.WIDTH) if options.dry else bench.SIZES[options.size]
    frames = smooth_frames(5, height, width)
    given = {"t2v": {}, "i2v": {"image": frames[0]}, "v2v": {"video": frames}}
    settings = {
        "negative_prompt": NEGATIVE, "height": height, "width": width,
        "num_frames": dry.FRAMES if options.dry else options.num_frames,
        "num_inference_steps": options.steps, "fps": 24.0,
    }  # fmt: skip
    model = Cosmos3.from_pretrained(options.checkpoint, "bfloat16", offload=False)
    record = environment() | {
        "job": {k: v for k, v in settings.items() if k != "negative_prompt"},
        "encoding": {}, "warmup_seconds": {}, "runs": [],
    }  # fmt: skip
    for mode in dict.fromkeys(modes):
        start = time.perf_counter()
        model.warmup(PROMPT, **settings, **given[mode])
        record["warmup_seconds"][mode] = time.perf_counter() - start
        request = model.prepare(PROMPT, **settings, **given[mode])
        if request.clean_video is not None:
            record["encoding"][mode] = encoding(model, request)
    for mode in modes:
        start = time.perf_counter()
        request = model.prepare(PROMPT, **settings, **given[mode])
        prepared = time.perf_counter()
        latents, _ = model.denoise(request)
        denoised = time.perf_counter()
        jax.block_until_ready(model.decode(latents))
        end = time.perf_counter()
        record["runs"].append(
            {
                "mode": mode,
                "seconds": end - start,
                "prepare": prepared - start,
                "denoise": denoised - prepared,
                "decode": end - denoised,
                "peak_gib_so_far": (device.memory_peak() or 0) / GIB,
            }  # fmt: skip
        )
        print(record["runs"][-1], flush=True)
        write_text(options.out, json.dumps(record, indent=2) + "\n", overwrite=True)
    print(json.dumps(record["encoding"], indent=2), record["warmup_seconds"])


if __name__ == "__main__":
    main()
