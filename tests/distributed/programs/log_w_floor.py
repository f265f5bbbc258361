"""The floor of log W of a few samples, and that measuring it leaves nothing behind."""

from __future__ import annotations

import numpy as np
from common import hand_back, start_policy


def main() -> None:
    policy, samples = start_policy("--max-tokens-per-gpu", "128")
    before = policy.log_probs(samples)
    few = samples[:7]
    floor = policy.log_w_floor(few)
    again = policy.log_w_floor(few)
    after = policy.log_probs(samples)
    mini_batch = policy.pack(samples)
    policy.compute_old_log_probs(mini_batch)
    hand_back(
        floor=floor,
        again=again,
        unchanged=all(np.array_equal(a, b) for a, b in zip(before, after, strict=True)),
        log_w=policy.train_step(mini_batch).log_w,
    )


if __name__ == "__main__":
    main()
