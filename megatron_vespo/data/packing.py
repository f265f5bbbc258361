"""Whole sequences into micro-batches by token budget, the same number on every data-parallel rank."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence


def pack_sequences(lengths: Sequence[int], num_ranks: int, max_tokens: int) -> list[list[list[int]]]:
    """Assign sequences to `num_ranks` ranks x some number of bins, no bin over `max_tokens`.

    Returns `bins[rank][micro_batch]` = indices into `lengths`. Every rank gets the same number of
    micro-batches (expert all-to-all and gradient reduction span the ranks); no bin is empty, which always
    works out where the ranks divide the number of sequences; the result depends on the arguments only.
    ValueError for a sequence longer than the budget and for too few sequences to fill every bin.
    """
    if len(lengths) < num_ranks:
        raise ValueError(f"{len(lengths)} sequences cannot feed {num_ranks} data-parallel ranks")
    longest = max(range(len(lengths)), key=lambda i: lengths[i])
    if lengths[longest] > max_tokens:
        raise ValueError(
            f"sample {longest} has {lengths[longest]} tokens, more than --max-tokens-per-gpu {max_tokens}: "
            "raise the budget or shorten the completions"
        )
    bins_per_rank = max(1, math.ceil(sum(lengths) / (max_tokens * num_ranks)))
    while bins_per_rank * num_ranks <= len(lengths):
        bins = _fill(lengths, bins_per_rank * num_ranks, max_tokens)
        if bins is not None:
            return [bins[rank::num_ranks] for rank in range(num_ranks)]
        bins_per_rank += 1
    raise ValueError(
        f"{len(lengths)} sequences cannot fill {bins_per_rank} micro-batches of {max_tokens} tokens on each "
        f"of {num_ranks} data-parallel ranks: their number should be a multiple of the ranks"
    )


def _fill(lengths: Sequence[int], num_bins: int, max_tokens: int) -> list[list[int]] | None:
    """Longest first into the emptiest bin; bins by falling load; None when a sequence fits nowhere."""
    heap = [(0, b) for b in range(num_bins)]
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    loads = [0] * num_bins
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        load, b = heapq.heappop(heap)
        if load + lengths[i] > max_tokens:
            return None  # the emptiest bin is full for it, so is every other
        bins[b].append(i)
        loads[b] = load + lengths[i]
        heapq.heappush(heap, (loads[b], b))
    # neighbours in load meet in the same micro-batch step on different ranks
    order = sorted(range(num_bins), key=lambda b: (-loads[b], b))
    return [sorted(bins[b]) for b in order]


def imbalance(bins: list[list[list[int]]], lengths: Sequence[int]) -> float:
    """Tokens of the busiest rank over the mean of all ranks, minus 1: 0 is perfect balance."""
    totals = [sum(lengths[i] for micro_batch in rank for i in micro_batch) for rank in bins]
    return max(totals) * len(totals) / sum(totals) - 1.0
