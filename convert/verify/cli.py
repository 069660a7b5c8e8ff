"""python -m convert.verify CHECKPOINT: the options, what is refused, and the order of the work.

Exit status: 0 if all agrees, 1 if a verdict failed, whatever else went wrong, 2 if none failed but
something could not be compared.
"""

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import jax

from convert.verify import report as reports
from convert.verify.compare import Outcome, keep_failures, one_line
from cosmos3_jax.checkpoint import find, load
from cosmos3_jax.checkpoint.files import TensorFiles
from cosmos3_jax.checkpoint.load import Component
from cosmos3_jax.config import Config

COMPONENTS = ("transformer", "video_vae", "sound_vae", "sampler", "pipeline")
FOLDERS = {"transformer": "transformer", "video_vae": "vae", "sound_vae": "sound_tokenizer"}
DTYPES = {"float32": ("float32",), "bfloat16": ("bfloat16",), "both": ("float32", "bfloat16")}
EXTRA = 'pip install ".[convert]"'


def main(arguments: list[str] | None = None) -> int:
    """Run the command. Returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        if options.markdown:
            print(reports.markdown(_read_report(options.markdown)))
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
    _check_libraries()
    if options.report is not None:
        _check_writable(options.report)
    checkpoint = find.find_checkpoint(options.checkpoint)
    folder = options.converted or checkpoint
    config, components, skipped = _open(checkpoint, folder)
    chosen = _choose(options, config, checkpoint)
    device = _device(options.device)
    print(f"{checkpoint} in diffusers, {folder} here: {', '.join(chosen)}", flush=True)
    outcomes: dict[str, Outcome] = {}
    for name in chosen:
        try:
            with jax.default_device(device):
                outcome = compare_component(name, checkpoint, folder, config, components, options)
        except Exception as error:
            if all(outcome.passed for outcome in outcomes.values()):
                raise
            _refuse(f"{name}: {one_line(error)}; an earlier verdict failed")
            return 1
        outcome.skipped[:0] = [] if outcomes else skipped
        outcomes[name] = outcome
        if outcome.rows:
            print(f"\n{reports.table(outcome.rows)}", flush=True)
        if not outcome.passed:
            print(f"\nfirst failure: {outcome.first_failure}")
            print(f"{len(outcome.mismatches)} mismatch(es) in all", flush=True)
        for line in outcome.skipped:
            print(f"skipped: {line}", flush=True)
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


def compare_component(
    name: str,
    checkpoint: Path,
    folder: Path,
    config: Config,
    components: dict[str, Component],
    options: argparse.Namespace,
) -> Outcome:
    """One component's comparison; see its module."""
    # Only now: torch and diffusers take seconds to import, and errors above need neither.
    from diffusers.utils import logging

    from convert.verify import autoencoders, pipeline, reference, sampler, transformer

    logging.disable_progress_bar()
    logging.set_verbosity_error()

    dtypes = DTYPES[options.dtype]

    def rounded(part: str) -> str:
        ours = components[FOLDERS[part]].files
        theirs = TensorFiles(checkpoint / FOLDERS[part], load.PUBLIC_STEM)
        if "BF16" not in ours.dtypes.values():
            return ""
        if load.is_converted(ours.folder):
            return "folded"
        return "stored" if {"F32"} & set(theirs.dtypes.values()) and folder != checkpoint else ""

    outcome = Outcome()
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # of libraries about each other
        stack.enter_context(reference.exact_arithmetic())
        stack.enter_context(keep_failures(outcome, name))
        if name == "sampler":
            sampler.compare(outcome, checkpoint, config)
        elif name == "pipeline":
            pipeline.compare(
                outcome, checkpoint, folder, config, dtypes, rounded=rounded("transformer"),
                device=options.device, free_gib=free_gib(options.device),
            )  # fmt: skip
        else:
            component = components[FOLDERS[name]]
            shared: dict[str, Any] = {"rounded": rounded(name), "device": options.device}
            if name == "transformer":
                transformer.compare(
                    outcome, checkpoint, component, config.transformer, dtypes,
                    layers=options.layers, say=lambda line: print(line, flush=True), **shared,
                )  # fmt: skip
            else:
                autoencoders.compare(
                    outcome, name, checkpoint, component, config, dtypes, **shared
                )  # fmt: skip
    return outcome


def _check_libraries() -> None:
    """Raise ValueError unless the reference can be imported."""
    from importlib.util import find_spec

    needed = ("torch", "diffusers", "transformers", "accelerate")
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        raise ValueError(f"{', '.join(missing)} not installed; the reference needs it: {EXTRA}")


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


def _open(checkpoint: Path, folder: Path) -> tuple[Config, dict[str, Component], list[str]]:
    """The configuration, our components by folder name, and what is left out.

    Raises ValueError if the reference cannot read `checkpoint`, or `folder` is another's.
    """
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
        for name in ("transformer", "video_vae", "sound_vae"):
            _check_same(checkpoint, folder, name, getattr(config, name), getattr(ours, name))
    components = {c.name: c for c in load.open_components(folder, config)}
    return config, components, skipped


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


def _choose(options: argparse.Namespace, config: Config, checkpoint: Path) -> list[str]:
    count = config.transformer.num_hidden_layers
    if options.layers is not None and not 1 <= options.layers <= count:
        raise ValueError(f"--layers {options.layers} is not between 1 and {count}, the model's")
    if options.component == "sound_vae" and not config.has_sound:
        raise ValueError(
            f"--component sound_vae, but {options.converted or checkpoint} has no sound: choose "
            "another component, or all"
        )
    if options.component != "all":
        return [options.component]
    return [name for name in COMPONENTS if name != "sound_vae" or config.has_sound]


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


def free_gib(device: str, cgroup: Path = Path("/sys/fs/cgroup")) -> float:
    """Memory that is free on the host, all of it where the system does not say; within the limit of
    a container; and on the GPU, where the work is done there.
    """
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        found = {line.split(":")[0]: line.split()[1] for line in lines}
        free = int(found["MemAvailable"]) * 1024
    except (OSError, KeyError):
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # none, or "max"
        limit, used = (int((cgroup / f"memory.{n}").read_text()) for n in ("max", "current"))
        free = min(free, max(limit - used, 0))
    if device == "cuda":
        import torch

        free = min(free, torch.cuda.mem_get_info()[0])
    return free / 2**30


def _read_report(path: Path) -> dict:
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        reports.markdown(report)
        return report
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no report of this command: {error!r}") from error
