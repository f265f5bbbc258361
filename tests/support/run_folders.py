"""Output folders of runs as a training writes them, for tests of the viewer; their numbers are made up."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vespo.observability.metrics import dump_json

BEGIN = 1_790_000_000.0  # Unix seconds
BATCH_S = 30.0
STEPS_PER_ROLLOUT = 4
ARGUMENTS = {
    "lr": 1e-6,
    "group_size": 8,
    "steps_per_rollout": STEPS_PER_ROLLOUT,
    "ratio_denominator": "recomputed",
    "output_dir": "/runs/one",
    "seed": 1234,
}
PACKAGES = {"numpy": "2.2.1", "torch": "2.9.0", "sglang": "0.5.23"}
MACHINE = {"host": "node1", "cpu": "a CPU", "cores": 2, "gpus": [], "python": "3.12.1", "slurm_job": None}


def records(
    num_batches: int, seed: int = 0, gain: float = 1.0, begin: float = BEGIN
) -> Iterator[dict[str, Any]]:
    """The records of metrics.jsonl; held-out accuracy every two batches. `gain` scales how fast it learns."""
    random = np.random.default_rng(seed)
    yield evaluation(0, begin, 0.25)
    for batch in range(1, num_batches + 1):
        step, now = batch * STEPS_PER_ROLLOUT, begin + batch * BATCH_S
        learned = 1.0 - math.exp(-gain * batch / 12)
        reward = 0.25 + 0.7 * learned + random.normal(0, 0.02)
        yield {"step": step, "time": now, **batch_metrics(batch, reward, learned, random)}
        if batch % 2 == 0:
            yield evaluation(step, now + 2.0, 0.25 + 0.7 * learned)


def evaluation(step: int, now: float, accuracy: float) -> dict[str, Any]:
    half = 0.04
    bounds = {"eval/interval_low": accuracy - half, "eval/interval_high": accuracy + half}
    return {"step": step, "time": now, "eval/accuracy": accuracy, **bounds, "eval/length_mean": 300.0}


def batch_metrics(batch: int, reward: float, learned: float, random: np.random.Generator) -> dict[str, float]:
    spread = 0.15 + 0.05 * learned + abs(random.normal(0, 0.02))
    norm = 0.4 + abs(random.normal(0, 0.1))
    metrics = {
        "reward/mean": reward,
        "response/length_mean": 300.0 + 40 * learned + random.normal(0, 5),
        "response/length_p90": 700.0 + 90 * learned,
        "response/truncated_share": 0.01,
        "ratio/log_w_mean": -(spread**2) / 2,
        "ratio/log_w_std": spread,
        "ratio/staleness_std": 0.9 * spread,
        "ratio/mismatch_std": 0.4 * spread,
        "weight/mean": 0.9,
        "weight/mean/positive": 0.95 - 0.1 * spread,
        "weight/mean/negative": 0.9 - 0.3 * spread,
        "weight/ess": 0.97 - spread / 4,
        "weight/dead_share": 0.0,
        "train/entropy": 0.6 - 0.3 * learned,
        "train/grad_norm": norm,
        "train/grad_norm_max": 1.4 * norm,
        "train/loss": -0.02,
        "train/tokens": 40_000.0 + 10 * batch,
        "train/tokens_per_second": 9_000.0 + random.normal(0, 300),
        "rollout/tokens_per_second": 3_000.0 + random.normal(0, 150),
        "policy/version": float(batch),
        "engines/restarts": 0.0,
        "time/generate": 17.0 + random.normal(0, 1),
        "time/reward": 0.5,
        "time/log-probs": 2.0,
        "time/train": 8.0 + random.normal(0, 0.3),
        "time/sync": 1.0,
    }
    return metrics


def append(folder: Path, *lines: dict[str, Any], end: str = "\n") -> None:
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as stream:
        stream.write("\n".join(dump_json(line) for line in lines) + end)


def write_run(
    folder: Path, num_batches: int = 20, *, seed: int = 0, gain: float = 1.0, finished: bool = False,
    arguments: dict[str, Any] | None = None, packages: dict[str, str] | None = None, begin: float = BEGIN,
) -> Path:  # fmt: skip
    """A run of `num_batches` rollout batches so far, with a timeline; `finished` adds summary.json."""
    folder.mkdir(parents=True)
    write_start(folder, 1, begin - 60, arguments=arguments, packages=packages)
    append(folder, *records(num_batches, seed, gain, begin))
    write_trace(folder, num_batches)
    if finished:
        summary = {"steps": num_batches * STEPS_PER_ROLLOUT, "idle": idle_shares()}
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def write_start(
    folder: Path, number: int, when: float, *, arguments: dict[str, Any] | None = None,
    packages: dict[str, str] | None = None, **more: Any,
) -> None:  # fmt: skip
    """run-00N.json of a start at `when` (Unix seconds)."""
    from datetime import UTC, datetime

    every = {**ARGUMENTS, **(arguments or {})}
    content = {
        "started": datetime.fromtimestamp(when, UTC).isoformat(timespec="seconds"),
        "command": "megatron-vespo train --lr 1e-6",
        "changed": {name: every[name] for name in ("lr", "group_size") if name in every},
        "seed": every["seed"],
        "source": {"commit": "a" * 40, "changed": []},
        "packages": packages or PACKAGES,
        "patches": "all 3 applied",
        "machine": MACHINE,
        "environment": {"exported": {"OMP_NUM_THREADS": "1"}, "trainer": {}, "engines": {}},
        "arguments": every,
        **more,
    }
    (folder / f"run-{number:03d}.json").write_text(json.dumps(content, indent=1) + "\n")


def idle_shares() -> dict[str, dict[str, float]]:
    trainer = {"sync": 0.03, "saving": 0.0, "rewards": 0.02, "evaluation": 0.05, "generation": 0.55}
    return {
        "trainer": {**trainer, "calls": 0.01, "other": 0.01},
        "engines": {
            "slower engines": 0.1,
            "sync": 0.03,
            "saving": 0.0,
            "rewards": 0.02,
            "training": 0.3,
            "other": 0.01,
        },
    }


def write_trace(folder: Path, num_batches: int, *, closed: bool = False) -> None:
    """trace.json of one trainer rank and one engine, in microseconds since the start."""
    events: list[dict[str, Any]] = [
        {"name": "process_name", "ph": "M", "pid": pid, "tid": 0, "args": {"name": name}}
        for pid, name in enumerate(("driver", "trainer", "engines"))
    ]
    for batch in range(num_batches):
        at = 60e6 + batch * 30e6
        for pid, name, start, end in (
            (0, "generate", 0, 18e6), (2, "generate", 0, 18e6), (0, "reward", 18e6, 18.5e6),
            (0, "log-probs", 18.5e6, 20.5e6), (1, "prepare", 18.6e6, 20.4e6),
            (0, "train", 20.5e6, 29e6), (1, "train_step", 20.6e6, 28.9e6), (0, "sync", 29e6, 30e6),
        ):  # fmt: skip
            events.append(
                {"name": name, "ph": "X", "pid": pid, "tid": 0, "ts": at + start, "dur": end - start}
            )
    text = "[\n" + ",\n".join(json.dumps(event) for event in events)
    (folder / "trace.json").write_text(text + ("\n]\n" if closed else ""))
