"""Maps the rows of a Megatron parameter to the rows of HF tensors.

Every mapping of the tables moves whole rows (dimension 0) of the full, unsharded tensors. So one call with
row numbers instead of rows shows where each row goes. Conversion, proof and comparison move byte ranges by
the result, and the table stays the only definition.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_vespo.models.mappings import Mapping


@dataclass(frozen=True)
class RowRun:
    """Consecutive HF rows that are also consecutive in the Megatron parameter."""

    hf_index: int  # in the mapping's `hf_names`
    hf_start: int
    megatron_start: int
    rows: int


def row_runs(mapping: Mapping, hf_rows: Sequence[int]) -> list[RowRun]:
    """The full Megatron parameter as runs, in its order; `hf_rows` are the HF tensors' numbers of rows."""
    ends = torch.tensor(hf_rows).cumsum(0)
    numbered = torch.arange(int(ends[-1])).view(-1, 1).split(list(hf_rows))
    order = mapping.shard(numbered, 1)[0].flatten()
    assert order.sort().values.equal(torch.arange(int(ends[-1]))), "a mapping loses or repeats rows"
    owner = torch.bucketize(order, ends, right=True)
    breaks = (order.diff() != 1) | (owner.diff() != 0)
    starts = [0, *(breaks.nonzero().flatten() + 1).tolist()]
    stops = [*starts[1:], len(order)]
    before = [0, *ends.tolist()]
    return [
        RowRun(int(owner[a]), int(order[a]) - before[int(owner[a])], a, b - a)
        for a, b in zip(starts, stops, strict=True)
    ]
