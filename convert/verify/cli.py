"""python -m convert.verify CHECKPOINT: the options, what is refused, and the order of the work.

Exit status: 0 if all agrees, 1 if a verdict failed, whatever else went wrong, 2 if none failed but
something could not be compared.
"""

import argparse
import importlib.util
import json
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import jax

from convert.verify import report as reports
from convert.verify.compare import Outcome, one_line
from convert.verify.sides import FOLDERS, Sides
from cosmos3_jax.checkpoint import find, load

COMPONENTS = (*FOLDERS, "sampler", "pipeline")
DTYPES = {"float32": ("float32",), "bfloat16": ("bfloat16",), "both": ("float32", "bfloat16")}
LIBRARIES = ("torch", "diffusers", "transformers", "accelerate")


def main(arguments: list[str] | None = None) -> int:
    """Run the command. Returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        if options.markdown:
            print(_read_table(options.markdown))
            return 0
        return _verify(options)
    except (ValueError, OSError) as error:
        return _refuse(str(error))
    except Exception as error:  # out of memory, a damaged file, a library's own
        at = traceback.extract_tb(error.__traceback__)[-1]
        return _refuse(f"{one_line(error)} ({Path(at.filename).name}:{at.lineno})")


def _refuse(why: str) -> int:
    print(f"convert.verify: error: {' '.join(why.split())}", file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m convert.verify",
        description="Compare a checkpoint's numbers here with those of diffusers, part by part.",
    )
    parser.add_argument("checkpoint", nargs="?", help="folder in the public layout, or a Hub id")
    parser.add_argument("--converted", type=Path, metavar="DIR", help="read our weights from here")
    parser.add_argument("--component", choices=(*COMPONENTS, "all"), default="all")
    parser.add_argument("--dtype", choices=DTYPES, default="both")
    parser.add_argument("--layers", type=int, metavar="N", help="the transformer's first N alone")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--report", type=Path, metavar="DIR", help="write JSON and plots there")
    parser.add_argument(
        "--markdown", type=Path, metavar="FILE.json", help="print a report's table and stop"
    )
    return parser


def _verify(options: argparse.Namespace) -> int:
    start = time.perf_counter()
    if options.checkpoint is None:
        raise ValueError("no checkpoint: give a folder in the public layout, or a Hub id")
    missing = [name for name in LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f'{", ".join(missing)} not installed; the reference needs it: pip install ".[convert]"'
        )
    if options.report is not None:
        _check_writable(options.report)
    sides, skipped = _open(options)
    chosen = _choose(options, sides)
    device = _device(options.device)
    print(f"{sides.checkpoint} in diffusers, {sides.folder} here: {', '.join(chosen)}", flush=True)
    outcomes: dict[str, Outcome] = {}
    for name in chosen:
        try:
            with jax.default_device(device):
                outcome = compare_component(name, sides)
        except Exception as error:
            if all(outcome.passed for outcome in outcomes.values()):
                raise
            _refuse(f"{name}: {one_line(error)}; an earlier verdict failed")
            return 1
        outcome.skipped[:0] = [] if outcomes else skipped
        outcomes[name] = outcome
        print(reports.text(outcome), flush=True)
        report = reports.make(
            outcomes,
            options.checkpoint,
            converted=None if options.converted is None else str(options.converted),
            options={n: getattr(options, n) for n in ("component", "dtype", "layers", "device")},
            seconds=time.perf_counter() - start,
            unfinished=[other for other in chosen if other not in outcomes],
        )
        if options.report is not None:  # what is measured stays, should the next not fit
            reports.write(report, options.report)
    print(
        f"\n{'passed' if report['passed'] else 'FAILED'} in {report['seconds']:.0f} s, "
        f"{report['peak_memory_gib']:.1f} GiB of host memory at the most"
    )
    if options.report is not None:
        print(f"wrote {options.report / reports.FILE}")
        try:
            reports.plot(report, options.report)
        except ImportError:
            print("no plots: matplotlib is not installed (pip install matplotlib)")
    return 0 if report["passed"] else 1


def compare_component(name: str, sides: Sides) -> Outcome:
    """One component's comparison; see its module."""
    # Only now: torch and diffusers take seconds to import, and errors above need neither.
    from diffusers.utils import logging

    from convert.verify import autoencoders, pipeline, reference, sampler, transformer

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    modules = {"transformer": transformer, "sampler": sampler, "pipeline": pipeline}
    outcome = Outcome(name)
    with warnings.catch_warnings(), reference.exact_arithmetic(), outcome.keeping_failures():
        warnings.simplefilter("ignore")  # of libraries about each other
        modules.get(name, autoencoders).compare(outcome, sides)
    return outcome


def _check_writable(folder: Path) -> None:
    """Raise OSError unless a file can be made in the folder, which is made if needed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(
            f"--report {folder} cannot be written to ({error}); choose another"
        ) from error


def _open(options: argparse.Namespace) -> tuple[Sides, list[str]]:
    """What is compared, and what is left out.

    Raises ValueError if the reference cannot read the checkpoint, or the conversion is another's.
    """
    checkpoint = find.find_checkpoint(options.checkpoint)
    folder = options.converted or checkpoint
    config, skipped = load.load_config(checkpoint), []
    for name in ("transformer", "vae"):
        if load.is_converted(checkpoint / name):
            raise ValueError(
                f"{checkpoint} is in the converted layout, which diffusers does not read: give the "
                f"public checkpoint, and this one as --converted {checkpoint}"
            )
    if folder != checkpoint:
        ours = load.load_config(folder)
        if config.has_sound and not ours.has_sound:
            skipped.append(f"sound: {folder} has none")
            config = load.load_config(checkpoint, load_sound=False)
        for name in FOLDERS:
            _check_same(checkpoint, folder, name, getattr(config, name), getattr(ours, name))
    components = {part.name: part for part in load.open_components(folder, config)}
    dtypes, layers, device = DTYPES[options.dtype], options.layers, options.device
    return Sides(checkpoint, folder, config, components, dtypes, layers, device), skipped


def _check_same(checkpoint: Path, folder: Path, name: str, theirs: Any, ours: Any) -> None:
    if theirs == ours:
        return
    for field in vars(theirs) if theirs is not None else ():
        one, other = getattr(theirs, field), getattr(ours, field, None)
        if one != other:
            raise ValueError(
                f"{folder} belongs to another checkpoint: its {name} has {field}={other!r}, that "
                f"of {checkpoint} {one!r}; convert {checkpoint} again"
            )
    raise ValueError(f"{folder} belongs to another checkpoint: {checkpoint} has no {name}")


def _choose(options: argparse.Namespace, sides: Sides) -> list[str]:
    """The components to compare, in order. Raises ValueError on options that do not fit."""
    count = sides.config.transformer.num_hidden_layers
    if options.layers is not None and not 1 <= options.layers <= count:
        raise ValueError(f"--layers {options.layers} is not between 1 and {count}, the model's")
    if options.component == "sound_vae" and not sides.config.has_sound:
        raise ValueError(
            f"--component sound_vae, but {sides.folder} has no sound: choose another component, "
            "or all"
        )
    if options.component != "all":
        return [options.component]
    return [name for name in COMPONENTS if name != "sound_vae" or sides.config.has_sound]


def _device(name: str) -> jax.Device:
    """JAX's device of this name. Raises ValueError unless both libraries have it."""
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda, but torch sees no CUDA GPU: use --device cpu")
    try:
        return jax.devices(name)[0]
    except RuntimeError as error:
        raise ValueError(
            f"--device {name}, but JAX has none ({error}); use --device cpu"
        ) from error


def _read_table(path: Path) -> str:
    """A report as a table. Raises ValueError if it is none."""
    try:
        return reports.markdown(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no report of this command: {error!r}") from error
