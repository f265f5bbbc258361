"""Canary samples: a few samples and their log-probs, which a resumed trainer must reproduce.

Expert routes are not saved. The router chooses them again, so a run may resume with another
--routing-replay.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from megatron_vespo.types import Segments, TokenSupports, TrainingSample, VersionSpans

NUM_CANARIES = 8
# In fp32 the largest difference per token is bounded: layouts differ by rounding, at most 1e-5 in the tests.
# In bfloat16 the mean is bounded, because a single token says little: logits of 10 to 20 are rounded by
# 0.03 to 0.06, and routers may choose other experts.
MAX_DIFFERENCE_FP32, MEAN_DIFFERENCE_BF16 = 1e-4, 0.05
_NUMBERS = ("prompt_length", "advantage", "reward", "temperature", "group_id")
_ARRAYS = ("token_ids", "behavior_log_probs")


class CanaryMismatchError(RuntimeError):
    """The loaded policy differs from the saved one."""


def canaries_of(samples: Sequence[TrainingSample]) -> list[TrainingSample]:
    """The first NUM_CANARIES samples, without routes."""
    return [replace(sample, routed_experts=None, routes_version=None) for sample in samples[:NUM_CANARIES]]


def encode(samples: Sequence[TrainingSample], log_probs: Sequence[np.ndarray]) -> bytes:
    """The content of an .npz file; `log_probs` is one float32 [N] per sample, N sampled tokens."""
    arrays: dict[str, Any] = {
        name: np.array([getattr(sample, name) for sample in samples]) for name in _NUMBERS
    }
    for i, (sample, values) in enumerate(zip(samples, log_probs, strict=True)):
        arrays |= {f"{name}_{i}": getattr(sample, name) for name in _ARRAYS}
        arrays[f"policy_versions_{i}"] = sample.policy_versions.array()
        arrays[f"log_probs_{i}"] = values
        if sample.segments is not None:
            arrays[f"segment_writers_{i}"] = np.array(sample.segments.writers, str)
            arrays[f"segment_lengths_{i}"] = np.array(sample.segments.lengths, np.int64)
        if sample.supports is not None:
            arrays[f"support_counts_{i}"] = sample.supports.counts
            arrays[f"support_token_ids_{i}"] = sample.supports.token_ids
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def decode(content: bytes) -> tuple[list[TrainingSample], list[np.ndarray]]:
    """The inverse of `encode`: samples without routes, and their log-probs."""
    with np.load(io.BytesIO(content), allow_pickle=False) as file:
        arrays = dict(file)
    samples = [
        TrainingSample(
            **{name: arrays[name][i].item() for name in _NUMBERS},
            **{name: arrays[f"{name}_{i}"] for name in _ARRAYS},
            policy_versions=VersionSpans.of(arrays[f"policy_versions_{i}"]),
            segments=_segments(arrays, i),
            supports=_supports(arrays, i),
        )
        for i in range(len(arrays["prompt_length"]))
    ]
    return samples, [arrays[f"log_probs_{i}"] for i in range(len(samples))]


def _segments(arrays: dict[str, np.ndarray], i: int) -> Segments | None:
    if f"segment_writers_{i}" not in arrays:
        return None
    return Segments(*(tuple(arrays[f"segment_{name}_{i}"].tolist()) for name in ("writers", "lengths")))


def _supports(arrays: dict[str, np.ndarray], i: int) -> TokenSupports | None:
    if f"support_counts_{i}" not in arrays:
        return None
    return TokenSupports(arrays[f"support_counts_{i}"], arrays[f"support_token_ids_{i}"])


def compare(saved: Sequence[np.ndarray], now: Sequence[np.ndarray], bf16: bool, where: str) -> float:
    """The largest difference per token. CanaryMismatchError if rounding cannot explain the differences."""
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
