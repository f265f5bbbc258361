"""Picture of several seeds: held-out accuracy and training reward against optimizer steps.

Usage: python seeds.py curves.png work/run work/run-seed-2
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from megatron_vespo.observability.metrics import read_metrics
from megatron_vespo.observability.report import BLUE, GREEN, ORANGE, STYLE

CURVES = {
    "eval/accuracy": "Held-out accuracy (%), greedy",
    "reward/mean": "Training reward (%), temperature 1",
}


def points(folder: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and percentages of a metric."""
    records = [record for record in read_metrics(folder / "metrics.jsonl") if name in record]
    return np.array([r["step"] for r in records]), 100 * np.array([r[name] for r in records])


def draw(axes: Any, folders: list[Path], name: str) -> None:
    for index, (folder, color) in enumerate(zip(folders, (BLUE, ORANGE, GREEN), strict=False), start=1):
        steps, values = points(folder, name)
        axes.plot(steps, values, color=color, marker="o", markersize=4, label=f"seed {index}")
    axes.set(title=CURVES[name], xlabel="optimizer steps")
    axes.set_ylim(bottom=0)
    axes.legend(loc="lower right")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, help="the picture, .png or .svg")
    parser.add_argument("runs", type=Path, nargs="+", help="output folders, seed 1 first, three at most")
    arguments = parser.parse_args()
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(1, 2, figsize=(11, 3.6))
        for axes, name in zip(panels, CURVES, strict=True):
            draw(axes, arguments.runs, name)
        figure.tight_layout()
        figure.savefig(arguments.output, dpi=110)


if __name__ == "__main__":
    main()
