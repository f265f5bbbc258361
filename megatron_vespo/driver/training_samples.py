"""Turns scored completions into training samples."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from megatron_vespo.algorithms.advantages import AdvantageEstimator, advantages
from megatron_vespo.algorithms.distillation import token_advantages
from megatron_vespo.algorithms.length_pairs import LENGTH_GAP
from megatron_vespo.algorithms.losses.settings import LossSettings
from megatron_vespo.arguments.distillation import DistillationSettings
from megatron_vespo.types import Completion, TrainingSample


def training_samples(
    groups: list[list[Completion]],
    estimator: AdvantageEstimator,
    routing_replay: str | None,
    length_gap: float = LENGTH_GAP,
    distillation: DistillationSettings | None = None,
) -> list[TrainingSample]:
    """`length_gap` is for equal-length-pairs, see `advantages`.

    With teachers in `distillation`, the advantages have its weight, and tokens have advantages of their own.
    """
    weights = _with_teachers(distillation)
    table = _advantages(groups, estimator, length_gap, weights)
    return [
        replace(
            training_sample(completion, float(table[g, i]), g, routing_replay),
            token_advantages=None if weights is None else _of_tokens(completion, weights),
        )
        for g, group in enumerate(groups)
        for i, completion in enumerate(group)
    ]


def _with_teachers(settings: DistillationSettings | None) -> DistillationSettings | None:
    """The settings, if a teacher scores; else None."""
    return settings if settings is not None and settings.teachers else None


def _of_tokens(completion: Completion, settings: DistillationSettings) -> np.ndarray:
    teacher = completion.teacher_log_probs
    assert teacher is not None, "scored with the rewards, or checked by --train-from"
    return token_advantages(
        teacher, completion.log_probs, settings.distillation_coefficient, settings.distillation_clip
    )


def penalize(
    samples: list[TrainingSample],
    groups: list[list[Completion]],
    reference_log_probs: list[np.ndarray],
    loss: LossSettings,
    distillation: DistillationSettings | None = None,
) -> dict[str, float]:
    """Replace the samples' advantages by those of penalised rewards, and store the reference's log-probs.

        R' = R - --kl-coef sum_t (log mu_t - log ref_t)

    The sum is over the sampled tokens of `reference_log_probs`, float32 [N] per sample. mu is what the engine
    drew them from, so its mean is KL(mu || ref) of responses. `distillation` as in `training_samples`.
    Returns metrics.
    """
    kl = np.empty(len(samples))
    for i, (sample, values) in enumerate(zip(samples, reference_log_probs, strict=True)):
        sample.reference_log_probs = values
        kl[i] = np.subtract(sample.behavior_log_probs, values, dtype=np.float64).sum()
    assert loss.kl_coef is not None
    penalties = loss.kl_coef * kl
    shape = len(groups), len(groups[0])
    weights = _with_teachers(distillation)
    estimator, length_gap = loss.advantage_estimator, loss.pair_length_gap
    table = _advantages(groups, estimator, length_gap, weights, penalties.reshape(shape))
    for sample, advantage in zip(samples, table.flatten().tolist(), strict=True):
        sample.advantage = advantage
    return {"reference/penalty_mean": float(penalties.mean())}


def _advantages(
    groups: list[list[Completion]],
    estimator: AdvantageEstimator,
    length_gap: float,
    weights: DistillationSettings | None,
    penalties: np.ndarray | float = 0.0,
) -> np.ndarray:
    """float64 [G, n], of the rewards minus `penalties`, of the same shape; with the weight of `weights`."""
    rewards = np.array([[completion.shaped_reward for completion in group] for group in groups])
    lengths = np.array([[completion.num_sampled for completion in group] for group in groups])
    table = advantages(rewards, estimator, lengths, length_gap, penalties)
    return table if weights is None else weights.reward_coefficient * table


def training_sample(
    completion: Completion, advantage: float, group_id: int, routing_replay: str | None
) -> TrainingSample:
    # routes are by far the largest part of a sample, so they are sent only where they are used
    replay = routing_replay == "R3" and completion.num_retractions == 0
    return TrainingSample(
        token_ids=np.concatenate([completion.prompt.token_ids, completion.token_ids]),
        prompt_length=len(completion.prompt.token_ids),
        behavior_log_probs=completion.log_probs,
        policy_versions=completion.policy_versions,
        advantage=advantage,
        reward=float("nan") if completion.reward is None else completion.reward,  # canaries have none
        temperature=completion.temperature,
        group_id=group_id,
        routed_experts=completion.routed_experts if replay else None,
        routes_version=completion.policy_versions.last if replay else None,
        replays=completion.num_retractions == 0,
        segments=completion.segments,
        supports=completion.supports,
    )


def lost_routes(samples: list[TrainingSample]) -> str | None:
    """A log line about samples that R3 cannot replay; None if it can replay all."""
    number = sum(not sample.replays for sample in samples)
    if number == 0:
        return None
    return (
        f"{number} of {len(samples)} responses are trained without routing replay: their engines ran out of "
        "KV cache and recomputed these responses, so the routes of the sampling are lost. Give the engines "
        "more memory (--sglang-mem-fraction-static) or fewer requests at a time "
        "(--sglang-max-running-requests)"
    )
