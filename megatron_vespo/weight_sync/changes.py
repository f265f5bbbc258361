"""Which elements of a part differ from the version before, in few bytes.

A part is cut into blocks of 65,536 elements. Each block takes the smallest of these forms:

    same    nothing
    gaps    a byte for each changed element: the number of unchanged ones before it; 255 skips 255 elements
    bits    a bit for each element
    whole   every element counts as changed

In front are, for each block, its form (uint8), the size of its gaps or bits and its number of changed
elements (uint32, little-endian). Then come, block by block, gaps or bits and the new values. Values are
compared as integers: NaN is equal to itself, and -0.0 differs from 0.0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

BLOCK = 65536
_SAME, _GAPS, _BITS, _WHOLE = range(4)
_ESCAPE = 255
_HEAD = np.dtype([("form", "u1"), ("where", "<u4"), ("number", "<u4")])
Elements = NDArray[Any]  # unsigned integers of a weight's size


@dataclass(frozen=True)
class Changes:
    """New `values` at `positions`, int64, and in whole `ranges`: first element and values."""

    positions: NDArray[np.int64]
    values: Elements
    ranges: list[tuple[int, Elements]]


def integers(itemsize: int) -> np.dtype:
    """The type to compare weights of that size as."""
    return np.dtype(f"<u{itemsize}")


def encode(new: Elements, old: Elements) -> tuple[bytes | None, int]:
    """What makes `new` of `old`, None if nothing has changed, and the number of changed elements."""
    head = np.zeros(-(-len(new) // BLOCK), _HEAD)
    found: list[bytes] = []
    changed = 0
    for block in range(len(head)):
        part = slice(block * BLOCK, (block + 1) * BLOCK)
        number, form, where, values = _encoded(new[part], old[part])
        head[block] = form, len(where), len(values)
        found += [where, values.tobytes()]
        changed += number
    return (b"".join([head.tobytes(), *found]) if changed else None), changed


def _encoded(new: Elements, old: Elements) -> tuple[int, int, bytes, Elements]:
    """Of a block: the number of changed elements, form, gaps or bits, values."""
    changed = new != old
    number = int(np.count_nonzero(changed))
    if number == 0:
        return 0, _SAME, b"", new[:0]
    bits_size = -(-len(new) // 8)
    # gaps take a byte for each changed element at least
    if min(number, bits_size) + number * new.itemsize >= new.nbytes:
        return number, _WHOLE, b"", new
    positions = np.flatnonzero(changed)
    values = new.take(positions)  # several times faster than new[changed]
    if number <= bits_size:
        gaps = _gaps(positions)
        if len(gaps) <= bits_size:
            return number, _GAPS, gaps, values
    return number, _BITS, np.packbits(changed).tobytes(), values


def _gaps(positions: NDArray[np.int64]) -> bytes:
    gaps = np.diff(positions, prepend=-1) - 1
    skips, rest = np.divmod(gaps, _ESCAPE)
    found = np.full(len(gaps) + int(skips.sum()), _ESCAPE, np.uint8)
    found[np.cumsum(skips + 1) - 1] = rest
    return found.tobytes()


def decode(data: bytes | bytearray, length: int, itemsize: int) -> Changes:
    """The inverse of `encode`, for a part of `length` elements. ValueError if `data` is too short."""
    head = np.frombuffer(data, _HEAD, -(-length // BLOCK))
    end = head.nbytes
    positions, values, ranges = [np.zeros(0, np.int64)], [np.zeros(0, integers(itemsize))], []
    for block, (form, where, number) in enumerate(head.tolist()):
        if form == _SAME:
            continue
        start, size = block * BLOCK, min(BLOCK, length - block * BLOCK)
        said = np.frombuffer(data, np.uint8, where, end)
        new = np.frombuffer(data, integers(itemsize), number, end + where)
        end += where + new.nbytes
        if form == _WHOLE:
            ranges.append((start, new))
            continue
        positions.append(start + (_from_gaps(said) if form == _GAPS else _from_bits(said, size)))
        values.append(new)
    return Changes(np.concatenate(positions), np.concatenate(values), ranges)


def _from_gaps(gaps: NDArray[np.uint8]) -> NDArray[np.int64]:
    is_value = gaps != _ESCAPE
    ends = np.cumsum(gaps.astype(np.int64) + is_value)
    return ends[is_value] - 1


def _from_bits(bits: NDArray[np.uint8], size: int) -> NDArray[np.int64]:
    return np.flatnonzero(np.unpackbits(bits, count=size).view(bool))
