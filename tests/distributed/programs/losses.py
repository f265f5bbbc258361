"""Loss and gradient norm of every policy loss and aggregation on one layout; the weights never move."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from common import hand_back, start_policy

from megatron_vespo.types import TrainingSample
from tests.support.random_task import token_noise

GROUP_SIZE = 8
PAIR_GAP = 0.2  # of responses of at most 30 tokens
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


def pair_draws(samples: list[TrainingSample]) -> tuple[np.ndarray, np.ndarray]:
    """Rewards and lengths of the groups, [G, n], from which equal-length-pairs makes advantages."""
    rewards = np.random.default_rng(4).integers(0, 2, (len(samples) // GROUP_SIZE, GROUP_SIZE)).astype(float)
    return rewards, np.array([sample.num_trained for sample in samples]).reshape(rewards.shape)


def main() -> None:
    policy, samples = start_policy("--lr", "0")
    from megatron_vespo.algorithms.advantages import advantages

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
    policy.use_loss(
        replace(policy.settings, policy_loss="grpo", loss_aggregation=None, loss_target=None, clip_range=None)
    )
    rewards, lengths = pair_draws(samples)
    given = advantages(rewards, "equal-length-pairs", lengths, PAIR_GAP).flatten().tolist()
    for sample, advantage in zip(samples, given, strict=True):
        sample.advantage = advantage
    step = policy.train_step(policy.pack(samples))
    results["pairs"] = np.array([step.loss, step.grad_norm, step.loss_terms])
    hand_back(**results)


if __name__ == "__main__":
    main()
