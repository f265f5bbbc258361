"""Where the tensors of a safetensors file are, so that parts of them can be read and written.

A file is 8 bytes of header length, a JSON header, and the tensors' bytes one after another
(https://github.com/huggingface/safetensors). The library reads and checks the header. The bytes are read by
`OpenFiles`, because both ways of the library (0.8.0) to read a part break the memory bound of a conversion:
`backend="mmap"` keeps all that was read resident, and a file that shrinks, or a disk error, ends the process
with SIGBUS; `backend="pread"` reads the whole tensor for each part.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

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
    """Every tensor of the file, in the order of its bytes.

    The library checks that every size fits its dtype and shape, and that the tensors fill the file without
    a gap. ValueError for a file that is cut short, or whose header is damaged, and for other dtypes.
    """
    tensors: dict[str, StoredTensor] = {}
    try:
        file_bytes = path.stat().st_size
        with path.open("rb") as file:
            position = 8 + int.from_bytes(file.read(8), "little")
        with safe_open(path, "numpy") as opened:
            for name in opened.offset_keys():
                entry = opened.get_slice(name)
                tensor = StoredTensor(
                    _dtype(path, name, entry.get_dtype()), tuple(entry.get_shape()), path, position
                )
                tensors[name] = tensor
                position += tensor.nbytes
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except SafetensorError as error:
        reason = " ".join(str(error).removeprefix("Error while deserializing header: ").split())[:300]
        raise ValueError(
            f"{path} ({file_bytes} bytes) is cut short or no safetensors file: {reason}"
        ) from error
    return tensors


def _dtype(path: Path, name: str, code: str) -> torch.dtype:
    if code not in DTYPES:
        raise ValueError(f"{path}: tensor {name} is {code}; supported are {', '.join(DTYPES)}")
    return DTYPES[code]


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
