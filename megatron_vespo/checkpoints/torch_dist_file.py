"""Reads the files of PyTorch's distributed checkpoint format, which Megatron calls torch_dist.

`.metadata` is a pickle of torch.distributed.checkpoint.metadata.Metadata: tensors with their chunks, and for
every chunk a range of bytes in some `.distcp` file. Those bytes are what torch.save makes of the chunk: a zip
archive, uncompressed, with the values in one record. Unpickling is restricted to what this format needs.

Chunks are located here and read in parts, because torch.load (2.14) breaks the memory bound of a conversion:
it reads a chunk as a whole, an embedding of 0.6 GB for instance, and takes `mmap=True` only for a file that
holds nothing else. Under FakeTensorMode it reads no values, but it accepts damaged archives then.
"""

from __future__ import annotations

import errno
import io
import math
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata

from megatron_vespo.checkpoints.names import METADATA_NAME
from megatron_vespo.checkpoints.safetensors_file import DTYPES

# the classes of the format, by module; a pickle with anything else is refused
_ALLOWED = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
        "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.planner": {"SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch": {"Size", *(str(dtype).removeprefix("torch.") for dtype in DTYPES.values())},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath"},
    "pathlib._local": {"PosixPath"},
}  # fmt: skip
_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
}
_LOCAL_HEADER = 30  # bytes, and the lengths of two variable fields are its last four
_END_RECORD = 22  # bytes, when no comment follows
_EXTRA_FIELDS = (b"FB", b"\x01\x00")  # torch's padding, and sizes above 4 GiB
_MAX_PICKLE = 2**16  # bytes of one tensor's description


class SafeUnpickler(pickle._Unpickler):
    """Written in Python: C's unpickler allocates what a damaged file requests, 64 GiB for one flipped bit."""

    dispatch = {
        code: load for code, load in pickle._Unpickler.dispatch.items() if code != pickle.BYTEARRAY8[0]
    }


class _MetadataUnpickler(SafeUnpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _ALLOWED.get(module, ()):
            return super().find_class(module, name)
        # Megatron's own additions say nothing about where tensors are
        if module == "megatron.core.dist_checkpointing.strategies.torch":
            return _Ignored
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


class _Ignored:
    def __setstate__(self, state: Any) -> None:
        pass


def read_metadata(folder: Path) -> Metadata:
    """Read `.metadata`. ValueError if it is missing, broken, or holds anything else."""
    path = folder / METADATA_NAME
    try:
        metadata = _MetadataUnpickler(io.BytesIO(path.read_bytes())).load()
        _check_metadata(metadata)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except Exception as error:  # a damaged pickle may raise anything
        raise ValueError(f"{path} is no metadata of a torch_dist checkpoint: {error}") from error
    return metadata


def _check_metadata(metadata: Any) -> None:
    """Check the types that all later code relies on: a damaged pickle may hold anything."""
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise ValueError("it holds no Metadata")
    for key, stored in metadata.state_dict_metadata.items():
        known = isinstance(stored, BytesStorageMetadata) or (
            isinstance(stored, TensorStorageMetadata)
            and isinstance(stored.properties.dtype, torch.dtype)
            and _are_sizes(stored.size)
            and all(_are_sizes(chunk.offsets) and _are_sizes(chunk.sizes) for chunk in stored.chunks)
        )
        if not known or not isinstance(key, str):
            raise ValueError(f"its entry of {key} is malformed")
    for index, place in metadata.storage_data.items():
        known = isinstance(index.fqn, str) and (index.offset is None or _are_sizes(index.offset))
        if (
            not known
            or not isinstance(place.relative_path, str)
            or not _are_sizes((place.offset, place.length))
        ):
            raise ValueError(f"it is malformed where it places {index.fqn}")


def _are_sizes(numbers: Any) -> bool:
    return isinstance(numbers, tuple) and all(type(number) is int and number >= 0 for number in numbers)


class StoredChunk(NamedTuple):
    """The location of the values of a tensor that torch.save wrote."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    path: Path
    offset: int  # of the first value in the file


class _PickledTensor(NamedTuple):
    storage: tuple  # ("storage", dtype, record, device, number of elements)
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _ChunkUnpickler(SafeUnpickler):
    """Reads a pickled tensor's description without creating the tensor."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch._utils" and name in ("_rebuild_tensor_v2", "_rebuild_tensor_v3"):
            return lambda storage, offset, size, stride, *rest: _PickledTensor(storage, offset, size, stride)
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")

    def persistent_load(self, saved: tuple) -> tuple:
        return saved


class _FileRange(io.RawIOBase):
    """Presents a range of a file as a separate file."""

    def __init__(self, descriptor: int, start: int, length: int):
        self._descriptor, self._start, self._length = descriptor, start, length
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        if base + offset < 0:
            raise OSError(errno.EINVAL, "a position before the start")
        self._position = base + offset
        return self._position

    def readinto(self, buffer) -> int:
        left = max(0, self._length - self._position)
        count = os.preadv(self._descriptor, [memoryview(buffer)[:left]], self._start + self._position)
        self._position += count
        return count


def locate_chunk(path: Path, offset: int, length: int) -> StoredChunk:
    """Locate the values in that range. ValueError unless it holds one contiguous, uncompressed tensor."""
    try:
        with path.open("rb") as file:
            archive: Any = io.BufferedReader(_FileRange(file.fileno(), offset, length))
            with zipfile.ZipFile(archive) as opened:
                records = {name.partition("/")[2]: opened.getinfo(name) for name in opened.namelist()}
                _check_range(archive, length, records.values())
                tensor = _pickled_tensor(opened, records)
                kind, dtype, key, _, numel = tensor.storage
                record = records[f"data/{key}"]
                opened.open(record).close()  # is the same name at both of its places?
            start = _data_start(archive, record)
        nbytes = math.prod(tensor.shape) * dtype.itemsize
        contiguous = torch.empty(tensor.shape, dtype=dtype, device="meta").stride()
        if (
            record.compress_type != zipfile.ZIP_STORED
            or tensor.offset != 0
            or tuple(tensor.stride) != contiguous
            or not nbytes == numel * dtype.itemsize == record.file_size
            or not 0 <= start <= length - nbytes
        ):
            raise ValueError("not one contiguous tensor")
    except Exception as error:  # a damaged archive may raise anything
        raise ValueError(
            f"{path}: the {length} bytes at {offset} are no tensor saved by torch: {error}"
        ) from error
    return StoredChunk(dtype, tuple(tensor.shape), path, offset + start)


def read_pickle(path: Path, offset: int, length: int) -> bytes:
    """The pickle that torch.save wrote into the archive in that range. ValueError if it is damaged."""
    try:
        with path.open("rb") as file:
            with zipfile.ZipFile(io.BufferedReader(_FileRange(file.fileno(), offset, length))) as opened:
                (name,) = (name for name in opened.namelist() if name.partition("/")[2] == "data.pkl")
                return opened.read(name)
    except Exception as error:  # a damaged archive may raise anything
        raise ValueError(f"{path}: the {length} bytes at {offset} are not saved by torch: {error}") from error


def _check_range(archive: IO[bytes], length: int, records: Iterable[zipfile.ZipInfo]) -> None:
    """Check that the archive fills the range: zipfile would also accept a neighbour's inside it."""
    archive.seek(max(0, length - _END_RECORD))
    ends = archive.read(4) == b"PK\5\6"
    if not ends or min(record.header_offset for record in records) != 0:
        raise ValueError("the archive begins or ends elsewhere")


def _pickled_tensor(opened: zipfile.ZipFile, records: Mapping[str, zipfile.ZipInfo]) -> _PickledTensor:
    if max(records["data.pkl"].file_size, records["data.pkl"].compress_size) > _MAX_PICKLE:
        raise ValueError("its data.pkl is too large")
    if "byteorder" in records and opened.read(records["byteorder"]) != b"little":
        raise ValueError("its bytes are not in little-endian order")
    return _ChunkUnpickler(io.BytesIO(opened.read(records["data.pkl"]))).load()


def _data_start(archive: IO[bytes], record: zipfile.ZipInfo) -> int:
    """Behind the local header, whose extra fields have no checksum and are checked to be torch's."""
    archive.seek(record.header_offset)
    local = archive.read(_LOCAL_HEADER)
    name_bytes, extra_bytes = struct.unpack_from("<HH", local, _LOCAL_HEADER - 4)
    archive.read(name_bytes)
    extra = archive.read(extra_bytes)
    while extra:
        if extra[:2] not in _EXTRA_FIELDS or len(extra) < 4:
            raise ValueError("its local header is damaged")
        size = 4 + int.from_bytes(extra[2:4], "little")
        if size > len(extra):
            raise ValueError("its local header is damaged")
        extra = extra[size:]
    return record.header_offset + _LOCAL_HEADER + name_bytes + extra_bytes
