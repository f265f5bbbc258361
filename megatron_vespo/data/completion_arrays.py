"""Converts completions to plain arrays and back, bit-exact.

Fields of variable length are concatenated. M completions; per completion C tokens, N of them sampled, and
P tokens of its prompt; L layers, E experts per token:

    completion_lengths int64 [M], completion_tokens int32 [sum C], log_probs float32 [sum N]
    span_counts int64 [M], span_versions int64, span_lengths int64 [sum of counts]   policy versions, as spans
    rewards (NaN: not scored yet), overlong_penalties, temperatures float64 [M]
    finish_reasons, reward_statuses str [M]
    num_retractions int64 [M], routed bool [M]
    routes uint8 [sum (P + C - 1) of the routed completions, L, E], absent if no completion is routed. Given
                 tokens at the end of an unfinished response, G of them, have none: P + C - G - 1
    segment_counts int64 [M], segment_writers str, segment_lengths int64 [sum of counts]   0: all sampled
    supported bool [M], support_counts int32 [sum N of the supported], support_token_ids int32 [sum of counts]
    teacher_scored bool [M], teacher_log_probs float32 [sum N of the completions that a teacher has scored]
    extras uint8   JSON in UTF-8: an object per completion with those of EXTRAS that it has

The last three lines are absent if no completion has any, as in what earlier versions wrote. These also wrote
int64 completion_tokens, and policy_versions int64 [sum C] instead of the spans.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np

from megatron_vespo.types import Completion, Prompt, Segments, TokenSupports, VersionSpans, fetched

EXTRAS = ("turn_rewards", "environment_error", "reward_data", "reward_parts")  # fields of Completion


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
    optional = _segment_arrays(completions) | _support_arrays(completions) | _teacher_arrays(completions)
    return arrays | optional | _extra_arrays(completions)


def completions_of(arrays: Mapping[str, np.ndarray], prompts: Sequence[Prompt]) -> list[Completion]:
    """Restore the completions; `prompts` has one prompt per completion."""
    lengths, segments = arrays["completion_lengths"], _segments(arrays)
    sampled = lengths.copy()
    for i, one in enumerate(segments):
        if one is not None:
            sampled[i] = one.num_sampled
    rows = zip(
        prompts, split(arrays["completion_tokens"], lengths), split(arrays["log_probs"], sampled),
        _versions(arrays), _routes(arrays, prompts, segments), arrays["finish_reasons"],
        arrays["temperatures"], arrays["rewards"], arrays["reward_statuses"], arrays["overlong_penalties"],
        arrays["num_retractions"], segments, _supports(arrays, sampled), _teacher_log_probs(arrays, sampled),
        _extras(arrays), strict=True,
    )  # fmt: skip
    return [
        Completion(
            prompt, tokens, log_probs, versions, experts, str(finish), float(temperature),
            None if np.isnan(reward) else float(reward), str(status), float(penalty),
            num_retractions=int(retractions), segments=segment, supports=supports, teacher_log_probs=scores,
            **extra,
        )
        for prompt, tokens, log_probs, versions, experts, finish, temperature, reward, status, penalty,
        retractions, segment, supports, scores, extra in rows
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


def _segment_arrays(completions: Sequence[Completion]) -> dict[str, np.ndarray]:
    segments = [c.segments for c in completions]
    if not any(segments):
        return {}
    spans = [one.spans() if one is not None else [] for one in segments]
    return {
        "segment_counts": np.array([len(one) for one in spans], np.int64),
        "segment_writers": np.array([writer for one in spans for writer, _ in one], str),
        "segment_lengths": np.array([length for one in spans for _, length in one], np.int64),
    }


def _segments(arrays: Mapping[str, np.ndarray]) -> list[Segments | None]:
    if "segment_counts" not in arrays:
        return [None] * len(arrays["completion_lengths"])
    writers, lengths = arrays["segment_writers"].tolist(), arrays["segment_lengths"].tolist()
    ends = np.cumsum(arrays["segment_counts"]).tolist()
    return [
        Segments(tuple(writers[start:end]), tuple(lengths[start:end])) if end > start else None
        for start, end in pairwise([0, *ends])
    ]


def _support_arrays(completions: Sequence[Completion]) -> dict[str, np.ndarray]:
    supports = [c.supports for c in completions]
    if not any(one is not None for one in supports):
        return {}
    joined = TokenSupports.joined([one for one in supports if one is not None])
    return {
        "supported": np.array([one is not None for one in supports], bool),
        "support_counts": joined.counts,
        "support_token_ids": joined.token_ids,
    }


def _supports(arrays: Mapping[str, np.ndarray], sampled: np.ndarray) -> list[TokenSupports | None]:
    """The supports of completions with so many sampled tokens."""
    if "supported" not in arrays:
        return [None] * len(sampled)
    supported = arrays["supported"]
    counts = split(arrays["support_counts"], sampled[supported])
    token_ids = split(arrays["support_token_ids"], np.array([one.sum() for one in counts], np.int64))
    parts = iter(map(TokenSupports, counts, token_ids))
    return [next(parts) if has else None for has in supported]


def _teacher_arrays(completions: Sequence[Completion]) -> dict[str, np.ndarray]:
    scores = [c.teacher_log_probs for c in completions]
    if all(one is None for one in scores):
        return {}
    return {
        "teacher_scored": np.array([one is not None for one in scores], bool),
        "teacher_log_probs": end_to_end([one for one in scores if one is not None], np.float32),
    }


def _teacher_log_probs(arrays: Mapping[str, np.ndarray], sampled: np.ndarray) -> list[np.ndarray | None]:
    """Of completions of `sampled` tokens, int64 [M]."""
    if "teacher_scored" not in arrays:
        return [None] * len(sampled)
    scored = arrays["teacher_scored"]
    parts = iter(split(arrays["teacher_log_probs"], sampled[scored]))
    return [next(parts) if known else None for known in scored]


def _extra_arrays(completions: Sequence[Completion]) -> dict[str, np.ndarray]:
    extras = [{name: value for name in EXTRAS if (value := getattr(c, name))} for c in completions]
    return {"extras": np.frombuffer(json.dumps(extras).encode(), np.uint8)} if any(extras) else {}


def _extras(arrays: Mapping[str, np.ndarray]) -> list[dict]:
    if "extras" not in arrays:
        return [{} for _ in arrays["completion_lengths"]]
    extras = json.loads(arrays["extras"].tobytes())
    for extra in extras:
        if "turn_rewards" in extra:  # JSON has lists alone
            extra["turn_rewards"] = tuple(extra["turn_rewards"])
    return extras


def _versions(arrays: Mapping[str, np.ndarray]) -> list[VersionSpans]:
    if "policy_versions" in arrays:  # written by an earlier version
        per_completion = split(arrays["policy_versions"], arrays["completion_lengths"])
        return [VersionSpans.of(versions) for versions in per_completion]
    return spans_of(arrays)


def _routes(
    arrays: Mapping[str, np.ndarray], prompts: Sequence[Prompt], segments: Sequence[Segments | None]
) -> list[np.ndarray | None]:
    if "routes" not in arrays:
        return [None] * len(prompts)
    entering = np.array([len(prompt.token_ids) for prompt in prompts]) + arrays["completion_lengths"] - 1
    entering -= np.array([one.num_given_at_end if one is not None else 0 for one in segments])
    parts = iter(split(arrays["routes"], entering[arrays["routed"]]))
    return [next(parts) if routed else None for routed in arrays["routed"]]


def end_to_end(parts: Sequence[Sequence | np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate([np.empty(0, dtype), *(np.asarray(part, dtype) for part in parts)])


def split(values: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    """Split `values` into its concatenated pieces, of these lengths."""
    return np.split(values, np.cumsum(lengths)[:-1]) if len(lengths) else []
