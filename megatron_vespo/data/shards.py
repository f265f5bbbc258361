"""Cuts a mini-batch into one shard per data-parallel rank, so that each rank receives its own samples only.

    outline = MiniBatchOutline.of(samples, rule)                 # small, for every rank
    shard = Shard.of(samples, outline.cut.of_rank(rank))         # the samples of one data-parallel rank

All tensor-, pipeline- and context-parallel ranks of a data-parallel rank receive the same shard.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron_vespo.data.completion_arrays import end_to_end, split
from megatron_vespo.data.packing import Cut, PackingRule
from megatron_vespo.types import TOKEN_ID, PartlySampled, Segments, TrainingSample, VersionSpans

NO_TOKENS, NO_LOG_PROBS = np.empty(0, TOKEN_ID), np.empty(0, np.float32)


@dataclass(frozen=True, slots=True)
class SampleOutline(PartlySampled):
    """What every rank knows of a sample."""

    num_tokens: int  # P + C
    prompt_length: int  # P
    advantage: float
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
                s.num_tokens, s.prompt_length, s.advantage, s.group_id, s.policy_versions, s.segments
            )
            for s in samples
        ]
        return cls(rule.cut([outline.num_tokens for outline in outlines]), outlines)

    @property
    def advantages(self) -> np.ndarray:
        """Return the advantages of all samples, float32 [num_samples]."""
        return np.array([sample.advantage for sample in self.samples], np.float32)


@dataclass(frozen=True)
class Shard:
    """Samples of a mini-batch, their long columns joined: Ray then handles a few large arrays."""

    indices: list[int]  # of the samples in their mini-batch
    without_columns: list[TrainingSample]
    lengths: np.ndarray  # int64 [2, samples], of token_ids and behavior_log_probs
    token_ids: np.ndarray  # int32, sample after sample
    behavior_log_probs: np.ndarray  # float32, sample after sample

    @classmethod
    def of(cls, samples: Sequence[TrainingSample], indices: Sequence[int]) -> Shard:
        """Return the shard with `samples[i] for i in indices`."""
        chosen = [samples[i] for i in indices]
        token_ids, log_probs = [s.token_ids for s in chosen], [s.behavior_log_probs for s in chosen]
        return cls(
            list(indices),
            [replace(s, token_ids=NO_TOKENS, behavior_log_probs=NO_LOG_PROBS) for s in chosen],
            np.array([[len(part) for part in parts] for parts in (token_ids, log_probs)], np.int64),
            end_to_end(token_ids, TOKEN_ID),
            end_to_end(log_probs, np.float32),
        )

    def samples(self) -> dict[int, TrainingSample]:
        """Return the samples by their indices. The arrays are views into those of the shard."""
        token_ids, log_probs = (
            split(column, lengths)
            for column, lengths in zip((self.token_ids, self.behavior_log_probs), self.lengths, strict=True)
        )
        rows = zip(self.indices, self.without_columns, token_ids, log_probs, strict=True)
        return {
            index: replace(sample, token_ids=ids, behavior_log_probs=values)
            for index, sample, ids, values in rows
        }

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays, those of routes in this process included."""
        routes = [sample.routed_experts for sample in self.without_columns]
        in_process = sum(one.nbytes for one in routes if isinstance(one, np.ndarray))
        return self.token_ids.nbytes + self.behavior_log_probs.nbytes + in_process


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
