"""Writes summary.json, the plots, the report and the printed summary at the end of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_vespo.arguments.train_settings import TrainSettings
from megatron_vespo.data.step_records import FOLDER_NAME
from megatron_vespo.driver.run_end import leave_report
from megatron_vespo.driver.run_state import RunState
from megatron_vespo.observability.html_report import REPORT_NAME
from megatron_vespo.observability.metrics import read_metrics
from megatron_vespo.observability.report import format_summary, plot_curves, write_summary


def plot(settings: TrainSettings) -> Path:
    """Draws curves.png from the metrics so far and returns its path."""
    picture = settings.run.output_dir / "curves.png"
    metrics = read_metrics(settings.run.output_dir / "metrics.jsonl")
    plot_curves(metrics, picture, f"VESPO, N = {settings.rollout.steps_per_rollout}")
    return picture


def summarize(
    settings: TrainSettings, state: RunState, num_eval: int, setup_seconds: float, idle: dict[str, dict]
) -> str:
    """Writes summary.json, curves.png and report.html of a finished run; returns the summary as text.

    `idle` holds the shares of time in which trainer and engines had no work, see `Trace.idle`.
    """
    paths = {
        "report": settings.run.output_dir / REPORT_NAME,
        "metrics": settings.run.output_dir / "metrics.jsonl",
        "TensorBoard": settings.run.output_dir / "tensorboard",
        "picture": plot(settings),
        "timeline": settings.run.output_dir / "trace.json",
        "logs": settings.run.output_dir / "logs",
    }
    if settings.save.save:
        paths["checkpoint"] = Path(settings.save.save)
    if settings.run.save_rollouts:
        paths["rollouts"] = settings.run.save_rollouts
    if settings.run.record_responses:
        paths["responses"] = settings.run.output_dir / FOLDER_NAME
    if settings.run.hf_export:
        paths["HF export"] = settings.run.output_dir / "hf"
    summary = {
        **_eval_summary("before", state.eval_before),
        **_eval_summary("after", state.eval_after),
        "eval_prompts": num_eval,
        "train_seconds": state.train_seconds,
        "setup_seconds": setup_seconds,
        "steps": state.iteration,
        "max_logprob_difference": None if settings.run.rollout_only else state.max_logprob_difference,
        "idle": idle,
        "layout": _layout(settings),
        "paths": {label: str(path) for label, path in paths.items()},
    }
    write_summary(settings.run.output_dir / "summary.json", summary)
    leave_report(settings.run.output_dir)
    return format_summary(summary)


def _eval_summary(when: str, metrics: dict[str, float] | None) -> dict[str, Any]:
    if metrics is None:
        return {}
    interval = [metrics["eval/interval_low"], metrics["eval/interval_high"]]
    return {f"eval_accuracy_{when}": metrics["eval/accuracy"], f"eval_interval_{when}": interval}


def _layout(settings: TrainSettings) -> dict[str, int | None]:
    trainer = settings.trainer
    tensor, pipeline = trainer.tensor_model_parallel_size, trainer.pipeline_model_parallel_size
    context = trainer.context_parallel_size
    return {
        "tensor": tensor,
        "pipeline": pipeline,
        "virtual_pipeline": trainer.virtual_pipeline_model_parallel_size or 1,
        "context": context,
        "expert": trainer.expert_model_parallel_size,
        "expert_tensor": trainer.expert_tensor_parallel_size,
        "data": trainer.trainer_ranks // (tensor * pipeline * context),
        "trainer_ranks": trainer.trainer_ranks,
        "engines": settings.engines.rollout_engines,
    }
