"""One rollout batch as numbers for people."""

from __future__ import annotations

from typing import Any

import numpy as np

from megatron_vespo.algorithms.diagnostics import weight_diagnostics
from megatron_vespo.types import Completion


def rollout_metrics(groups: list[list[Completion]]) -> dict[str, float]:
    """Of scored completions."""
    rewards = np.array([[completion.reward for completion in group] for group in groups])
    completions = [completion for group in groups for completion in group]
    lengths = np.array([len(completion.token_ids) for completion in completions])
    return {
        "reward/mean": float(rewards.mean()),
        "rollout/zero_advantage_share": float((rewards == rewards[:, :1]).all(axis=1).mean()),
        "response/length_mean": float(lengths.mean()),
        "response/truncated_share": float(np.mean([c.finish_reason == "length" for c in completions])),
        "rollout/tokens": float(lengths.sum()),
        "rollout/nonfinite_log_probs": float(sum(len(c.rejections) for c in completions)),
    }


def step_metrics(steps: list[dict[str, Any]], advantages: np.ndarray) -> dict[str, float]:
    """Of the optimizer steps of one rollout batch; `advantages` [num_samples] as the mini-batches lie."""

    def joined(name: str) -> np.ndarray:
        return np.concatenate([step[name] for step in steps])

    def mean(name: str) -> float:
        return float(np.mean([step[name] for step in steps]))

    metrics = weight_diagnostics(joined("log_w"), joined("phi"), advantages)
    gap = joined("engine_gap")
    if not np.isnan(gap).any():
        metrics["vespo/engine_gap_std"] = float(gap.std())
    return metrics | {
        "train/loss": mean("loss"),
        "train/grad_norm": mean("grad_norm"),
        "train/entropy": mean("entropy"),
        "train/learning_rate": steps[-1]["learning_rate"],
        "train/padding_share": mean("padding_share"),
        "train/imbalance": mean("imbalance"),
        "train/tokens": float(sum(step["num_tokens"] for step in steps)),
        "policy/lag_mean": mean("lag"),
    }
