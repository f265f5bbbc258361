"""Quantises an HF folder with NVIDIA ModelOpt for engines: fp8 per tensor, or nvfp4 in blocks of 16.

Block-FP8 has scales of the weights only. These formats also scale activations by constants, which must be
measured: the model runs on prompts first. ModelOpt chooses the layers (all linear ones but router and head),
measures, and writes the folder; https://github.com/NVIDIA/Model-Optimizer describes the formats. The written
folder is checked against the source tensor by tensor before it gets its name.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatron_vespo.checkpoints.hf_checkpoint import HFCheckpointReader
from megatron_vespo.checkpoints.hf_shards import copy_companions
from megatron_vespo.checkpoints.manifest import entry_of, write_manifest
from megatron_vespo.checkpoints.ranks import Ranks
from megatron_vespo.checkpoints.safetensors_file import TensorInfo
from megatron_vespo.checkpoints.sources import opened_hf
from megatron_vespo.checkpoints.spans import SpanBuffer, tensor_digest
from megatron_vespo.checkpoints.staging import staged
from megatron_vespo.data.jsonl import jsonl_rows
from megatron_vespo.data.located import located

VERSION = "0.47.0"  # of nvidia-modelopt; setup.py installs it
FORMATS = {"fp8": "FP8_DEFAULT_CFG", "nvfp4": "NVFP4_DEFAULT_CFG"}  # ModelOpt's names
_PROMPT_KEYS = ("text", "question")
_SPAN_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Calibration:
    """The tokens that the model runs on while activations are measured."""

    path: Path | None  # JSONL; None: random tokens
    num_samples: int
    num_tokens: int  # per sample, at most


@dataclass(frozen=True)
class ModelOpt:
    """The parts of the package that are used."""

    quantize: Callable[[nn.Module, Any, Callable[[nn.Module], None]], nn.Module]
    config: Any
    export: Callable[..., None]


def load_modelopt(fmt: str) -> ModelOpt:
    """ValueError that says what is missing, if the package cannot run here."""
    try:
        found = version("nvidia-modelopt")
    except PackageNotFoundError as error:
        raise ValueError(
            f"convert modelopt needs nvidia-modelopt, which is not installed: pip install "
            f"nvidia-modelopt=={VERSION}, or megatron-to-hf --dtype fp8, which needs nothing"
        ) from error
    if found != VERSION:
        raise ValueError(f"nvidia-modelopt is {found}, convert modelopt is made for {VERSION}")
    try:
        quantization = importlib.import_module("modelopt.torch.quantization")
        export = importlib.import_module("modelopt.torch.export")
    except ImportError as error:
        raise ValueError(f"nvidia-modelopt {found} cannot be imported: {error}") from error
    config = getattr(quantization, FORMATS[fmt], None)
    if config is None:
        raise ValueError(f"nvidia-modelopt {found} has no {FORMATS[fmt]}, which --format {fmt} needs")
    return ModelOpt(quantization.quantize, config, export.export_hf_checkpoint)


def export_quantised(
    source_path: Path, target: Path, fmt: str, calibration: Calibration, force: bool, ranks: Ranks
) -> list[str]:
    """Writes `target`; returns lines to print. Runs on the first CUDA device, or slowly on the CPU."""
    if ranks.size > 1:
        raise ValueError(f"convert modelopt is for one process, not {ranks.size}")
    modelopt = load_modelopt(fmt)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with opened_hf(source_path) as source, staged(target, source.nbytes, force, ranks) as staging:
        samples = list(_samples(source_path, calibration, source.shape.vocab_size))
        if not samples:
            raise ValueError(f"--calibration {calibration.path}: the file is empty")
        model = _load(source_path, device)
        modelopt.quantize(model, modelopt.config, lambda model: _run(model, samples))
        copy_companions(source_path, staging)
        with torch.inference_mode():
            modelopt.export(model, export_dir=staging)
        with HFCheckpointReader(staging) as reader:
            _check(reader, source.tensors)
            written = reader.tensors
            buffer = SpanBuffer()
            entries = {
                name: entry_of(info, tensor_digest(reader, name, _SPAN_BYTES, buffer))
                for name, info in written.items()
            }
        write_manifest(staging, source_path, entries)
    size = sum(info.nbytes for info in written.values())
    tokens = sum(sample.shape[1] for sample in samples)
    what = calibration.path or "random tokens, which are not what the model will see: name --calibration FILE"
    return [
        f"{target}: {len(written)} tensors, {size / 2**20:.1f} MiB as {fmt} by ModelOpt {VERSION}, "
        f"of {source.nbytes / 2**20:.1f} MiB",
        f"calibrated on {device}: {len(samples)} samples, {tokens} tokens, {what}",
    ]


def _load(folder: Path, device: str) -> nn.Module:
    from transformers.models.auto.modeling_auto import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").to(device).eval()  # pyright: ignore[reportArgumentType]


def _samples(model: Path, calibration: Calibration, vocab_size: int) -> Iterator[Tensor]:
    """Token ids [1, tokens]."""
    if calibration.path is None:
        draw = torch.Generator().manual_seed(0)
        for _ in range(calibration.num_samples):
            yield torch.randint(vocab_size, (1, calibration.num_tokens), generator=draw)
        return
    from transformers.models.auto.tokenization_auto import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ValueError(f"{model} has no tokenizer that loads, which --calibration needs") from error
    if not calibration.path.is_file():
        raise ValueError(f"--calibration {calibration.path}: no such file")
    for where, row in islice(jsonl_rows(calibration.path), calibration.num_samples):
        with located(where):
            ids = tokenizer(_text(row, where))["input_ids"][: calibration.num_tokens]
        if not ids:
            raise ValueError(f"{where}: the prompt has no tokens")
        yield torch.tensor([ids])


def _text(row: Mapping[str, Any], where: str) -> str:
    for key in _PROMPT_KEYS:
        if isinstance(row.get(key), str):
            return row[key]
    raise ValueError(f"{where}: neither {' nor '.join(_PROMPT_KEYS)} is there as a string")


@torch.no_grad()
def _run(model: nn.Module, samples: list[Tensor]) -> None:
    for sample in samples:
        model(sample.to(model.device), use_cache=False)  # pyright: ignore[reportArgumentType, reportCallIssue]


def _check(reader: HFCheckpointReader, source: Mapping[str, TensorInfo]) -> None:
    """Checks that every source tensor is there with its name and shape, and every scalar scale is positive.

    RuntimeError if not. If ModelOpt cannot undo the renaming by transformers, it only warns. An activation
    that was never measured has a scale of zero.
    """
    for name, info in source.items():
        found = reader.tensors.get(name)
        if found is None:
            raise RuntimeError(f"ModelOpt's export lacks {name}")
        packed = found.dtype == torch.uint8  # two 4-bit values per byte
        shape = (*found.shape[:-1], found.shape[-1] * 2) if packed else found.shape
        if shape != info.shape:
            raise RuntimeError(f"ModelOpt's export has {name} as {found.shape}, the source {info.shape}")
    for name, info in reader.tensors.items():
        if info.shape == () and not (value := reader.get(name).item()) > 0:
            raise RuntimeError(f"ModelOpt's export has {name} = {value}; it must be positive")
