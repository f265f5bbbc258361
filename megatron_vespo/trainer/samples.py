"""Refuses samples whose numbers would reach the loss as NaN, or not reach it at all."""

from __future__ import annotations

import numpy as np

from megatron_vespo.types import TrainingSample


def check_sample(sample: TrainingSample, name: str, vocab_size: int) -> None:
    """ValueError naming the sample and its group for missing or non-finite numbers and unknown tokens."""
    where = f"{name} (group {sample.group_id})"
    num_log_probs = len(sample.behavior_log_probs)
    if not 0 < sample.prompt_length < sample.num_tokens:
        raise ValueError(
            f"{where} has {sample.num_tokens} tokens, {sample.prompt_length} of them prompt: both prompt and "
            "completion need at least one"
        )
    if num_log_probs != sample.completion_length:
        raise ValueError(
            f"{where} has {num_log_probs} behavior_log_probs for {sample.completion_length} completion tokens"
        )
    bad = np.flatnonzero(~np.isfinite(sample.behavior_log_probs))
    if len(bad):
        raise ValueError(
            f"{where} has {len(bad)} non-finite behavior_log_probs, the first one is "
            f"{sample.behavior_log_probs[bad[0]]} at completion token {bad[0]}"
        )
    if not np.isfinite(sample.advantage):
        raise ValueError(f"{where} has the advantage {sample.advantage}, it must be finite")
    if not sample.temperature > 0:
        raise ValueError(f"{where} was sampled at temperature {sample.temperature}, it must be positive")
    if sample.token_ids.min() < 0 or sample.token_ids.max() >= vocab_size:
        raise ValueError(
            f"{where} has token ids from {sample.token_ids.min()} to {sample.token_ids.max()}, the "
            f"vocabulary has 0 to {vocab_size - 1}"
        )
