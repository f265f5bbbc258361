"""What a run remembers across its attempts, beside weights and optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass
class RunState:
    """What a checkpoint must bring back beside weights and optimizer; `iteration` is the policy version."""

    iteration: int = 0  # optimizer steps done
    consumed_prompts: int = 0
    train_seconds: float = 0.0
    evaluation_due: bool = False  # a preemption has interrupted it
    eval_before: dict[str, float] | None = None  # metrics of the first evaluation
    eval_after: dict[str, float] | None = None  # of the last one
    max_logprob_difference: float = 0.0
    log_w_floor: dict[str, float] | None = None  # the last one measured, as metrics

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> RunState:
        """From what a checkpoint has stored, also under the names of version 0.1."""
        state = cls(**{name.replace("heldout_", "eval_"): value for name, value in stored.items()})
        for name in ("eval_before", "eval_after"):
            if (metrics := getattr(state, name)) is not None:
                setattr(state, name, {key.replace("heldout/", "eval/"): v for key, v in metrics.items()})
        return state
