"""Curves of a run of `train_towers`: python -m examples.tiny.curves --run RUN --out curves.png"""

import argparse
import json
from pathlib import Path

import numpy as np

LOSSES = {"video": "#346ebe", "sound": "#de6a42"}
SHARES = {
    "colour and shape": "#346ebe", "direction": "#3c9a5f", "pitch": "#de6a42",
    "bounce and tone, 4/24 s": "#8a4fa3",
}  # fmt: skip
SMOOTH = 9  # lines of the log that a point is the mean of


def draw(log: list[dict], out: Path) -> None:
    """Losses by step, and what the judge said of held-out sentences."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    losses = [line for line in log if "loss" in line]
    for name, colour in LOSSES.items():
        steps, values = (np.array([line[key] for line in losses]) for key in ("step", name))
        width = min(SMOOTH, len(values))
        mean = np.convolve(values, np.ones(width) / width, "valid")
        left.plot(steps, values, colour, alpha=0.25, linewidth=1)
        left.plot(steps[width - 1 :], mean, colour, label=name)
    left.set(xlabel="step", ylabel="mean squared error of the velocity", yscale="log")
    judged = [line for line in log if "shares" in line]
    for name, colour in SHARES.items():
        points = [(line["step"], line["shares"][name]) for line in judged if name in line["shares"]]
        if points:
            right.plot(*zip(*points, strict=True), colour, marker="o", label=name)
    right.set(xlabel="step", ylabel="right, of held-out sentences", ylim=(0, 1.02))
    for axes in (left, right):
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the curves of a run of train_towers.")
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    lines = (args.run / "log.jsonl").read_text().splitlines()
    draw([json.loads(line) for line in lines], args.out)


if __name__ == "__main__":
    main()
