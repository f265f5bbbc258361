"""A run with all trackers and Prometheus, stopped and resumed: each tracker has one run, with all records."""

from __future__ import annotations

import json
import re
import socket
import urllib.request
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_vespo.observability.metrics import read_metrics
from megatron_vespo.observability.trackers.mlflow_tracker import metric_name
from megatron_vespo.system.preemption import EXIT_RESUME
from tests.support.interrupted import command
from tests.support.runs import START_S, Run
from tests.support.tracker_files import Found, read_mlflow, read_swanlab, read_wandb, use_packages

SECRET = "fedcba9876543210fedcba9876543210fedcba98"
STEPS = 12
TRACKERS = ("wandb", "mlflow", "swanlab")
COMPARED = ("reward/mean", "ratio/log_w_std", "weight/mean/positive", "time/train")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def scraped(port: int) -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    samples = (re.fullmatch(r"(\w+)\{[^}]*\} (\S+)", line) for line in lines)
    return {sample[1]: float(sample[2]) for sample in samples if sample}


def same_points(found: Found, name: str, records: list[dict], metric: str) -> bool:
    """The tracker's points of a metric, the last of each step, are the run's; NaN equals NaN."""
    points = dict(found.metrics[name])
    ours = {r["step"]: r[metric] for r in records if metric in r}
    return {k: repr(v) for k, v in points.items()} == {k: repr(v) for k, v in ours.items()}


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_resumed_run_continues_its_trackers_runs(tiny_model, tmp_path, monkeypatch):
    use_packages(monkeypatch)
    for name in ("WANDB_API_KEY", "MLFLOW_TRACKING_TOKEN", "SWANLAB_API_KEY"):
        monkeypatch.setenv(name, SECRET)
    folder, out, port = tmp_path / "run", tmp_path / "run/out", free_port()
    flags = [word for name in (*TRACKERS, "tensorboard") for word in ("--tracker", name)]
    flags += ["--tracker-offline", "--tracker-project", "tests", "--tracker-tag", "tiny"]
    flags += ["--prometheus-port", str(port), "--train-iters", str(STEPS)]

    with Run(command(tiny_model, folder, *flags), tmp_path / "first.log") as run:
        run.wait_for_output(f" 6/{STEPS} ", START_S)
        served = scraped(port)
        assert served["vespo_step"] >= 6 and served["vespo_steps_planned"] == STEPS
        assert served["vespo_engine_up"] == 1.0 and served["vespo_engines_lost"] == 0.0
        assert served["vespo_seconds_since_step"] < 60 and "vespo_reward_mean" in served
        run.process.terminate()
        run.finish(120, code=EXIT_RESUME)
    first = json.loads((out / "trackers.json").read_text())
    assert set(first) == set(TRACKERS)

    with Run(command(tiny_model, folder, *flags), tmp_path / "second.log") as second:
        second.finish()
    assert {name: entry["id"] for name, entry in first.items()} == {
        name: entry["id"] for name, entry in json.loads((out / "trackers.json").read_text()).items()
    }
    output = run.output + second.output
    assert not re.search(r"tracker \w+: (?!run )", output), output
    check_trackers(out, {name: entry["id"] for name, entry in first.items()})
    texts = [path for path in tmp_path.rglob("*") if path.is_file() and "saved" not in path.parts]
    assert len(texts) > 30 and not [path for path in texts if SECRET.encode() in path.read_bytes()]


def check_trackers(out: Path, ids: dict[str, str]) -> None:
    records = read_metrics(out / "metrics.jsonl")
    names = {metric: metric_name(metric) for metric in COMPARED}
    wandb, swanlab = read_wandb(out), read_swanlab(out)
    mlflow = read_mlflow(out, ids["mlflow"], list(names.values()))
    assert set(wandb.ids) == {ids["wandb"]} and set(swanlab.ids) == {ids["swanlab"]}
    assert mlflow.ids == [ids["mlflow"]] and mlflow.endings == ["FINISHED"]
    assert wandb.endings == ["130", "0"]
    for metric in COMPARED:
        assert same_points(wandb, metric, records, metric)
        assert same_points(mlflow, names[metric], records, metric)
        assert {step for step, _ in swanlab.metrics[metric]} == {r["step"] for r in records if metric in r}
    batch = next(r for r in records if "policy/version" in r)
    assert abs(wandb.times[batch["step"]] - batch["time"]) < 60
    assert wandb.config["train_iters"] == STEPS and wandb.config["version.torch"]
    assert wandb.summary["steps"] == STEPS
    assert {"curves.png", "summary.json", "samples", "config.json"} <= set(mlflow.files)
    assert any(text.startswith("samples") for text in swanlab.texts)
    events = EventAccumulator(str(out / "tensorboard"), {"images": 0, "tensors": 0}).Reload()
    assert events.Images("curves") and events.Tensors("samples")
