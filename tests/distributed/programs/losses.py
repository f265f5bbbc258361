"""Loss and gradient norm of every policy loss and aggregation on one layout; the weights never move."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from common import hand_back, start_policy

from megatron_vespo.types import TrainingSample
from tests.support.random_task import random_supports, token_noise

GROUP_SIZE = 8
PER_TOKEN, ZEROS = "A per token", "A per token of 0"  # in the names of results
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


def token_cases() -> list[str]:
    """Losses that run with advantages per token at every layout; on one rank all do."""
    return ["vespo", "vespo-mean", "grpo", "gspo"]


def token_advantages(samples: list[TrainingSample]) -> list[np.ndarray | None]:
    """Of both signs in most responses, float32 [N] per sample; one of four samples has none."""
    draw = np.random.default_rng(5)
    drawn = [draw.normal(0.0, 0.8, sample.num_trained).astype(np.float32) for sample in samples]
    return [None if i % 4 == 1 else values for i, values in enumerate(drawn)]


def pair_draws(samples: list[TrainingSample]) -> tuple[np.ndarray, np.ndarray]:
    """Rewards and lengths of the groups, [G, n], from which equal-length-pairs makes advantages."""
    rewards = np.random.default_rng(4).integers(0, 2, (len(samples) // GROUP_SIZE, GROUP_SIZE)).astype(float)
    return rewards, np.array([sample.num_trained for sample in samples]).reshape(rewards.shape)


def numbers(step) -> np.ndarray:
    return np.array([step.loss, step.grad_norm, step.loss_terms])


def with_supports(policy, samples: list[TrainingSample]) -> dict[str, np.ndarray]:
    """One step with the supports of truncated sampling; log W where nothing has changed."""
    samples = random_supports(samples)
    log_probs, noise = policy.log_probs(samples), old_noise(samples)
    unchanged = policy.pack([replace(sample, old_log_probs=None) for sample in samples])
    policy.compute_old_log_probs(unchanged)
    floor = policy.train_step(unchanged).log_w
    for sample, of_sample, of_noise in zip(samples, log_probs, noise, strict=True):
        sample.old_log_probs = (of_sample + of_noise).astype(np.float32)
    step = policy.train_step(policy.pack(samples))
    return {
        "supports": np.array([step.loss, step.grad_norm, step.loss_terms]),
        "supports log_probs": np.concatenate(log_probs),
        "supports entropy": np.array(step.entropy),
        "supports log_w": step.log_w,
        "supports unchanged log_w": floor,
    }


def main() -> None:
    policy, samples = start_policy("--lr", "0")
    import torch.distributed as dist

    from megatron_vespo.algorithms.advantages import advantages
    from megatron_vespo.algorithms.losses.table import METHODS

    log_probs, noise = policy.log_probs(samples), old_noise(samples)
    for i, sample in enumerate(samples):
        sample.old_log_probs = (log_probs[i] + noise[i]).astype(np.float32)
    results = {}

    def step_of(name: str, aggregation: str | None, trained: list[TrainingSample]):
        policy.use_loss(
            replace(
                policy.settings,
                policy_loss=name,
                loss_aggregation=aggregation,
                loss_target=TARGETS.get(name),
                clip_range=CLIP_RANGES.get(name),
            )
        )
        return policy.train_step(policy.pack(trained))

    for name, aggregation in cases():
        step = step_of(name, aggregation, samples)
        results[f"{name} {aggregation}"] = numbers(step)
        results[f"{name} {aggregation} weight"] = step.weight
        results["log_w"] = step.log_w
        results[f"{name} {aggregation} chosen"] = np.array([step.zero_weight_share, *step.clip_bounds])
    own = [replace(s, token_advantages=a) for s, a in zip(samples, token_advantages(samples), strict=True)]
    zeros = [replace(s, token_advantages=np.zeros(s.num_trained, np.float32)) for s in samples]
    for name in METHODS if dist.get_world_size() == 1 else token_cases():
        step = step_of(name, None, own)
        results[f"{name} {PER_TOKEN}"] = numbers(step)
        results[f"{name} {PER_TOKEN} weight"] = step.weight
    for name in token_cases():
        results[f"{name} {ZEROS}"] = numbers(step_of(name, None, zeros))
    own = {"loss_aggregation": None, "loss_target": None, "clip_range": None}
    policy.use_loss(replace(policy.settings, policy_loss="vespo", **own))
    results |= with_supports(policy, samples)
    policy.use_loss(replace(policy.settings, policy_loss="grpo", **own))
    rewards, lengths = pair_draws(samples)
    given = advantages(rewards, "equal-length-pairs", lengths, PAIR_GAP).flatten().tolist()
    for sample, advantage in zip(samples, given, strict=True):
        sample.advantage = advantage
    step = policy.train_step(policy.pack(samples))
    results["pairs"] = numbers(step)
    hand_back(**results)


if __name__ == "__main__":
    main()
