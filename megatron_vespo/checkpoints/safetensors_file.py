"""The safetensors format: 8 bytes of header length, a JSON header, the tensors' bytes one after another.

The library hands out whole tensors; a conversion in bounded memory has to read and write parts of them, so
it needs to know where they are. https://github.com/huggingface/safetensors describes the format.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER = 100 * 2**20  # bytes; the library's own limit
_ALIGNMENT = 8


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor without its values."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def rows(self) -> int:
        """Length of dimension 0; a scalar is one row."""
        return self.shape[0] if self.shape else 1

    @property
    def row_bytes(self) -> int:
        return self.nbytes // self.rows if self.rows else 0


@dataclass(frozen=True)
class StoredTensor(TensorInfo):
    """A tensor and where its bytes are."""

    path: Path
    offset: int  # in the file


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of the file; ValueError for a file that is cut short or whose header does not fit it."""
    try:
        file_bytes = path.stat().st_size
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            if file_bytes < 8 or header_bytes > min(file_bytes - 8, _MAX_HEADER):
                raise ValueError(f"{path} is no safetensors file, or is cut short inside its header")
            header = _parsed(path, file.read(header_bytes))
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        tensors = {name: _stored(path, 8 + header_bytes, name, entry) for name, entry in entries.items()}
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    _check_tiling(path, tensors, 8 + header_bytes, file_bytes)
    return tensors


def _parsed(path: Path, text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text.decode(), object_pairs_hook=_without_duplicates)
        if not isinstance(header, dict):
            raise ValueError(f"it is a {type(header).__name__}")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: its safetensors header is not a JSON object: {error}") from error
    return header


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name appears twice")
    return found


def _stored(path: Path, data_start: int, name: str, entry: Any) -> StoredTensor:
    try:
        dtype, shape, (begin, end) = DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
        numbers = [*shape, begin, end]
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise ValueError
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: the header's entry of {name} is malformed: {str(entry)[:200]}") from error
    tensor = StoredTensor(dtype, shape, path, data_start + begin)
    if tensor.nbytes != end - begin:
        raise ValueError(
            f"{path}: {name} is {entry['dtype']} {list(shape)}, {tensor.nbytes} bytes, "
            f"but the header gives it {end - begin}"
        )
    return tensor


def _check_tiling(path: Path, tensors: Mapping[str, StoredTensor], start: int, file_bytes: int) -> None:
    """The format allows neither holes nor overlaps nor anything behind the last tensor."""
    position = start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if tensor.offset != position:
            raise ValueError(f"{path}: the header places {name} at byte {tensor.offset}, not at {position}")
        position += tensor.nbytes
    if position != file_bytes:
        raise ValueError(
            f"{path} has {file_bytes} bytes, by its header it should have {position}: "
            + ("it is cut short" if file_bytes < position else "something follows the last tensor")
        )


def header(tensors: Mapping[str, TensorInfo]) -> tuple[bytes, dict[str, int]]:
    """The first bytes of a file that holds `tensors` in this order, and each one's offset in the file."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, tensor in tensors.items():
        end = position + tensor.nbytes
        entries[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    start = 8 + len(text)
    offsets = {name: start + entries[name]["data_offsets"][0] for name in tensors}
    return len(text).to_bytes(8, "little") + text, offsets
