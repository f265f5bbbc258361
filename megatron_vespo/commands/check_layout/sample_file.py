"""Makes training samples, from a file or at random."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vespo.data.jsonl import jsonl_rows, kind
from megatron_vespo.data.supports import check_supports
from megatron_vespo.types import WRITERS, Segments, TokenSupports, TrainingSample, VersionSpans, token_array

REQUIRED_KEYS = ("token_ids", "prompt_length", "advantage")
PER_TOKEN_KEYS = ("behavior_log_probs", "token_advantages")  # a number for each sampled token
OPTIONAL_KEYS = (*PER_TOKEN_KEYS, "temperature", "reward", "group_id", "segments", "supports")
GIVEN_EVERY = 3  # one of so many random samples has given tokens, and one has advantages per token


def read_samples(path: Path, vocab_size: int) -> list[TrainingSample]:
    """Samples of a JSONL file, one object per line.

    Keys: `token_ids` (prompt and completion), `prompt_length`, `advantage`. Optional keys and defaults:
    `behavior_log_probs` (one per sampled token), `token_advantages` (one per sampled token, added to the
    advantage; 0), `temperature` (1), `reward` (0), `group_id` (0), `segments` (who wrote the tokens after the
    prompt, pairs of writer and number of tokens; the policy), `supports` (what truncated sampling left to
    choose from, a list of ids per sampled token; everything).
    Without `behavior_log_probs` a sample has NaN there, see `with_noisy_behavior`.

    Example: {"token_ids": [5, 9, 2, 11, 1], "prompt_length": 2, "advantage": -0.25,
              "segments": [["policy", 1], ["tool", 1], ["policy", 1]]}

    Raises:
        ValueError: one line that names the file and the wrong line, counted from 1.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; it must be a JSONL file of samples")
    samples = [_sample(row, where, vocab_size) for where, row in jsonl_rows(path)]
    if not samples:
        raise ValueError(f"{path}: the file is empty; it needs one sample a line")
    return samples


def random_samples(
    number: int, vocab_size: int, max_prompt_tokens: int, max_completion_tokens: int, seed: int
) -> list[TrainingSample]:
    """Samples of random tokens, random lengths and advantages of both signs; behavior log-probs are NaN.

    Advantages have the mean 0.5, so that the terms of a loss do not cancel and losses can be compared. One
    of GIVEN_EVERY samples has given tokens between sampled ones, if it has room for them, and the next one
    has advantages per token.
    """
    draw = np.random.default_rng(seed)
    samples = []
    for i in range(number):
        prompt = int(draw.integers(1, max_prompt_tokens + 1))
        completion = int(draw.integers(1, max_completion_tokens + 1))
        token_ids = draw.integers(0, vocab_size, prompt + completion)
        advantage = float(draw.normal(0.5))
        segments = None
        if i % GIVEN_EVERY == 0 and completion >= 3:
            start, end = sorted(draw.choice(np.arange(1, completion), 2, replace=False).tolist())
            turns = (start, end - start, completion - end)
            segments = Segments(("policy", "environment", "policy"), turns)
        fields: dict[str, Any] = {"advantage": advantage, "group_id": i}
        if i % GIVEN_EVERY == 1:
            fields["token_advantages"] = draw.normal(0.0, 0.5, completion).astype(np.float32)
        samples.append(_make(token_ids, prompt, segments, **fields))
    return samples


def with_noisy_behavior(
    samples: Sequence[TrainingSample], log_probs: Sequence[np.ndarray], deviation: float, seed: int
) -> list[TrainingSample]:
    """The samples, with NaN behavior log-probs replaced by `log_probs` plus normal noise.

    `log_probs` are a policy's, float32 [N] per sample. The noise has the standard `deviation` per token; it
    makes W differ from 1.
    """
    draw = np.random.default_rng(seed)
    filled = []
    for sample, values in zip(samples, log_probs, strict=True):
        noise = draw.normal(0.0, deviation, len(values))
        if np.isnan(sample.behavior_log_probs).any():
            sample = dataclasses.replace(sample, behavior_log_probs=(values + noise).astype(np.float32))
        filled.append(sample)
    return filled


def _make(
    token_ids: np.ndarray, prompt_length: int, segments: Segments | None, **fields: Any
) -> TrainingSample:
    sampled = len(token_ids) - prompt_length if segments is None else segments.num_sampled
    unknown = np.full(sampled, np.nan, np.float32)
    defaults = {"behavior_log_probs": unknown, "temperature": 1.0, "reward": 0.0, "group_id": 0}
    return TrainingSample(
        token_ids=token_ids,
        prompt_length=prompt_length,
        policy_versions=VersionSpans.single(0, sampled),
        segments=segments,
        **(defaults | fields),
    )


def _sample(row: dict, where: str, vocab_size: int) -> TrainingSample:
    for key in row:
        if key not in REQUIRED_KEYS + OPTIONAL_KEYS:
            near = difflib.get_close_matches(key, REQUIRED_KEYS + OPTIONAL_KEYS, n=1)
            hint = (
                f"did you mean {near[0]!r}?"
                if near
                else f"known are {', '.join(REQUIRED_KEYS + OPTIONAL_KEYS)}"
            )
            raise ValueError(f"{where}: no key {key!r} is known; {hint}")
    for key in REQUIRED_KEYS:
        if key not in row:
            raise ValueError(f"{where}: {key} is missing")
    token_ids = row["token_ids"]
    if not isinstance(token_ids, list) or not all(_is_token(token, vocab_size) for token in token_ids):
        raise ValueError(f"{where}: token_ids must be a list of integers from 0 to {vocab_size - 1}")
    prompt_length = row["prompt_length"]
    if not _is_integer(prompt_length) or not 0 < prompt_length < len(token_ids):
        raise ValueError(
            f"{where}: prompt_length must be an integer from 1 to {len(token_ids) - 1}, one less than the "
            f"token_ids, it is {kind(prompt_length)}"
        )
    fields: dict[str, Any] = {
        key: _number(row[key], key, where) for key in ("advantage", "temperature", "reward") if key in row
    }
    if fields.get("temperature", 1.0) <= 0:
        raise ValueError(f"{where}: temperature must be positive, it is {kind(row['temperature'])}")
    if "group_id" in row:
        if not _is_integer(row["group_id"]):
            raise ValueError(f"{where}: group_id must be an integer, it is {kind(row['group_id'])}")
        fields["group_id"] = row["group_id"]
    completion = len(token_ids) - prompt_length
    segments = _segments(row["segments"], completion, where) if "segments" in row else None
    sampled = completion if segments is None else segments.num_sampled
    fields |= {key: _per_token(row[key], key, sampled, where) for key in PER_TOKEN_KEYS if key in row}
    sample = _make(np.array(token_ids, np.int64), prompt_length, segments, **fields)
    if "supports" in row:
        sample.supports = _supports(row["supports"], vocab_size, where)
        check_supports(sample, vocab_size, f"{where}: the sample")
    return sample


def _segments(value: Any, length: int, where: str) -> Segments:
    if not isinstance(value, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in value):
        raise ValueError(
            f"{where}: segments must be a list of pairs of a writer and its number of tokens, for example "
            '[["policy", 12], ["tool", 5]]'
        )
    for writer, tokens in value:
        if writer not in WRITERS:
            raise ValueError(f"{where}: a writer of segments is one of {', '.join(WRITERS)}, not {writer!r}")
        if not _is_integer(tokens) or tokens < 1:
            raise ValueError(
                f"{where}: the tokens of a segment must be an integer from 1, here is {kind(tokens)}"
            )
    segments = Segments.joined(Segments.single(writer, tokens) for writer, tokens in value)
    if len(segments) != length:
        raise ValueError(
            f"{where}: segments have {len(segments)} tokens, token_ids has {length} after the prompt"
        )
    if segments.num_sampled == 0:
        raise ValueError(f"{where}: no token of segments is the policy's: there is nothing to train on")
    return segments


def _per_token(values: Any, key: str, length: int, where: str) -> np.ndarray:
    if not isinstance(values, list) or len(values) != length:
        found = f"a list of {len(values)}" if isinstance(values, list) else kind(values)
        raise ValueError(
            f"{where}: {key} must be a list of {length} numbers, one per sampled token, it is {found}"
        )
    return np.array([_number(value, key, where) for value in values], np.float32)


def _supports(value: Any, vocab_size: int, where: str) -> TokenSupports:
    if not isinstance(value, list) or not all(
        isinstance(ids, list) and all(_is_token(token, vocab_size) for token in ids) for ids in value
    ):
        raise ValueError(
            f"{where}: supports must be lists of integers from 0 to {vocab_size - 1}, one list per sampled "
            "token, for example [[5, 9], [7]]"
        )
    counts = np.array([len(ids) for ids in value], np.int32)
    return TokenSupports(counts, token_array([token for ids in value for token in ids]))


def _number(value: Any, key: str, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{where}: {key} must be a finite number, here is {kind(value)}")
    return float(value)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_token(value: Any, vocab_size: int) -> bool:
    return _is_integer(value) and 0 <= value < vocab_size
