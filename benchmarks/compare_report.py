"""What `compare_diffusers.py` writes: whole jobs in seconds and their ratios, formed from events.

An event is `{side, environment}`, `{size, side, found}` or `{failed}`. An environment's side is
"ours" or "diffusers"; a measurement's is "ours" or one of diffusers' `VARIANTS`.
"""

import statistics

from cosmos3_jax.cli import bench
from cosmos3_jax.runtime.job import Job
from cosmos3_jax.runtime.measure import LONG_SECONDS

VARIANTS = ("eager", "compiled")
NOTES = {
    "warm": "a first run is left out, but for a loop of ours that takes more than "
    f"{LONG_SECONDS} s: it runs once; else the median counts; all of the video is decoded",
    "preparation": "diffusers also encodes a video of zeros before the loop, of which text-to-video"
    " uses the shape alone; total_seconds leaves that out, total_with_preparation_seconds has it",
    "text": "diffusers runs its text tower in every pass; ours runs once, in `condition`",
    "work": "diffusers' is counted as it runs, ours is what its job asks for; `passes` are those of"
    " the steps timed",
    "best": "of eager and compiled (blocks compiled, cuDNN searching for its convolutions) the one "
    "with the smaller total",
}


def new_report(jobs: dict[str, Job], flags: dict) -> dict:
    """What the file holds, before anything is measured."""
    sizes = {
        size: {
            "job": bench.describe(job),
            "total_formed_by": {},
            "variants_run": [],
            "diffusers": {},
        }
        for size, job in jobs.items()
    }
    return {"sizes": sizes, "notes": NOTES, "environment": {}, "flags": flags, "failed": []}


def merge(report: dict, event: dict) -> None:
    """Put an event in its place, form the ratios anew, and note under `failed` what is wrong."""
    if "failed" in event:
        problems = [event["failed"]]
    elif "environment" in event:
        report["environment"][event["side"]] = event["environment"]
        problems = _devices_differ(report["environment"])
    else:
        problems = _merge_found(report["sizes"][event["size"]], **event)
    report["failed"] += [problem for problem in problems if problem not in report["failed"]]


def _devices_differ(environments: dict[str, dict]) -> list[str]:
    devices = {side: found.get("device") for side, found in environments.items()}
    if len(set(devices.values())) < 2:
        return []
    named = ", ".join(f"{side} on {device}" for side, device in devices.items())
    return [f"the two sides ran on different devices: {named}; measure both on one"]


def _merge_found(entry: dict, size: str, side: str, found: dict) -> list[str]:
    problems = []
    if "error" in found:
        problems.append(f"{size} {side}: {found['error']}")
    else:
        steps, timed = entry["job"]["steps"], found["steps_timed"]
        found = found | summed(found, steps)
        one = "ours" if side == "ours" else "diffusers"
        entry["total_formed_by"][one] = formed_by(one, timed, steps)
        if not found.get("finite", True):
            problems.append(f"{size} {side}: not all values are finite")
    if side == "ours":
        entry["ours"] = found
    else:
        entry["diffusers"][side] = found
        ran = entry["diffusers"].items()
        entry["variants_run"] = [name for name, variant in ran if "error" not in variant]
    if "ours" in entry:
        entry["ratios"] = ratios(entry["ours"], entry["diffusers"])
        if not entry["ratios"].get("same_work", True):
            problems.append(f"{size}: the two sides did not do the same work")
    return problems


def formed_by(side: str, timed: int, steps: int) -> str:
    """How `summed` makes a whole job of what was timed."""
    if side == "ours":
        few, start = f"{steps} * (one loop of {timed} steps / {timed})", "condition + "
        every = f"one loop of all {steps} steps"
    else:
        few, start = f"{steps} * the median of {timed} steps after one to warm up", ""
        every = f"all {steps} steps of one call"
    return f"{start}{every if timed == steps else few} + decode"


def summed(found: dict, steps: int) -> dict:
    """The seconds of the whole job, from what was measured of it; see `formed_by`."""
    timed = found["steps_timed"]
    if "loop_samples" in found:  # one program: its steps have no clock
        loop = statistics.median(found["loop_samples"])
        step = loop / timed
    else:
        loop, step = sum(found["step_samples"]), statistics.median(found["step_samples"])
    denoise = loop if timed == steps else steps * step
    decoding = statistics.median(found["decode_samples"])
    total = found.get("condition_seconds", 0.0) + denoise + decoding
    before = found.get("encode_seconds", 0.0) + found.get("preparation_seconds", 0.0)
    return {
        "step_median_seconds": step,
        "denoise_seconds": denoise,
        "decode_seconds": decoding,
        "total_seconds": total,
        "total_with_preparation_seconds": total + before,
    }


def ratios(here: dict, variants: dict[str, dict]) -> dict:
    """diffusers' seconds over ours, of each variant that ran and of the one with the least total.

    `ratio` is the headline: denoising and decoding alone on their side, everything on ours.
    """
    ran = {name: found for name, found in variants.items() if "error" not in found}
    if "error" in here or not ran:
        return {}
    pairs = {
        "ratio": "total_seconds",
        "ratio_with_preparation": "total_with_preparation_seconds",
        "ratio_step": "step_median_seconds",
        "ratio_decode": "decode_seconds",
    }
    found = {
        name: {ratio: variant[key] / here[key] for ratio, key in pairs.items()}
        for name, variant in ran.items()
    }
    best = min(ran, key=lambda name: ran[name]["total_seconds"])
    same = all(variant["work"] == here["work"] for variant in ran.values())
    return {**found, "compared_with": best, "same_work": same, **found[best]}


def table(report: dict) -> str:
    """A line for each size and side: step, decode, encode, total, peak memory and ratios.

    And what did not run, and what failed.
    """
    lines = [
        "size  side        step s  decode s  encode s   total s  peak GiB  ratio (with encode)"
    ]
    for size, entry in report["sizes"].items():
        rows = {"ours": entry["ours"]} if "ours" in entry else {}
        rows |= entry["diffusers"]
        for name, row in rows.items():
            if "error" in row:
                continue
            columns = ("step_median_seconds", "decode_seconds", "encode_seconds", "total_seconds")
            values = [row.get(column, 0.0) for column in columns] + [row["peak_gib"] or 0.0]
            line = f"{size:5} {name:9} " + " ".join(f"{value:9.3f}" for value in values)
            if name in entry.get("ratios", {}):
                found = entry["ratios"][name]
                line += f"  {found['ratio']:.2f} ({found['ratio_with_preparation']:.2f})"
                if name == entry["ratios"]["compared_with"]:
                    line += " <- compared with"
            lines.append(line)
        missing = [name for name in VARIANTS if name not in entry["diffusers"]]
        lines += [f"{size:5} {name}: not run" for name in missing]
    return "\n".join(lines + report["failed"])
