"""The command line: cosmos3-jax generate | convert | info | bench."""

import argparse
import json
import sys
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from cosmos3_jax.checkpoint import load
from cosmos3_jax.checkpoint.convert import check_target, convert_checkpoint
from cosmos3_jax.checkpoint.find import BUILT_IN, TINY, find_checkpoint
from cosmos3_jax.cli import bench
from cosmos3_jax.cli.generate import run_generate
from cosmos3_jax.config import Config
from cosmos3_jax.io import media
from cosmos3_jax.io.prompt import PROMPT_STYLES
from cosmos3_jax.parallel import device, distributed
from cosmos3_jax.pipeline import Cosmos3
from cosmos3_jax.runtime import measure, memory, random_inputs
from cosmos3_jax.runtime.job import Job
from cosmos3_jax.sampling import unipc

# A sentence that the embedded checkpoint understands.
DEFAULT_PROMPT = (
    "A large red circle moves fast to the right over a plain navy background and bounces off the "
    "wall early with a high bell."
)
CHECKPOINT_HELP = (
    "folder, Hub id owner/name, or one that is built in: tiny, trained on a world of coloured "
    "shapes, or random, of random weights"
)


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Returns the exit status; errors that a user can mend are one line, not a
    traceback.
    """
    options = parser().parse_args(arguments)
    device.use_whole_device()
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            status = options.run(options)
    except (ValueError, OSError) as error:
        print(f"cosmos3-jax: error: {error}", file=sys.stderr)
        status = 2
    except jax.errors.JaxRuntimeError:
        if not distributed.are_several():
            raise
        traceback.print_exc()
        print(
            f"cosmos3-jax: error: the devices of {jax.process_count()} processes did not finish; "
            "perhaps one of them ended, see what the others say",
            file=sys.stderr,
        )
        status = 1
    except KeyboardInterrupt:
        print("cosmos3-jax: interrupted", file=sys.stderr)
        status = 130
    if status and distributed.are_several():
        distributed.leave(status)
    return status


def _show_warning(message: Warning, *_, **__) -> None:
    print(f"cosmos3-jax: warning: {' '.join(str(message).split())}", file=sys.stderr)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="cosmos3-jax", description="Cosmos3 video and sound generation in JAX."
    )
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    _add_generate(commands.add_parser("generate", help="turn a prompt into a video or an image"))
    _add_convert(commands.add_parser("convert", help="write a checkpoint in the converted layout"))
    _add_info(commands.add_parser("info", help="what a checkpoint holds and what a shape needs"))
    _add_bench(commands.add_parser("bench", help="time and memory of each stage of a generation"))
    return top


def _add_checkpoint(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--checkpoint",
        default=TINY,
        help=CHECKPOINT_HELP + " (%(default)s)",
    )


def _add_shape(
    command: argparse.ArgumentParser, dtype: str = "default: bfloat16, on a CPU float32"
) -> None:
    command.add_argument("--num-frames", type=int, help="4k + 1; 1 is an image")
    command.add_argument("--height", type=int, help="pixels, a multiple of 16")
    command.add_argument("--width", type=int, help="pixels, a multiple of 16")
    command.add_argument("--fps", type=float, help="frames per second")
    command.add_argument("--sound", action="store_true", help="denoise sound along with the video")
    command.add_argument("--dtype", choices=("bfloat16", "float32"), help=dtype)


def _add_generate(command: argparse.ArgumentParser) -> None:
    command.set_defaults(run=run_generate)
    _add_checkpoint(command)
    command.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="FILE[:FACTOR]",
        help="a LoRA in diffusers' layout, merged into the weights; may be given several times",
    )
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
    given = command.add_mutually_exclusive_group()
    given.add_argument("--image", type=Path, help="an image that the video begins with")
    given.add_argument("--video", type=Path, help="a clip that the video goes on from")
    command.add_argument(
        "--condition-frames",
        metavar="I,J",
        help="latent frames that the clip gives, its frame 0 and four for each later one; -1 is "
        "the video's last, as in --condition-frames=-1 (default: 0,1, which is five frames)",
    )
    command.add_argument(
        "--keep", choices=("first", "last"), help="the end of the clip to take (default: first)"
    )
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
        "--out", type=Path, help="mp4 file; png or jpg for one frame (default: output.mp4, .png)"
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
        "--steps-per-program",
        type=int,
        help="denoising steps of one call to the device; another number rounds otherwise (default: "
        "the largest divisor of --steps up to 5)",
    )
    _add_mesh(command)
    command.add_argument(
        "--no-compilation-cache",
        action="store_true",
        help="do not keep compiled programs for the next run",
    )


def _add_mesh(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--mesh",
        help="what the devices divide: cfg (branches of guidance), seq (tokens), fsdp (weights, "
        "and tokens), as in cfg=2,seq=2; data=1 is one device (default: all, as suits the job)",
    )
    command.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        help="of several processes, where number 0 is; srun and mpirun say so themselves",
    )
    command.add_argument("--processes", type=int, help="how many there are")
    command.add_argument("--process-id", type=int, help="which this is, from 0 on")


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
    _add_shape(command, dtype="default: bfloat16")


def _add_bench(command: argparse.ArgumentParser) -> None:
    command.set_defaults(run=run_bench)
    weights = command.add_mutually_exclusive_group()
    weights.add_argument("--checkpoint", help=CHECKPOINT_HELP)
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
    command.add_argument(
        "--repeats",
        type=int,
        default=3,
        help="runs of a stage after one to warm up; that one alone, if it takes over "
        f"{measure.LONG_SECONDS} s (%(default)s)",
    )
    command.add_argument("--text-tokens", type=int, default=bench.PROMPT_TOKENS, help="%(default)s")
    command.add_argument(
        "--negative-tokens",
        type=int,
        default=bench.PROMPT_TOKENS,
        help="%(default)s; 0 for no guidance",
    )
    command.add_argument("--decode-chunk-size", type=int, help="latent frames at a time")
    command.add_argument("--out", type=Path, metavar="FILE.json", help="what was measured, as JSON")
    command.add_argument("--overwrite", action="store_true", help="replace an existing FILE.json")


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
    folder = find_checkpoint(options.checkpoint, weights=False)
    config = load.load_config(folder, load_sound=options.sound or None)
    here = folder == Path(options.checkpoint) or options.checkpoint in BUILT_IN
    lines = [*_memory_lines(options, config)]  # first, as this is what may be refused
    if here:
        layout = "converted" if load.is_converted(folder / "transformer") else "public"
        print(f"{options.checkpoint}: {layout} layout")
        for component in load.open_components(folder, config):
            print(f"  {component.name:16} {len(component.files.shapes):5} tensors, fits the model")
    else:
        print(f"{options.checkpoint}: on the Hub, weights not looked at")
    print("parameters that generation reads")
    for part, count in memory.parameter_counts(config).items():
        print(f"  {part:16} {count / 1e6:12,.1f} M")
    print(f"sound: {'yes' if config.has_sound else 'no'}")
    print(f"recipe: {', '.join(f'{key}={value}' for key, value in vars(config.recipe).items())}")
    print("\n".join(lines))
    return 0


def _memory_lines(options: argparse.Namespace, config: Config) -> Iterator[str]:
    """The estimate for this GPU or, where there is none, for one to come."""
    names = ("num_frames", "height", "width", "fps", "sound", "dtype")
    if not options.sound:
        config = config.silent()
    job = Job.of_recipe(config, **{name: getattr(options, name) for name in names})
    if device.default_device().platform != "gpu":
        job = job.replace(device=device.PlannedGPU())
    resident, offloaded = (
        memory.generation_bytes(config, job.replace(offload=offload)) for offload in (False, True)
    )
    yield f"GPU memory for {job} in {job.dtype}, an estimate"
    yield f"  {'':21} {'resident':>12} {'offload':>12}"
    for part, size in resident.items():
        yield f"  {part:21} {size / 2**30:8.3f} GiB {offloaded[part] / 2**30:8.3f} GiB"
    limit = device.memory_limit()
    if limit is not None:
        fits = ["fits" if x["peak"] <= limit else "too large" for x in (resident, offloaded)]
        here = f"of {limit / 2**30:.3f} GiB here"
        yield f"  {here:21} {fits[0]:>12} {fits[1]:>12}"


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
        "sizes", "num_frames", "height", "width", "fps", "steps", "sound", "text_tokens",
        "negative_tokens", "decode_chunk_size",
    )  # fmt: skip
    if options.repeats < 1:
        raise ValueError(f"repeats={options.repeats} must be at least 1")
    jobs = bench.jobs(config, **{name: getattr(options, name) for name in names})
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


if __name__ == "__main__":
    sys.exit(main())
