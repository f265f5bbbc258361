"""Reads the list of tensors of an HF checkpoint folder, and any rows of them, in little memory.

Only safetensors are read: a pickled checkpoint (pytorch_model.bin) could run code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from megatron_vespo.checkpoints.fused_experts import is_fused, taken_apart
from megatron_vespo.checkpoints.names import INDEX_NAME, SINGLE_NAME
from megatron_vespo.checkpoints.open_files import OpenFiles
from megatron_vespo.checkpoints.safetensors_file import StoredTensor, TensorInfo, read_header


class HFCheckpointReader:
    """Random access to the tensors of a folder; files are opened when first needed. A context manager.

    The constructor checks every header against its file and the index. ValueError for a missing or truncated
    file, for a header that contradicts its file, and for a tensor that is missing or stored twice.
    Fused experts are read as one tensor per expert; `has_fused_experts` tells whether they are stored fused.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        stored = _stored_tensors(folder)
        self.has_fused_experts = any(map(is_fused, stored))
        self._stored = taken_apart(stored)
        self._files = OpenFiles()

    def __enter__(self) -> HFCheckpointReader:
        return self

    def __exit__(self, *error) -> None:
        self._files.__exit__(*error)

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """All tensors, in the order of the files' contents."""
        return self._stored

    def place(self, name: str) -> tuple[Path, int]:
        """File and offset of a tensor, for reading in disk order."""
        return self._stored[name].path, self._stored[name].offset

    def get(self, name: str) -> Tensor:
        """One tensor, on CPU, in its stored dtype; ValueError naming the file if it is missing or broken."""
        if name not in self._stored:
            raise ValueError(f"{self.folder}: tensor {name} is missing")
        tensor = self._stored[name]
        out = torch.empty(tensor.nbytes, dtype=torch.uint8)
        self.read_rows(name, 0, tensor.rows, out)
        return out.view(tensor.dtype).view(tensor.shape)

    def read_rows(self, name: str, start: int, stop: int, out: Tensor) -> None:
        """Fill `out`, uint8 [bytes of those rows]. Safe to call from several threads."""
        tensor = self._stored[name]
        assert out.nbytes == (stop - start) * tensor.row_bytes
        self._files.read(tensor.path, tensor.offset + start * tensor.row_bytes, out)


def _stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder")
    index, single = folder / INDEX_NAME, folder / SINGLE_NAME
    if index.is_file():
        return _by_index(index)
    if single.is_file():
        return read_header(single)
    pickled = next(iter(sorted(folder.glob("*.bin"))), None)
    hint = f"; {pickled.name} is a pickle, which is not read: save it as safetensors first" if pickled else ""
    raise ValueError(f"{folder}: neither {INDEX_NAME} nor {SINGLE_NAME} is there{hint}")


def _by_index(index: Path) -> dict[str, StoredTensor]:
    weight_map = _weight_map(index)
    files = {file: index.parent / file for file in dict.fromkeys(weight_map.values())}
    missing = [file for file, path in files.items() if not path.is_file()]
    if missing:
        raise ValueError(f"{index} names files that do not exist: {', '.join(sorted(missing))}")
    tensors: dict[str, StoredTensor] = {}
    for file, path in files.items():
        for name, tensor in read_header(path).items():
            if name in tensors:
                raise ValueError(
                    f"{index.parent}: tensor {name} is in {tensors[name].path.name} and in {file}"
                )
            if weight_map.get(name) != file:
                raise ValueError(
                    f"{path} holds tensor {name}, which the index places in {weight_map.get(name, 'no file')}"
                )
            tensors[name] = tensor
    absent = sorted(weight_map.keys() - tensors.keys())
    if absent:
        raise ValueError(
            f"{index.parent}: {weight_map[absent[0]]} lacks {absent[0]}, which the index places there"
            + (f" ({len(absent)} tensors in all)" if len(absent) > 1 else "")
        )
    return tensors


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        if not all(isinstance(file, str) and Path(file).name == file for file in weight_map.values()):
            raise ValueError("a file name in weight_map is no plain name")
        if not weight_map:
            raise ValueError("weight_map is empty")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index} is no index of safetensors: {error!r}") from error
    except OSError as error:
        raise ValueError(f"{index} cannot be read: {error.strerror}") from error
    return weight_map
