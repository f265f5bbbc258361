"""Cuts a mini-batch into one shard per data-parallel rank, so that each rank receives its own samples only.

    outline = MiniBatchOutline.of(samples, rule)                 # small, for every rank
    shard = Shard.of(samples, outline.cut.of_rank(rank))         # the samples of one data-parallel rank

All tensor-, pipeline- and context-parallel ranks of a data-parallel rank receive the same shard.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron_vespo.data.completion_arrays import end_to_end, split
from megatron_vespo.data.packing import Cut, PackingRule
from megatron_vespo.data.sample_advantages import sign_shares
from megatron_vespo.types import (
    TOKEN_ID,
    PartlySampled,
    Segments,
    TokenSupports,
    TrainingSample,
    VersionSpans,
)

# fields of a sample that travel joined, with their dtype; a sample may lack the last two
COLUMNS = {
    "token_ids": TOKEN_ID,
    "behavior_log_probs": np.float32,
    "token_advantages": np.float32,
    "reference_log_probs": np.float32,
}
EMPTY = {name: np.empty(0, dtype) for name, dtype in COLUMNS.items()}
NO_SUPPORTS = TokenSupports.joined([])


@dataclass(frozen=True, slots=True)
class SampleOutline(PartlySampled):
    """What every rank knows of a sample."""

    num_tokens: int  # P + C
    prompt_length: int  # P
    sign_shares: tuple[float, float]  # of the sampled tokens, with A > 0 and with A < 0
    group_id: int
    policy_versions: VersionSpans  # of N tokens
    segments: Segments | None  # of C tokens

    @property
    def completion_length(self) -> int:
        return self.num_tokens - self.prompt_length


@dataclass(frozen=True)
class MiniBatchOutline:
    """What every rank knows of a mini-batch: how it is cut, and a few numbers of each sample."""

    cut: Cut
    samples: list[SampleOutline]

    @classmethod
    def of(cls, samples: Sequence[TrainingSample], rule: PackingRule) -> MiniBatchOutline:
        """Cut the samples. ValueError names a sample of a length that cannot be trained on."""
        for index, sample in enumerate(samples):
            check_length(sample, f"sample {index} (group {sample.group_id})", rule.max_tokens)
        outlines = [
            SampleOutline(
                s.num_tokens, s.prompt_length, sign_shares(s), s.group_id, s.policy_versions, s.segments
            )
            for s in samples
        ]
        return cls(rule.cut([outline.num_tokens for outline in outlines]), outlines)

    @property
    def sign_shares(self) -> np.ndarray:
        """Return those of all samples, float64 [num_samples, 2]."""
        return np.array([sample.sign_shares for sample in self.samples], np.float64).reshape(-1, 2)


@dataclass(frozen=True)
class Shard:
    """Samples of a mini-batch, their long columns joined: Ray then handles a few large arrays."""

    indices: list[int]  # of the samples in their mini-batch
    without_columns: list[TrainingSample]  # those of COLUMNS that a sample has are empty
    lengths: dict[str, np.ndarray]  # int64 [samples], of each of COLUMNS; 0 where a sample has none
    columns: dict[str, np.ndarray]  # each of COLUMNS, sample after sample
    supports: TokenSupports  # sample after sample, of those that have supports
    support_lengths: np.ndarray  # int64 [2, these samples], of counts and token_ids

    @classmethod
    def of(cls, samples: Sequence[TrainingSample], indices: Sequence[int]) -> Shard:
        """Return the shard with `samples[i] for i in indices`."""
        chosen = [samples[i] for i in indices]
        supports = [s.supports for s in chosen if s.supports is not None]
        parts = {name: [_column(sample, name) for sample in chosen] for name in COLUMNS}
        return cls(
            list(indices),
            [_without_columns(sample) for sample in chosen],
            {name: np.array([len(part) for part in parts[name]], np.int64) for name in COLUMNS},
            {name: end_to_end(parts[name], dtype) for name, dtype in COLUMNS.items()},
            TokenSupports.joined(supports),
            np.array([[len(s) for s in supports], [len(s.token_ids) for s in supports]], np.int64),
        )

    def samples(self) -> dict[int, TrainingSample]:
        """Return the samples by their indices. The arrays are views into those of the shard."""
        columns = [split(self.columns[name], self.lengths[name]) for name in COLUMNS]
        of_supports = zip((self.supports.counts, self.supports.token_ids), self.support_lengths, strict=True)
        supports = map(TokenSupports, *(split(column, lengths) for column, lengths in of_supports))
        rows = zip(self.indices, self.without_columns, zip(*columns, strict=True), strict=True)
        return {
            index: replace(
                _with_columns(sample, dict(zip(COLUMNS, values, strict=True))),
                supports=None if sample.supports is None else next(supports),
            )
            for index, sample, values in rows
        }

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays, those of routes in this process included."""
        routes = [sample.routed_experts for sample in self.without_columns]
        in_process = sum(one.nbytes for one in routes if isinstance(one, np.ndarray))
        return sum(column.nbytes for column in (*self.columns.values(), self.supports)) + in_process


def _column(sample: TrainingSample, name: str) -> np.ndarray:
    values = getattr(sample, name)
    return EMPTY[name] if values is None else values


def _with_columns(sample: TrainingSample, values: Mapping[str, np.ndarray]) -> TrainingSample:
    """Return the sample with these columns, but for those that it does not have."""
    return replace(sample, **{name: values[name] for name in COLUMNS if getattr(sample, name) is not None})


def _without_columns(sample: TrainingSample) -> TrainingSample:
    supports = None if sample.supports is None else NO_SUPPORTS
    return replace(_with_columns(sample, EMPTY), supports=supports)


def check_length(sample: TrainingSample, where: str, max_tokens: int) -> None:
    """ValueError if the sample, which the message calls `where`, has nothing to train on or fits no pack."""
    if not 0 < sample.prompt_length < sample.num_tokens:
        raise ValueError(
            f"{where} has {sample.num_tokens} tokens, {sample.prompt_length} of them prompt: both prompt and "
            "completion need at least one"
        )
    if sample.segments is not None and len(sample.segments) != sample.completion_length:
        raise ValueError(
            f"{where} has segments of {len(sample.segments)} tokens for {sample.completion_length} tokens "
            "after the prompt"
        )
    if sample.num_trained == 0:
        raise ValueError(f"{where} has no token that the policy sampled: nothing of it can be trained on")
    if sample.num_tokens > max_tokens:
        raise ValueError(
            f"{where} has {sample.num_tokens} tokens, more than --max-tokens-per-gpu x "
            f"--context-parallel-size = {max_tokens}: raise one of them or shorten the completions"
        )
