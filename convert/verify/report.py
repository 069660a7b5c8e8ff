"""What was found: as a table, as JSON, as plots, and as the table of a README.

The JSON holds `rows` (see `compare.Row`), `places` (see `compare.Mismatch`), `parting` (the first
failure of each component, in words), `skipped`, `details`, `bars`, `versions`, `checkpoint`,
`converted`, `options`, `seconds`, `peak_memory_gib`, `unfinished` (components to come) and
`passed`.
"""

import dataclasses
import importlib.metadata
import json
import math
import platform
import resource
import sys
from pathlib import Path
from typing import Any

from convert.verify.compare import FLOAT32, FLOOR, NONSENSE, RATIO, Outcome, Row
from cosmos3_jax.checkpoint import publish

PACKAGES = ("cosmos3-jax", "jax", "jaxlib", "flax", "numpy", "torch", "diffusers", "transformers")
FILE = "verify.json"


def text(outcome: Outcome) -> str:
    """For a terminal: a line a row, the first failure, and what was skipped."""
    lines = ["", _table(outcome.rows)] if outcome.rows else []
    if not outcome.passed:
        lines += ["", f"first failure: {outcome.first_failure}"]
        lines.append(f"{len(outcome.mismatches)} mismatch(es) in all")
    return "\n".join(lines + [f"skipped: {line}" for line in outcome.skipped])


def _table(rows: list[Row]) -> str:
    head = (
        "component", "case", "dtype", "shape", "inputs", "max abs", "rel. L2", "cosine", "PSNR",
        "reference", "bar", "verdict",
    )  # fmt: skip
    lines = [head] + [
        (
            row.component, row.case, row.dtype, "x".join(map(str, row.shape)), str(row.inputs),
            f"{row.max_abs:.1e}", f"{row.relative_l2:.1e}", f"{row.cosine:.7f}",
            "" if row.psnr is None else f"{row.psnr:.1f} dB",
            "" if row.reference_error is None else f"{row.reference_error:.1e}",
            f"{row.bar:.1e}", "pass" if row.passed else "FAIL",
        )
        for row in rows
    ]  # fmt: skip
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def markdown(report: dict[str, Any]) -> str:
    """The same rows, from the JSON, as a table for a README; float32 and bfloat16 side by side.

    Above it, where the comparison failed, that it did and where.
    """
    rows: dict[tuple[str, str], dict[str, dict]] = {}
    for row in report["rows"]:
        rows.setdefault((row["component"], row["case"]), {})[row["dtype"]] = row
    failed = [] if report["passed"] else ["**FAILED**", *filter(None, report["parting"].values())]
    lines = [
        *([": ".join(failed[:2]), ""] if failed else []),
        "| | fp32 | bf16, ours | bf16, diffusers | PSNR | verdict |",
        "|---|---|---|---|---|---|",
    ]
    for (component, case), by_dtype in rows.items():
        full, half = (by_dtype.get(dtype, {}) for dtype in ("float32", "bfloat16"))
        full = full or by_dtype.get("int32", {})
        psnr = (full or half).get("psnr")
        cells = (
            f"{component.replace('_', ' ')}: {case}",
            _number(full.get("relative_l2")),
            _number(half.get("relative_l2")),
            _number(half.get("reference_error")),
            "" if psnr is None else f"{float(psnr):.0f} dB",
            "pass" if all(row["passed"] for row in by_dtype.values()) else "**FAIL**",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _number(value: float | str | None) -> str:
    """Infinity and NaN are text in JSON."""
    return "" if value is None else ("equal" if value == 0 else f"{float(value):.1e}")


def make(outcomes: dict[str, Outcome], checkpoint: str, **what: Any) -> dict[str, Any]:
    """Everything as one dictionary that JSON can hold; `what` is added as it is."""
    mismatches = [m for outcome in outcomes.values() for m in outcome.mismatches]
    return {
        "passed": all(outcome.passed for outcome in outcomes.values()),
        "checkpoint": checkpoint,
        **what,
        "versions": {"python": platform.python_version()}
        | {name: version for name in PACKAGES if (version := _version(name))},
        "bars": {
            "float32": FLOAT32,
            "bfloat16_ratio": RATIO,
            "bfloat16_nonsense": NONSENSE,
            "bfloat16_floor": FLOOR,
        },  # fmt: skip
        "peak_memory_gib": peak_memory_gib(),
        "rows": [dataclasses.asdict(row) for o in outcomes.values() for row in o.rows],
        "parting": {name: outcome.first_failure for name, outcome in outcomes.items()},
        "places": [dataclasses.asdict(mismatch) for mismatch in mismatches],
        "skipped": [line for outcome in outcomes.values() for line in outcome.skipped],
        "details": {name: outcome.details for name, outcome in outcomes.items()},
    }


def write(report: dict[str, Any], folder: Path) -> Path:
    """Write `verify.json`, whole or not at all. Raises OSError."""
    path = folder / FILE
    text = json.dumps(_finite(report), indent=2, allow_nan=False)
    with publish.file(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    return path


def plot(report: dict[str, Any], folder: Path) -> Path | None:
    """The transformer's errors after each layer, as `layers.png`; None where it was not compared.

    Raises ImportError without matplotlib.
    """
    layers = report["details"].get("transformer", {}).get("layers")
    if not layers:
        return None
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    lines: dict[str, tuple[list, list]] = {}
    for entry in layers:
        tower = {"und": "text tower", "gen": "media tower"}[entry["tower"]]
        for key, whose in (("relative_l2", ""), ("reference_error", ", diffusers")):
            if entry[key] is not None:
                line = lines.setdefault(f"{tower}, {entry['dtype']}{whose}", ([], []))
                line[0].append(entry["layer"])
                line[1].append(entry[key])
    for label, line in lines.items():
        axes.plot(*line, "--" if "diffusers" in label else ".-", label=label)
    axes.set(yscale="log", xlabel="after layer", ylabel="relative L2 error")
    axes.set(title="Transformer: error after each layer, against diffusers in float32")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend()
    figure.tight_layout()
    figure.savefig(folder / "layers.png", dpi=120)
    pyplot.close(figure)
    return folder / "layers.png"


def peak_memory_gib() -> float:
    """The most that this process has held of the host's memory."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _finite(value: Any) -> Any:
    """JSON has no infinity and no NaN: they become text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return value
