"""pi_old from snapshots or a moving average, against log-probs of the policy that had those weights."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from common import hand_back, start_policy

from megatron_vespo.types import VersionSpans

STEPS = 3
# the version of a sample's first and second half, in turn; 0 is dropped when version 3 is kept
VERSIONS = [(1, 1), (1, 3), (2, 3), (3, 3), (2, 2), (1, 2)]


def parameters(policy) -> list[torch.Tensor]:
    return [parameter for chunk in policy.model for parameter in chunk.parameters()]


def copies(policy) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in parameters(policy)]


def same(policy, before: list[torch.Tensor]) -> bool:
    return all(torch.equal(now, then) for now, then in zip(parameters(policy), before, strict=True))


def of_version(samples: list, version: int) -> list:
    return [
        dataclasses.replace(s, policy_versions=VersionSpans.single(version, s.num_trained)) for s in samples
    ]


def old_log_probs(mini_batch, samples: list) -> np.ndarray:
    """float32 [all sampled tokens]; NaN where this rank has none."""
    rows = [np.full(sample.completion_length, np.nan, np.float32) for sample in samples]
    for micro_batch in mini_batch.micro_batches:
        if micro_batch.old_log_probs_T is None:  # the log-probs of a pass are the last pipeline stage's
            continue
        for position in micro_batch.loss_positions.tolist():
            i = micro_batch.sample_indices[micro_batch.sequence_ids_T[position]]
            place = int(micro_batch.position_ids_T[position]) + 1 - samples[i].prompt_length
            rows[i][place] = float(micro_batch.old_log_probs_T[position])
    masks = [sample.sampled_mask() for sample in samples]
    assert all(np.isnan(row[~mask]).all() for row, mask in zip(rows, masks, strict=True))
    return np.concatenate([row[mask] for row, mask in zip(rows, masks, strict=True)])


def refused(action) -> str:
    try:
        action()
    except ValueError as error:
        return str(error)
    return "accepted"


def train(policy, samples: list, after_version) -> None:
    """Three steps; `after_version` sees the policy at each version, 0 included."""
    after_version()
    for _ in range(STEPS):
        mini_batch = policy.pack(of_version(samples, policy.iteration))
        policy.compute_old_log_probs(mini_batch)
        policy.train_step(mini_batch)
        after_version()


def snapshots(policy, samples: list) -> dict:
    mixed = []
    for i, sample in enumerate(samples):
        first, second = VERSIONS[i % len(VERSIONS)]
        half = sample.num_trained // 2
        versions = np.array([first] * half + [second] * (sample.num_trained - half), np.int64)
        mixed.append(dataclasses.replace(sample, policy_versions=versions))
    expected = [np.full(sample.num_trained, np.nan, np.float32) for sample in mixed]

    def remember() -> None:
        # packed as the mini-batch is: other packs would round otherwise
        for sample, row, target in zip(mixed, policy.log_probs(mixed), expected, strict=True):
            mine = sample.policy_versions.array() == policy.iteration
            target[mine] = row[mine]

    train(policy, samples, remember)
    before = copies(policy)
    mini_batch = policy.pack(mixed)
    policy.compute_old_log_probs(mini_batch)
    gone = policy.pack([*mixed[:-1], *of_version(mixed[-1:], 0)])
    return {
        "expected": np.concatenate(expected),
        "actual": old_log_probs(mini_batch, mixed),
        "restored": same(policy, before),
        "now": np.concatenate(policy.log_probs(mixed)),
        "gone": refused(lambda: policy.compute_old_log_probs(gone)),
        "restored after a refusal": same(policy, before),
    }


def moving_average(policy, samples: list) -> dict:
    history = []
    train(policy, samples, lambda: history.append([p.double() for p in copies(policy)]))
    powers = [policy.settings.ewma_decay**age for age in reversed(range(STEPS + 1))]
    before = copies(policy)
    with policy._old_policy.weights():
        averaged = copies(policy)
    worst = 0.0
    for average, *versions in zip(averaged, *history, strict=True):
        exact = sum(w * version for w, version in zip(powers, versions, strict=True)) / sum(powers)
        worst = max(worst, float((average.double() - exact).abs().max() / exact.abs().max()))
    mini_batch = policy.pack(samples)
    policy.compute_old_log_probs(mini_batch)
    results = {
        "weights": worst,
        "actual": old_log_probs(mini_batch, samples),
        "restored": same(policy, before),
        "now": np.concatenate(policy.log_probs(samples)),
    }
    with torch.no_grad():
        for parameter, average in zip(parameters(policy), averaged, strict=True):
            parameter.copy_(average)
    return results | {"expected": np.concatenate(policy.log_probs(samples))}


def failure_inside(policy, samples: list) -> dict:
    """An exception between the swap and the restoring, on every rank."""
    from megatron_vespo.trainer.weight_copies import swapped

    before = copies(policy)
    log_probs = policy.log_probs(samples)
    try:
        with swapped(policy.model, [torch.zeros_like(values) for values in before]):
            uniform = policy.log_probs(samples)
            raise KeyError
    except KeyError:
        pass
    again = policy.log_probs(samples)
    return {
        "restored after an exception": same(policy, before)
        and all(np.array_equal(a, b) for a, b in zip(log_probs, again, strict=True)),
        "swapped": np.concatenate(uniform),
    }


def main() -> None:
    policy, samples = start_policy()
    results = failure_inside(policy, samples)
    results |= (snapshots if policy.settings.old_policy == "snapshot" else moving_average)(policy, samples)
    hand_back(**results)


if __name__ == "__main__":
    main()
