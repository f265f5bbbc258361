"""A few samples whose log-probs are saved with a checkpoint: a resumed trainer must compute them again.

Their routes are not: routers choose for themselves, so that a run may go on with another --routing-replay.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from megatron_vespo.types import TrainingSample

NUM_CANARIES = 8
# Largest difference of a token in fp32, where layouts differ by rounding, 1e-5 at most in the tests. In
# bfloat16, whose logits of 10 to 20 are rounded by 0.03 to 0.06 and whose routers may choose other experts,
# single tokens say little: there it is the mean, to which errors of both signs and sizes contribute.
MAX_DIFFERENCE_FP32, MEAN_DIFFERENCE_BF16 = 1e-4, 0.05
_NUMBERS = ("prompt_length", "advantage", "reward", "temperature", "group_id")
_ARRAYS = ("token_ids", "behavior_log_probs", "policy_versions")


class CanaryMismatchError(RuntimeError):
    """The loaded policy is not the one that was saved."""


def canaries_of(samples: Sequence[TrainingSample]) -> list[TrainingSample]:
    """The first NUM_CANARIES without routes, in memory of their own.

    Arrays that Ray has handed over are views: a single one would pin all samples in its store.
    """
    plain = [replace(sample, routed_experts=None, routes_version=None) for sample in samples[:NUM_CANARIES]]
    return copy.deepcopy(plain)


def encode(samples: Sequence[TrainingSample], log_probs: Sequence[np.ndarray]) -> bytes:
    """As an .npz file; `log_probs` are float32 [C] a sample."""
    arrays: dict[str, Any] = {
        name: np.array([getattr(sample, name) for sample in samples]) for name in _NUMBERS
    }
    for i, (sample, values) in enumerate(zip(samples, log_probs, strict=True)):
        arrays |= {f"{name}_{i}": getattr(sample, name) for name in _ARRAYS}
        arrays[f"log_probs_{i}"] = values
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def decode(content: bytes) -> tuple[list[TrainingSample], list[np.ndarray]]:
    """Samples of `encode`, without routes, and log-probs."""
    with np.load(io.BytesIO(content), allow_pickle=False) as file:
        arrays = dict(file)
    samples = [
        TrainingSample(
            **{name: arrays[name][i].item() for name in _NUMBERS},
            **{name: arrays[f"{name}_{i}"] for name in _ARRAYS},
        )
        for i in range(len(arrays["prompt_length"]))
    ]
    return samples, [arrays[f"log_probs_{i}"] for i in range(len(samples))]


def compare(saved: Sequence[np.ndarray], now: Sequence[np.ndarray], bf16: bool, where: str) -> float:
    """The largest difference of a token; CanaryMismatchError where it is too much for rounding."""
    differences = np.abs(np.concatenate(list(saved)) - np.concatenate(list(now)))
    largest = float(differences.max())
    found, bound = (
        (float(differences.mean()), MEAN_DIFFERENCE_BF16) if bf16 else (largest, MAX_DIFFERENCE_FP32)
    )
    if not found <= bound:
        raise CanaryMismatchError(
            f"{where} does not bring back the policy that was saved: its log-probs of {len(saved)} samples "
            f"differ by {found:.2e} ({'mean' if bf16 else 'largest'}), more than {bound:g}"
        )
    return largest
