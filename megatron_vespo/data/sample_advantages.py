"""What the advantages of a response's tokens come to: A of a token is its response's plus its own.

Where tokens have their own, a response has no one sign: what goes by the sign takes the shares of its tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_vespo.types import TrainingSample


def advantages_per_token(samples: Sequence[TrainingSample]) -> np.ndarray | None:
    """Return A of all trained tokens, float32 [sum N]; None if A is the response's in all samples."""
    if all(sample.token_advantages is None for sample in samples):
        return None
    return np.concatenate([_per_token(sample) for sample in samples])


def _per_token(sample: TrainingSample) -> np.ndarray:
    """A of the trained tokens in the arithmetic of the loss, float32 [N]."""
    own = (
        np.zeros(sample.num_trained, np.float32)
        if sample.token_advantages is None
        else sample.token_advantages
    )
    return np.float32(sample.advantage) + np.asarray(own, np.float32)


def mean_advantage(sample: TrainingSample) -> float:
    """Return the mean of A over the trained tokens."""
    if sample.token_advantages is None:
        return sample.advantage
    return sample.advantage + float(sample.token_advantages.mean(dtype=np.float64))


def sign_shares(sample: TrainingSample) -> tuple[float, float]:
    """Return the shares of the trained tokens with A > 0 and with A < 0."""
    if sample.token_advantages is None:
        advantage = np.float32(sample.advantage)
        return float(advantage > 0), float(advantage < 0)
    advantages = _per_token(sample)
    return float((advantages > 0).mean()), float((advantages < 0).mean())


def token_advantage_metrics(samples: Sequence[TrainingSample]) -> dict[str, float]:
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
