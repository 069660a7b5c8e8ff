"""The command line's options: names, help, defaults. It imports no JAX, so `--help` is quick.

What a generation is made of comes from `io.settings.Settings`, which Python's `generate` takes too;
defaults by mode come from the recipes.
"""

import argparse
import difflib
import os
import re
import sys
from pathlib import Path
from typing import Any, NoReturn

import cosmos3_jax
from cosmos3_jax import guard
from cosmos3_jax.io.settings import Settings, help_of
from cosmos3_jax.recipes import RECIPES

# A sentence that the embedded checkpoint understands.
DEFAULT_PROMPT = (
    "A large red circle moves fast to the right over a plain navy background and bounces off the "
    "wall early with a high bell."
)
DEFAULT_CHECKPOINT = "tiny"
CHECKPOINT_HELP = (
    "folder, Hub id owner/name, or one that is built in: tiny, trained on a world of coloured "
    "shapes, or random, of random weights"
)
STYLES = ("native", "phyai", "diffusers")
SCHEDULES = ("native", "diffusers", "karras")
BENCH_SIZES = ("256p", "480p", "720p")
PROMPT_TOKENS = 300  # of a benchmark


COMMANDS = ("generate", "convert", "info", "bench")
# What other tools call it -> what it is here.
HABITS = {
    "--negative": "--negative-prompt",
    "--resolution": "--size, as in --size 480p or --size 832x480",
    "--cfg": "--guidance-scale",
    "--cfg-scale": "--guidance-scale",
    "--duration": "--num-frames, a multiple of 4 and one more: seconds times --fps",
    "--length": "--num-frames",
    "--model": "--checkpoint",
    "--precision": "--dtype",
    "--input": "--image or --video",
    "--num-videos": "--count",
}
DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
PROMPT_SUFFIXES = (".json", ".jsonl", ".txt")

EXAMPLES = """\
examples:
  a first try:     cosmos3-jax generate "A large red circle moves fast to the right over a plain \
navy background." -o circle.mp4
  text to video:   cosmos3-jax generate --checkpoint nvidia/Cosmos3-Nano \
--prompt-file caption.json -o storm.mp4
  with sound:      cosmos3-jax generate --checkpoint nvidia/Cosmos3-Nano \
--prompt-file caption.json --sound -o storm.mp4
  text to image:   cosmos3-jax generate --checkpoint nvidia/Cosmos3-Nano \
--prompt-file caption.json -o still.png
  image to video:  cosmos3-jax generate --checkpoint nvidia/Cosmos3-Nano \
--prompt-file caption.json --image first.jpg -o out.mp4
  video to video:  cosmos3-jax generate --checkpoint nvidia/Cosmos3-Nano \
--prompt-file caption.json --video clip.mov -o longer.mp4
  another size:    cosmos3-jax generate --checkpoint nvidia/Cosmos3-Nano \
--prompt-file caption.json --size 480p --aspect 9:16
  four attempts:   cosmos3-jax generate --checkpoint nvidia/Cosmos3-Nano \
--prompt-file caption.json --count 4 -o take.mp4
  one once more:   cosmos3-jax generate --from-record take-seed42.mp4 -o same.mp4
"""


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options of a command line; `command` names what to run.

    With `--from-record` the record's settings are the defaults. Ends the process, with status 2, on
    what cannot be read: of an option that does not exist it names those that are spelt alike.
    """
    parser = _parser({})
    _refuse_habits(parser, sys.argv[1:] if arguments is None else arguments)
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        _refuse(options, unknown)
    if options.command == "generate":
        _refuse_file_as_prompt(options)
    if options.command == "info" and options.model and options.checkpoint != DEFAULT_CHECKPOINT:
        options.parser.error(f"{options.model} beside --checkpoint {options.checkpoint}: give one")
    if options.command == "generate" and options.from_record:
        from cosmos3_jax.cli.record import recorded_options  # needs PyAV

        none = dict.fromkeys(vars(options))  # of all defaults: what is left was named
        named = vars(_parser(none).parse_args(arguments))
        try:
            recorded = recorded_options(
                options.from_record,
                {name: value for name, value in named.items() if value is not None},
            )
        except (ValueError, OSError) as error:
            options.parser.error(str(error))
        options = _parser(recorded).parse_args(arguments)
    return options


def numbers(option: str, text: str, kind: type = float, kinds: str = "numbers") -> list:
    """`1,2,3` as numbers. Raises ValueError on any other text."""
    try:
        return [kind(number) for number in text.split(",")]
    except ValueError as error:
        raise ValueError(f"{option} {text!r} must be {kinds} with commas between them") from error


def _refuse_habits(parser: argparse.ArgumentParser, arguments: list[str]) -> None:
    """Of what another tool's user types, the right spelling."""
    first = arguments[0] if arguments else ""
    if first and first not in COMMANDS and not first.startswith("-"):
        near = difflib.get_close_matches(first, COMMANDS, 1)
        right = near[0] if near else f'generate "{first}"'
        parser.error(f"{first!r} is no command: do you mean cosmos3-jax {right}?")
    for word in arguments:
        if (name := word.partition("=")[0]) in HABITS:
            parser.error(f"there is no {name}: use {HABITS[name]}")


def _refuse(options: argparse.Namespace, unknown: list[str]) -> NoReturn:
    command = options.parser
    if options.command == "generate" and not any(word.startswith("-") for word in unknown):
        prompt = " ".join([options.text or "", *unknown])
        command.error(f'quote the prompt, so that it is one argument: "{prompt}"')
    known = sorted(set(re.findall(r"--[a-z][a-z-]+", command.format_help())))
    words = []
    for word in unknown:
        near = difflib.get_close_matches(word.partition("=")[0], known, 2)
        words.append(f"{word} (do you mean {' or '.join(near)}?)" if near else word)
    command.error(f"unrecognized arguments: {', '.join(words)}")


def _refuse_file_as_prompt(options: argparse.Namespace) -> None:
    for text in filter(None, (options.text, options.prompt)):
        named = text.lower().endswith(PROMPT_SUFFIXES) and len(text.split()) == 1
        if named or os.path.isfile(text):
            options.parser.error(
                f"the prompt {text!r} is the name of a file: say --prompt-file {text}"
            )


def _dtype(text: str) -> str:
    """The full name. Raises ArgumentTypeError on float16, for a reason."""
    if text in ("fp16", "float16", "half"):
        raise argparse.ArgumentTypeError(
            f"{text} has too small a range for this model's weights: use bfloat16"
        )
    return DTYPES.get(text, text)


def _written(text: str) -> Path:
    """A path to write; a shell leaves the ~ of `--out=~/car.mp4` as it is."""
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"{text}: this user has no home folder") from error


def _file(text: str) -> Path:
    """Raises ArgumentTypeError on a folder."""
    path = _written(text)
    if text.endswith(("/", os.sep)) or os.path.isdir(path):  # False, where it cannot be a name
        name = os.path.join(text, "output.mp4")
        raise argparse.ArgumentTypeError(f"{text} is a folder: name a file in it, such as {name}")
    return path


class _Parser(argparse.ArgumentParser):
    """Its errors are as short as others, whatever was typed."""

    def error(self, message: str) -> NoReturn:
        super().error(guard.printable(message.replace("\n", " ")))


def _parser(recorded: dict[str, Any]) -> argparse.ArgumentParser:
    top = _Parser(prog="cosmos3-jax", description="Cosmos3 video and sound generation in JAX.")
    top.add_argument(
        "--version", action="version", version=f"cosmos3-jax {cosmos3_jax.__version__}"
    )
    commands = top.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for name, add, text in (
        ("generate", _add_generate, "turn a prompt into a video or an image"),
        ("convert", _add_convert, "write a checkpoint in the converted layout"),
        ("info", _add_info, "what a checkpoint is, its settings, and the memory of a generation"),
        ("bench", _add_bench, "time, energy and memory of each stage of a generation"),
    ):
        command = commands.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            # Of all options, in front of every error, it would be a page.
            usage="%(prog)s [PROMPT] [options]" if name == "generate" else None,
            epilog=EXAMPLES if name == "generate" else None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(parser=command)
        add(command)
        if name == "generate":
            command.set_defaults(**recorded)
    return top


def _recipe(name: str) -> str:
    """Nano's defaults of one setting, as help shows them."""
    video, image = (RECIPES["Nano"][mode][name] for mode in ("text2video", "text2image"))
    values = f"{video:g}" if video == image else f"{video:g}, of an image {image:g}"
    return f" (default: the recipe's; Nano's: {values})"


def _add_checkpoint(group: Any) -> None:
    group.add_argument(
        "--checkpoint", default=DEFAULT_CHECKPOINT, help=CHECKPOINT_HELP + " (default: %(default)s)"
    )
    group.add_argument("--revision", help="branch, tag or commit of a Hub id (default: main)")


def _add_shape(group: Any, one_size: bool = True, makes: bool = False) -> None:
    if one_size:
        group.add_argument(
            "--size", help=help_of("size") + " (default: the recipe's; Nano's: 720p, 16:9 or 1:1)"
        )
        group.add_argument(
            "--aspect",
            metavar="W:H",
            help=help_of("aspect")
            if makes
            else "of its width to its height, with a size such as 480p",
        )
    group.add_argument("--height", type=int, help=help_of("height"))
    group.add_argument("--width", type=int, help=help_of("width"))
    group.add_argument(
        "--num-frames", "--frames", type=int, metavar="N",
        help=help_of("num_frames") + " (default: the recipe's; Nano's: 189"
        + ("; with a name such as still.png: 1)" if makes else ")"),
    )  # fmt: skip
    group.add_argument("--fps", type=float, help=help_of("fps") + _recipe("fps"))
    group.add_argument(
        "--sound", action=argparse.BooleanOptionalAction, help=help_of("sound") + " (default: no)"
    )


def _add_dtype(group: Any) -> None:
    group.add_argument(
        "--dtype",
        type=_dtype,
        choices=("bfloat16", "float32"),
        help="of the computation (default: bfloat16, on a CPU float32)",
    )


def _add_generate(command: argparse.ArgumentParser) -> None:
    prompt = command.add_argument_group("prompt")
    one = prompt.add_mutually_exclusive_group()
    one.add_argument(
        "text", nargs="?", metavar="PROMPT", help="text, or a structured caption as JSON"
    )
    one.add_argument(
        "--prompt",
        "-p",
        help="the same as an option (default: for tiny and random, a sentence for tiny)",
    )
    one.add_argument(
        "--prompt-file", type=Path, metavar="FILE", help="a text or JSON file, read byte for byte"
    )
    one = prompt.add_mutually_exclusive_group()
    one.add_argument(
        "--negative-prompt", metavar="TEXT",
        help="what to lead away from; an empty text is one too (default: the recipe's, else the "
        "style's)",
    )  # fmt: skip
    one.add_argument(
        "--negative-prompt-file", type=Path, metavar="FILE", help="the same from a file"
    )
    prompt.add_argument(
        "--prompt-style", choices=STYLES, default=Settings().prompt_style,
        help="whose way to put prompts into tokens (default: %(default)s)",
    )  # fmt: skip
    prompt.add_argument(
        "--system-prompt", metavar="TEXT", help="of the chat template (default: the style's)"
    )
    prompt.add_argument(
        "--no-system-prompt", dest="system_prompt", action="store_const", const=False,
        help="no system turn",
    )  # fmt: skip
    prompt.add_argument(
        "--no-prompt-metadata", dest="prompt_metadata", action="store_false", default=True,
        help="do not tell the model size, duration and rate along with the prompt",
    )  # fmt: skip

    given = command.add_argument_group("what the video begins with")
    one = given.add_mutually_exclusive_group()
    one.add_argument("--image", metavar="FILE", help="an image")
    one.add_argument("--video", metavar="FILE", help="a clip to go on from")
    given.add_argument(
        "--condition-frames",
        metavar="I,J",
        help="latent frames that the clip gives, its frame 0 and four for each later one; -1 is "
        "the video's last, as in --condition-frames=-1 (default: 0,1, which is five frames)",
    )
    given.add_argument(
        "--keep", choices=("first", "last"), help="the end of the clip to take (default: first)"
    )

    _add_shape(command.add_argument_group("what is made"), makes=True)

    sampler = command.add_argument_group("sampler")
    sampler.add_argument(
        "--steps", "--num-inference-steps", type=int, dest="num_inference_steps", metavar="K",
        help=help_of("num_inference_steps") + _recipe("num_inference_steps"),
    )  # fmt: skip
    sampler.add_argument(
        "--guidance-scale", "--guidance", type=float, metavar="G",
        help=help_of("guidance_scale") + _recipe("guidance_scale"),
    )  # fmt: skip
    sampler.add_argument(
        "--flow-shift", "--shift", type=float, metavar="S",
        help="shift of the noise levels" + _recipe("flow_shift"),
    )  # fmt: skip
    sampler.add_argument(
        "--schedule", choices=SCHEDULES, help="of the noise levels (default: native)"
    )
    sampler.add_argument(
        "--sigmas", metavar="S,S,...",
        help="K + 1 comma-separated noise levels ending in 0, instead of those, of --speed and of "
        "--evaluations",
    )  # fmt: skip
    sampler.add_argument("--speed", choices=("exact", "fast"), help=help_of("speed"))
    sampler.add_argument("--evaluations", type=int, metavar="K", help=help_of("evaluations"))
    seeds = sampler.add_mutually_exclusive_group()
    seeds.add_argument("--seed", type=int, help=f"-1 draws one (default: {Settings().seed})")
    seeds.add_argument(
        "--seeds",
        metavar="N,N,...",
        help="several seeds, as 1,2,3 or 1-4: a file for each, named by it",
    )
    sampler.add_argument(
        "--count", type=int, default=1, metavar="N",
        help="so many files, of this seed and those after it (default: %(default)s)",
    )  # fmt: skip
    sampler.add_argument(
        "--noise", type=Path, metavar="FILE.npz", help="initial `noise` and `sound_noise`"
    )

    output = command.add_argument_group("output")
    output.add_argument(
        "--out", "-o", "--output", type=_file, metavar="FILE",
        help=".mp4, .mov, .webm, or without sound .gif, .webp; .png, .jpg, .jpeg, .webp for one "
        "frame (default: output.mp4 or output.png)",
    )  # fmt: skip
    output.add_argument("--overwrite", action="store_true", help="replace existing outputs")
    output.add_argument(
        "--save-latents", type=_written, metavar="FILE.npz",
        help="write final `video` and `sound` latents",
    )  # fmt: skip
    output.add_argument(
        "--checkpoint-every", type=int, metavar="N",
        help="write the sampler's state beside the output every N steps; after an interruption the "
        "same command goes on from it, to the same result",
    )  # fmt: skip
    output.add_argument(
        "--no-metadata", dest="metadata", action="store_false",
        help="do not put the record into the file as well",
    )  # fmt: skip
    output.add_argument(
        "--full-digest", action="store_true",
        help="digest large weight files whole for the record, not by samples; kept for next time",
    )  # fmt: skip
    output.add_argument(
        "--from-record", type=Path, metavar="FILE",
        help="make it again: a record, or a file that was made; other options change what they say",
    )  # fmt: skip

    weights = command.add_argument_group("weights and devices")
    _add_checkpoint(weights)
    weights.add_argument(
        "--lora",
        action="append",
        metavar="FILE[:FACTOR]",
        help="a LoRA file or folder, merged into the weights; may be given several times",
    )
    _add_dtype(weights)
    weights.add_argument(
        "--offload",
        choices=("auto", "yes", "no"),
        default="auto",
        help="have each part of the weights on the device only while it is used; auto: if the "
        "video does not fit otherwise (default: %(default)s)",
    )
    weights.add_argument(
        "--steps-per-program",
        type=int,
        metavar="N",
        help="denoising steps of one call to the device; another number rounds otherwise (default: "
        "the largest divisor of the steps that are made, up to 5)",
    )
    weights.add_argument(
        "--mesh",
        help="what the devices divide: cfg (branches of guidance), seq (tokens), fsdp (weights, "
        "and tokens), as in cfg=2,seq=2; data=1 is one device (default: all, as suits the job)",
    )
    weights.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        help="of several processes, where number 0 is; srun and mpirun say so themselves",
    )
    weights.add_argument("--processes", type=int, metavar="N", help="how many there are")
    weights.add_argument("--process-id", type=int, metavar="N", help="which this is, from 0 on")
    weights.add_argument(
        "--no-compilation-cache",
        action="store_true",
        help="do not keep compiled programs for the next run",
    )


def _add_convert(command: argparse.ArgumentParser) -> None:
    command.add_argument("source", help="folder or Hub id")
    command.add_argument("target", type=_written, help="folder to write")
    command.add_argument("--revision", help="branch, tag or commit of a Hub id (default: main)")
    command.add_argument(
        "--dtype", type=_dtype, choices=("bfloat16", "float32"), default="bfloat16",
        help="of the weights (default: %(default)s)",
    )  # fmt: skip
    command.add_argument("--no-sound", action="store_true", help="leave the sound weights out")
    command.add_argument("--overwrite", action="store_true", help="replace an existing target")


def _add_info(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "model", nargs="?", metavar="CHECKPOINT",
        help="as --checkpoint; Nano and Super, whose sizes are known, need no network",
    )  # fmt: skip
    _add_checkpoint(command)
    _add_shape(command)
    _add_dtype(command)


def _add_bench(command: argparse.ArgumentParser) -> None:
    weights = command.add_mutually_exclusive_group()
    weights.add_argument("--checkpoint", help=CHECKPOINT_HELP)
    weights.add_argument(
        "--random", choices=("nano",), help="random weights of these sizes (default: nano)"
    )
    command.add_argument(
        "--size",
        dest="sizes",
        help=f"{', '.join(BENCH_SIZES)}, or several with commas, instead of --height and --width",
    )
    _add_shape(command, one_size=False)
    _add_dtype(command)
    command.add_argument(
        "--steps", type=int, metavar="K", help="denoising steps (default: the recipe's)"
    )
    command.add_argument(
        "--speed", dest="speeds", default="exact", metavar="SPEED",
        help="exact, fast or exact,fast: all steps, or half as many evaluations (default: "
        "%(default)s)",
    )  # fmt: skip
    command.add_argument(
        "--repeats",
        type=int,
        default=3,
        metavar="N",
        help="runs of a stage after one to warm up; of a long stage that one alone "
        "(default: %(default)s)",
    )
    command.add_argument(
        "--text-tokens", type=int, default=PROMPT_TOKENS, metavar="N",
        help="of the prompt (default: %(default)s)",
    )  # fmt: skip
    command.add_argument(
        "--negative-tokens", type=int, default=PROMPT_TOKENS, metavar="N",
        help="of the negative prompt; 0 for no guidance (default: %(default)s)",
    )  # fmt: skip
    command.add_argument(
        "--decode-chunk-size",
        type=int,
        metavar="N",
        help="latent frames at a time (default: by size)",
    )
    command.add_argument(
        "--out", type=_written, metavar="FILE.json", help="what was measured, as JSON"
    )
    command.add_argument("--overwrite", action="store_true", help="replace an existing FILE.json")
