"""Table and picture of the runs that run.sh has made."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np

from megatron_vespo.observability.metrics import batch_records, read_metrics
from megatron_vespo.observability.report import BLUE, ORANGE, STYLE

MODES = {"synchronous": ORANGE, "asynchronous": BLUE}
SEEDS = (1, 2, 3)
T_95 = 4.303  # Student's t, two degrees of freedom, 95% on both sides


@dataclass
class Run:
    """Times without the evaluations, which are the same in both modes."""

    seconds: np.ndarray  # [batches], since the start of training
    reward: np.ndarray  # [batches]
    accuracy: float  # held out, at the end
    trainer_waits: float  # share of the time, for generation
    lags: np.ndarray  # [S + 1], share of the samples
    lost: float  # groups generated in vain, a group trained on


def read_run(folder: Path) -> Run:
    records = batch_records(read_metrics(folder / "metrics.jsonl"))
    summary = json.loads((folder / "summary.json").read_text())
    phases = [
        sum(value for name, value in record.items() if name.startswith("time/") and name != "time/evaluate")
        for record in records
    ]
    last = records[-1]
    shares = [record for record in records if "staleness/share/0" in record]
    size = sum(name.startswith("staleness/share/") for name in last)
    lags = [np.mean([record[f"staleness/share/{lag}"] for record in shares]) for lag in range(size)]
    in_vain = sum(last.get(f"staleness/{name}_groups", 0.0) for name in ("stale_requeued", "expired"))
    return Run(
        np.cumsum(phases),
        np.array([record["reward/mean"] for record in records]),
        summary["eval_accuracy_after"],
        summary["idle"]["trainer"]["generation"],
        np.array(lags),
        in_vain / last.get("staleness/trained_groups", math.nan),
    )


def interval(values: list[float], form: str) -> str:
    """Mean and 95% interval over the seeds."""
    half = T_95 * np.std(values, ddof=1) / math.sqrt(len(values))
    return f"{np.mean(values):{form}} ± {half:{form}}"


def table(runs: dict[str, list[Run]]) -> str:
    rows = [
        ("seconds of training", lambda run: run.seconds[-1], ".1f"),
        ("held-out accuracy after", lambda run: 100 * run.accuracy, ".1f"),
        ("trainer waits for generation, %", lambda run: 100 * run.trainer_waits, ".1f"),
    ]
    lines = ["| mean and 95% interval of three seeds | " + " | ".join(runs) + " |", "|---|---|---|"]
    for label, value, form in rows:
        cells = [interval([value(run) for run in of_mode], form) for of_mode in runs.values()]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    pairs = zip(runs["asynchronous"], runs["synchronous"], strict=True)
    ratios = [fast.seconds[-1] / slow.seconds[-1] for fast, slow in pairs]
    lost = [run.lost for run in runs["asynchronous"]]
    worst = max(int(np.flatnonzero(run.lags).max()) for run in runs["asynchronous"])
    return "\n".join(
        [*lines, "", f"time ratio, seed by seed: {', '.join(f'{ratio:.2f}' for ratio in ratios)}",
         f"oldest sample, optimizer steps: {worst} (bound {len(runs['asynchronous'][0].lags) - 1})",
         f"groups generated in vain, a group trained on: {np.mean(lost):.2f}"]
    )  # fmt: skip


def picture(runs: dict[str, list[Run]], path: Path) -> None:
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), width_ratios=(2, 1))
        for mode, of_mode in runs.items():
            for number, run in enumerate(of_mode):
                smooth = np.convolve(np.pad(run.reward, 2, "edge"), np.full(5, 0.2), "valid")
                left.plot(run.seconds, smooth, color=MODES[mode], alpha=0.85, label=None if number else mode)
        left.set(title="Reward of the rollout batches", xlabel="seconds of training", ylim=(0, 1.02))
        left.legend(loc="lower right")
        lags = np.mean([run.lags for run in runs["asynchronous"]], axis=0)
        right.bar(range(len(lags)), 100 * lags, color=BLUE)
        right.axvline(len(lags) - 0.5, color="#222222", linestyle="--", linewidth=1.2)
        right.set_ylim(0, 115 * lags.max())
        right.text(len(lags) - 0.6, 113 * lags.max(), "bound", ha="right", va="top")
        right.set(title="Age of the samples", xlabel="optimizer steps", ylabel="% of the samples")
        right.set_xticks(range(len(lags)))
        figure.tight_layout()
        figure.savefig(path, dpi=110)
        plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path, help="folder of the runs")
    work = parser.parse_args().work
    runs = {mode: [read_run(work / f"{mode}-{seed}") for seed in SEEDS] for mode in MODES}
    text = table(runs)
    (work / "table.md").write_text(text + "\n")
    picture(runs, work / "comparison.png")
    print(text)
    print(f"picture: {work / 'comparison.png'}")


if __name__ == "__main__":
    main()
