"""Converts completions to plain arrays and back, bit-exact.

Fields of variable length are concatenated. N completions; per completion C tokens, and P tokens of its
prompt; L layers, E experts per token:

    completion_lengths int64 [N], completion_tokens int32 [sum C], log_probs float32 [sum C]
    span_counts int64 [N], span_versions int64, span_lengths int64 [sum of counts]   policy versions, as spans
    rewards (NaN: not scored yet), overlong_penalties, temperatures float64 [N]
    finish_reasons, reward_statuses str [N]
    num_retractions int64 [N], routed bool [N]
    routes uint8 [sum (P + C - 1) of the routed completions, L, E], absent if no completion is routed

Earlier versions wrote int64 completion_tokens, and policy_versions int64 [sum C] instead of the spans.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np

from megatron_vespo.types import Completion, Prompt, VersionSpans, fetched


def completion_arrays(completions: Sequence[Completion]) -> dict[str, np.ndarray]:
    rewards = [np.nan if c.reward is None else c.reward for c in completions]
    arrays = {
        "completion_lengths": np.array([len(c.token_ids) for c in completions], np.int64),
        "completion_tokens": end_to_end([c.token_ids for c in completions], np.int32),
        "log_probs": end_to_end([c.log_probs for c in completions], np.float32),
        **span_arrays([c.policy_versions for c in completions]),
        "rewards": np.array(rewards, np.float64),
        "overlong_penalties": np.array([c.overlong_penalty for c in completions], np.float64),
        "temperatures": np.array([c.temperature for c in completions], np.float64),
        "finish_reasons": np.array([c.finish_reason for c in completions], str),
        "reward_statuses": np.array([c.reward_status for c in completions], str),
        "num_retractions": np.array([c.num_retractions for c in completions], np.int64),
        "routed": np.array([c.routed_experts is not None for c in completions], bool),
    }
    if arrays["routed"].any():
        routes = [c.routed_experts for c in completions if c.routed_experts is not None]
        arrays["routes"] = np.concatenate([fetched(one) for one in routes])
    return arrays


def completions_of(arrays: Mapping[str, np.ndarray], prompts: Sequence[Prompt]) -> list[Completion]:
    """Restore the completions; `prompts` has one prompt per completion."""
    lengths = arrays["completion_lengths"]
    rows = zip(
        prompts, split(arrays["completion_tokens"], lengths), split(arrays["log_probs"], lengths),
        _versions(arrays), _routes(arrays, prompts), arrays["finish_reasons"],
        arrays["temperatures"], arrays["rewards"], arrays["reward_statuses"], arrays["overlong_penalties"],
        arrays["num_retractions"], strict=True,
    )  # fmt: skip
    return [
        Completion(
            prompt, tokens, log_probs, versions, experts, str(finish), float(temperature),
            None if np.isnan(reward) else float(reward), str(status), float(penalty),
            num_retractions=int(retractions),
        )
        for prompt, tokens, log_probs, versions, experts, finish, temperature, reward, status, penalty,
        retractions in rows
    ]  # fmt: skip


def span_arrays(spans: Sequence[VersionSpans]) -> dict[str, np.ndarray]:
    """Return the three arrays of the module's docstring that stand for policy versions."""
    return {
        "span_counts": np.array([len(one.versions) for one in spans], np.int64),
        "span_versions": np.array([version for one in spans for version in one.versions], np.int64),
        "span_lengths": np.array([length for one in spans for length in one.lengths], np.int64),
    }


def spans_of(arrays: Mapping[str, np.ndarray]) -> list[VersionSpans]:
    """The inverse of `span_arrays`."""
    versions, lengths = arrays["span_versions"].tolist(), arrays["span_lengths"].tolist()
    ends = np.cumsum(arrays["span_counts"]).tolist()
    return [
        VersionSpans(tuple(versions[start:end]), tuple(lengths[start:end]))
        for start, end in pairwise([0, *ends])
    ]


def _versions(arrays: Mapping[str, np.ndarray]) -> list[VersionSpans]:
    if "policy_versions" in arrays:  # written by an earlier version
        per_completion = split(arrays["policy_versions"], arrays["completion_lengths"])
        return [VersionSpans.of(versions) for versions in per_completion]
    return spans_of(arrays)


def _routes(arrays: Mapping[str, np.ndarray], prompts: Sequence[Prompt]) -> list[np.ndarray | None]:
    if "routes" not in arrays:
        return [None] * len(prompts)
    entering = np.array([len(prompt.token_ids) for prompt in prompts]) + arrays["completion_lengths"] - 1
    parts = iter(split(arrays["routes"], entering[arrays["routed"]]))
    return [next(parts) if routed else None for routed in arrays["routed"]]


def end_to_end(parts: Sequence[Sequence | np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate([np.empty(0, dtype), *(np.asarray(part, dtype) for part in parts)])


def split(values: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    """Split `values` into its concatenated pieces, of these lengths."""
    return np.split(values, np.cumsum(lengths)[:-1]) if len(lengths) else []
