"""Compares two checkpoints of any formats, or one and its manifest, tensor by tensor in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from threading import Event

import torch
from tqdm import tqdm

from megatron_vespo.checkpoints.copying import Budget, in_threads, progress_bar
from megatron_vespo.checkpoints.manifest import read_manifest
from megatron_vespo.checkpoints.names import MANIFEST_NAME
from megatron_vespo.checkpoints.ranks import Ranks
from megatron_vespo.checkpoints.safetensors_file import TensorInfo
from megatron_vespo.checkpoints.sources import Source
from megatron_vespo.checkpoints.spans import (
    HASH,
    Span,
    SpanBuffer,
    row_ranges,
    shares,
    tensor_digest,
)
from megatron_vespo.commands.convert.engine_folder import EngineFolder

_BITS = {2: torch.int16, 4: torch.int32}


@dataclass(frozen=True)
class Comparison:
    """The result of a comparison."""

    num_tensors: int  # on both sides
    num_bytes: int  # of these tensors, on one side
    differences: list[str]  # one line per tensor


def compare(a: Source, b: Source, budget: Budget, quiet: bool, ranks: Ranks) -> Comparison:
    """Compares bit for bit; different dtypes are compared as the narrower one. Every rank gets the result."""
    only = [f"{name}: only in {source.folder}" for source, name in _unmatched(a, b)]
    both = [name for name in a.tensors if name in b.tensors]

    def one(name: str, buffers: list[SpanBuffer], bar: tqdm) -> str | None:
        return _difference(a, b, name, buffers, budget.span_bytes, bar)

    return _each_tensor(a, both, only, one, budget, quiet, ranks)


def compare_with_manifest(
    source: Source | EngineFolder, budget: Budget, quiet: bool, ranks: Ranks
) -> Comparison:
    """Compares the stored tensors with the hashes that the conversion wrote next to them."""
    recorded = read_manifest(source.manifest_folder)
    if recorded is None:
        raise ValueError(
            f"{source.manifest_folder} has no {MANIFEST_NAME}; name a second checkpoint to compare with"
        )
    only = [f"{name}: only in the manifest" for name in recorded if name not in source.tensors]

    def one(name: str, buffers: list[SpanBuffer], bar: tqdm) -> str | None:
        info, entry = source.tensors[name], recorded.get(name)
        if entry is None:
            return f"{name}: not in the manifest"
        if (_plain(info.dtype), list(info.shape)) != (entry["dtype"], entry["shape"]):
            return f"{name}: {_describe(info)}, by the manifest {entry['dtype']} {entry['shape']}"
        digest = tensor_digest(source.reader, name, budget.span_bytes, buffers[0], bar.update)
        return None if digest == entry["hash"] else f"{name}: its {HASH} is not the manifest's"

    return _each_tensor(source, list(source.tensors), only, one, budget, quiet, ranks)


def _each_tensor(
    source: Source | EngineFolder,
    names: list[str],
    differences: list[str],
    one: Callable[[str, list[SpanBuffer], tqdm], str | None],
    budget: Budget,
    quiet: bool,
    ranks: Ranks,
) -> Comparison:
    sizes = [source.tensors[name].nbytes for name in names]
    own = shares(names, sizes, ranks.size)[ranks.rank]
    own_sizes = [source.tensors[name].nbytes for name in own]

    def work(number: int, run: list[str], stop: Event) -> list[str]:
        buffers = [SpanBuffer(), SpanBuffer()]
        return [line for name in run if not stop.is_set() and (line := one(name, buffers, bar))]

    with progress_bar("comparing", sum(own_sizes), quiet, ranks) as bar:
        found = ranks.together(lambda: in_threads(shares(own, own_sizes, budget.workers), work))
    lines = [line for part in found for run in part for line in run]
    return Comparison(len(names), sum(sizes), [*differences, *lines])


def _unmatched(a: Source, b: Source) -> Iterator[tuple[Source, str]]:
    for source, other in ((a, b), (b, a)):
        yield from ((source, name) for name in source.tensors if name not in other.tensors)


def _difference(
    a: Source, b: Source, name: str, buffers: list[SpanBuffer], max_bytes: int, bar: tqdm
) -> str | None:
    """One line about the difference; None if there is none."""
    info, other = a.tensors[name], b.tensors[name]
    if info.shape != other.shape:
        return f"{name}: {_describe(info)} in {a.folder}, {_describe(other)} in {b.folder}"
    dtype = min((info.dtype, other.dtype), key=lambda dtype: dtype.itemsize)
    count, largest = 0, 0.0
    for start, stop in row_ranges(info.rows, max(info.row_bytes, other.row_bytes), max_bytes):
        span = Span(name, start, stop)
        one, two = (buffer.read(s.reader, span, dtype) for s, buffer in zip((a, b), buffers, strict=True))
        bits = _BITS[dtype.itemsize]  # as -0.0 == 0.0
        different = int((one.view(bits) != two.view(bits)).sum())
        if different:
            count += different
            largest = max(largest, float((one.float() - two.float()).abs().max()))
        bar.update(one.nbytes)
    if count:
        return (
            f"{name}: {count} of {info.nbytes // info.dtype.itemsize} values differ, by {largest:.3g} at most"
        )
    return None


def _describe(info: TensorInfo) -> str:
    return f"{_plain(info.dtype)} {list(info.shape)}"


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def summary(source: Source | EngineFolder) -> Iterable[str]:
    """Describes a checkpoint, one fact per line."""
    yield f"format       {source.kind}, {source.folder}"
    yield from _of_engine(source) if isinstance(source, EngineFolder) else _of_model(source)
    tensors = source.tensors.values()
    dtypes = ", ".join(sorted({_plain(tensor.dtype) for tensor in tensors}))
    size = sum(tensor.nbytes for tensor in tensors)
    yield f"size         {size / 2**30:.2f} GiB as {dtypes}"
    yield "manifest     " + ("there" if (source.manifest_folder / MANIFEST_NAME).is_file() else "none")


def _of_engine(source: EngineFolder) -> Iterable[str]:
    yield f"model        {', '.join(source.architectures) or 'not said'}"
    yield f"quantised    {source.quantisation}"
    yield f"tensors      {len(source.tensors)}"


def _of_model(source: Source) -> Iterable[str]:
    shape, tensors = source.shape, source.tensors
    parameters = sum(tensor.nbytes // tensor.dtype.itemsize for tensor in tensors.values())
    experts = f", {shape.num_experts} experts each" if shape.num_experts else ""
    heads = f"{shape.num_attention_heads} heads in {shape.num_query_groups} groups"
    yield f"model        {source.family.architecture}"
    yield f"layers       {shape.num_layers}{experts}"
    yield f"width        {shape.hidden_size}, {heads} of {shape.head_dim}"
    yield f"vocabulary   {shape.vocab_size}" + (", tied embeddings" if shape.tied_embeddings else "")
    yield f"parameters   {parameters:,} in {len(tensors)} tensors"
