"""The commands beside `generate`: convert, info, bench."""

import argparse
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np

from cosmos3_jax import limits
from cosmos3_jax.checkpoint import load
from cosmos3_jax.checkpoint.convert import check_target, convert_checkpoint
from cosmos3_jax.checkpoint.find import BUILT_IN, find_checkpoint
from cosmos3_jax.cli import bench
from cosmos3_jax.cli.generate import run_generate
from cosmos3_jax.config import Config, Recipes, TransformerConfig
from cosmos3_jax.io import media
from cosmos3_jax.io.prepare import resolve_settings
from cosmos3_jax.io.settings import Settings
from cosmos3_jax.parallel import device
from cosmos3_jax.pipeline import Cosmos3
from cosmos3_jax.recipes import MODES
from cosmos3_jax.runtime import measure, memory, random_inputs
from cosmos3_jax.runtime.job import Job
from cosmos3_jax.runtime.words import PARTS

SUPER = TransformerConfig(
    hidden_size=5120, num_hidden_layers=64, num_attention_heads=64, intermediate_size=25600
)
# Models whose sizes are published: nothing need be fetched to plan for them.
PUBLISHED = {
    "cosmos3-nano": Config(),
    "cosmos3-super": Config(transformer=SUPER, recipes=Recipes("Super")),
}
# What needs memory, in a user's words.
WORDS = {
    **{part: f"weights of the {name}" for part, name in PARTS.items()},
    "condition": "the encoded prompt",
    "clean pixels": "pixels of the input",
    "pixels": "finished pixels",
    "waveform": "finished sound",
    "trajectory": "latents of every step",
    "logits": "attention without a fast kernel",
}


def run_convert(options: argparse.Namespace) -> int:
    check_target(options.target, options.overwrite)
    source = find_checkpoint(options.source, revision=options.revision)
    sound = False if options.no_sound else None
    convert_checkpoint(
        source, options.target, dtype=options.dtype, sound=sound, overwrite=options.overwrite
    )
    print(f"wrote {options.target}")
    return 0


def run_info(options: argparse.Namespace) -> int:
    name = options.model or options.checkpoint
    published = None
    if options.revision is None and not Path(name).is_dir():
        published = PUBLISHED.get(name.lower().removeprefix("nvidia/"))
    folder = None
    if published is not None:
        config = published
    else:
        folder = find_checkpoint(name, weights=False, revision=options.revision)
        config = load.load_config(folder, load_sound=options.sound or None)
    lines = [*_memory_lines(options, config)]  # first, as this is what may be refused
    if folder is None:
        print(f"{name}: sizes as published, nothing was fetched")
    elif folder == Path(name).expanduser() or name in BUILT_IN:
        layout = "converted" if load.is_converted(folder / "transformer") else "public"
        print(f"{name}: {layout} layout")
        for component in load.open_components(folder, config):
            print(f"  {component.name:16} {len(component.files.shapes):5} tensors, fits the model")
    else:
        print(f"{name}: on the Hub, weights not looked at")
    print("parameters that generation reads")
    for part, count in memory.parameter_counts(config).items():
        print(f"  {part:16} {count / 1e6:12,.1f} M")
    print(f"sound: {'yes' if config.has_sound else 'no'}")
    if not config.recipes.recognised:
        model = config.recipes.model
        print(f"its sizes are of no model that is known here: the settings are {model}'s")
    for mode in MODES:
        print("\n".join(_recipe_lines(config, mode)))
    print("\n".join(lines))
    return 0


def _recipe_lines(config: Config, mode: str) -> Iterator[str]:
    recipe = config.recipes.of(mode)
    length = "1 frame" if mode == "text2image" else f"{recipe.num_frames} frames at {recipe.fps:g}"
    size, number = f"{recipe.width}x{recipe.height}", recipe.num_inference_steps
    steps = "1 step" if number == 1 else f"{number} steps"
    source = config.recipes.source(mode, "num_inference_steps")
    yield f"{mode}, if nothing else is said ({source})"
    yield (
        f"  {length}, {size}, {steps}, guidance "
        f"{recipe.guidance_scale:g}, shift {recipe.flow_shift:g}, {recipe.schedule} schedule"
    )
    negative = recipe.negative_prompt
    words = "the prompt style's" if negative is None else repr(negative) if negative else "empty"
    yield f"  negative prompt: {words}"
    names = [field.name for field in dataclasses.fields(recipe) if field.name != "size"]
    for other in dict.fromkeys(config.recipes.source(mode, name) for name in names):
        if other != source:
            of = [name for name in names if config.recipes.source(mode, name) == other]
            yield f"  from {other}: {', '.join(of)}"


def _memory_lines(options: argparse.Namespace, config: Config) -> Iterator[str]:
    """The estimate for this GPU or, where there is none, for one to come."""
    names = ("num_frames", "size", "aspect", "height", "width", "fps")
    settings, *_ = resolve_settings(
        config.recipes, Settings(**{name: getattr(options, name) for name in names})
    )
    if not options.sound:
        config = config.silent()
    names = ("num_frames", "height", "width", "fps")
    job = Job.of_recipe(
        config, sound=bool(options.sound), dtype=options.dtype,
        **{name: getattr(settings, name) for name in names},
    )  # fmt: skip
    if device.default_device().platform != "gpu":
        job = job.replace(device=device.PlannedGPU())
    resident, offloaded = (
        memory.generation_bytes(config, job.replace(offload=offload)) for offload in (False, True)
    )
    height, width = job.height, job.width
    what = str(job).replace(f"{height}x{width}", f"{width}x{height} (width x height)")
    yield f"GPU memory for {what} in {job.dtype}, an estimate"
    yield f"  {'':32} {'resident':>12} {'offload':>12}"
    for part, size in resident.items():
        if max(size, offloaded[part]) < 2**30 / 2000:  # 0.000 in both columns
            continue
        words = WORDS.get(part, part)
        yield f"  {words:32} {size / 2**30:8.3f} GiB {offloaded[part] / 2**30:8.3f} GiB"
    limit = device.memory_limit()
    if limit is not None:
        fits = ["fits" if x["peak"] <= limit else "too large" for x in (resident, offloaded)]
        here = f"of {limit / 2**30:.3f} GiB here"
        yield f"  {here:32} {fits[0]:>12} {fits[1]:>12}"


def run_bench(options: argparse.Namespace) -> int:
    if options.out:
        media.check_writable(options.out, options.overwrite, (".json",))
    dtype = options.dtype or device.default_dtype()
    model = None
    if options.checkpoint:
        model = Cosmos3.open(options.checkpoint, load_sound=options.sound)
        config = model.config
    else:
        config = Config() if options.sound else Config().silent()
    names = (
        "sizes", "num_frames", "height", "width", "fps", "steps", "text_tokens", "negative_tokens",
        "decode_chunk_size", "speeds",
    )  # fmt: skip
    if options.repeats < 1:
        raise ValueError(f"repeats={options.repeats} must be at least 1")
    limits.check_most("repeats", options.repeats)
    settings = {name: getattr(options, name) for name in names} | {"sound": bool(options.sound)}
    jobs = bench.jobs(config, **settings)
    for job in jobs.values():
        memory.check_fits(config, device.memory_limit(), bench.padded(job, dtype))
    if model is not None:
        params = model.load(dtype).params
    else:
        params = random_inputs.random_params(config, np.dtype(dtype))
    jax.block_until_ready(params)
    weights = options.checkpoint or f"random {options.random or 'nano'}"
    record = measure.environment() | {"weights": weights, "dtype": dtype, "results": {}}
    overwrite = options.overwrite
    for name, job in jobs.items():
        record["results"][name] = bench.run_bench(config, params, job, options.repeats)
        print(bench.table(name, record["results"][name]), flush=True)
        if options.out:  # after each size: an interruption costs the one at hand
            media.write_text(options.out, json.dumps(record, indent=2) + "\n", overwrite=overwrite)
            overwrite = True
    return 0


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "generate": run_generate,
    "convert": run_convert,
    "info": run_info,
    "bench": run_bench,
}
