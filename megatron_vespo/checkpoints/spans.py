"""Rows of HF tensors: the unit in which conversion, proof and comparison move bytes.

A reader of any format has `tensors`, {HF name: TensorInfo}, and `read_rows(name, start, stop, out)`, which
fills uint8 `out` with those rows' bytes. Its `folder` is for messages.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import xxhash
from torch import Tensor

from megatron_vespo.checkpoints.safetensors_file import TensorInfo

HASH = "xxh3_128"


class TensorReader(Protocol):
    """Random access to HF-named tensors in any storage format."""

    folder: Path

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    def read_rows(self, name: str, start: int, stop: int, out: Tensor) -> None: ...


@dataclass(frozen=True)
class Span:
    """Rows `start` to `stop` of dimension 0."""

    name: str
    start: int
    stop: int

    def __str__(self) -> str:
        return f"{self.name}[{self.start}:{self.stop}]"


def row_ranges(rows: int, row_bytes: int, max_bytes: int) -> Iterator[tuple[int, int]]:
    """Cut `rows` into ranges of at most `max_bytes`, but at least one row each."""
    step = max(1, max_bytes // max(row_bytes, 1))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


class SpanBuffer:
    """The memory of one worker, reused for every span."""

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def read(self, reader: TensorReader, span: Span, dtype: torch.dtype | None = None) -> Tensor:
        """The span's values [rows, ...], cast to `dtype`; valid until the next call.

        The memory is filled with NaN first, so values that a reader does not write are detected. ValueError
        if a value is not finite: no usable checkpoint holds one.
        """
        info = reader.tensors[span.name]
        nbytes = (span.stop - span.start) * info.row_bytes
        if nbytes > len(self._bytes):
            self._bytes = torch.empty(nbytes, dtype=torch.uint8)
        out = self._bytes[:nbytes]
        out.fill_(0xFF)  # NaN in every floating-point format
        reader.read_rows(span.name, span.start, span.stop, out)
        values = out.view(info.dtype).view(-1, *info.shape[1:]).to(dtype or info.dtype)
        if not _finite(values):
            cast = f" as {values.dtype}" if values.dtype != info.dtype else ""
            raise ValueError(f"{reader.folder}: {span} holds NaN or infinity{cast}")
        return values


def _finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite; true of what is not floating point.

    The extremes are NaN if any value is. `isfinite().all()` says the same at a fiftieth of the rate.
    """
    if not values.numel() or not values.dtype.is_floating_point or values.dtype.itemsize == 1:
        return True
    return all(math.isfinite(extreme) for extreme in values.aminmax())


def digest(values: Tensor) -> bytes:
    """The hash of the bytes. xxh3 is fast enough to hash everything; it detects accidents, not attacks."""
    return xxhash.xxh3_128(_bytes(values)).digest()


def tensor_hasher():
    """Takes the digest's bytes of a whole tensor span by span: `update_hash`, then `.hexdigest()`."""
    return xxhash.xxh3_128()


def update_hash(hasher, values: Tensor) -> None:
    hasher.update(_bytes(values))


def tensor_digest(
    reader: TensorReader,
    name: str,
    max_bytes: int,
    buffer: SpanBuffer,
    advance: Callable[[int], Any] = lambda num_bytes: None,
) -> str:
    """The digest of one stored tensor, read `max_bytes` at a time. `advance` is called after each read."""
    info, hasher = reader.tensors[name], tensor_hasher()
    for start, stop in row_ranges(info.rows, info.row_bytes, max_bytes):
        values = buffer.read(reader, Span(name, start, stop))
        update_hash(hasher, values)
        advance(values.nbytes)
    return hasher.hexdigest()


def _bytes(values: Tensor) -> memoryview:
    return memoryview(values.contiguous().view(torch.uint8).view(-1).numpy())


def shares[T](items: Sequence[T], sizes: Sequence[int], parts: int) -> list[list[T]]:
    """`items` in `parts` consecutive runs of about the same sum of `sizes`."""
    total, done, runs = max(sum(sizes), 1), 0, [[] for _ in range(parts)]
    for item, size in zip(items, sizes, strict=True):
        runs[min(done * parts // total, parts - 1)].append(item)
        done += size
    return runs
