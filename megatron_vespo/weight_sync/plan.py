"""Which bytes go from which trainer rank to which engine rank: every element of an engine exactly once.

Both sides are rectangles of the HF tensors, see `trainer_layout` and `engine_layout`; a piece is what a
trainer rank's and an engine rank's rectangle have in common. Of the trainer ranks that hold the same part the
one sends that has the least to send so far.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from megatron_vespo.models.table import Family, ModelShape, Parameter
from megatron_vespo.weight_sync.engine_layout import (
    EngineLayout,
    Rectangle,
    check_supported,
    destination,
    experts_of,
)
from megatron_vespo.weight_sync.trainer_layout import Held, Sources, TrainerShard


class MissingPartError(ValueError):
    """The given trainer ranks do not hold the whole model."""


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
class Plan:
    """Of one engine. Every engine with the same sources has the same plan, and reads the same buffers."""

    pieces: list[Piece]
    padding: list[Padding]
    matrices: list[dict[str, tuple[int, int]]]  # by engine rank: SGLang's parameter -> its rows and columns
    num_groups: int
    buffer_bytes: int  # of the fullest buffer


def make_plan(
    family: Family,
    shape: ModelShape,
    shards: Sequence[TrainerShard],
    layout: EngineLayout,
    element_bytes: int,
    buffer_bytes: int,
) -> Plan:
    """Pieces in groups of at most `buffer_bytes` from one source.

    MissingPartError if `shards` do not hold the whole model, ValueError if SGLang's layout is not known.
    """
    check_supported(layout, shape)
    buffers = _Buffers(element_bytes, buffer_bytes)
    kinds: dict[tuple[str, ...], _Kind] = {}
    pieces: list[Piece] = []
    padding: list[Padding] = []
    matrices: list[dict[str, tuple[int, int]]] = [{} for _ in range(layout.tp)]
    for row, numbers in family.rows(shape):
        if row.names not in kinds:
            kinds[row.names] = _Kind(row, shape, shards[0].part.group_of(row)[1], layout)
        kind = kinds[row.names]
        holders = [shard for shard in shards if shard.part.holds(row, numbers["layer"], numbers["expert"])]
        for copy, engine_rank, parameter, expert_row in kind.copies_of(numbers):
            candidates = [s.rank for s in holders if copy.tp_rank in (None, s.part.group_of(row)[0])]
            if not candidates:
                raise MissingPartError(f"no trainer rank has {kind.tensor(numbers)}")
            pieces += buffers.place(candidates, Piece(
                -1, engine_rank, kind.tensor(numbers), copy.row, copy.col, parameter,
                copy.to_row + expert_row, copy.to_col, copy.rows, copy.cols,
            ))  # fmt: skip
        padding += kind.padding
        for engine_rank, parameter, matrix in kind.matrices_of(numbers):
            matrices[engine_rank][parameter] = matrix
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
        self._row, self._layout, self._num_experts = row, layout, shape.num_experts
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
        """Copy, engine rank, SGLang's parameter and the row of it where the expert begins."""
        for engine_rank, parameter, height, _, copies in self._copies:
            before = 0
            if self._row.in_expert:
                experts = experts_of(engine_rank, self._layout, self._num_experts)
                if numbers["expert"] not in experts:
                    continue
                before = height * experts.index(numbers["expert"])
            name = parameter.format(**numbers)
            for copy in copies:
                yield copy, engine_rank, name, before

    def matrices_of(self, numbers: dict[str, int]) -> Iterator[tuple[int, str, tuple[int, int]]]:
        for engine_rank, parameter, height, width, _ in self._copies:
            number = self._num_experts // self._layout.ep if self._row.in_expert else 1
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


class _Buffers:
    """Chooses sources, and cuts what each of them sends into groups."""

    def __init__(self, element_bytes: int, limit: int):
        self._element_bytes, self._limit = element_bytes, limit
        self._sent: dict[int, int] = defaultdict(int)
        self._ends: dict[int, tuple[int, int]] = defaultdict(lambda: (0, 0))  # the last group and its size
        self.num_groups = self.fullest = 0

    def place(self, candidates: list[int], piece: Piece) -> Iterator[Piece]:
        """The piece with its source and group, in several if it is larger than a buffer."""
        source = min(candidates, key=lambda rank: self._sent[rank])
        row_bytes = piece.cols * self._element_bytes
        if row_bytes > self._limit:
            raise ValueError(f"a row of {piece.parameter} has {row_bytes} bytes, a buffer {self._limit}")
        for start in range(0, piece.rows, self._limit // row_bytes):
            rows = min(self._limit // row_bytes, piece.rows - start)
            size = rows * row_bytes
            group, end = self._ends[source]
            if end + size > self._limit:
                group, end = group + 1, 0
            self._ends[source] = group, end + size
            self._sent[source] += size
            self.num_groups = max(self.num_groups, group + 1)
            self.fullest = max(self.fullest, end + size)
            yield replace(
                piece, source=source, row=piece.row + start, to_row=piece.to_row + start, rows=rows,
                group=group,
            )  # fmt: skip
