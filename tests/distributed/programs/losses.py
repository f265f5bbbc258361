"""Loss and gradient norm of every policy loss and aggregation on one layout; the weights never move."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from common import hand_back, start_policy

TOKEN_NOISE = 0.1  # of pi against pi_old: some tokens are clipped, some responses have a W far from 1
# of the losses that adapt; parts of the step would choose otherwise than the whole of it: of 48 samples the
# positive share is 0.1835, and 0.1837 with c_high raised once; M2PO masks a part of the tokens
TARGETS = {"bapo": 0.1836, "m2po": 0.005}


def main() -> None:
    policy, samples = start_policy("--lr", "0")
    from megatron_vespo.algorithms.losses.aggregation import AGGREGATIONS
    from megatron_vespo.algorithms.losses.table import METHODS

    draw = np.random.default_rng(3)
    for sample, log_probs in zip(samples, policy.log_probs(samples), strict=True):
        noise = draw.normal(0, TOKEN_NOISE, len(log_probs))
        sample.old_log_probs = (log_probs + noise).astype(np.float32)
    cases = [(name, METHODS[name].aggregation) for name in METHODS]
    cases += [("grpo", aggregation) for aggregation in AGGREGATIONS[1:]]
    results = {}
    for name, aggregation in cases:
        target = TARGETS.get(name)
        policy.use_loss(
            replace(policy.settings, policy_loss=name, loss_aggregation=aggregation, loss_target=target)
        )
        step = policy.train_step(policy.pack(samples))
        results[f"{name} {aggregation}"] = np.array([step.loss, step.grad_norm, step.loss_terms])
        results[f"{name} {aggregation} weight"] = step.weight
        results[f"{name} {aggregation} chosen"] = np.array([step.zero_weight_share, *step.clip_bounds])
    hand_back(**results)


if __name__ == "__main__":
    main()
