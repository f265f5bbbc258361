"""One row of the study again, with SGLang for the in-process engine and several trainer ranks for one.

    python real_stack.py [--work DIR] [--results DIR] [--only WORD]

Every run is `megatron-vespo train` with the row's own flags (`trial.flags`), on the same base model, task and
held-out prompts. It adds a line to `results/real_stack.jsonl`, and goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import base_model
import numpy as np
import qwen3_moe
import running_sum
from safetensors.torch import load_file
from sampler import Sampler, sample_responses
from study import HERE, read_records, report
from table import real_stack_trials
from task_files import write_model, write_prompts
from transformers import Qwen3MoeConfig
from trial import EVALUATION_INTERVAL, PROMPTS_PER_STEP, Trial, flags, held_out_prompts

from megatron_vespo.types import Prompt

# matrices, sequence and vocabulary are cut in two, experts are shared out
LAYOUT = [
    "--trainer-ranks", "2",
    "--tensor-model-parallel-size", "2",
    "--expert-model-parallel-size", "2",
    "--expert-tensor-parallel-size", "1",
]  # fmt: skip
CURVES = {"reward": "reward/mean", "entropy": "train/entropy", "grad_norm": "train/grad_norm"}


def train_prompts(trial: Trial) -> list[Prompt]:
    """As many as the run takes: none is seen twice, as in the study."""
    draw = np.random.default_rng([trial.seed, 1])
    return running_sum.prompts(running_sum.draw_digits(draw, trial.num_steps * PROMPTS_PER_STEP))


def command_line(trial: Trial, folder: Path) -> list[str]:
    """Of a run in `folder`; a flag that is given twice has its last value."""
    return [
        *flags(trial, folder / "base"), *LAYOUT,
        "--prompt-data", str(folder / "train.jsonl"), "--no-chat-template",
        "--eval-data", str(folder / "heldout.jsonl"),
        "--eval-interval", str(max(1, EVALUATION_INTERVAL // trial.mini_batches)),
        "--reward-function", "running_sum:text_reward",
        "--output-dir", str(folder / "run"),
    ]  # fmt: skip


def run(trial: Trial, base: Path, folder: Path) -> dict[str, Any]:
    """Train in processes of their own; returns the run's record."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_model(base, folder / "base")
    write_prompts(folder / "train.jsonl", train_prompts(trial))
    write_prompts(folder / "heldout.jsonl", held_out_prompts(trial))
    started = time.monotonic()
    search_path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    subprocess.run(
        [sys.executable, "-m", "megatron_vespo", "train", *command_line(trial, folder)],
        env=os.environ | {"PYTHONPATH": search_path},
        check=True,
    )
    minutes = (time.monotonic() - started) / 60
    summary = json.loads((folder / "run/summary.json").read_text())
    return asdict(trial) | {
        "layout": {name: summary["layout"][name] for name in ("trainer_ranks", "tensor", "expert")},
        **curves(read_records(folder / "run/metrics.jsonl")),
        "exported_accuracy": exported_accuracy(trial, folder / "run/hf"),
        "max_logprob_difference": summary["max_logprob_difference"],
        "error": None,
        "minutes": round(minutes, 1),
    }


def curves(rows: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """One entry an evaluation, and one for the mean of what led to it, as in the study's records."""
    found: dict[str, list[float]] = defaultdict(list)
    since: list[dict[str, Any]] = []
    for row in rows:
        if "reward/mean" in row:
            since.append(row)
        if "eval/accuracy" in row:
            found["steps"].append(row["step"])
            found["accuracy"].append(row["eval/accuracy"])
            for name, metric in CURVES.items() if since else ():
                found[name].append(float(np.mean([one[metric] for one in since])))
            since = []
    return {name: [float(f"{value:.4g}") for value in values] for name, values in found.items()}


def exported_accuracy(trial: Trial, hf: Path) -> float:
    """Of the last weights, judged by the study's own engine, with the seed that it judges all runs with."""
    config = Qwen3MoeConfig.from_pretrained(hf)
    named: qwen3_moe.Weights = {}
    for path in sorted(hf.glob("*.safetensors")):
        named |= load_file(path)
    sampler = Sampler(qwen3_moe.stack_experts(named, config), config)
    completions = sample_responses(sampler, held_out_prompts(trial), seed=1)
    return float(np.mean([completion.reward for completion in completions]))


def run_all(work: Path, results: Path, only: str) -> None:
    """Those that `results/real_stack.jsonl` lacks, one after the other."""
    base, path = work / "base", results / "real_stack.jsonl"
    base_model.make(base)
    tuning = {record["key"]: record for record in read_records(results / "runs.jsonl")}
    known = {record["key"] for record in read_records(path)}
    for trial in real_stack_trials(tuning):
        if trial.key not in known and only in trial.key:
            record = run(trial, base, work / "real_stack" / f"{trial.method}_{trial.seed}")
            with path.open("a") as file:
                file.write(json.dumps({"key": trial.key} | record) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=HERE / "work", help="base model, data and runs")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--only", default="", metavar="WORD", help="runs whose key contains this")
    options = parser.parse_args()
    run_all(options.work, options.results, options.only)
    report(options.results)


if __name__ == "__main__":
    main()
