"""How the pieces of a plan reach each engine rank. Pure.

A trainer rank packs what it sends into its buffer. In it the bytes for one engine rank are one segment. An
engine rank reads a segment where it lies, if it can open that memory. Any other segment travels: to a trainer
rank whose memory the engine rank can open, its home, or to the engine rank itself where it has no home.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

from megatron_vespo.weight_sync.places import Place
from megatron_vespo.weight_sync.plan import Piece, Plan
from megatron_vespo.weight_sync.trainer_layout import TrainerShard


@dataclass(frozen=True)
class EngineRank:
    """Rank `rank` of the engine number `engine`; `slot` numbers the ranks of all engines."""

    engine: int
    rank: int
    slot: int
    place: Place


@dataclass(frozen=True)
class Segment:
    """Bytes of one trainer rank for one engine rank in one group."""

    source: int
    group: int
    offset: int
    size: int


@dataclass(frozen=True)
class Landing:
    """Where segments of other memories end up, in a buffer of `size` bytes at `home`.

    `home` is a trainer rank; None: the engine rank itself receives. `spans` are offset and size of each
    segment by group and source.
    """

    home: int | None
    spans: Mapping[tuple[int, int], tuple[int, int]]
    size: int


@dataclass(frozen=True)
class Arrival:
    """One segment on its way to `receiver`'s landing buffer, at `offset`."""

    segment: Segment
    receiver: EngineRank
    offset: int


class Wiring:
    """Of one plan, its trainer ranks and its engines, which all have the same layout."""

    def __init__(
        self,
        plan: Plan,
        sources: Sequence[TrainerShard],
        shards: Sequence[TrainerShard],
        engine_ranks: Sequence[EngineRank],
        element: int,
    ):
        """`sources` are the plan's, `shards` all of the trainer's: every one may be a home. `element` is the
        size of a weight in bytes.
        """
        self.plan, self.engine_ranks, self._element = plan, list(engine_ranks), element
        self._memory = {shard.rank: shard.place.memory for shard in sources}
        homes: dict[str, list[int]] = {}
        for shard in shards:
            homes.setdefault(shard.place.memory, []).append(shard.rank)
        self._landings = {
            receiver: self._landing(receiver, homes.get(receiver.place.memory, []))
            for receiver in self.engine_ranks
        }

    @cached_property
    def sources(self) -> set[int]:
        """Trainer ranks that send."""
        return {piece.source for piece in self.plan.pieces}

    @cached_property
    def _segments(self) -> dict[int, list[Segment]]:
        """By engine rank, ordered by group and source."""
        found: dict[int, list[Segment]] = {}
        keys = groupby(self.plan.pieces, lambda piece: (piece.source, piece.group, piece.engine_rank))
        for (source, group, rank), pieces in keys:
            offset, size = extent(list(pieces), self._element)
            found.setdefault(rank, []).append(Segment(source, group, offset, size))
        for segments in found.values():
            segments.sort(key=lambda segment: (segment.group, segment.source))
        return found

    def landing(self, receiver: EngineRank) -> Landing:
        return self._landings[receiver]

    def reads_in_place(self, receiver: EngineRank, source: int) -> bool:
        return self._memory[source] == receiver.place.memory

    def _landing(self, receiver: EngineRank, homes: Sequence[int]) -> Landing:
        spans: dict[tuple[int, int], tuple[int, int]] = {}
        ends: dict[int, int] = {}
        for segment in self._segments.get(receiver.rank, ()):
            if not self.reads_in_place(receiver, segment.source):
                start = ends.get(segment.group, 0)
                spans[segment.group, segment.source] = start, segment.size
                ends[segment.group] = start + segment.size
        home = homes[receiver.slot % len(homes)] if homes else None
        return Landing(home, spans, max(ends.values(), default=0))

    def arrivals(self, group: int) -> list[Arrival]:
        """All segments of the group that travel, in an order that all ranks agree on."""
        return self._arrivals.get(group, [])

    @cached_property
    def _arrivals(self) -> dict[int, list[Arrival]]:
        found: dict[int, list[Arrival]] = {}
        for receiver in self.engine_ranks:
            spans = self._landings[receiver].spans
            for segment in self._segments.get(receiver.rank, ()):
                key = segment.group, segment.source
                if key in spans:
                    found.setdefault(segment.group, []).append(Arrival(segment, receiver, spans[key][0]))
        return found

    def place_of(self, piece: Piece, receiver: EngineRank) -> tuple[int | None, int]:
        """Where the engine rank finds the piece: the source whose buffer it is in, None for the landing
        buffer, and the offset in bytes.
        """
        if self.reads_in_place(receiver, piece.source):
            return piece.source, piece.offset
        start = self._starts[piece.source, piece.group, piece.engine_rank]
        landed, _ = self._landings[receiver].spans[piece.group, piece.source]
        return None, landed + piece.offset - start

    @cached_property
    def _starts(self) -> dict[tuple[int, int, int], int]:
        return {
            (segment.source, segment.group, rank): segment.offset
            for rank, segments in self._segments.items()
            for segment in segments
        }


def extent(pieces: Sequence[Piece], element: int) -> tuple[int, int]:
    """Offset and size of neighbouring pieces."""
    end = pieces[-1].offset + pieces[-1].elements * element
    return pieces[0].offset, end - pieces[0].offset
