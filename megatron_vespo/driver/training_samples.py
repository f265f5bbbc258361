"""Turns scored completions into training samples."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from megatron_vespo.algorithms.advantages import AdvantageEstimator, advantages
from megatron_vespo.algorithms.distillation import token_advantages
from megatron_vespo.algorithms.length_pairs import LENGTH_GAP
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
    weights = distillation if distillation is not None and distillation.teachers else None
    rewards = np.array([[completion.shaped_reward for completion in group] for group in groups])
    lengths = np.array([[completion.num_sampled for completion in group] for group in groups])
    table = advantages(rewards, estimator, lengths, length_gap)
    if weights is not None:
        table = weights.reward_coefficient * table
    return [
        replace(
            training_sample(completion, float(table[g, i]), g, routing_replay),
            token_advantages=None if weights is None else _of_tokens(completion, weights),
        )
        for g, group in enumerate(groups)
        for i, completion in enumerate(group)
    ]


def _of_tokens(completion: Completion, settings: DistillationSettings) -> np.ndarray:
    teacher = completion.teacher_log_probs
    assert teacher is not None, "scored with the rewards, or checked by --train-from"
    return token_advantages(
        teacher, completion.log_probs, settings.distillation_coefficient, settings.distillation_clip
    )


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
