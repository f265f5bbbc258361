"""Reads a Megatron torch_dist checkpoint, saved at any layout, as HF tensors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_vespo.checkpoints.chunk_index import Chunk, ChunkIndex
from megatron_vespo.checkpoints.names import METADATA_NAME, RELEASE, TRACKER_NAME
from megatron_vespo.checkpoints.open_files import OpenFiles
from megatron_vespo.checkpoints.row_map import row_runs
from megatron_vespo.checkpoints.safetensors_file import TensorInfo
from megatron_vespo.checkpoints.torch_dist_file import StoredChunk, locate_chunk
from megatron_vespo.checkpoints.torch_dist_names import REFERENCE, Address, addresses
from megatron_vespo.models.family import Family, ModelShape
from megatron_vespo.models.mappings import Vocabulary

# what a training checkpoint holds besides the model
_NOT_THE_MODEL = ("optimizer", "chained_", "rng_state", "rerun_state", "opt_param_scheduler", REFERENCE)


def checkpoint_folder(path: Path) -> Path:
    """The folder of one iteration: `path` itself, or the one that its tracker file names."""
    if (path / METADATA_NAME).is_file():
        return path
    tracker = path / TRACKER_NAME
    if not tracker.is_file():
        raise ValueError(
            f"{path} is no Megatron checkpoint: neither {METADATA_NAME} nor {TRACKER_NAME} there"
        )
    named = tracker.read_text(errors="replace").strip()
    if named != RELEASE and not (named.isascii() and named.isdigit() and len(named) < 20):
        raise ValueError(f"{tracker} says {named[:40]!r}, neither {RELEASE!r} nor a number")
    folder = path / (RELEASE if named == RELEASE else f"iter_{int(named):07d}")
    if not (folder / METADATA_NAME).is_file():
        raise ValueError(f"{tracker} says {named[:40]!r}, but {folder} has no {METADATA_NAME}")
    return folder


@dataclass(frozen=True)
class _Source:
    """Consecutive rows of an HF tensor that are consecutive in one Megatron parameter."""

    rows: range
    address: Address
    megatron_start: int


class MegatronCheckpointReader:
    """Assembles HF tensors from chunks on demand. A context manager.

    The constructor reads only metadata. ValueError for a parameter that is missing, has another shape, is not
    covered exactly once by its chunks, or is unknown to the model.
    """

    def __init__(self, folder: Path, family: Family, shape: ModelShape):
        self.folder = folder
        self._index = ChunkIndex(folder)
        self._sources: dict[str, list[_Source]] = defaultdict(list)
        self._chunks: dict[Address, list[Chunk]] = {}
        self._located: dict[tuple[Path, int], StoredChunk] = {}
        self._taken: set[tuple[Path, int, int]] = set()
        self._files = OpenFiles()
        hf_shapes = family.hf_tensors(shape)
        tensors: dict[str, TensorInfo] = {}
        used: set[str] = set()
        for name in family.parameters(shape):
            mapping = family.mapping_for(name, shape)
            candidates = [a for known in addresses(name, shape) for a in (known, known.unstacked())]
            found = [address for address in candidates if address.key in self._index.tensors]
            if not found:
                raise ValueError(f"{folder} lacks {name} ({candidates[0].key})")
            used |= {address.key for address in found}
            self._add_parameter(found[0], mapping, {hf: hf_shapes[hf] for hf in mapping.hf_names}, tensors)
        self._refuse_extra(used)
        self._tensors = {name: tensors[name] for name in hf_shapes}

    def __enter__(self) -> MegatronCheckpointReader:
        return self

    def __exit__(self, *error) -> None:
        self._files.__exit__(*error)

    @property
    def index(self) -> ChunkIndex:
        return self._index

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    def read_rows(self, name: str, start: int, stop: int, out: Tensor) -> None:
        """Fill `out`, uint8 [bytes of those rows]. Safe to call from several threads."""
        target = out.view(self._tensors[name].dtype).view(stop - start, -1)
        for source in self._sources[name]:
            first, last = max(start, source.rows.start), min(stop, source.rows.stop)
            if first < last:
                begin = source.megatron_start + first - source.rows.start
                self._read_parameter(source.address, begin, target[first - start : last - start])

    def _read_parameter(self, address: Address, start: int, target: Tensor) -> None:
        stop = start + len(target)
        for chunk in self._chunks[address]:
            first, last = max(start, chunk.rows.start), min(stop, chunk.rows.stop)
            if first < last:
                part = target[first - start : last - start, chunk.columns.start : chunk.columns.stop]
                self._read_chunk(chunk, first - chunk.rows.start, part)

    def _read_chunk(self, chunk: Chunk, first_row: int, target: Tensor) -> None:
        stored = self._locate(chunk, target.dtype)
        whole_rows = target.is_contiguous()
        values = target if whole_rows else torch.empty(target.shape, dtype=target.dtype)
        before = chunk.before + first_row * len(chunk.columns)
        self._files.read(stored.path, stored.offset + before * target.dtype.itemsize, values)
        if not whole_rows:
            target.copy_(values)

    def _locate(self, chunk: Chunk, dtype: torch.dtype) -> StoredChunk:
        place = (chunk.path, chunk.offset)
        if place not in self._located:
            stored = locate_chunk(chunk.path, chunk.offset, chunk.length)
            if stored.shape != chunk.stored_shape or stored.dtype != dtype:
                raise ValueError(
                    f"{chunk.path}: at byte {chunk.offset} is {stored.dtype} {list(stored.shape)}, by "
                    f"{METADATA_NAME} it should be {dtype} {list(chunk.stored_shape)}"
                )
            self._located[place] = stored
        return self._located[place]

    def _add_parameter(self, address: Address, mapping, hf_shapes: dict, tensors: dict) -> None:
        """Add one Megatron parameter to the index."""
        shapes = list(hf_shapes.values())
        expected = (*address.stack, sum(shape[0] for shape in shapes), *shapes[0][1:])
        size, rows = self._index.size(address.key), len(address.stack)
        # the vocabulary may be padded for the layout that saved it
        if isinstance(mapping, Vocabulary) and len(size) == len(expected) and size[rows] > expected[rows]:
            expected = (*expected[:rows], size[rows], *expected[rows + 1 :])
        if size != expected:
            raise ValueError(
                f"{self.folder}: {address.key} is {list(size)}, "
                f"by the HF config it should be {list(expected)}"
            )
        self._chunks[address] = self._index.chunks(address)
        for chunk in self._chunks[address]:
            place = (chunk.path, chunk.offset, chunk.before)
            if place in self._taken:
                raise ValueError(
                    f"{chunk.path}: the chunk at byte {chunk.offset} is said to be two parameters"
                )
            self._taken.add(place)
        for run in row_runs(mapping, [shape[0] for shape in shapes]):
            hf_name = mapping.hf_names[run.hf_index]
            rows_here = range(run.hf_start, run.hf_start + run.rows)
            self._sources[hf_name].append(_Source(rows_here, address, run.megatron_start))
            tensors[hf_name] = TensorInfo(self._index.dtype(address.key), shapes[run.hf_index])

    def _refuse_extra(self, used: set[str]) -> None:
        extra = sorted(key for key in self._index.tensors.keys() - used if not key.startswith(_NOT_THE_MODEL))
        if extra:
            raise ValueError(
                f"{self.folder}: the model of the HF config has no {', '.join(extra[:3])}"
                + (f" ({len(extra)} tensors in all)" if len(extra) > 3 else "")
            )
