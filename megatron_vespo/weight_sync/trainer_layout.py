"""Which rows and columns of each HF tensor a trainer rank holds, from the table of the model's family."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from megatron_vespo.models.mappings import Direct, Mapping
from megatron_vespo.models.part import ModelPart
from megatron_vespo.weight_sync.engine_layout import Rectangle
from megatron_vespo.weight_sync.places import Place


@dataclass(frozen=True)
class TrainerShard:
    """What one trainer rank holds, and where it runs, see `places`."""

    rank: int
    place: Place
    part: ModelPart


@dataclass(frozen=True)
class Held:
    """A part of one HF tensor, `index` among those of its parameter, on the rank `tp_rank` of a group.

    The rectangle's row and column to go to are the ones in the rank's parameter. With `tp_rank` None every
    rank of the group has it.
    """

    tp_rank: int | None
    index: int
    rectangle: Rectangle


@dataclass(frozen=True)
class Sources:
    """The parts of a parameter over `size` ranks."""

    mapping: Mapping
    hf_shapes: Sequence[tuple[int, ...]]
    size: int

    @cached_property
    def parts(self) -> list[Held]:
        matrices = [(*shape, 1)[:2] for shape in self.hf_shapes]
        if isinstance(self.mapping, Direct) and self.mapping.dim is None:
            [(rows, cols)] = matrices
            return [Held(None, 0, Rectangle(0, rows, 0, cols, 0))]
        if isinstance(self.mapping, Direct) and self.mapping.dim == 1:
            [(rows, cols)] = matrices
            each = cols // self.size
            return [Held(rank, 0, Rectangle(0, rows, rank * each, each, 0)) for rank in range(self.size)]
        return self._row_parts([rows for rows, _ in matrices], matrices[0][1])

    def _row_parts(self, heights: list[int], cols: int) -> list[Held]:
        """By asking the mapping where it puts the numbers of the rows; 0 is a row of padding."""
        total = sum(heights)
        numbered = torch.arange(1, total + 1).view(-1, 1).split(heights)
        ends = torch.tensor(heights).cumsum(0)
        found = []
        for rank, shard in enumerate(self.mapping.shard(numbered, self.size)):
            order = shard.flatten()
            owner = torch.bucketize(order - 1, ends, right=True)
            breaks = (order.diff() != 1) | (owner.diff() != 0)
            starts = [0, *(breaks.nonzero().flatten() + 1).tolist()]
            for start, stop in zip(starts, [*starts[1:], len(order)], strict=True):
                if number := int(order[start]):
                    index = int(owner[start])
                    row = number - 1 - (int(ends[index - 1]) if index else 0)
                    found.append(Held(rank, index, Rectangle(row, stop - start, 0, cols, start)))
        assert sum(part.rectangle.rows for part in found) == total, "a mapping loses or repeats rows"
        return found
