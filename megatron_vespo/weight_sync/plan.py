"""Which bytes go from which trainer rank to which engine rank: every element of an engine exactly once.

Both sides are rectangles of the HF tensors, see `trainer_layout` and `engine_layout`; a piece is what a
trainer rank's and an engine rank's rectangle have in common. Of the trainer ranks that hold the same part the
one sends that has the least to send so far.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from megatron_vespo.models.part import ModelPart
from megatron_vespo.models.table import Family, ModelShape, Parameter
from megatron_vespo.weight_sync.engine_layout import (
    EngineLayout,
    Rectangle,
    check_one_dtype,
    check_supported,
    destination,
    experts_of,
)
from megatron_vespo.weight_sync.trainer_layout import Held, Sources, TrainerShard


@dataclass(frozen=True, slots=True)
class Piece:
    """A rectangle of `rows` x `cols` elements on its way.

    `tensor` names the trainer's parameter: the first HF tensor that it holds. `offset`, in bytes, is its
    place in the buffer of `source` while the `group` is sent. There the pieces of an engine rank are
    neighbours.
    """

    source: int  # trainer rank
    engine_rank: int
    tensor: str
    row: int
    col: int
    parameter: str  # SGLang's
    to_row: int
    to_col: int
    rows: int
    cols: int
    group: int = 0
    offset: int = 0

    @property
    def elements(self) -> int:
        return self.rows * self.cols


@dataclass(frozen=True, slots=True)
class Padding:
    """Rows of an engine's parameter that are no token's: they are zero."""

    engine_rank: int
    parameter: str
    to_row: int
    rows: int
    cols: int


@dataclass(frozen=True)
class EngineShard:
    """What a plan says of one engine rank, in the form of `messages`.

    `numbers` are the positions of SGLang's parameters in `matrices`, which are names, rows and columns.
    """

    numbers: dict[str, int]
    matrices: list[tuple[str, int, int]]
    pieces: list[Piece]
    padding: list[list[int]]  # parameter, its first row of padding, number of rows


@dataclass(frozen=True)
class Plan:
    """Of one engine. Every engine with the same sources has the same plan, and reads the same buffers."""

    pieces: list[Piece]
    padding: list[Padding]
    matrices: list[dict[str, tuple[int, int]]]  # by engine rank: SGLang's parameter -> its rows and columns
    num_groups: int
    buffer_bytes: int  # of the fullest buffer

    def of_rank(self, engine_rank: int) -> EngineShard:
        matrices = self.matrices[engine_rank]
        numbers = {name: number for number, name in enumerate(matrices)}
        return EngineShard(
            numbers,
            [(name, *size) for name, size in matrices.items()],
            [piece for piece in self.pieces if piece.engine_rank == engine_rank],
            [
                [numbers[fill.parameter], fill.to_row, fill.rows]
                for fill in self.padding
                if fill.engine_rank == engine_rank
            ],
        )

    def sent_by(self, ranks: Sequence[int]) -> Plan:
        """The same plan with trainer rank `ranks[n]` in the place of n; `ranks` are ascending."""
        pieces = [replace(piece, source=ranks[piece.source]) for piece in self.pieces]
        return replace(self, pieces=pieces)


@dataclass(frozen=True, slots=True)
class Flow:
    """What goes from one trainer rank to one rank of an engine."""

    bytes: int
    pieces: int


@dataclass(frozen=True)
class Totals:
    """What a plan adds up to, for one engine. `flows` is by trainer rank and engine rank."""

    flows: dict[tuple[int, int], Flow]
    padding: dict[int, int]  # bytes by engine rank, filled there
    num_groups: int
    buffer_bytes: int  # of the fullest buffer of a trainer rank
    landing_bytes: int  # most that comes to an engine rank in one group
    in_turn_bytes: int  # what the busiest trainer rank of each group sends, over all groups

    @property
    def sent(self) -> dict[int, int]:
        """Bytes by trainer rank."""
        found: dict[int, int] = defaultdict(int)
        for (source, _), flow in self.flows.items():
            found[source] += flow.bytes
        return dict(found)

    @property
    def uneven(self) -> float:
        """How much longer sending takes, as the ranks are not busy with the same groups; 1 is the least."""
        return self.in_turn_bytes / max(self.sent.values())


def make_plan(
    family: Family,
    shape: ModelShape,
    shards: Sequence[TrainerShard],
    layout: EngineLayout,
    element_bytes: int,
    buffer_bytes: int,
) -> Plan:
    """Pieces in groups: of each at most `buffer_bytes` leave a trainer rank or come to an engine rank.

    ValueError if `shards` do not hold the whole model, or if SGLang's layout is not known.
    """
    planner = _Planner(family, shape, shards, layout, element_bytes, buffer_bytes)
    pieces: list[Piece] = []
    padding: list[Padding] = []
    matrices: list[dict[str, tuple[int, int]]] = [{} for _ in range(layout.tp)]
    for kind, numbers in planner.rows():
        tensor = kind.tensor(numbers)
        for copy, engine_rank, parameter, expert_row, share in planner.copies(kind, numbers):
            pieces.append(Piece(
                share.source, engine_rank, tensor, copy.row + share.start, copy.col,
                parameter.format(**numbers), copy.to_row + expert_row + share.start, copy.to_col,
                share.rows, copy.cols, share.group,
            ))  # fmt: skip
        padding += kind.padding
        for engine_rank, parameter, matrix in kind.matrices_of(numbers):
            matrices[engine_rank][parameter] = matrix
    buffers = planner.buffers
    return Plan(_packed(pieces, element_bytes), padding, matrices, buffers.num_groups, buffers.fullest)


def _packed(pieces: list[Piece], element_bytes: int) -> list[Piece]:
    """With their places in the buffers, ordered by source, group and engine rank."""
    ordered = sorted(pieces, key=lambda piece: (piece.source, piece.group, piece.engine_rank))
    found, buffer, end = [], None, 0
    for piece in ordered:
        if (piece.source, piece.group) != buffer:
            buffer, end = (piece.source, piece.group), 0
        found.append(replace(piece, offset=end))
        end += piece.elements * element_bytes
    return found


def count(
    family: Family,
    shape: ModelShape,
    shards: Sequence[TrainerShard],
    layout: EngineLayout,
    element_bytes: int,
    buffer_bytes: int,
) -> Totals:
    """The totals of `make_plan`'s plan, in a third of its time: no piece is kept."""
    planner = _Planner(family, shape, shards, layout, element_bytes, buffer_bytes)
    sent: dict[tuple[int, int], list[int]] = defaultdict(lambda: [0, 0])
    leaving: dict[int, dict[int, int]] = defaultdict(lambda: defaultdict(int))
    padding: dict[int, int] = defaultdict(int)
    for kind, numbers in planner.rows():
        for copy, engine_rank, _, _, share in planner.copies(kind, numbers):
            size = share.rows * copy.cols * element_bytes
            flow = sent[share.source, engine_rank]
            flow[0] += size
            flow[1] += 1
            leaving[share.group][share.source] += size
        for fill in kind.padding:
            padding[fill.engine_rank] += fill.rows * fill.cols * element_bytes
    return Totals(
        flows={ranks: Flow(*flow) for ranks, flow in sent.items()},
        padding=dict(padding),
        num_groups=planner.buffers.num_groups,
        buffer_bytes=planner.buffers.fullest,
        landing_bytes=planner.buffers.landing,
        in_turn_bytes=sum(max(of_group.values()) for of_group in leaving.values()),
    )


class _Planner:
    """Walks through the model's parameters, and chooses a source for each piece."""

    def __init__(
        self,
        family: Family,
        shape: ModelShape,
        shards: Sequence[TrainerShard],
        layout: EngineLayout,
        element_bytes: int,
        buffer_bytes: int,
    ):
        check_supported(layout, shape)
        check_one_dtype(family.fixed_tensors(shape), element_bytes)
        self._family, self._shape, self._layout = family, shape, layout
        self._holders = _Holders(shards)
        self._part = shards[0].part
        self.buffers = _Buffers([shard.rank for shard in shards], layout.tp, element_bytes, buffer_bytes)

    def rows(self) -> Iterator[tuple[_Kind, dict[str, int]]]:
        """The model's parameters in its order, with their numbers of layer and expert."""
        kinds: dict[tuple[str, ...], _Kind] = {}
        for row, numbers in self._family.rows(self._shape):
            if row.names not in kinds:
                size = self._part.group_of(row)[1]
                kinds[row.names] = _Kind(row, self._shape, size, self._layout)
            yield kinds[row.names], numbers

    def copies(self, kind: _Kind, numbers: dict[str, int]) -> Iterator[tuple[_Copy, int, str, int, _Share]]:
        """As `_Kind.copies_of`, each with its source and group."""
        candidates = self._holders.of(kind.row, numbers)
        for copy, engine_rank, parameter, expert_row in kind.copies_of(numbers):
            if copy.tp_rank not in candidates:
                raise ValueError(f"no trainer rank has {kind.tensor(numbers)}")
            for share in self.buffers.place(candidates[copy.tp_rank], engine_rank, copy.rows, copy.cols):
                yield copy, engine_rank, parameter, expert_row, share


class _Holders:
    """Which trainer ranks hold a parameter. Those with the same part are asked once."""

    def __init__(self, shards: Sequence[TrainerShard]):
        self._ranks: dict[ModelPart, list[int]] = defaultdict(list)
        for shard in shards:
            self._ranks[shard.part].append(shard.rank)
        self._found: dict[tuple[bool, tuple[ModelPart, ...]], dict[int | None, list[int]]] = {}

    def of(self, row: Parameter, numbers: dict[str, int]) -> dict[int | None, list[int]]:
        """By their rank in the group that shares the parameter; all of them under None."""
        layer, expert = numbers["layer"], numbers["expert"]
        parts = tuple(part for part in self._ranks if part.holds(row, layer, expert))
        key = row.in_expert, parts
        if parts and key not in self._found:
            found: dict[int | None, list[int]] = defaultdict(list)
            for part in parts:
                for where in (None, part.group_of(row)[0]):
                    found[where] += self._ranks[part]
            self._found[key] = {where: sorted(ranks) for where, ranks in found.items()}
        return self._found.get(key, {})


@dataclass(frozen=True, slots=True)
class _Copy:
    tp_rank: int | None
    row: int
    col: int
    to_row: int
    to_col: int
    rows: int
    cols: int


class _Kind:
    """Of one row of the table: all that does not depend on the numbers of layer and expert."""

    def __init__(self, row: Parameter, shape: ModelShape, size: int, layout: EngineLayout):
        self.row, self._layout, self._num_experts = row, layout, shape.num_experts
        self._first = next(iter(row.tensors))
        hf_shapes = [tuple(getattr(shape, name) for name in names) for names in row.tensors.values()]
        parts = Sources(row.build(tuple(row.tensors), shape), hf_shapes, size).parts
        self._copies: list[tuple[int, str, int, int, list[_Copy]]] = []
        self.padding: list[Padding] = []
        for engine_rank in range(layout.tp):
            for index, hf_name in enumerate(row.tensors):
                place = destination(hf_name, hf_shapes[index], engine_rank, layout, shape)
                copies = [
                    copy
                    for part in parts
                    if part.index == index and (copy := _common(part, place.rectangle)) is not None
                ]
                self._copies.append((engine_rank, place.parameter, place.shape[0], place.shape[1], copies))
                if place.padding:
                    self.padding.append(
                        Padding(
                            engine_rank, place.parameter, place.rectangle.rows, place.padding, place.shape[1]
                        )
                    )

    def tensor(self, numbers: dict[str, int]) -> str:
        return self._first.format(**numbers)

    def copies_of(self, numbers: dict[str, int]) -> Iterator[tuple[_Copy, int, str, int]]:
        """Copy, engine rank, SGLang's parameter without its numbers, and the row where the expert begins."""
        for engine_rank, parameter, height, _, copies in self._copies:
            before = 0
            if self.row.in_expert:
                experts = experts_of(engine_rank, self._layout, self._num_experts)
                if numbers["expert"] not in experts:
                    continue
                before = height * experts.index(numbers["expert"])
            for copy in copies:
                yield copy, engine_rank, parameter, before

    def matrices_of(self, numbers: dict[str, int]) -> Iterator[tuple[int, str, tuple[int, int]]]:
        for engine_rank, parameter, height, width, _ in self._copies:
            number = self._num_experts // self._layout.ep if self.row.in_expert else 1
            yield engine_rank, parameter.format(**numbers), (number * height, width)


def _common(part: Held, wanted: Rectangle) -> _Copy | None:
    """What the trainer rank's rectangle and the engine rank's have in common."""
    have = part.rectangle
    row, col = max(have.row, wanted.row), max(have.col, wanted.col)
    rows = min(have.row + have.rows, wanted.row + wanted.rows) - row
    cols = min(have.col + have.cols, wanted.col + wanted.cols) - col
    if rows <= 0 or cols <= 0:
        return None
    return _Copy(
        part.tp_rank,
        have.to_row + row - have.row,
        have.to_col + col - have.col,
        wanted.to_row + row - wanted.row,
        wanted.to_col + col - wanted.col,
        rows,
        cols,
    )


class _Share(NamedTuple):
    """`rows` of a copy, from row `start` of it on."""

    source: int
    start: int
    rows: int
    group: int


class _Buffers:
    """Chooses sources, and cuts what leaves each of them, or comes to an engine rank, into groups."""

    def __init__(self, sources: Iterable[int], engine_ranks: int, element_bytes: int, limit: int):
        self._element_bytes, self._limit = element_bytes, limit
        self._sent = dict.fromkeys(sources, 0)
        # the last group and its size
        self._leaving: dict[int, tuple[int, int]] = dict.fromkeys(self._sent, (0, 0))
        self._coming: dict[int, tuple[int, int]] = dict.fromkeys(range(engine_ranks), (0, 0))
        self.num_groups = self.fullest = self.landing = 0

    def place(self, candidates: Sequence[int], engine_rank: int, rows: int, cols: int) -> Iterator[_Share]:
        """A copy's source and group; in several shares if it is larger than a buffer."""
        source = min(candidates, key=self._sent.__getitem__)
        row_bytes = cols * self._element_bytes
        if row_bytes > self._limit:
            raise ValueError(f"a row of weights has {row_bytes} bytes, a buffer {self._limit}")
        most = self._limit // row_bytes
        for start in range(0, rows, most):
            number = min(most, rows - start)
            self._sent[source] += number * row_bytes
            yield _Share(source, start, number, self._group(source, engine_rank, number * row_bytes))

    def _group(self, source: int, engine_rank: int, size: int) -> int:
        """The first group, from the last one of both on, that has room on both sides."""
        leaving, coming = self._leaving[source], self._coming[engine_rank]
        group = max(leaving[0], coming[0])
        sizes = [used if last == group else 0 for last, used in (leaving, coming)]
        if max(sizes) + size > self._limit:
            group, sizes = group + 1, [0, 0]
        self._leaving[source] = group, sizes[0] + size
        self._coming[engine_rank] = group, sizes[1] + size
        self.num_groups = max(self.num_groups, group + 1)
        self.fullest = max(self.fullest, sizes[0] + size)
        self.landing = max(self.landing, sizes[1] + size)
        return group
