"""One optimizer step under each ratio denominator, after another step has moved the weights; on one rank."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from common import hand_back, start_program


def main() -> None:
    _, policy, samples = start_program()
    from megatron_vespo.algorithms.vespo import RATIO_DENOMINATORS

    results = {}
    for denominator in RATIO_DENOMINATORS:
        policy.use_loss(replace(policy.settings, ratio_denominator=denominator))
        old_log_probs = policy.log_probs(samples)
        mini_batch = policy.pack(samples)
        if denominator != "rollout":
            policy.compute_old_log_probs(mini_batch)
        policy.train_step(mini_batch)
        log_probs = policy.log_probs(samples)
        results[f"{denominator} old_log_probs"] = np.concatenate(old_log_probs)
        results[f"{denominator} log_probs"] = np.concatenate(log_probs)
        for name, value in vars(policy.train_step(mini_batch)).items():
            results[f"{denominator} {name}"] = value
    hand_back(**results)


if __name__ == "__main__":
    main()
