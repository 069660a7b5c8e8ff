"""The command line: cosmos3-jax generate | convert | info | bench."""

import argparse
import json
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np

import cosmos3_jax
from cosmos3_jax import bench, bench_measure, media, memory, startup, tiny, unipc
from cosmos3_jax.checkpoint import load
from cosmos3_jax.checkpoint.convert import check_target, convert_checkpoint
from cosmos3_jax.config import Config
from cosmos3_jax.generate import T2VRequest
from cosmos3_jax.pipeline import Cosmos3, find_checkpoint, load_frontend
from cosmos3_jax.prompt import PROMPT_STYLES, read_prompt
from cosmos3_jax.request import prepare_request, resolve_batch, resolve_sigmas

DEFAULT_PROMPT = "A red ball bounces across a wooden floor; each bounce makes a soft knock."


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Returns the exit status; errors that a user can mend are one line, not a
    traceback.
    """
    options = parser().parse_args(arguments)
    startup.use_whole_device()
    try:
        return options.run(options)
    except (ValueError, OSError) as error:
        print(f"cosmos3-jax: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("cosmos3-jax: interrupted", file=sys.stderr)
        return 130


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="cosmos3-jax", description="Cosmos3 video and sound generation in JAX."
    )
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    _add_generate(commands.add_parser("generate", help="turn a prompt into a video"))
    _add_convert(commands.add_parser("convert", help="write a checkpoint in the converted layout"))
    _add_info(commands.add_parser("info", help="what a checkpoint holds and what a shape needs"))
    _add_bench(commands.add_parser("bench", help="time and memory of each stage of a generation"))
    return top


def _add_checkpoint(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--checkpoint",
        default=tiny.NAME,
        help=f"folder, Hub id owner/name, or {tiny.NAME}, the embedded default (%(default)s)",
    )


def _add_shape(command: argparse.ArgumentParser) -> None:
    command.add_argument("--num-frames", type=int, help="4k + 1")
    command.add_argument("--height", type=int, help="pixels, a multiple of 16")
    command.add_argument("--width", type=int, help="pixels, a multiple of 16")
    command.add_argument("--fps", type=float, help="frames per second")
    command.add_argument("--sound", action="store_true", help="denoise sound along with the video")
    command.add_argument(
        "--dtype", choices=("bfloat16", "float32"), help="default: bfloat16, on a CPU float32"
    )


def _add_generate(command: argparse.ArgumentParser) -> None:
    command.set_defaults(run=run_generate)
    _add_checkpoint(command)
    prompt = command.add_mutually_exclusive_group()
    prompt.add_argument(
        "--prompt", default=DEFAULT_PROMPT, help="text, or a structured caption as JSON"
    )
    prompt.add_argument("--prompt-file", type=Path, help="a text or JSON file, read byte for byte")
    negative = command.add_mutually_exclusive_group()
    negative.add_argument(
        "--negative-prompt", help="default: the style's; an empty text is an empty prompt"
    )
    negative.add_argument("--negative-prompt-file", type=Path)
    command.add_argument("--prompt-style", choices=PROMPT_STYLES, default="native")
    command.add_argument("--system-prompt", help="default: the style's; an empty text turns it off")
    _add_shape(command)
    command.add_argument("--steps", type=int, dest="num_inference_steps", help="denoising steps")
    command.add_argument("--guidance-scale", type=float, help="1 skips the negative prompt")
    command.add_argument("--flow-shift", type=float)
    command.add_argument("--schedule", choices=unipc.SCHEDULES)
    command.add_argument(
        "--sigmas", help="K + 1 comma-separated noise levels ending in 0, instead of those"
    )
    command.add_argument("--seed", type=int, default=42)
    command.add_argument(
        "--noise", type=Path, metavar="FILE.npz", help="initial `noise` and `sound_noise`"
    )
    command.add_argument(
        "--save-latents",
        type=Path,
        metavar="FILE.npz",
        help="write final `video` and `sound` latents",
    )
    command.add_argument(
        "--out", type=Path, default=Path("output.mp4"), help="mp4 file (%(default)s)"
    )
    command.add_argument("--overwrite", action="store_true", help="replace existing outputs")
    command.add_argument(
        "--offload",
        choices=("auto", "yes", "no"),
        default="auto",
        help="have each part of the weights on the device only while it is used; auto: if the "
        "video does not fit otherwise (%(default)s)",
    )
    command.add_argument(
        "--no-compilation-cache",
        action="store_true",
        help="do not keep compiled programs for the next run",
    )


def _add_convert(command: argparse.ArgumentParser) -> None:
    command.set_defaults(run=run_convert)
    command.add_argument("source", help="folder or Hub id")
    command.add_argument("target", type=Path)
    command.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    command.add_argument("--no-sound", action="store_true", help="leave the sound weights out")
    command.add_argument("--overwrite", action="store_true", help="replace an existing target")


def _add_info(command: argparse.ArgumentParser) -> None:
    command.set_defaults(run=run_info)
    _add_checkpoint(command)
    _add_shape(command)


def _add_bench(command: argparse.ArgumentParser) -> None:
    command.set_defaults(run=run_bench)
    weights = command.add_mutually_exclusive_group()
    weights.add_argument("--checkpoint", help=f"folder, Hub id owner/name, or {tiny.NAME}")
    weights.add_argument(
        "--random", choices=("nano",), help="random weights of these sizes (default: nano)"
    )
    _add_shape(command)
    command.add_argument(
        "--size",
        dest="sizes",
        help=f"{', '.join(bench.SIZES)}, or several with commas, instead of --height and --width",
    )
    command.add_argument("--steps", type=int, help="denoising steps")
    command.add_argument("--repeats", type=int, default=3, help="runs of each stage (%(default)s)")
    command.add_argument("--text-tokens", type=int, default=300, help="%(default)s")
    command.add_argument(
        "--negative-tokens", type=int, default=300, help="%(default)s; 0 for no guidance"
    )
    command.add_argument("--decode-chunk-size", type=int, help="latent frames at a time")
    command.add_argument("--out", type=Path, metavar="FILE.json", help="what was measured, as JSON")
    command.add_argument("--overwrite", action="store_true", help="replace an existing FILE.json")


def run_generate(options: argparse.Namespace) -> int:
    record_path = options.out.with_suffix(".json")
    outputs = {options.out: (".mp4",), record_path: None}
    if options.save_latents:
        outputs[options.save_latents] = (".npz",)
    inputs = [options.prompt_file, options.negative_prompt_file, options.noise]
    read = {path.resolve() for path in inputs if path is not None}
    for path, suffixes in outputs.items():
        if path.resolve() in read:
            raise ValueError(f"{path} would be written and is also read; choose another --out")
        media.check_writable(path, options.overwrite, suffixes)
    settings = _settings(options)
    prompt = read_prompt(options.prompt_file) if options.prompt_file else options.prompt
    times: dict[str, float] = {}
    with _timed(times, "preprocess"):
        folder = find_checkpoint(options.checkpoint, weights=False)
        config, tokenizer = load_frontend(folder, load_sound=options.sound)
        request = prepare_request(config, tokenizer, prompt, **settings)
        media.frame_rate(float(request.fps))  # raises on a rate that no mp4 can have
    startup.use_compilation_cache(not options.no_compilation_cache)
    dtype, limit = options.dtype or _default_dtype(), memory.device_limit()
    job = memory.request_sizes(config, request) | {"dtype": dtype}
    offload = options.offload == "yes"
    if options.offload == "auto":
        offload = memory.should_offload(config, limit, **job)
    memory.check_fits(config, limit, offload=offload, **job)
    with memory.exhaustion_explained(config, limit, offload=offload, **job):
        with _timed(times, "model_load"):
            model = Cosmos3.from_pretrained(options.checkpoint, dtype, options.sound, offload)
        with _timed(times, "denoise"):
            latents, _ = model.denoise(request, progress=sys.stderr.isatty())
        if options.save_latents:
            _save_arrays(options.save_latents, latents)
        with _timed(times, "decode"):
            result = jax.block_until_ready(model.decode(latents))
    with _timed(times, "to_cpu"):
        result = {name: np.asarray(value) for name, value in result.items()}
    fps = float(request.fps)
    with _timed(times, "encode"):
        media.save_mp4(result, options.out, fps=fps, overwrite=options.overwrite)
    times["total"] = sum(times.values())
    record = _record(options, model, request, prompt, settings, times)
    media.write_text(record_path, json.dumps(record, indent=2) + "\n", overwrite=options.overwrite)
    for stage, seconds in times.items():
        print(f"{stage:>10}  {seconds:8.2f} s")
    print(f"wrote {', '.join(map(str, outputs))}")
    return 0


def _settings(options: argparse.Namespace) -> dict:
    """The arguments of `Cosmos3.prepare` that the command line names; the rest comes from the
    recipe.
    """
    names = (
        "num_frames", "height", "width", "fps", "num_inference_steps", "guidance_scale",
        "flow_shift", "schedule", "seed", "sound", "prompt_style",
        "system_prompt", "negative_prompt",
    )  # fmt: skip
    settings = {name: getattr(options, name) for name in names}
    if options.negative_prompt_file:
        settings["negative_prompt"] = read_prompt(options.negative_prompt_file)
    if options.sigmas:
        settings["sigmas"] = _numbers("--sigmas", options.sigmas)
    if options.noise:
        settings |= _load_noise(options.noise)
    return settings


def _numbers(option: str, text: str) -> list[float]:
    try:
        return [float(number) for number in text.split(",")]
    except ValueError as error:
        raise ValueError(f"{option} {text!r} must be numbers with commas between them") from error


def _load_noise(path: Path) -> dict[str, np.ndarray]:
    """`noise` and, if it is there, `sound_noise` of an npz file."""
    try:
        with np.load(path) as arrays:
            found = {name: arrays[name] for name in ("noise", "sound_noise") if name in arrays}
    except Exception as error:  # numpy, zipfile and zlib raise half a dozen kinds
        raise ValueError(f"--noise {path} cannot be read as an npz file: {error}") from error
    if "noise" not in found:
        raise ValueError(f"--noise {path} holds no array named noise")
    return found


def _save_arrays(path: Path, arrays: dict[str, jax.Array]) -> None:
    temporary = path.with_name(f".{path.name}.partial.npz")
    np.savez(temporary, **{name: np.asarray(value) for name, value in arrays.items()})
    temporary.replace(path)


def _record(
    options: argparse.Namespace,
    model: Cosmos3,
    request: T2VRequest,
    prompt: str,
    settings: dict,
    times: dict[str, float],
) -> dict:
    """Everything needed to make the same video again."""
    frames = 1 + (request.video_shape[0] - 1) * model.config.video_vae.scale_factor_temporal
    scale = model.config.video_vae.scale_factor_spatial
    height, width = (size * scale for size in request.video_shape[1:])
    fps = model.config.recipe.fps if settings["fps"] is None else settings["fps"]
    [resolved] = resolve_batch(
        [prompt], settings["negative_prompt"], style=options.prompt_style,
        system_prompt=options.system_prompt, num_frames=frames, height=height, width=width, fps=fps,
    )  # fmt: skip
    # In float64: the request's are rounded, and 1000 sigma may then be truncated to another
    # timestep.
    sigmas = resolve_sigmas(
        model.config, steps=settings["num_inference_steps"], flow_shift=settings["flow_shift"],
        schedule=settings["schedule"], sigmas=settings.get("sigmas"),
    )  # fmt: skip
    return {
        "checkpoint": str(options.checkpoint),
        "prompt": prompt,
        "negative_prompt": settings["negative_prompt"],
        "system_prompt": options.system_prompt,
        "resolved_prompt": resolved.prompt,
        "resolved_negative_prompt": resolved.negative_prompt
        if request.neg_text_ids is not None
        else None,
        "resolved_system_prompt": resolved.system_prompt,
        "prompt_style": options.prompt_style,
        "prompt_tokens": int(request.text_mask.sum()),
        "negative_prompt_tokens": None
        if request.neg_text_mask is None
        else int(request.neg_text_mask.sum()),
        "num_frames": frames,
        "height": height,
        "width": width,
        "fps": float(fps),
        "sound_frames": request.sound_frames,
        "seed": options.seed,
        "noise": str(options.noise) if options.noise else None,
        "num_inference_steps": request.num_inference_steps,
        "guidance_scale": float(request.guidance_scale),
        "sigmas": sigmas.tolist(),
        "timesteps": [*map(int, request.sampler.timestep)],
        "dtype": model.dtype,
        "offload": not model.weights.resident,
        "device": jax.devices()[0].device_kind,
        "peak_memory_bytes": memory.device_peak(),
        "versions": {
            "cosmos3_jax": cosmos3_jax.__version__,
            "jax": jax.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "seconds": {stage: round(seconds, 3) for stage, seconds in times.items()},
    }


def run_convert(options: argparse.Namespace) -> int:
    check_target(options.target, options.overwrite)
    source = find_checkpoint(options.source)
    sound = False if options.no_sound else None
    convert_checkpoint(
        source, options.target, dtype=options.dtype, sound=sound, overwrite=options.overwrite
    )
    print(f"wrote {options.target}")
    return 0


def run_info(options: argparse.Namespace) -> int:
    folder = find_checkpoint(options.checkpoint)
    config = load.load_config(folder, load_sound=None)
    components = load.open_components(folder, config)
    layout = "converted" if load.is_converted(folder / "transformer") else "public"
    print(f"{options.checkpoint}: {layout} layout")
    for component in components:
        print(f"  {component.name:16} {len(component.files.shapes):5} tensors, fits the model")
    print("parameters that generation reads")
    for part, count in memory.parameter_counts(config).items():
        print(f"  {part:16} {count / 1e6:12,.1f} M")
    print(f"sound: {'yes' if config.has_sound else 'no'}")
    print(f"recipe: {', '.join(f'{key}={value}' for key, value in vars(config.recipe).items())}")
    _print_memory(options, folder)
    return 0


def _print_memory(options: argparse.Namespace, folder: Path) -> None:
    config = load.load_config(folder, load_sound=None if options.sound else False)
    given = {name: getattr(options, name) for name in ("num_frames", "height", "width", "fps")}
    job = memory.recipe_sizes(config) | {k: v for k, v in given.items() if v is not None}
    job["dtype"] = options.dtype or "bfloat16"
    resident = memory.generation_bytes(config, **job)
    offloaded = memory.generation_bytes(config, **job, offload=True)
    frames, height, width = (job[name] for name in ("num_frames", "height", "width"))
    print(f"device memory for {frames} frames of {height}x{width} in {job['dtype']}, an estimate")
    print(f"  {'':21} {'resident':>12} {'offload':>12}")
    for part, size in resident.items():
        print(f"  {part:21} {size / 2**30:8.3f} GiB {offloaded[part] / 2**30:8.3f} GiB")
    limit = memory.device_limit()
    if limit is not None:
        fits = ["fits" if x["peak"] <= limit else "too large" for x in (resident, offloaded)]
        print(
            f"  {'of ' + format(limit / 2**30, '.3f') + ' GiB here':21} {fits[0]:>12} {fits[1]:>12}"
        )


def run_bench(options: argparse.Namespace) -> int:
    if options.out:
        media.check_writable(options.out, options.overwrite, (".json",))
    if options.checkpoint:
        folder = find_checkpoint(options.checkpoint, weights=False)
        config = load.load_config(folder, load_sound=options.sound)
    else:
        config = Config() if options.sound else bench.silent(Config())
    names = (
        "sizes", "num_frames", "height", "width", "fps", "steps", "sound", "text_tokens",
        "negative_tokens", "decode_chunk_size", "repeats",
    )  # fmt: skip
    jobs = bench.jobs(config, **{name: getattr(options, name) for name in names})
    dtype = options.dtype or _default_dtype()
    if options.checkpoint:
        params = Cosmos3.from_pretrained(options.checkpoint, dtype, options.sound).params
    else:
        params = bench.random_params(config, np.dtype(dtype))
    jax.block_until_ready(params)
    weights = options.checkpoint or f"random {options.random or 'nano'}"
    record = bench_measure.environment() | {"weights": weights, "dtype": dtype, "results": {}}
    overwrite = options.overwrite
    for name, job in jobs.items():
        record["results"][name] = bench.run_bench(config, params, job)
        print(bench_measure.table(name, record["results"][name]), flush=True)
        if options.out:  # after each size: an interruption costs the one at hand
            media.write_text(options.out, json.dumps(record, indent=2) + "\n", overwrite=overwrite)
            overwrite = True
    return 0


def _default_dtype() -> str:
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


@contextmanager
def _timed(times: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    times[stage] = time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main())
