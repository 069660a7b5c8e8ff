"""What it costs to start from an image or a clip: whole generations with and without, in turns.

python benchmarks/image_to_video.py CHECKPOINT --out FILE.json [--modes t2v,i2v] [--size 720p]
    [--steps 35] [--dry]

One process, one model, everything compiled beforehand by `Cosmos3.warmup`. Each mode runs once in
the order given, so that a mode named twice is run twice; a whole loop at 720p is minutes long. The
file is rewritten after every run. `--dry` takes tiny sizes, for a tiny checkpoint.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial

import dry
import jax
import numpy as np

from cosmos3_jax import Cosmos3, Request
from cosmos3_jax.io.media import write_text
from cosmos3_jax.parallel import device
from cosmos3_jax.runtime.measure import GIB, Measure, environment
from cosmos3_jax.sampling import stages

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


def encoding(model: Cosmos3, request: Request) -> dict:
    """The encoder alone, compiled and warm."""
    encode = next(stage for stage in stages.STAGES if stage.name == "video encode")
    measure = Measure(model.params, model.config, repeats=REPEATS)
    stages.walk(stages.initial_values(jax.device_put(request)), measure, (encode,))
    return {"pixel_frames": request.clean_video.shape[2], **measure.stages[encode.name]}


def timed_run(model: Cosmos3, prepare: Callable[[], Request]) -> dict:
    """A whole generation: the seconds of it, and of each part by name."""
    last, found = time.perf_counter(), {}

    def ended(name: str) -> None:
        nonlocal last
        now = time.perf_counter()
        found[name], last = now - last, now

    request = prepare()
    ended("prepare")
    model.run(request, after=lambda stage, values: ended(stage.name))
    return {"seconds": sum(found.values()), "stages": found}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    dry.add_options(parser, "720p")
    parser.add_argument("--modes", default="t2v,i2v,v2v", help="t2v, i2v, v2v (%(default)s)")
    parser.add_argument("--steps", type=int, default=35)
    options = parser.parse_args(arguments)
    modes = options.modes.split(",")
    size = dry.video_size(options)
    frames = smooth_frames(5, size["height"], size["width"])
    given = {"t2v": {}, "i2v": {"image": frames[0]}, "v2v": {"video": frames}}
    job = {**size, "num_inference_steps": options.steps, "fps": 24.0}
    settings = {"negative_prompt": NEGATIVE, **job}
    model = Cosmos3.from_pretrained(options.checkpoint, "bfloat16", offload=False)
    record = environment() | {"job": job, "encoding": {}, "warmup_seconds": {}, "runs": []}
    for mode in dict.fromkeys(modes):
        start = time.perf_counter()
        model.warmup(PROMPT, **settings, **given[mode])
        record["warmup_seconds"][mode] = time.perf_counter() - start
        request = model.prepare(PROMPT, **settings, **given[mode])
        if request.clean_video is not None:
            record["encoding"][mode] = encoding(model, request)
    for mode in modes:
        found = timed_run(model, partial(model.prepare, PROMPT, **settings, **given[mode]))
        peak = (device.memory_peak() or 0) / GIB
        record["runs"].append({"mode": mode, **found, "peak_gib_so_far": peak})
        print(record["runs"][-1], flush=True)
        write_text(options.out, json.dumps(record, indent=2) + "\n", overwrite=True)
    print(json.dumps(record["encoding"], indent=2), record["warmup_seconds"])


if __name__ == "__main__":
    main()
