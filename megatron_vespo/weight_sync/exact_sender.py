"""A trainer rank's part in one wiring: packs its pieces, and moves segments to where engines read them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vespo.weight_sync.exported_memory import ExportedMemory
from megatron_vespo.weight_sync.messages import Introduction
from megatron_vespo.weight_sync.packer import Packer
from megatron_vespo.weight_sync.wiring import Arrival, EngineRank, Wiring

OWN = -1  # in the place of a slot: the buffer that a rank packs into
Handles = Mapping[tuple[int, int], str]  # trainer rank and slot, or OWN -> handle


class ExactSender:
    """Buffers hold `ring` groups each, and are filled in turn: engines read one while the next is filled."""

    def __init__(self, wiring: Wiring, rank: int, dtype: torch.dtype, device: torch.device, ring: int):
        self._wiring, self._rank, self._ring = wiring, rank, ring
        self._size = wiring.plan.buffer_bytes
        self._packer = Packer(wiring.plan, rank, dtype)
        self._own = ExportedMemory(ring * self._size, device) if self._packer.groups else None
        self._landings = {
            receiver: ExportedMemory(ring * landing.size, device)
            for receiver in wiring.engine_ranks
            if (landing := wiring.landing(receiver)).home == rank and landing.size
        }

    @property
    def handles(self) -> dict[tuple[int, int], str]:
        """Of this rank's buffers."""
        found = {(self._rank, receiver.slot): memory.handle for receiver, memory in self._landings.items()}
        if self._own is not None:
            found[self._rank, OWN] = self._own.handle
        return found

    def pack(self, group: int, held: Mapping[str, Tensor]) -> int:
        """Fill the group's part of the buffer, see `Packer`."""
        return self._packer.pack(group, held, self._packed(group)) if group in self._packer.groups else 0

    def relayed(self, group: int) -> Iterator[dist.P2POp]:
        """Between ranks of the trainer: segments on their way to the homes of engine ranks."""
        for arrival in self._wiring.arrivals(group):
            home = self._wiring.landing(arrival.receiver).home
            source = arrival.segment.source
            if home is None:
                continue
            if source == self._rank:
                yield dist.P2POp(dist.isend, self._segment(arrival), home)
            if home == self._rank:
                yield dist.P2POp(dist.irecv, self._landed(arrival), source)

    def sent(
        self, group: int, ranks: Mapping[EngineRank, int], process_group: dist.ProcessGroup
    ) -> Iterator[dist.P2POp]:
        """To the engine ranks themselves, whose ranks in the group are `ranks`."""
        for arrival in self._wiring.arrivals(group):
            if arrival.segment.source == self._rank and arrival.receiver in ranks:
                yield dist.P2POp(dist.isend, self._segment(arrival), ranks[arrival.receiver], process_group)

    def close(self) -> None:
        for memory in (self._own, *self._landings.values()):
            if memory is not None:
                memory.close()

    def _packed(self, group: int) -> Tensor:
        assert self._own is not None
        start = group % self._ring * self._size
        return self._own.bytes[start : start + self._size]

    def _segment(self, arrival: Arrival) -> Tensor:
        segment = arrival.segment
        return self._packed(segment.group)[segment.offset : segment.offset + segment.size]

    def _landed(self, arrival: Arrival) -> Tensor:
        segment, memory = arrival.segment, self._landings[arrival.receiver]
        start = segment.group % self._ring * self._wiring.landing(arrival.receiver).size + arrival.offset
        return memory.bytes[start : start + segment.size]


def introduction(
    wiring: Wiring, receiver: EngineRank, handles: Handles, dtype: torch.dtype, ring: int
) -> Introduction:
    """What one engine rank has to know. `handles` are those of all trainer ranks."""
    plan, landing = wiring.plan, wiring.landing(receiver)
    shard = plan.of_rank(receiver.rank)
    in_place = sorted(source for source in wiring.sources if wiring.reads_in_place(receiver, source))
    buffers = [(handles[source, OWN], plan.buffer_bytes) for source in in_place]
    numbers: dict[int | None, int] = {source: number for number, source in enumerate(in_place)}
    if landing.size:
        numbers[None] = len(buffers)
        handle = "" if landing.home is None else handles[landing.home, receiver.slot]
        buffers.append((handle, landing.size))
    pieces = []
    for piece in shard.pieces:
        where, offset = wiring.place_of(piece, receiver)
        pieces.append([
            piece.group, numbers[where], offset, shard.numbers[piece.parameter],
            piece.to_row, piece.to_col, piece.rows, piece.cols,
        ])  # fmt: skip
    return Introduction(
        dtype=str(dtype).removeprefix("torch."),
        num_groups=plan.num_groups,
        ring=ring,
        buffers=buffers,
        matrices=shard.matrices,
        pieces=pieces,
        padding=shard.padding,
        arrivals=[
            [group, source, *span] for (group, source), span in landing.spans.items() if landing.home is None
        ],
    )
