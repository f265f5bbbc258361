"""Converts HF to Megatron and back. It copies spans and verifies the output before the final rename."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Event
from typing import Any

import torch
from torch import Tensor

from megatron_vespo.checkpoints import block_fp8
from megatron_vespo.checkpoints.copying import Budget, Digests, copy_spans, in_threads, progress_bar, prove
from megatron_vespo.checkpoints.hf_checkpoint import HFCheckpointReader
from megatron_vespo.checkpoints.hf_shards import copy_companions, write_index
from megatron_vespo.checkpoints.hf_writer import ShardFile, plan_shards
from megatron_vespo.checkpoints.manifest import read_manifest, write_manifest
from megatron_vespo.checkpoints.megatron_checkpoint import MegatronCheckpointReader
from megatron_vespo.checkpoints.names import CONFIG_NAME, HF_FOLDER, MANIFEST_NAME, RELEASE, TRACKER_NAME
from megatron_vespo.checkpoints.ranks import Ranks
from megatron_vespo.checkpoints.safetensors_file import TensorInfo
from megatron_vespo.checkpoints.sources import Source, opened_hf, opened_megatron
from megatron_vespo.checkpoints.spans import Span, TensorReader, row_ranges, shares
from megatron_vespo.checkpoints.staging import staged
from megatron_vespo.checkpoints.torch_dist_writer import (
    ChunkFile,
    Destination,
    Written,
    destinations,
    write_metadata,
)
from megatron_vespo.models.hf_config import megatron_arguments
from megatron_vespo.models.prediction_layers import without_prediction_layers

DEFAULT_SHARD_BYTES = 5 * 10**9  # the default of transformers
_ARCHIVE_BYTES = 2048  # approximate overhead per chunk


@dataclass(frozen=True)
class Options:
    """Options of a conversion, the same in both directions."""

    dtype: torch.dtype | None = None  # of the output, or block_fp8.DTYPE; None: as stored
    budget: Budget = field(default_factory=Budget)
    force: bool = False
    quiet: bool = False
    # an extra check of (HF folder, Megatron iteration folder): raises ValueError or returns its finding
    check: Callable[[Path, Path], str] | None = None


@dataclass(frozen=True)
class Result:
    """The result of a conversion whose output was read back and verified."""

    num_tensors: int
    num_bytes: int
    checked: str | None  # finding of the extra check


def hf_to_megatron(source_path: Path, target: Path, options: Options, ranks: Ranks) -> Result:
    """Write a Megatron checkpoint to `target`, which --load can read at any layout."""
    _check_apart(target, source_path)
    with opened_hf(source_path) as source:
        infos = _output_infos(source, options.dtype)
        with staged(target, _total(infos), options.force, ranks) as staging:
            folder = staging / RELEASE
            ranks.on_first(folder.mkdir)
            parts = ranks.together(lambda: _write_chunks(source, infos, folder, options, ranks))
            digests = {span: value for part in parts for own, _ in part for span, value in own.items()}
            written = [chunk for part in parts for _, own in part for chunk in own]
            ranks.on_first(lambda: _finish_megatron(source, staging, written, options.dtype))
            with MegatronCheckpointReader(folder, source.family, source.shape) as reader:
                proven = _proven(reader, digests, source, staging, options, ranks)
            return _result(proven, infos, (source_path, folder), options, ranks)


def megatron_to_hf(
    source_path: Path,
    target: Path,
    options: Options,
    ranks: Ranks,
    hf_config: Path | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> Result:
    """Write an HF folder that transformers and SGLang load. `hf_config`: see `sources.opened_megatron`."""
    _check_apart(target, source_path, *([hf_config] if hf_config else []))
    with opened_megatron(source_path, hf_config) as source:
        return _to_hf(source, target, options, ranks, max_shard_bytes)


def hf_to_hf(
    source_path: Path,
    target: Path,
    options: Options,
    ranks: Ranks,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> Result:
    """Copy an HF folder to `target`: split fused experts, drop buffers, cast to another dtype."""
    _check_apart(target, source_path)
    with opened_hf(source_path) as source:
        return _to_hf(source, target, options, ranks, max_shard_bytes)


def _to_hf(source: Source, target: Path, options: Options, ranks: Ranks, max_shard_bytes: int) -> Result:
    reader: TensorReader = source.reader
    if options.dtype == block_fp8.DTYPE:
        reader = block_fp8.BlockFP8Reader(reader, source.tensors)
        infos, options = dict(reader.tensors), replace(options, dtype=None)
    else:
        infos = _output_infos(source, options.dtype)
    shards = plan_shards(infos, max_shard_bytes)
    with staged(target, _total(infos), options.force, ranks) as staging:
        parts = ranks.together(lambda: _write_shards(reader, shards, staging, options, ranks))
        digests = {span: value for part in parts for own in part for span, value in own.items()}
        ranks.on_first(lambda: _finish_hf(source, staging, shards))
        with HFCheckpointReader(staging) as written:
            proven = _proven(written, digests, source, staging, options, ranks)
        return _result(proven, infos, (staging, source.folder), options, ranks)


def _check_apart(target: Path, *sources: Path) -> None:
    """ValueError if `target` is or contains a source, which --force would delete."""
    for source in sources:
        if source.resolve().is_relative_to(target.resolve()):
            raise ValueError(f"{target} is or holds {source}, which is read: the result needs another place")


def _output_infos(source: Source, dtype: torch.dtype | None) -> dict[str, TensorInfo]:
    """What is written. Tensors that nothing trains keep their dtype, as a router's bias in float32 does."""
    if dtype is None and len(source.dtypes) > 1:
        found = ", ".join(sorted(map(str, source.dtypes)))
        raise ValueError(f"{source.folder} mixes {found}; --dtype makes them one")
    fixed = source.family.fixed_tensors(source.shape)
    return {
        name: TensorInfo(tensor.dtype if name in fixed else dtype or tensor.dtype, tensor.shape)
        for name, tensor in source.tensors.items()
    }


def _total(infos: Mapping[str, TensorInfo]) -> int:
    return sum(info.nbytes for info in infos.values())


def _write_chunks(
    source: Source, infos: Mapping[str, TensorInfo], folder: Path, options: Options, ranks: Ranks
) -> list[tuple[Digests, list[Written]]]:
    """Write this rank's share of a torch_dist checkpoint, one file per worker."""
    items = list(destinations(source.family, source.shape, source.tensors, options.budget.span_bytes))
    items.sort(key=lambda item: (*source.place(item.span.name), item.span.start))  # in disk order

    def sizes(some: Sequence[Destination]) -> list[int]:
        return [_span_bytes(item.span, infos) for item in some]

    own = shares(items, sizes(items), ranks.size)[ranks.rank]

    def work(number: int, run: list[Destination], stop: Event) -> tuple[Digests, list[Written]]:
        num_bytes = sum(sizes(run)) + len(run) * _ARCHIVE_BYTES
        with ChunkFile(folder, f"__{ranks.rank}_{number}.distcp", num_bytes) as file:
            digests = copy_spans(source.reader, run, lambda item: item.span, file.write, infos, bar, stop)
        return digests, file.written

    with progress_bar("writing", sum(sizes(own)), options.quiet, ranks) as bar:
        return in_threads(shares(own, sizes(own), options.budget.workers), work)


def _write_shards(
    reader: TensorReader,
    shards: Mapping[str, dict[str, TensorInfo]],
    folder: Path,
    options: Options,
    ranks: Ranks,
) -> list[Digests]:
    """Write this rank's share of the safetensors files. All workers write each file."""
    own = shares(list(shards), [_total(infos) for infos in shards.values()], ranks.size)[ranks.rank]
    infos = {name: info for file_name in own for name, info in shards[file_name].items()}
    spans = [
        Span(name, start, stop)
        for name, info in infos.items()
        for start, stop in row_ranges(info.rows, info.row_bytes, options.budget.span_bytes)
    ]
    sizes = [_span_bytes(span, infos) for span in spans]
    with ExitStack() as stack, progress_bar("writing", sum(sizes), options.quiet, ranks) as bar:
        files = {name: stack.enter_context(ShardFile(folder / name, shards[name])) for name in own}
        file_of = {name: files[file_name] for file_name in own for name in shards[file_name]}

        def write(span: Span, values: Tensor) -> None:
            file_of[span.name].write(span, values)

        def work(number: int, run: list[Span], stop: Event) -> Digests:
            return copy_spans(reader, run, lambda span: span, write, infos, bar, stop)

        return in_threads(shares(spans, sizes, options.budget.workers), work)


def _span_bytes(span: Span, infos: Mapping[str, TensorInfo]) -> int:
    return (span.stop - span.start) * infos[span.name].row_bytes


def _finish_megatron(
    source: Source, staging: Path, written: Sequence[Written], dtype: torch.dtype | None
) -> None:
    folder = staging / RELEASE
    (folder / HF_FOLDER).mkdir()
    _copy_hf_files(source, folder / HF_FOLDER, dtype or next(iter(source.dtypes)))
    write_metadata(folder, source.shape, written, megatron_arguments(dict(source.hf_config)))
    (staging / TRACKER_NAME).write_text(RELEASE)


def _finish_hf(source: Source, staging: Path, shards: Mapping[str, dict[str, TensorInfo]]) -> None:
    infos = {name: info for shard in shards.values() for name, info in shard.items()}
    fixed = source.family.fixed_tensors(source.shape)
    trained = (info.dtype for name, info in infos.items() if name not in fixed)
    dtype = max(trained, key=lambda dtype: dtype.itemsize)
    quantised = any(info.dtype == block_fp8.DTYPE for info in infos.values())
    more = {"quantization_config": block_fp8.quantisation_config(source.tensors)} if quantised else {}
    _copy_hf_files(source, staging, dtype, more)
    if len(shards) > 1:
        weight_map = {name: file_name for file_name, shard in shards.items() for name in shard}
        write_index(staging, weight_map, _total(infos))


def _copy_hf_files(
    source: Source, folder: Path, dtype: torch.dtype, more: Mapping[str, Any] | None = None
) -> None:
    """Write the configuration, with the new dtype of the weights, and the tokenizer."""
    copy_companions(source.hf_folder, folder)
    name = "torch_dtype" if "torch_dtype" in source.hf_config else "dtype"
    config = without_prediction_layers(source.hf_config)
    config |= {name: str(dtype).removeprefix("torch."), **(more or {})}
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n")


def _proven(
    reader: TensorReader, digests: Digests, source: Source, staging: Path, options: Options, ranks: Ranks
) -> int:
    """Read the output back, compare it with the source's own manifest, and write the new manifest.

    Returns the number of tensors.
    """
    # each rank reads one share, so the bar's total is one share
    with progress_bar("proving", _total(reader.tensors) // ranks.size, options.quiet, ranks) as bar:
        proven = prove(reader, digests, options.budget, ranks, bar)
    recorded = read_manifest(source.manifest_folder) or {}
    for name, entry in proven.items():
        before = recorded.get(name, entry)
        if before["dtype"] == entry["dtype"] and before != entry:
            raise ValueError(
                f"{source.manifest_folder / MANIFEST_NAME} says {before} of {name}, "
                f"but the tensor is {entry}: it has changed since then"
            )
    ranks.on_first(lambda: write_manifest(staging, source.folder, proven))
    return len(proven)


def _result(
    num_tensors: int,
    infos: Mapping[str, TensorInfo],
    folders: tuple[Path, Path],
    options: Options,
    ranks: Ranks,
) -> Result:
    check = options.check
    checked = None if check is None else ranks.on_first(lambda: check(*folders))
    return Result(num_tensors, _total(infos), checked)
