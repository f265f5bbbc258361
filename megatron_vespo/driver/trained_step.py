"""Defines what observers of a run get after every optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_vespo.types import Completion, TrainingSample


@dataclass(frozen=True)
class TrainedStep:
    """One optimizer step and what it was trained on: sample i was made of completion i."""

    step: int  # optimizer steps done, this one included
    completions: Sequence[Completion]
    samples: Sequence[TrainingSample]
    # the fields of StepResult, arrays in the order of the samples; with --record-responses also TOKENS
    result: dict[str, Any]


# Called between two optimizer steps, so it must return at once.
StepObserver = Callable[[TrainedStep], None]
