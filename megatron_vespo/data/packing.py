"""Packs whole sequences into micro-batches of similar work within a token budget, equally many per rank."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_vespo.data.context_parallel import TokenLayout


@dataclass(frozen=True)
class SequenceWork:
    """Cost of one sequence in a forward pass; only ratios matter for packing.

    Example: SequenceWork(linear=1.0, attention=0.0) counts tokens.
    """

    linear: float  # FLOPs per token, for all work that is linear in the length
    attention: float  # FLOPs per pair of tokens; a causal sequence of n tokens has n^2 / 2 pairs

    @classmethod
    def of_model(
        cls, *, num_layers: int, hidden_size: int, num_heads: int, num_query_groups: int, head_dim: int,
        ffn_hidden_size: int, topk: int, num_experts: int, vocab_size: int,
    ) -> SequenceWork:  # fmt: skip
        """Forward FLOPs of a transformer with grouped-query attention and gated (three-matrix) MLPs.

        Linear, per token 2 FLOPs per active parameter:
            2 x [layers x (hidden x head_dim x (2 heads + 2 groups)     Q and output, K and V
                           + hidden x experts                           router
                           + 3 x hidden x ffn_hidden x topk)            experts
                 + hidden x vocab]                                      output layer
        Attention, 2 matrix products of 2 FLOPs: layers x 4 x heads x head_dim per pair of tokens.
        A dense model has topk 1 and no experts.
        """
        projections = hidden_size * head_dim * (2 * num_heads + 2 * num_query_groups)
        mlp = hidden_size * num_experts + 3 * hidden_size * ffn_hidden_size * topk
        return cls(
            linear=2.0 * (num_layers * (projections + mlp) + hidden_size * vocab_size),
            attention=4.0 * num_layers * num_heads * head_dim,
        )

    def of(self, length: int) -> float:
        """Return the FLOPs of one sequence of `length` tokens."""
        return self.linear * length + self.attention * length * length / 2


@dataclass(frozen=True)
class PackingStats:
    """Losses of a packing over all data-parallel ranks; both are 0 at best."""

    padding_share: float  # padding / all tokens that run
    imbalance: float  # slowest rank's time of every step / mean time - 1: the wait of the ranks


@dataclass(frozen=True)
class Cut:
    """A mini-batch's packs on all data-parallel ranks."""

    bins: list[list[list[int]]]  # [rank][pack] -> indices of the samples
    pack_tokens: list[list[int]]  # [rank][pack], with padding
    stats: PackingStats

    def of_rank(self, rank: int) -> list[int]:
        """Return the indices of the samples of a data-parallel rank, pack after pack."""
        return [index for pack in self.bins[rank] for index in pack]


@dataclass(frozen=True)
class PackingRule:
    """Cuts a mini-batch into packs by the samples' lengths alone: the same result in every process."""

    work: SequenceWork
    num_ranks: int  # data-parallel
    max_tokens: int  # of a pack, over all context-parallel ranks
    layout: TokenLayout  # pads sequences and packs, any rank's
    packs_multiple: int = 1  # the number of packs per rank is a multiple of this
    equal_packs: bool = False  # the i-th packs of all ranks get the same number of tokens

    def cut(self, lengths: Sequence[int]) -> Cut:
        """Cut samples of `lengths` tokens. ValueError as in `pack_sequences`."""
        padded = [self.layout.padded_length(length) for length in lengths]
        bins = pack_sequences(padded, self.work, self.num_ranks, self.max_tokens, self.packs_multiple)
        tokens = [[self.layout.padded_pack(sum(padded[i] for i in pack)) for pack in packs] for packs in bins]
        if self.equal_packs:
            tokens = [[max(step) for step in zip(*tokens, strict=True)]] * len(tokens)
        return Cut(bins, tokens, packing_stats(bins, lengths, sum(map(sum, tokens)), self.work))

    @property
    def samples_multiple(self) -> int:
        """With a multiple of this number of samples, every rank can get equally many in every pack."""
        return self.num_ranks * self.packs_multiple


def pack_sequences(
    lengths: Sequence[int], work: SequenceWork, num_ranks: int, max_tokens: int, multiple_of: int = 1
) -> list[list[list[int]]]:
    """Assign sequences to micro-batches of at most `max_tokens` tokens on `num_ranks` ranks.

    Returns `bins[rank][micro_batch]` = indices into `lengths`, the lengths that count against the budget.
    Every rank gets the same number of micro-batches, a multiple of `multiple_of` (interleaved pipeline
    schedules need a multiple of the pipeline size). No micro-batch is empty; this is always possible if
    ranks x `multiple_of` divides the number of sequences. The result depends only on the arguments.
    ValueError for a sequence longer than the budget, or too few sequences to fill every micro-batch.
    """
    if len(lengths) < num_ranks * multiple_of:
        micro_batches = f" with {multiple_of} micro-batches each" if multiple_of > 1 else ""
        raise ValueError(
            f"{len(lengths)} sequences cannot feed {num_ranks} data-parallel ranks{micro_batches}"
        )
    longest = max(range(len(lengths)), key=lambda i: lengths[i])
    if lengths[longest] > max_tokens:
        raise ValueError(
            f"sample {longest} has {lengths[longest]} tokens, more than --max-tokens-per-gpu {max_tokens}: "
            "raise the budget or shorten the completions"
        )
    steps = multiple_of * math.ceil(sum(lengths) / (max_tokens * num_ranks * multiple_of))
    while steps * num_ranks <= len(lengths):
        bins = _fill(lengths, work, steps * num_ranks, max_tokens)
        if bins is not None:
            return _spread(bins, lengths, work, num_ranks)
        steps += multiple_of
    wanted = "the ranks" if multiple_of == 1 else f"ranks x {multiple_of}"
    raise ValueError(
        f"{len(lengths)} sequences cannot fill {steps} micro-batches of {max_tokens} tokens on each "
        f"of {num_ranks} data-parallel ranks: their number should be a multiple of {wanted}"
    )


def _fill(
    lengths: Sequence[int], work: SequenceWork, num_bins: int, max_tokens: int
) -> list[list[int]] | None:
    """Put each sequence, most work first, into the bin with room and least work; None if none has room."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    tokens, loads = np.zeros(num_bins, np.int64), np.zeros(num_bins)
    for i in sorted(range(len(lengths)), key=lambda i: (-work.of(lengths[i]), i)):
        has_room = tokens + lengths[i] <= max_tokens
        if not has_room.any():
            return None
        b = int(np.where(has_room, loads, np.inf).argmin())
        bins[b].append(i)
        tokens[b] += lengths[i]
        loads[b] += work.of(lengths[i])
    return bins


def _spread(
    bins: list[list[int]], lengths: Sequence[int], work: SequenceWork, num_ranks: int
) -> list[list[list[int]]]:
    """Put bins of similar work into the same step, because ranks wait for each other in every step.

    Within a step, the rank with the least work so far gets the bin with the most work.
    """
    loads = [_load(indices, lengths, work) for indices in bins]
    order = sorted(range(len(bins)), key=lambda b: (-loads[b], b))
    ranks: list[list[list[int]]] = [[] for _ in range(num_ranks)]
    totals = [0.0] * num_ranks
    for start in range(0, len(order), num_ranks):
        least_first = sorted(range(num_ranks), key=lambda rank: (totals[rank], rank))
        for rank, b in zip(least_first, order[start : start + num_ranks], strict=True):
            ranks[rank].append(sorted(bins[b]))
            totals[rank] += loads[b]
    return ranks


def packing_stats(
    bins: list[list[list[int]]],
    lengths: Sequence[int],
    tokens_run: int,
    work: SequenceWork,
) -> PackingStats:
    """Return the losses of `bins[rank][micro_batch]`; `lengths` are without padding.

    `tokens_run` is the number of tokens in all micro-batches of all ranks, with padding.
    """
    real = sum(lengths[i] for rank in bins for indices in rank for i in indices)
    steps = [[_load(indices, lengths, work) for indices in step] for step in zip(*bins, strict=True)]
    slowest = sum(max(step) for step in steps)
    mean = sum(sum(step) for step in steps) / len(bins)
    return PackingStats(padding_share=1.0 - real / tokens_run, imbalance=slowest / mean - 1.0)


def _load(indices: Sequence[int], lengths: Sequence[int], work: SequenceWork) -> float:
    return sum(work.of(lengths[i]) for i in indices)
