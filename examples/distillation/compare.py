"""Table and picture of the runs that run.sh has made."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np

from megatron_vespo.observability.metrics import batch_records, read_metrics
from megatron_vespo.observability.report import BLUE, GREEN, ORANGE, STYLE

WAYS = {"distillation": ("the teacher alone", BLUE), "mixture": ("both", GREEN), "rl": ("RL alone", ORANGE)}
SAMPLES_PER_STEP = 8  # 4 prompts x 4 completions, two optimizer steps
NEAR = 0.02  # of the teacher's accuracy


@dataclass
class Run:
    """Held-out accuracy and reverse KL (nats per token; empty without a teacher) against samples."""

    samples: np.ndarray
    accuracy: np.ndarray
    kl_samples: np.ndarray
    kl: np.ndarray

    def samples_until(self, accuracy: float) -> int | None:
        """Samples drawn when an evaluation first reaches `accuracy`; None if none does."""
        reached = np.flatnonzero(self.accuracy >= accuracy)
        return int(self.samples[reached[0]]) if len(reached) else None


def read_run(folder: Path) -> Run:
    records = read_metrics(folder / "metrics.jsonl")
    evaluated = [record for record in records if "eval/accuracy" in record]
    taught = [record for record in batch_records(records) if "distillation/reverse_kl" in record]
    return Run(
        SAMPLES_PER_STEP * np.array([record["step"] for record in evaluated]),
        np.array([record["eval/accuracy"] for record in evaluated]),
        SAMPLES_PER_STEP * np.array([record["step"] for record in taught]),
        np.array([record["distillation/reverse_kl"] for record in taught]),
    )


def table(teacher: float, runs: dict[str, list[Run]]) -> str:
    """A column per way; a cell has a value for each seed."""

    def until(run: Run, accuracy: float) -> str:
        found = run.samples_until(accuracy)
        return "not reached" if found is None else f"{found:,}"

    last = next(iter(runs.values()))[0].samples[-1]
    rows: dict[str, Callable[[Run], str]] = {
        "held-out accuracy before, %": lambda run: f"{100 * run.accuracy[0]:.1f}",
        f"after {last // 4:,} samples, %": lambda run: f"{100 * run.accuracy[len(run.accuracy) // 4]:.1f}",
        f"after {last:,} samples, %": lambda run: f"{100 * run.accuracy[-1]:.1f}",
        "samples until 90%": lambda run: until(run, 0.9),
        f"until within {100 * NEAR:.0f} points of the teacher": lambda run: until(run, teacher - NEAR),
    }
    head = f"| student | {' | '.join(WAYS[way][0] for way in runs)} |"
    lines = [
        f"| {label} | {' | '.join(', '.join(cell(run) for run in seeds) for seeds in runs.values())} |"
        for label, cell in rows.items()
    ]
    title = f"teacher: {100 * teacher:.1f}% of the held-out prompts"
    return "\n".join([title, "", head, "|---" * (len(runs) + 1) + "|", *lines])


def picture(teacher: float, runs: dict[str, list[Run]], path: Path) -> None:
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), width_ratios=(3, 2))
        left.axhline(100 * teacher, color="#222222", linestyle="--", linewidth=1.2, label="teacher")
        for way, seeds in runs.items():
            name, color = WAYS[way]
            for index, run in enumerate(seeds):
                label = None if index else name  # once in the legend
                style = {"color": color, "linestyle": "-" if index == 0 else ":", "label": label}
                left.plot(run.samples, 100 * run.accuracy, marker="o", markersize=3, **style)
                if len(run.kl):
                    right.plot(run.kl_samples, run.kl, **style)
        left.set(title="Held-out accuracy of the student (%)", xlabel="samples", ylim=(0, 102))
        left.legend(loc="lower right")
        right.set(title="Reverse KL to the teacher (nats per token)", xlabel="samples")
        right.set_ylim(bottom=0)
        right.legend()
        figure.tight_layout()
        figure.savefig(path, dpi=110)
        plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path, help="folder of the runs")
    work = parser.parse_args().work
    teacher = json.loads((work / "teacher/summary.json").read_text())["eval_accuracy_after"]
    found = {way: sorted(path.parent for path in work.glob(f"{way}-*/summary.json")) for way in WAYS}
    runs = {way: [read_run(folder) for folder in folders] for way, folders in found.items() if folders}
    text = table(teacher, runs)
    (work / "table.md").write_text(text + "\n")
    picture(teacher, runs, work / "curves.png")
    print(text)
    print(f"picture: {work / 'curves.png'}")


if __name__ == "__main__":
    main()
