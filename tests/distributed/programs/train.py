"""Optimizer steps on one layout, with everything a test compares between layouts.

Steps go two a rollout, as training does: both mini-batches are prepared before the first update.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from common import hand_back, start_program

from tests.support.exact_shards import wrong_shards

MINI_BATCHES = 2
LAST_STEP = 4


def train(policy, samples: list, save_after: int | None) -> list[dict]:
    size = len(samples) // MINI_BATCHES
    steps = []
    while policy.iteration < LAST_STEP:
        prepared = [policy.pack(samples[i : i + size]) for i in range(0, len(samples), size)]
        for mini_batch in prepared:
            policy.compute_old_log_probs(mini_batch)
        for mini_batch in prepared:
            steps.append(vars(policy.train_step(mini_batch)))
        if policy.iteration == save_after:
            policy.save({"consumed_prompts": 7, "iteration": policy.iteration})
    return steps


def export(policy, target: Path) -> dict[str, np.ndarray]:
    """Write an HF folder in small files; returns the names this rank saw, and what engines would miss."""
    from megatron_vespo.trainer.export import export_hf

    export_hf(policy, target, bucket_bytes=100_000)
    return {
        "names": np.array([name for name, _ in policy.named_hf_weights()]),
        "stage": policy.groups.pp.rank(),
        "wrong_shards": np.array(wrong_shards(policy)),
    }


def main() -> None:
    options, policy, samples = start_program(export_before=Path, export_after=Path, save_after=int)
    results = {"first_iteration": policy.iteration}
    if policy.rollout_state is not None:
        results["consumed_prompts"] = policy.rollout_state["consumed_prompts"]
    results["betas"] = policy.optimizer.param_groups[0]["betas"]
    if options.export_before:
        results |= export(policy, options.export_before)
    results["log_probs"] = np.concatenate(policy.log_probs(samples))
    results["log_probs_of_three"] = np.concatenate(policy.log_probs(samples[:3]))
    results["log_ratio"] = policy.sequence_log_ratio(samples, "rollout")
    steps = train(policy, samples, options.save_after)
    for name in steps[0]:
        results[name] = np.array([step[name] for step in steps])
    if options.export_after:
        export(policy, options.export_after)
        results["log_probs_after"] = np.concatenate(policy.log_probs(samples))
    hand_back(**results)


if __name__ == "__main__":
    main()
