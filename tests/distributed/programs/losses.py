"""Loss and gradient norm of every policy loss and aggregation on one layout; the weights never move."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from common import hand_back, start_policy

from megatron_vespo.types import TrainingSample
from tests.support.random_task import token_noise

TOKEN_NOISE = 0.1  # of pi against pi_old: some tokens are clipped, some responses have a W far from 1
# of the losses that adapt; parts of the step would choose otherwise than the whole of it: of 24 samples the
# positive share is 0.1519, and 0.1522 with c_high raised once; M2PO masks a part of the tokens
TARGETS = {"bapo": 0.152, "m2po": 0.005}
# DPPO's thresholds: the model knows nothing, its probabilities are small, and so are divergences
CLIP_RANGES = {"dppo-tv": (5e-4, 1e-3), "dppo-kl": (2e-5, 4e-5)}


def cases() -> list[tuple[str, str]]:
    """Losses and their aggregations."""
    from megatron_vespo.algorithms.losses.aggregation import AGGREGATIONS
    from megatron_vespo.algorithms.losses.table import METHODS

    own = [(name, METHODS[name].aggregation) for name in METHODS]
    return own + [("grpo", aggregation) for aggregation in AGGREGATIONS[1:]]


def old_noise(samples: list[TrainingSample]) -> list[np.ndarray]:
    """log pi_old - log pi, [N] per sample."""
    draw = np.random.default_rng(3)
    return [token_noise(draw, TOKEN_NOISE, sample) for sample in samples]


def main() -> None:
    policy, samples = start_policy("--lr", "0")
    log_probs, noise = policy.log_probs(samples), old_noise(samples)
    for i, sample in enumerate(samples):
        sample.old_log_probs = (log_probs[i] + noise[i]).astype(np.float32)
    results = {}
    for name, aggregation in cases():
        policy.use_loss(
            replace(
                policy.settings,
                policy_loss=name,
                loss_aggregation=aggregation,
                loss_target=TARGETS.get(name),
                clip_range=CLIP_RANGES.get(name),
            )
        )
        step = policy.train_step(policy.pack(samples))
        results[f"{name} {aggregation}"] = np.array([step.loss, step.grad_norm, step.loss_terms])
        results[f"{name} {aggregation} weight"] = step.weight
        results["log_w"] = step.log_w
        results[f"{name} {aggregation} chosen"] = np.array([step.zero_weight_share, *step.clip_bounds])
    hand_back(**results)


if __name__ == "__main__":
    main()
