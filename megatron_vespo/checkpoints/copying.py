"""Copies every span from a reader to a writer, then reads it back to verify the copy."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Event
from typing import Any

from torch import Tensor
from tqdm import tqdm

from megatron_vespo.checkpoints.manifest import entry_of
from megatron_vespo.checkpoints.ranks import Ranks
from megatron_vespo.checkpoints.safetensors_file import TensorInfo
from megatron_vespo.checkpoints.spans import (
    Span,
    SpanBuffer,
    TensorReader,
    digest,
    shares,
    tensor_hasher,
    update_hash,
)

DEFAULT_MEMORY = 2 * 2**30
_OWN_MEMORY = 700 * 2**20  # bytes: interpreter, torch, tensor metadata
_MAX_SPAN = 64 * 2**20  # larger ones are no faster
_BUFFERS = 4  # spans per worker: as read, cast, a block of columns, the hash's or the file's view


@dataclass(frozen=True)
class Budget:
    """The memory and the number of threads that a process may use."""

    memory: int = DEFAULT_MEMORY
    workers: int = max(2, min(os.cpu_count() or 1, 8))

    def __post_init__(self) -> None:
        if self.span_bytes < 2**20:
            least = (_OWN_MEMORY + self.workers * _BUFFERS * 2**20) / 2**30
            raise ValueError(f"{self.memory / 2**30:.2f} GiB of memory are too few: at least {least:.2f}")

    @property
    def span_bytes(self) -> int:
        return min(_MAX_SPAN, (self.memory - _OWN_MEMORY) // (self.workers * _BUFFERS))


Digests = dict[Span, bytes]


def in_threads[T](runs: Sequence[T], work: Callable[[int, T, Event], Any]) -> list[Any]:
    """Call `work(number, run, stop)` for every run in parallel. Raises the first failure once all stopped."""
    stop = Event()

    def guarded(number: int, run: T) -> Any:
        try:
            return work(number, run, stop)
        except BaseException:
            stop.set()
            raise

    with ThreadPoolExecutor(max_workers=max(len(runs), 1)) as pool:
        try:
            futures = [pool.submit(guarded, number, run) for number, run in enumerate(runs)]
            return [future.result() for future in futures]
        except BaseException:  # an interrupt too: the threads must not go on
            stop.set()
            raise


def progress_bar(what: str, num_bytes: int, quiet: bool, ranks: Ranks) -> tqdm:
    """Show bytes, rate and time left of rank 0's share. All shares are about equally large."""
    share = f" (1 of {ranks.size} shares)" if ranks.size > 1 else ""
    return tqdm(
        total=num_bytes, desc=what + share, unit="B", unit_scale=True, unit_divisor=1024, mininterval=0.5,
        disable=quiet or ranks.rank != 0,
    )  # fmt: skip


def copy_spans[T](
    reader: TensorReader,
    items: Sequence[T],
    span_of: Callable[[T], Span],
    write: Callable[[T, Tensor], None],
    infos: Mapping[str, TensorInfo],
    bar: tqdm,
    stop: Event,
) -> Digests:
    """Read, cast to the dtype of `infos`, hash and write one span after another.

    Returns the hashes of the cast values.
    """
    buffer, digests = SpanBuffer(), {}
    for item in items:
        if stop.is_set():
            break
        span = span_of(item)
        values = buffer.read(reader, span, infos[span.name].dtype)
        digests[span] = digest(values)
        write(item, values)
        bar.update(values.nbytes)
    return digests


def prove(
    reader: TensorReader, digests: Mapping[Span, bytes], budget: Budget, ranks: Ranks, bar: tqdm
) -> dict[str, dict[str, Any]]:
    """Read the output back, and check that every row of every tensor equals the input, exactly once.

    Returns the manifest entry of each tensor, the same on every rank. ValueError names a difference.
    """
    by_name: dict[str, list[Span]] = {}
    for span in digests:
        by_name.setdefault(span.name, []).append(span)
    if by_name.keys() != reader.tensors.keys():
        odd = sorted(by_name.keys() ^ reader.tensors.keys())
        raise ValueError(f"the proof fails: {odd[0]} is on one side only ({len(odd)} in all)")
    names = sorted(by_name)
    own = shares(names, [reader.tensors[name].nbytes for name in names], ranks.size)[ranks.rank]
    runs = shares(own, [reader.tensors[name].nbytes for name in own], budget.workers)

    def check(number: int, run: list[str], stop: Event) -> dict[str, dict[str, Any]]:
        buffer = SpanBuffer()
        return {
            name: _prove_tensor(reader, name, by_name[name], digests, buffer, bar)
            for name in run
            if not stop.is_set()
        }

    found = ranks.together(lambda: in_threads(runs, check))
    return {name: entry for parts in found for part in parts for name, entry in part.items()}


def _prove_tensor(
    reader: TensorReader,
    name: str,
    spans: Sequence[Span],
    digests: Mapping[Span, bytes],
    buffer: SpanBuffer,
    bar: tqdm,
) -> dict[str, Any]:
    info = reader.tensors[name]
    hasher, row = tensor_hasher(), 0
    for span in sorted(spans, key=lambda span: span.start):
        if span.start != row:
            raise ValueError(
                f"the proof fails: rows {row} to {span.start} of {name} were never or twice written"
            )
        values = buffer.read(reader, span)
        if digest(values) != digests[span]:
            raise ValueError(f"the proof fails: {span} does not read back as it was written")
        update_hash(hasher, values)
        row = span.stop
        bar.update(values.nbytes)
    if row != info.rows:
        raise ValueError(f"the proof fails: {name} has {info.rows} rows, {row} were written")
    return entry_of(info, hasher.hexdigest())
