"""The reference policy: the KL terms of the loss, its log-probs by both ways, and how it moves.

The weights do not move before the last part, as losses are compared with another program's.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from common import hand_back, start_program

AGGREGATIONS = ("token-mean", "sequence-mean-token-mean", "sequence-mean-token-sum", "constant")
# kind, bound of pi / mu, aggregation
KL_CASES = [
    (kind, bound, "token-mean") for bound in (None, 1.05, float("inf")) for kind in ("k1", "k2", "k3")
]
KL_CASES += [("k3", None, aggregation) for aggregation in AGGREGATIONS[1:]]
COEFFICIENT = 0.5


def name_of(kind: str, bound: float | None, aggregation: str) -> str:
    return f"kl {kind} {bound} {aggregation}"


def prepared(policy, samples: list):
    mini_batch = policy.pack(samples)
    policy.compute_reference_log_probs([mini_batch])
    return mini_batch


def kl_losses(policy, samples: list) -> dict[str, np.ndarray]:
    """One step each of `reinforce` and the term; and how far the reference is."""
    results = {}
    for kind, bound, aggregation in KL_CASES:
        policy.use_loss(
            dataclasses.replace(
                policy.settings,
                policy_loss="reinforce",
                loss_aggregation=aggregation,
                kl_loss_coef=COEFFICIENT,
                kl_loss_type=kind,
                unbiased_kl=bound,
            )
        )
        step = policy.train_step(prepared(policy, samples))
        results[name_of(kind, bound, aggregation)] = np.array([step.loss, step.grad_norm, step.loss_terms])
        results["kl_loss " + name_of(kind, bound, aggregation)] = step.kl_loss
        results["kl sums"] = np.array(step.reference_sums) / step.num_tokens
    return results


def log_probs(policy, samples: list) -> dict[str, np.ndarray]:
    """The reference's, as the driver gets them, and a policy's with them in the samples."""
    mini_batch = prepared(policy, samples)
    values = policy.reference_log_probs(mini_batch, samples)
    carried = [dataclasses.replace(s, reference_log_probs=v) for s, v in zip(samples, values, strict=True)]
    step, again = policy.train_step(mini_batch), policy.train_step(policy.pack(carried))
    return {
        "reference": np.concatenate(values),
        "policy": np.concatenate(policy.log_probs(samples)),
        "in place and carried": np.array([[s.loss, s.grad_norm, *s.reference_sums] for s in (step, again)]),
    }


def main() -> None:
    options, policy, samples = start_program(moves=bool, save_after=int, last_step=int)
    if not options.moves:
        samples = samples[: policy.args.global_batch_size]
        hand_back(**kl_losses(policy, samples), **log_probs(policy, samples))
        return
    size = len(samples) // 2
    steps = []
    results = {"start": np.concatenate(_reference(policy, samples)), "version": policy.iteration}
    while policy.iteration < options.last_step:
        halves = [samples[:size], samples[size:]]
        mini_batches = [policy.pack(half) for half in halves]
        for mini_batch in mini_batches:
            policy.compute_old_log_probs(mini_batch)
        policy.compute_reference_log_probs(mini_batches)
        results[f"reference {policy.iteration}"] = np.concatenate(
            [v for one, half in zip(mini_batches, halves, strict=True) for v in _gathered(policy, one, half)]
        )
        results[f"policy {policy.iteration}"] = np.concatenate(
            [v for half in halves for v in policy.log_probs(half)]
        )
        for mini_batch in mini_batches:
            step = policy.train_step(mini_batch)
            steps.append([step.loss, step.grad_norm, step.kl_loss, *step.reference_sums])
        if policy.iteration == options.save_after:
            reports = policy.save({"iteration": policy.iteration})
            reports += policy.saver.poll(blocking=True)
            assert not any(report.problem for report in reports), reports
    hand_back(**results, steps=np.array(steps))


def _gathered(policy, mini_batch, samples: list) -> list[np.ndarray]:
    return policy.reference_log_probs(mini_batch, samples)


def _reference(policy, samples: list) -> list[np.ndarray]:
    return _gathered(policy, prepared(policy, samples), samples)


if __name__ == "__main__":
    main()
