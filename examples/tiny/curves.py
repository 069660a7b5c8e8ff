"""Curves of training: python -m examples.tiny.curves --runs RUNS --out curves.png

RUNS is a folder of the recipe, with the logs of `sound`, `video` and `towers`; those that are not
there are left out.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from cosmos3_jax.io import media

COLOURS = {"video": "#346ebe", "sound": "#de6a42"}
FIDELITY = {"video": "psnr", "sound": "snr"}  # dB, of training clips
SHARES = {
    "colour and shape": "#346ebe", "direction": "#3c9a5f", "pitch": "#de6a42",
    "bounce and tone, 4/24 s": "#8a4fa3",
}  # fmt: skip
SMOOTH = {"autoencoders": 3, "losses": 9}  # lines of a log that a point is the mean of


def read(runs: Path) -> dict[str, list[dict]]:
    """The lines of each log that is there. Raises FileNotFoundError if none is."""
    logs = {}
    for name in ("sound", "video", "towers"):
        path = runs / name / "log.jsonl"
        if path.is_file():
            logs[name] = [json.loads(line) for line in path.read_text().splitlines()]
    if not logs:
        raise FileNotFoundError(f"{runs} has no log of sound, video or towers")
    return logs


def draw(logs: dict[str, list[dict]], out: Path) -> None:
    """What the autoencoders give back, the towers' losses, and what the judge said meanwhile."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    towers = logs.get("towers", [])
    judged = [line for line in towers if "shares" in line]
    figure, panels = pyplot.subplots(
        1, 3 if judged else 2, figsize=(13 if judged else 9, 3.2), layout="constrained"
    )
    autoencoders, losses = panels[:2]
    autoencoders.set(xlabel="step", ylabel="autoencoders: PSNR, SNR in dB")
    losses.set(xlabel="step", ylabel="towers: squared error of the velocity", yscale="log")
    for name, colour in COLOURS.items():
        lines = logs.get(name, [])
        if lines:
            _curve(autoencoders, lines, FIDELITY[name], colour, name, SMOOTH["autoencoders"])
        lines = [line for line in towers if name in line]
        if lines:
            _curve(losses, lines, name, colour, name, SMOOTH["losses"])
    if judged:
        panels[2].set(xlabel="step", ylabel="right, of held-out sentences", ylim=(0, 1.02))
        for name, colour in SHARES.items():
            points = [(ln["step"], ln["shares"][name]) for ln in judged if name in ln["shares"]]
            if points:
                panels[2].plot(*zip(*points, strict=True), colour, marker="o", label=name)
    for axes in panels:
        if axes.lines:
            axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, dpi=150)
    pyplot.close(figure)


def _curve(axes, lines: list[dict], key: str, colour: str, label: str, smooth: int) -> None:
    """The values of a log, and their running mean."""
    steps, values = (np.array([line[name] for line in lines]) for name in ("step", key))
    width = min(smooth, len(values))
    mean = np.convolve(values, np.ones(width) / width, "valid")
    axes.plot(steps, values, colour, alpha=0.25, linewidth=1)
    axes.plot(steps[width // 2 :][: len(mean)], mean, colour, label=label)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the curves of a run of the recipe.")
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    media.check_writable(args.out, overwrite=True)
    draw(read(args.runs), args.out)


if __name__ == "__main__":
    main()
