"""Compares engines' log-probs with the trainer's, for decoded tokens and for prefilled ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_vespo.commands.smoke.stages import CheckFailed
from megatron_vespo.system.http import post_json
from megatron_vespo.types import TrainingSample


@dataclass(frozen=True)
class Bounds:
    """Bounds of absolute differences of log-probs, per token."""

    mean: float
    largest: float


# rounding only; a wrong weight or position makes differences of about 1, as large as log-probs vary
BOUNDS_FP32 = Bounds(mean=1e-4, largest=1e-3)
# a near tie of two experts is sometimes decided differently
BOUNDS_BF16 = Bounds(mean=0.05, largest=2.0)


def differences(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> np.ndarray:
    """Absolute differences of all tokens, float64 [tokens]."""
    return np.abs(np.concatenate(ours).astype(np.float64) - np.concatenate(theirs))


def compare(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray], bounds: Bounds, whose: str) -> str:
    """A line about the result; CheckFailed if log-probs differ by more than `bounds`."""
    found = differences(ours, theirs)
    mean, largest = found.mean(), found.max()
    text = f"{len(found)} tokens differ by {mean:.1e}, at most {largest:.1e}"
    # not >, which is false for NaN
    if not (mean <= bounds.mean and largest <= bounds.largest):
        raise CheckFailed(f"{whose}: {text}; rounding makes {bounds.mean:g}, at most {bounds.largest:g}")
    return text


def prefilled(
    url: str, samples: Sequence[TrainingSample], timeout_s: float, api_key: str | None
) -> list[np.ndarray]:
    """The engine's log-probs of completions that it gets as prompts, float [C] per sample.

    SGLang returns them at temperature 1. RuntimeError for a reply without them.
    """
    payload = {
        "input_ids": [sample.token_ids.tolist() for sample in samples],
        "sampling_params": {"max_new_tokens": 1, "temperature": 1.0},
        "return_logprob": True,
        "logprob_start_len": 0,
    }
    answers = post_json(url, "/generate", payload, timeout_s, api_key)
    found = []
    for sample, answer in zip(samples, answers, strict=True):
        scored = answer["meta_info"]["input_token_logprobs"]
        if len(scored) != sample.num_tokens:
            raise RuntimeError(f"engine {url} scores {len(scored)} tokens, it was given {sample.num_tokens}")
        found.append(np.array([entry[0] for entry in scored[sample.prompt_length :]], np.float64))
    return found
