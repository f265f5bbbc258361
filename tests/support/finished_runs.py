"""Output folders of runs in the real format, for what reads them: the report and the viewer."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_vespo.observability.metrics import MetricsWriter, dump_json

HOSTILE = (
    "<script>document.title='hacked'</script><img src=x onerror=alert(1)>\n"
    "</pre></body></html>\n&lt;b&gt; \u202eright to left\u202c שלום עולם مرحبا\n"
    "lone \ud800 nul \x00 escape \x1b[31m"
)


def batch(step: int, **changes: float) -> dict[str, float]:
    """Metrics of a rollout batch."""
    return {
        "reward/mean": step / 40,
        "response/length_mean": 100.0 + step,
        "response/length_p90": 150.0,
        "ratio/log_w_mean": -0.01,
        "ratio/log_w_std": 0.2,
        "weight/ess": 0.9,
        "weight/mean/positive": 0.98,
        "train/entropy": 0.5,
        "train/grad_norm": 0.3,
        "train/grad_norm_max": 0.4,
        "train/tokens": 1000.0,
        "rollout/tokens": 1000.0,
        "check/max_logprob_difference": 3e-6,
        "time/generate": 3.0,
        "time/train": 1.0,
        "policy/version": float(step),
    } | changes


def evaluation(accuracy: float, margin: float = 0.05) -> dict[str, float]:
    return {
        "eval/accuracy": accuracy,
        "eval/interval_low": accuracy - margin,
        "eval/interval_high": accuracy + margin,
        "eval/length_mean": 99.5,
    }


def sample(step: int, text: str, **changes) -> dict:
    """A row of sample-responses.jsonl."""
    return {
        "step": step,
        "why": "largest log W",
        "prompt_id": 7,
        "prompt": "6 * 7 = ?",
        "answer": "42",
        "advantage": -0.5,
        "log_w": 3.1,
        "weight": 0.02,
        "turns": [{"writer": "policy", "text": text}],
        "reward": 1.0,
        "parts": {},
        "error": "",
        "finish_reason": "stop",
        "sampled_tokens": 12,
    } | changes


def start_record(**changes) -> dict:
    """A run-NNN.json."""
    arguments = {"hf_checkpoint": "models/base", "train_iters": 40, "lr": 1e-6, "policy_loss": "vespo"}
    return {
        "started": "2026-01-02T03:04:05+00:00",
        "folder": "/home/user/work",
        "command": "megatron-vespo train --lr 1e-6 --sglang-api-key '<left out>'",
        "recipes": {},
        "changed": {"lr": 1e-6},
        "source": {"commit": "0123abcd", "changed": []},
        "packages": {"torch": "2.9.0", "numpy": "2.3.0"},
        "patches": "all 3 applied",
        "machine": {"host": "node-1", "cores": 64, "gpus": []},
        "environment": {"exported": {"OMP_NUM_THREADS": "1"}},
        "arguments": arguments,
        "nodes": [{"host": "node-1", "gpus": 8}],
    } | changes


def finished(how: str = "finished", message: str = "") -> dict:
    return {"how": how, "message": message, "ended": "2026-01-02T04:05:06+00:00"}


def write_run(
    folder: Path,
    records: list[tuple[int, dict[str, float]]],
    *,
    starts: list[dict] | None = None,
    samples: list[dict] | None = None,
    summary: dict | None = None,
) -> Path:
    """The files of a run; those that are None are missing, as in an old folder."""
    writer = MetricsWriter(folder, None)
    for step, metrics in records:
        writer.write(step, metrics)
    writer.close()
    for number, start in enumerate(starts or [], start=1):
        (folder / f"run-{number:03d}.json").write_text(json.dumps(start))
    if samples is not None:
        lines = "".join(dump_json(row) + "\n" for row in samples)
        (folder / "sample-responses.jsonl").write_text(lines)
    if summary is not None:
        (folder / "summary.json").write_text(dump_json(summary))
    return folder


def whole_run(folder: Path, text: str = HOSTILE) -> Path:
    """A finished run of ten batches with an alarm, a resume, evaluations and a sample response."""
    records = [(0, evaluation(0.25))]
    for step in range(4, 44, 4):
        # response/truncated_share makes the rule say something
        alarm = (
            {"alarm/truncated_responses": 1.0, "response/truncated_share": 0.75} if step in (8, 12) else {}
        )
        evaluated = evaluation(step / 50) if step % 20 == 0 else {}
        records.append((step, batch(step, **alarm, **evaluated)))
    starts = [
        start_record(outcome=finished("preempted", "ended by SIGTERM at optimizer step 20")),
        start_record(
            resumed_from="/data/checkpoints/iter_0000020",
            outcome=finished(),
            trainer_restarts=["2026-01-02T03:30:00+00:00 RESTART OF THE TRAINER from x: rank 1 died"],
        ),
    ]
    summary = {
        "steps": 40, "train_seconds": 750.0, "setup_seconds": 42.0, "eval_prompts": 200,
        "idle": {"trainer": {"generation": 0.25, "sync": 0.0}}, "layout": {"tensor": 2},
        "paths": {"metrics": str(folder / "metrics.jsonl")},
    }  # fmt: skip
    samples = [sample(step, text) for step in (4, 8, 20, 36, 40)]
    return write_run(folder, records, starts=starts, samples=samples, summary=summary)
