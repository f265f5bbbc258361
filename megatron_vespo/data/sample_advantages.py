"""What the advantages of a response's tokens come to: A of a token is its response's plus its own.

Where tokens have their own, a response has no one sign: what goes by the sign takes the shares of its tokens.
"""

from __future__ import annotations

import numpy as np

from megatron_vespo.types import TrainingSample


def mean_advantage(sample: TrainingSample) -> float:
    """Return the mean of A over the trained tokens."""
    if sample.token_advantages is None:
        return sample.advantage
    return sample.advantage + float(sample.token_advantages.mean(dtype=np.float64))


def sign_shares(sample: TrainingSample) -> tuple[float, float]:
    """Return the shares of the trained tokens with A > 0 and with A < 0, in the float32 of the loss."""
    advantages = np.atleast_1d(np.float32(sample.advantage))
    if sample.token_advantages is not None:
        advantages = advantages + np.asarray(sample.token_advantages, np.float32)
    return float((advantages > 0).mean()), float((advantages < 0).mean())


def token_advantage_metrics(samples: list[TrainingSample]) -> dict[str, float]:
    """Return mean and mean size over the trained tokens; nothing if no sample has token advantages."""
    if all(sample.token_advantages is None for sample in samples):
        return {}
    given = [sample.token_advantages for sample in samples if sample.token_advantages is not None]
    values = np.concatenate(given).astype(np.float64)
    num_tokens = sum(sample.num_trained for sample in samples)  # those without have 0
    return {
        "token_advantage/mean": float(values.sum() / num_tokens),
        "token_advantage/abs_mean": float(np.abs(values).sum() / num_tokens),
    }
