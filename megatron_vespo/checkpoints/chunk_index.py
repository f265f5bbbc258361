"""Finds the chunks of each parameter in a torch_dist checkpoint."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, product
from pathlib import Path

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_vespo.checkpoints.names import METADATA_NAME
from megatron_vespo.checkpoints.torch_dist_file import read_metadata
from megatron_vespo.checkpoints.torch_dist_names import Address


@dataclass(frozen=True)
class Chunk:
    """A block of one parameter [rows, columns] and where it is stored; a vector has one column."""

    rows: range
    columns: range
    path: Path
    offset: int
    length: int
    stored_shape: tuple[int, ...]
    before: int  # elements of the stored tensor before the block's first, when it holds several parameters

    @property
    def size(self) -> int:
        return len(self.rows) * len(self.columns)

    def overlaps(self, other: Chunk) -> bool:
        return all(
            max(a.start, b.start) < min(a.stop, b.stop)
            for a, b in ((self.rows, other.rows), (self.columns, other.columns))
        )


class ChunkIndex:
    """The tensors that the folder's `.metadata` describes. ValueError if the metadata contradicts itself."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._metadata = read_metadata(folder)
        self._grouped: dict[tuple[str, int], dict[tuple[int, ...], list[Chunk]]] = {}

    @cached_property
    def tensors(self) -> dict[str, TensorStorageMetadata]:
        stored = self._metadata.state_dict_metadata
        return {key: value for key, value in stored.items() if isinstance(value, TensorStorageMetadata)}

    def dtype(self, key: str) -> torch.dtype:
        return self.tensors[key].properties.dtype

    def size(self, key: str) -> tuple[int, ...]:
        return tuple(self.tensors[key].size)

    def chunks(self, address: Address) -> list[Chunk]:
        """The chunks of one parameter. They cover it exactly once."""
        stacked = len(address.stack)
        if (address.key, stacked) not in self._grouped:
            self._grouped[address.key, stacked] = self._group(address.key, stacked)
        chunks = self._grouped[address.key, stacked].get(address.index, [])
        rows, columns = _block((0,) * len(self.size(address.key)), self.size(address.key), stacked)
        where = f"{self.folder}: {address.key}" + (f" at {list(address.index)}" if address.index else "")
        if sum(chunk.size for chunk in chunks) != len(rows) * len(columns):
            raise ValueError(f"{where}: its chunks do not add up to its {len(rows)} x {len(columns)} values")
        if any(a.overlaps(b) for a, b in combinations(chunks, 2)):
            raise ValueError(f"{where}: two of its chunks overlap")
        return chunks

    def place_of_object(self, key: str) -> tuple[Path, int, int] | None:
        """File, offset and length of a non-tensor object, or None if `key` does not exist."""
        places = self._metadata.storage_data
        found = next((places[index] for index in places if (index.fqn, index.offset) == (key, None)), None)
        return found and (self.folder / Path(found.relative_path).name, found.offset, found.length)

    @cached_property
    def _places(self) -> dict[tuple[str, tuple[int, ...]], _StorageInfo]:
        return {
            (index.fqn, tuple(index.offset)): place
            for index, place in self._metadata.storage_data.items()
            if index.offset is not None
        }

    def _group(self, key: str, stacked: int) -> dict[tuple[int, ...], list[Chunk]]:
        grouped: dict[tuple[int, ...], list[Chunk]] = defaultdict(list)
        for chunk in self.tensors[key].chunks:
            offsets, sizes = tuple(chunk.offsets), tuple(chunk.sizes)
            place = self._places.get((key, offsets))
            if place is None or not len(offsets) == len(sizes) == len(self.size(key)):
                raise ValueError(
                    f"{self.folder}: {METADATA_NAME} does not say where {key} at {list(offsets)} is stored"
                )
            if any(o + s > size for o, s, size in zip(offsets, sizes, self.size(key), strict=True)):
                raise ValueError(f"{self.folder}: the chunk of {key} at {list(offsets)} reaches beyond it")
            if Path(place.relative_path).name != place.relative_path:
                raise ValueError(
                    f"{self.folder}: {METADATA_NAME} names {place.relative_path!r}, no plain file name"
                )
            rows, columns = _block(offsets, sizes, stacked)
            block = math.prod(sizes[stacked:])
            ranges = [range(o, o + s) for o, s in zip(offsets[:stacked], sizes[:stacked], strict=True)]
            for number, index in enumerate(product(*ranges)):
                grouped[index].append(
                    Chunk(
                        rows, columns, self.folder / place.relative_path, place.offset, place.length,
                        sizes, number * block,
                    )
                )  # fmt: skip
        return grouped


def _block(offsets: Sequence[int], sizes: Sequence[int], stacked: int) -> tuple[range, range]:
    """Rows and columns of the block, without the stacked dimensions."""
    starts, lengths = offsets[stacked:], sizes[stacked:]
    rows = range(starts[0], starts[0] + lengths[0])
    columns = range(starts[1], starts[1] + lengths[1]) if len(starts) > 1 else range(1)
    return rows, columns
