"""The data that tests hand around, with every field that a test does not care about filled in.

Example:
    make_completion(make_prompt(3), 5, reward=1.0)   # 5 tokens for prompt 3, log-probs 0, version 0
    make_group(make_prompt(3), [2, 4])               # two completions, of 2 and 4 tokens
    make_sample(3, 4, advantage=-0.5)                # 3 prompt tokens, 4 completion tokens
    make_sample(3, 9, segments=make_segments(2, 3, 4))   # 2 sampled, 3 given, 4 sampled
    make_supports([5, 9], [7])                       # the first token was drawn from {5, 9}
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from megatron_vespo.types import (
    Completion,
    Prompt,
    SamplingParams,
    Segments,
    TokenSupports,
    TrainingSample,
    VersionSpans,
    token_array,
)

SAMPLING = SamplingParams(temperature=1.0, max_new_tokens=8, stop_token_ids=())


def make_prompt(number: int = 0, token_ids: Sequence[int] | None = None, **fields: Any) -> Prompt:
    """Its only token is its number, unless others are given."""
    values = {"answer": "", "text": ""} | fields
    return Prompt(number, token_array([number] if token_ids is None else token_ids), **values)


def make_completion(
    prompt: Prompt | None = None,
    tokens: int | Sequence[int] = 3,
    versions: int | Sequence[int] = 0,
    finish_reason: str = "stop",
    **fields: Any,
) -> Completion:
    """`tokens` and `versions`: how many, or which; one version for all sampled tokens."""
    token_ids = token_array(tokens if isinstance(tokens, Sequence | np.ndarray) else [5] * int(tokens))
    segments = fields.get("segments")
    count = len(token_ids) if segments is None else segments.num_sampled
    values = {"log_probs": np.zeros(count, np.float32), "routed_experts": None, "temperature": 1.0} | fields
    spans = VersionSpans.single(versions, count) if isinstance(versions, int) else VersionSpans.of(versions)
    return Completion(
        prompt=make_prompt() if prompt is None else prompt,
        token_ids=token_ids,
        policy_versions=spans,
        finish_reason=finish_reason,
        **values,
    )


def make_group(prompt: Prompt, lengths: Iterable[int], **fields: Any) -> list[Completion]:
    return [make_completion(prompt, length, **fields) for length in lengths]


def make_segments(*lengths: int) -> Segments:
    """Tokens of the policy and of a tool in turn; 0 leaves a span out."""
    writers = ("policy", "tool")
    return Segments.joined(Segments.single(writers[i % 2], length) for i, length in enumerate(lengths))


Tokens = int | Sequence[int] | np.ndarray


def make_sample(prompt: Tokens = 3, completion: Tokens = 4, **fields: Any) -> TrainingSample:
    """`prompt` and `completion`: how many tokens, or which; tokens are numbered where none are given."""
    first = token_array(range(prompt) if isinstance(prompt, int) else prompt)
    if isinstance(completion, int):
        completion = range(len(first), len(first) + completion)
    rest = token_array(completion)
    segments = fields.get("segments")
    sampled = len(rest) if segments is None else segments.num_sampled
    values: dict[str, Any] = {
        "behavior_log_probs": np.zeros(sampled, np.float32),
        "policy_versions": VersionSpans.single(0, sampled),
        "advantage": 0.0,
        "reward": 0.0,
        "temperature": 1.0,
        "group_id": 0,
    }
    return TrainingSample(np.concatenate([first, rest]), len(first), **(values | fields))


def make_supports(*ids: Sequence[int]) -> TokenSupports:
    """The ids that each sampled token was drawn from."""
    counts = np.array([len(of_token) for of_token in ids], np.int32)
    return TokenSupports(counts, token_array([token for of_token in ids for token in of_token]))
