"""The bytes that torch.save writes before and after the values of a tensor.

The archives of two tensors of one shape and dtype differ in the values and in their CRC-32, which a zip
archive states twice. So torch makes one archive per shape and dtype, and its two ends are used for all: the
values are written without a copy.
"""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from functools import lru_cache

import torch
from torch import Tensor

_LOCAL_HEADER, _LOCAL_CRC = 30, 14  # bytes; https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT
_CENTRAL_HEADER, _CENTRAL_CRC = 46, 16
_DATA = "/data/0"  # end of the record's name


def around(values: Tensor) -> tuple[bytes, bytes]:
    """The parts of torch.save's archive before and after the bytes of the contiguous `values`."""
    before, after, places = _ends(tuple(values.shape), values.dtype)
    crc = struct.pack("<L", zlib.crc32(values.view(-1).view(torch.uint8).numpy()))
    before, after = bytearray(before), bytearray(after)
    before[places[0] : places[0] + 4] = crc
    after[places[1] : places[1] + 4] = crc
    return bytes(before), bytes(after)


@lru_cache(maxsize=64)
def _ends(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[bytes, bytes, tuple[int, int]]:
    """Both ends, and the offset of the CRC in each."""
    values = torch.zeros(shape, dtype=dtype)
    stream = io.BytesIO()
    torch.save(values, stream)
    archive = stream.getbuffer()
    with zipfile.ZipFile(stream) as opened:
        record = next(record for record in opened.infolist() if record.filename.endswith(_DATA))
        central = opened.start_dir
    name_bytes, extra_bytes = struct.unpack_from("<HH", archive, record.header_offset + _LOCAL_HEADER - 4)
    start = record.header_offset + _LOCAL_HEADER + name_bytes + extra_bytes
    stop = start + values.nbytes
    name = record.filename.encode()
    while archive[central + _CENTRAL_HEADER : central + _CENTRAL_HEADER + len(name)] != name:
        central += _CENTRAL_HEADER + sum(struct.unpack_from("<HHH", archive, central + 28))
    places = (record.header_offset + _LOCAL_CRC, central + _CENTRAL_CRC - stop)
    return bytes(archive[:start]), bytes(archive[stop:]), places
