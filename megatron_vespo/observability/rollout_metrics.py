"""Computes the metrics of one rollout batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from megatron_vespo.algorithms.advantages import AdvantageEstimator, advantages, pair_metrics
from megatron_vespo.algorithms.diagnostics import (
    FLOOR_TOKEN_SIGMA,
    ratio_metrics,
    share_dead_by,
    weight_metrics,
)
from megatron_vespo.algorithms.distillation import distillation_metrics
from megatron_vespo.algorithms.length_pairs import LENGTH_GAP
from megatron_vespo.algorithms.token_sums import TokenSums, token_metrics
from megatron_vespo.models.parameter_groups import GRADIENT_GROUPS
from megatron_vespo.types import Completion, TrainingSample


def rollout_metrics(
    groups: list[list[Completion]], estimator: AdvantageEstimator, length_gap: float = LENGTH_GAP
) -> dict[str, float]:
    """Metrics of scored completions; `length_gap` is for equal-length-pairs, see `advantages`."""
    rewards = np.array([[completion.reward for completion in group] for group in groups])
    shaped = np.array([[completion.shaped_reward for completion in group] for group in groups])
    completions = [completion for group in groups for completion in group]
    lengths = np.array([[completion.num_sampled for completion in group] for group in groups])
    given = advantages(shaped, estimator, lengths, length_gap)
    metrics = {
        "reward/mean": float(rewards.mean()),
        "reward/error_count": float(sum(c.reward_status == "error" for c in completions)),
        "reward/timeout_count": float(sum(c.reward_status == "timeout" for c in completions)),
        "reward/overlong_penalty_mean": float(np.mean([c.overlong_penalty for c in completions])),
        "rollout/zero_advantage_share": float((given == 0.0).all(axis=1).mean()),
        "response/length_mean": float(lengths.mean()),
        "response/length_p90": float(np.quantile(lengths, 0.9)),
        "response/truncated_share": float(np.mean([c.finish_reason == "length" for c in completions])),
        "rollout/tokens": float(lengths.sum()),
        "rollout/nonfinite_log_probs": float(sum(len(c.rejections) for c in completions)),
        "rollout/retracted_share": float(np.mean([c.num_retractions > 0 for c in completions])),
    }
    if estimator == "equal-length-pairs":
        metrics |= pair_metrics(shaped, lengths, length_gap)
    for metrics_of in (_turn_metrics, _support_metrics, _teacher_metrics, _reward_parts):
        metrics |= metrics_of(completions)
    return metrics


def _support_metrics(completions: list[Completion]) -> dict[str, float]:
    """Metrics of truncated sampling: only a batch with supports has them."""
    counts = [c.supports.counts for c in completions if c.supports is not None]
    if not any(map(len, counts)):
        return {}
    sizes = np.concatenate(counts)
    return {
        "rollout/support_size_mean": float(sizes.mean()),
        "rollout/support_size_max": float(sizes.max()),
        "rollout/single_choice_share": float((sizes == 1).mean()),
    }


def _turn_metrics(completions: list[Completion]) -> dict[str, float]:
    """Metrics of multi-turn responses: only a batch with given tokens has them."""
    if not any(completion.segments for completion in completions):
        return {}
    turns = [1 if c.segments is None else c.segments.num_turns for c in completions]
    given = [len(c.token_ids) - c.num_sampled for c in completions]
    return {
        "response/turns_mean": float(np.mean(turns)),
        "response/turns_max": float(max(turns)),
        "response/given_tokens_mean": float(np.mean(given)),
        "response/turn_limit_share": float(np.mean([c.finish_reason == "turns" for c in completions])),
    }


def _teacher_metrics(completions: list[Completion]) -> dict[str, float]:
    """Metrics of the completions that teachers have scored."""
    scored = [(c.teacher_log_probs, c.log_probs) for c in completions if c.teacher_log_probs is not None]
    return distillation_metrics(*map(list, zip(*scored, strict=True))) if scored else {}


def _reward_parts(completions: list[Completion]) -> dict[str, float]:
    """Return the mean of each named part of the rewards, over the responses that have it."""
    values: dict[str, list[float]] = {}
    for completion in completions:
        for name, value in completion.reward_parts.items():
            values.setdefault(name, []).append(value)
    return {f"reward/part/{name}": float(np.mean(values[name])) for name in sorted(values)}


def staleness_metrics(
    groups: list[list[Completion]], first_step: int, mini_batches: int, max_staleness: int
) -> dict[str, float]:
    """Lags of the batch that will be trained from optimizer step `first_step` on. A sample's total lag is its
    own optimizer step minus the version of its oldest token; RuntimeError if it exceeds the bound.
    """
    completions = [completion for group in groups for completion in group]
    oldest, newest = np.array([(c.policy_versions.oldest, c.policy_versions.newest) for c in completions]).T
    index = np.repeat(np.arange(mini_batches), len(completions) // mini_batches)
    lags = first_step + index - oldest
    if lags.max() > max_staleness or lags.min() < 0:
        worst = completions[int(lags.argmax())].prompt.prompt_id
        raise RuntimeError(
            f"samples from optimizer step {first_step} on are {lags.min()} to {lags.max()} steps old, not 0 "
            f"to {max_staleness}; the oldest is of prompt {worst}"
        )
    counts = np.bincount(lags, minlength=max_staleness + 1) / len(lags)
    return {
        "staleness/total_mean": float(lags.mean()),
        "staleness/total_max": float(lags.max()),
        "staleness/asynchronous_mean": float((first_step - oldest).mean()),
        "staleness/mixed_share": float((oldest != newest).mean()),  # tokens of several policy versions
    } | {f"staleness/share/{lag}": float(share) for lag, share in enumerate(counts)}


def pi_old_is_in_place(
    ratio_denominator: str, old_policy: str, mini_batch: list[TrainingSample], version: int
) -> bool:
    """Whether log W of a rollout batch's first mini-batch must be 0, because pi_old is pi before its update.

    `version` is the policy's version before the update.
    """
    if ratio_denominator != "recomputed" or old_policy == "ewma":
        return False
    return old_policy == "current" or all(s.policy_versions.are_all(version) for s in mini_batch)


def step_metrics(
    steps: list[dict[str, Any]],
    sample_advantages: np.ndarray,
    lengths: np.ndarray,
    floor: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """Metrics of the optimizer steps of one rollout batch.

    `sample_advantages` (means over a response's tokens) and `lengths` (response tokens) are [num_samples], in
    the order of the mini-batches. Each step has the fields of StepResult and its policy lag. `floor` is the
    last one measured, see `floor_metrics`; its metrics are added.
    """

    def joined(name: str) -> np.ndarray:
        return np.concatenate([step[name] for step in steps])

    def mean(name: str) -> float:
        return float(np.mean([step[name] for step in steps]))

    sizes = [len(step["log_w"]) for step in steps]
    on_policy = np.repeat([step["lag"] == 0 for step in steps], sizes)
    variance = None if floor is None else floor[FLOOR_TOKEN_SIGMA] ** 2 * lengths
    metrics = ratio_metrics(
        joined("log_w"), joined("log_mismatch_in_w"), joined("log_mismatch"), on_policy, variance
    )
    metrics |= floor or {}
    metrics |= weight_metrics(
        joined("weight"), sample_advantages, lengths, np.repeat(np.arange(len(steps)), sizes)
    )
    metrics |= share_dead_by(joined("correction"), joined("weight"))
    return (
        metrics
        | _token_metrics(steps)
        | _gradient_metrics(steps)
        | {
            # means over responses of the mean over their tokens
            "mismatch/weight_mean": float(joined("correction").mean()),
            "mismatch/rejected_share": float(joined("rejected").mean()),
            "loss/zero_weight_share": mean("zero_weight_share"),
            "train/loss": mean("loss"),
            "train/entropy": mean("entropy"),
            "train/learning_rate": steps[-1]["learning_rate"],
            "train/padding_share": mean("padding_share"),
            "train/imbalance": mean("imbalance"),
            "train/tokens": float(sum(step["num_tokens"] for step in steps)),
            "policy/lag_mean": mean("lag"),
        }
        | budget_metrics(steps)
        | _reference_metrics(steps)
        | _clip_metrics(steps)
    )


def _token_metrics(steps: list[dict[str, Any]]) -> dict[str, float]:
    """Engine metrics use only steps that compare an engine with its own policy: pi_old, or pi at lag 0."""
    comparable = [step for step in steps if step["lag"] == 0 or not np.isnan(step["log_mismatch"]).any()]
    metrics: dict[str, float] = {}
    for prefix, of, name in (("", steps, "ratio_sums"), ("engine_", comparable, "log_mismatch_sums")):
        if of:
            sums = TokenSums(*np.sum([step[name] for step in of], axis=0))
            metrics |= token_metrics(sums, sum(step["num_tokens"] for step in of), prefix)
    return metrics


def _reference_metrics(steps: list[dict[str, Any]]) -> dict[str, float]:
    """Of KL(pi || ref) per token, and its part of the loss; none without a reference policy."""
    sums = TokenSums(*np.sum([step["reference_sums"] for step in steps], axis=0))
    if np.isnan(sums.x):
        return {}
    num_tokens = sum(step["num_tokens"] for step in steps)
    return {
        "reference/kl_k1": float(-sums.x / num_tokens),
        "reference/kl_k3": float(sums.k3 / num_tokens),
        "reference/kl_loss": float(np.mean([step["kl_loss"] for step in steps])),
    }


def _gradient_metrics(steps: list[dict[str, Any]]) -> dict[str, float]:
    """`gradient/<part>` is from the step with the largest norm, so that the squares of the parts add up to
    the square of `train/grad_norm_max`. A part without gradient is left out.
    """
    largest = max(steps, key=lambda step: step["grad_norm"])
    return {
        "train/grad_norm": float(np.mean([step["grad_norm"] for step in steps])),
        "train/grad_norm_max": float(largest["grad_norm"]),
    } | {
        f"gradient/{group}": float(norm)
        for group, norm in zip(GRADIENT_GROUPS, largest["gradient_norms"], strict=True)
        if norm > 0.0
    }


def _clip_metrics(steps: list[dict[str, Any]]) -> dict[str, float]:
    """Means of the clip bounds that the loss has chosen; only BAPO chooses them."""
    low, high = np.mean([step["clip_bounds"] for step in steps], axis=0)
    return {"loss/bapo_clip_low": float(low), "loss/bapo_clip_high": float(high)} if high > 0.0 else {}


def budget_metrics(steps: list[dict[str, Any]]) -> dict[str, float]:
    """For --vespo-budget, by the sign of A: last c2, mean E_Q[W], share of steps without an estimate."""
    metrics = {}
    for i, sign in enumerate(("positive", "negative")):
        c2, expected = (np.array([step[name][i] for step in steps]) for name in ("kernel_c2", "expected_w"))
        if np.isnan(c2[-1]):
            continue
        known = ~np.isnan(expected)
        metrics[f"budget/c2_{sign}"] = float(c2[-1])
        metrics[f"budget/held_share_{sign}"] = float(1.0 - known.mean())
        if known.any():
            metrics[f"budget/expected_w_{sign}"] = float(expected[known].mean())
    return metrics
