"""Opens a checkpoint of either format with the model family that its HF config names."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megatron_vespo.checkpoints.fused_experts import is_fused
from megatron_vespo.checkpoints.hf_checkpoint import HFCheckpointReader
from megatron_vespo.checkpoints.megatron_checkpoint import MegatronCheckpointReader, checkpoint_folder
from megatron_vespo.checkpoints.names import (
    CONFIG_NAME,
    HF_FOLDER,
    INDEX_NAME,
    METADATA_NAME,
    SINGLE_NAME,
    TRACKER_NAME,
)
from megatron_vespo.checkpoints.rotary_buffer import check_rotary_buffer, is_rotary_buffer
from megatron_vespo.checkpoints.safetensors_file import TensorInfo
from megatron_vespo.checkpoints.saved_arguments import check_same_model
from megatron_vespo.checkpoints.spans import Span, SpanBuffer, TensorReader, row_ranges
from megatron_vespo.models.family import FAMILIES, Family, ModelShape, family_of, shape_of
from megatron_vespo.models.hf_config import megatron_arguments, read_hf_config, read_unchecked
from megatron_vespo.models.prediction_layers import is_of_prediction_layer

WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_COMPARED_AT_ONCE = 16 * 2**20  # bytes
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@dataclass(frozen=True)
class Source:
    """What a conversion or a comparison reads from."""

    kind: str  # "HF" or "Megatron"
    folder: Path  # where the tensors are
    hf_folder: Path  # where configuration and tokenizer are
    hf_config: Mapping[str, Any]
    family: Family
    shape: ModelShape
    reader: TensorReader

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """The model's tensors, in its order."""
        return {name: self.reader.tensors[name] for name in self.family.hf_tensors(self.shape)}

    @property
    def dtypes(self) -> set[torch.dtype]:
        """The dtypes of the trained tensors."""
        fixed = self.family.fixed_tensors(self.shape)
        return {tensor.dtype for name, tensor in self.tensors.items() if name not in fixed}

    @property
    def manifest_folder(self) -> Path:
        """Where a conversion left its manifest: beside the tracker of a Megatron checkpoint."""
        return self.folder if self.kind == "HF" else self.folder.parent

    def place(self, name: str) -> tuple[Path, int]:
        """File and offset of an HF tensor, for reading in disk order."""
        assert isinstance(self.reader, HFCheckpointReader)
        return self.reader.place(name)


def is_hf(path: Path) -> bool:
    return (path / INDEX_NAME).is_file() or (path / SINGLE_NAME).is_file()


def is_megatron(path: Path) -> bool:
    return (path / TRACKER_NAME).is_file() or (path / METADATA_NAME).is_file()


@contextmanager
def opened(path: Path, hf_config: Path | None = None) -> Iterator[Source]:
    """Either format. `hf_config` is the HF folder of a Megatron checkpoint that does not hold its own.

    ValueError for anything that is not a whole, supported checkpoint.
    """
    if is_megatron(path) and not is_hf(path):
        with opened_megatron(path, hf_config) as source:
            yield source
        return
    with opened_hf(path) as source:
        yield source


@contextmanager
def opened_hf(path: Path) -> Iterator[Source]:
    """Open an HF folder. It holds exactly the tensors that the config requires, in their shapes."""
    config = read_hf_config(path)
    family, shape = family_of(config), shape_of(config)
    with HFCheckpointReader(path) as reader:
        check_tensors(path, reader, family.hf_tensors(shape), config)
        _check_dtypes(path, reader)
        yield Source("HF", path, path, config, family, shape, reader)


@contextmanager
def opened_megatron(path: Path, hf_config: Path | None = None) -> Iterator[Source]:
    """The checkpoint that `path`'s tracker names, or `path` itself if it is one."""
    folder = checkpoint_folder(path)
    hf_folder = hf_config or folder / HF_FOLDER
    if hf_config is None and not hf_folder.is_dir():
        raise ValueError(f"{folder} holds no HF config: --hf-config DIR names the HF folder of its model")
    config = read_hf_config(hf_folder)
    family, shape = family_of(config), shape_of(config)
    with MegatronCheckpointReader(folder, family, shape) as reader:
        _check_dtypes(folder, reader)
        check_same_model(reader.index, hf_folder / CONFIG_NAME, megatron_arguments(config))
        yield Source("Megatron", folder, hf_folder, config, family, shape, reader)


def check_tensors(
    folder: Path,
    reader: HFCheckpointReader,
    expected: Mapping[str, tuple[int, ...]],
    hf_config: dict[str, Any],
) -> None:
    """ValueError naming a tensor that is missing, of another shape, or one too many.

    What the rest of the checkpoint determines may be there, with that value. Layers for multi-token
    prediction may be there, and are left out.
    """
    found = reader.tensors
    missing = [name for name in expected if name not in found]
    if missing:
        raise ValueError(f"{folder}: {_and_others(missing)} missing")
    extra = sorted(
        name for name in found.keys() - expected.keys() if not is_of_prediction_layer(name, hf_config)
    )
    for name in filter(is_rotary_buffer, extra):
        check_rotary_buffer(folder, reader, name, hf_config)
    extra = [name for name in extra if not is_rotary_buffer(name)]
    if hf_config.get("tie_word_embeddings") and extra == [_HEAD]:
        _check_same(folder, reader)  # some exports write the tied tensor under both of its names
    elif extra:
        raise ValueError(f"{folder}: {_and_others(extra)} not in the model that config.json describes")
    for name, shape in expected.items():
        if found[name].shape != shape:
            raise ValueError(
                f"{folder}: tensor {name} is {found[name].shape}, by config.json it should be {shape}"
            )


def check_served(folder: Path) -> None:
    """ValueError for an HF folder of our families that SGLang 0.5.23 starts with and does not load."""
    found = read_unchecked(folder).get("architectures")
    if not (isinstance(found, list) and set(map(str, found)) & FAMILIES.keys()):
        return  # engines of an evaluation may serve any model, some of which are stored so
    if any(map(is_fused, _stored_names(folder))):
        raise ValueError(
            f"{folder}: its experts are fused (experts.gate_up_proj), and SGLang would leave them out "
            f"without a word: megatron-vespo convert hf-to-hf {folder} DST writes each by itself"
        )


def _stored_names(folder: Path) -> list[str]:
    """Of the tensors in safetensors; none where there are none, or none can be read: an engine says why."""
    try:
        if (folder / INDEX_NAME).is_file():
            return list(json.loads((folder / INDEX_NAME).read_text())["weight_map"])
        if (folder / SINGLE_NAME).is_file():
            with safe_open(folder / SINGLE_NAME, "numpy") as file:
                return list(file.keys())
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        pass
    return []


def _check_dtypes(folder: Path, reader: TensorReader) -> None:
    for name, tensor in reader.tensors.items():
        if tensor.dtype not in WEIGHT_DTYPES:
            raise ValueError(f"{folder}: tensor {name} is {tensor.dtype}, no float32, float16 or bfloat16")


def _and_others(names: list[str]) -> str:
    more = f", {names[1]}, ... ({len(names)} tensors) are" if len(names) > 1 else " is"
    return f"tensor {names[0]}{more}"


def _check_same(folder: Path, reader: TensorReader) -> None:
    head, embedding = reader.tensors[_HEAD], reader.tensors[_EMBEDDING]
    same = (head.shape, head.dtype) == (embedding.shape, embedding.dtype)
    one, other = SpanBuffer(), SpanBuffer()
    for start, stop in row_ranges(head.rows, head.row_bytes, _COMPARED_AT_ONCE) if same else ():
        same = same and one.read(reader, Span(_HEAD, start, stop)).equal(
            other.read(reader, Span(_EMBEDDING, start, stop))
        )
    if not same:
        raise ValueError(f"{folder}: the config ties {_HEAD} to {_EMBEDDING}, but they differ")
