"""summary.json, plots and the printed summary at the end of a run."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from megatron_vespo.observability.metrics import read_metrics
from megatron_vespo.observability.report import format_summary, plot_curves, write_summary
from megatron_vespo.types import RunState


def plot(args: Namespace) -> Path:
    """Draws curves.png from the metrics so far and returns its path."""
    picture = args.output_dir / "curves.png"
    plot_curves(
        read_metrics(args.output_dir / "metrics.jsonl"), picture, f"VESPO, N = {args.steps_per_rollout}"
    )
    return picture


def summarize(
    args: Namespace, state: RunState, num_eval: int, setup_seconds: float, idle: dict[str, dict]
) -> str:
    """Writes summary.json and curves.png of a finished run; the summary as text, for people.

    `idle` is the shares of time in which trainer and engines had no work, see `Trace.idle`.
    """
    paths = {
        "metrics": args.output_dir / "metrics.jsonl",
        "TensorBoard": args.output_dir / "tensorboard",
        "picture": plot(args),
        "timeline": args.output_dir / "trace.json",
        "logs": args.output_dir / "logs",
    }
    if args.save:
        paths["checkpoint"] = Path(args.save)
    if args.save_rollouts:
        paths["rollouts"] = args.save_rollouts
    if args.hf_export:
        paths["HF export"] = args.output_dir / "hf"
    summary = {
        **_eval_summary("before", state.eval_before),
        **_eval_summary("after", state.eval_after),
        "eval_prompts": num_eval,
        "train_seconds": state.train_seconds,
        "setup_seconds": setup_seconds,
        "steps": state.iteration,
        "max_logprob_difference": None if args.rollout_only else state.max_logprob_difference,
        "idle": idle,
        "layout": _layout(args),
        "paths": {label: str(path) for label, path in paths.items()},
    }
    write_summary(args.output_dir / "summary.json", summary)
    return format_summary(summary)


def _eval_summary(when: str, metrics: dict[str, float] | None) -> dict[str, Any]:
    if metrics is None:
        return {}
    interval = [metrics["eval/interval_low"], metrics["eval/interval_high"]]
    return {f"eval_accuracy_{when}": metrics["eval/accuracy"], f"eval_interval_{when}": interval}


def _layout(args: Namespace) -> dict[str, int]:
    tensor, pipeline = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    context = args.context_parallel_size
    return {
        "tensor": tensor,
        "pipeline": pipeline,
        "virtual_pipeline": args.virtual_pipeline_model_parallel_size or 1,
        "context": context,
        "expert": args.expert_model_parallel_size,
        "expert_tensor": args.expert_tensor_parallel_size,
        "data": args.trainer_ranks // (tensor * pipeline * context),
        "trainer_ranks": args.trainer_ranks,
        "engines": args.rollout_engines,
    }
