"""The same samples through the same weights again and again: what differs, and by how much."""

from __future__ import annotations

import numpy as np
import torch

from tests.distributed.programs.common import hand_back, start_policy

PASSES = 5


def log_w(policy, samples: list, passes: int) -> list[np.ndarray]:
    """Each later pass against the first: log W [num_samples]."""
    passes_log_probs = [policy.log_probs(samples) for _ in range(passes)]
    first = passes_log_probs[0]
    return [
        np.array([(a - b).sum(dtype=np.float64) for a, b in zip(each, first, strict=True)])
        for each in passes_log_probs[1:]
    ]


def largest(arrays: list[np.ndarray]) -> float:
    return max(float(np.abs(array).max()) for array in arrays)


def gradients(policy, samples: list) -> torch.Tensor:
    """All gradients of the loss, fp32."""
    mini_batch = policy.pack(samples)
    policy.compute_old_log_probs(mini_batch)
    policy.forward_backward(mini_batch)
    buffers = [b for chunk in policy.model for b in chunk.buffers + chunk.expert_parallel_buffers]
    return torch.cat([buffer.grad_data.float().flatten() for buffer in buffers])


def gradient_difference(policy, samples: list) -> float:
    """Of two passes, relative to the first."""
    first, second = (gradients(policy, samples) for _ in range(2))
    return float((first - second).norm() / first.norm())


def main() -> None:
    policy, samples = start_policy()
    repeated = log_w(policy, samples, PASSES)
    whole = policy.log_probs(samples)
    # other neighbours in a pack, other sizes of the matmuls
    halves = [policy.log_probs(samples[start::2]) for start in range(2)]
    cut = [
        np.array([(a - b).sum(dtype=np.float64) for a, b in zip(half, whole[start::2], strict=True)])
        for start, half in enumerate(halves)
    ]
    results = {
        "tokens of a sample": np.mean([sample.completion_length for sample in samples]),
        "largest |log W|": largest(repeated),
        "share of samples with log W = 0": np.mean([array == 0 for array in repeated]),
        "largest |log W|, packed otherwise": largest(cut),
        "gradient, relative difference": gradient_difference(policy, samples),
    }
    torch.use_deterministic_algorithms(True, warn_only=True)
    results["deterministic algorithms: largest |log W|"] = largest(log_w(policy, samples, PASSES))
    results["deterministic algorithms: gradient"] = gradient_difference(policy, samples)
    hand_back(**results)


if __name__ == "__main__":
    main()
