"""Measures one layout on given samples: the part of `megatron-vespo check layout` that every rank runs."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_vespo.observability.layout_report import LayoutMeasurement, StepMeasurement
from megatron_vespo.trainer.gradient_norms import gradient_norms
from megatron_vespo.trainer.policy import MegatronPolicy
from megatron_vespo.types import TrainingSample


def measure(policy: MegatronPolicy, samples: Sequence[TrainingSample], num_steps: int) -> LayoutMeasurement:
    """Takes `num_steps` optimizer steps, each on all `samples`; pi_old is the policy before the first."""
    experts = policy.chosen_experts(samples)
    mini_batch = policy.pack(samples)
    policy.compute_old_log_probs(mini_batch)
    if policy.settings.uses_reference:
        policy.compute_reference_log_probs([mini_batch])
    steps = []
    for _ in range(num_steps):
        outputs = policy.forward_backward(mini_batch)
        norms = gradient_norms(policy.model, policy.groups)
        result = policy.optimizer_step(mini_batch, outputs)
        steps.append(StepMeasurement(result.log_w, result.loss, result.loss_terms, result.grad_norm, norms))
    return LayoutMeasurement(steps, experts)
