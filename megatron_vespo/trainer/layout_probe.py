"""What one layout makes of given samples: the part of `megatron-vespo check layout` that every rank runs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_vespo.observability.layout_report import LayoutMeasurement, StepMeasurement
from megatron_vespo.trainer.gradient_norms import gradient_norms
from megatron_vespo.trainer.policy import MegatronPolicy
from megatron_vespo.types import TrainingSample


def measure(policy: MegatronPolicy, samples: Sequence[TrainingSample], num_steps: int) -> LayoutMeasurement:
    """Optimizer steps, each on all `samples`, as one rollout batch: pi_old is the policy before the first."""
    experts = policy.chosen_experts(samples)
    advantages = np.array([sample.advantage for sample in samples])
    # log-probs are negative, so nothing cancels in a sequence's sum
    terms = np.abs([log_probs.sum() for log_probs in policy.log_probs(samples)] * advantages)
    mini_batch = policy.pack(samples)
    policy.compute_old_log_probs(mini_batch)
    steps = []
    for _ in range(num_steps):
        outputs = policy.forward_backward(mini_batch)
        norms = gradient_norms(policy.model, policy.groups)
        result = policy.optimizer_step(mini_batch, outputs)
        loss_terms = float((result.phi * terms).sum() / result.num_tokens)
        steps.append(StepMeasurement(result.log_w, result.loss, loss_terms, result.grad_norm, norms))
    return LayoutMeasurement(steps, experts)
