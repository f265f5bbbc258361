"""How arguments and results of a program's functions travel: as data of plain types, never as objects.

The value that arrives was written by the program. It consists of plain values only, so that comparing it runs
no code of the program.
"""

from __future__ import annotations

import collections
import contextlib
import decimal
import fractions
import json
import numbers
import os
import struct
from typing import Any

MAX_MESSAGE_BYTES = 16 * 2**20
_READ_BYTES = 2**16
MAX_ITEMS = 1_000_000  # of an iterator
_SEQUENCES = {"tuple": tuple, "set": set, "frozenset": frozenset, "deque": collections.deque}
_SIZE = struct.Struct("<Q")


class Unreadable(Exception):
    """The other side sent no message of this form, or ended."""


def encode(value: Any) -> Any:
    """Return `value` as JSON data; TypeError if it is no plain value."""
    if value is None or value is True or value is False:
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, numbers.Integral):
        return {"int": hex(int(value))}  # no limit on digits, unlike decimals
    if isinstance(value, float):
        return {"float": float.hex(value)}
    if isinstance(value, list):
        return [encode(item) for item in list.__iter__(value)]
    if isinstance(value, dict):
        return {"dict": [[encode(key), encode(item)] for key, item in dict.items(value)]}
    for name, kind in _SEQUENCES.items():
        if isinstance(value, kind):
            return {name: [encode(item) for item in kind.__iter__(value)]}
    return _encode_rare(value)


def _encode_rare(value: Any) -> Any:
    if isinstance(value, complex):
        return {"complex": [float.hex(value.real), float.hex(value.imag)]}
    if isinstance(value, bytes | bytearray):
        return {type(value).__name__: bytes(value).hex()}
    if isinstance(value, decimal.Decimal | fractions.Fraction):
        return {"decimal" if isinstance(value, decimal.Decimal) else "fraction": str(value)}
    if isinstance(value, range):
        return {"range": [hex(value.start), hex(value.stop), hex(value.step)]}
    if hasattr(value, "tolist"):  # an array or a scalar of numpy
        return encode(value.tolist())
    if hasattr(value, "__iter__"):  # a generator, map, zip, dict view ...
        items = []
        for item in value:
            if len(items) >= MAX_ITEMS:
                raise TypeError("the iterator has too many items")
            items.append(encode(item))
        return {"iterator" if hasattr(value, "__next__") else "view": items}
    raise TypeError(f"a {type(value).__name__} cannot leave the program")


def decode(data: Any) -> Any:
    """Return the value of `encode`'s JSON data; Unreadable if it is something else."""
    if data is None or isinstance(data, bool | str):
        return data
    if isinstance(data, list):
        return [decode(item) for item in data]
    if not isinstance(data, dict) or len(data) != 1:
        raise Unreadable("no value")
    ((name, content),) = data.items()
    try:
        return _decode_tagged(name, content)
    except (ValueError, TypeError, ArithmeticError) as error:
        raise Unreadable(f"no {name}: {error}") from error


def _decode_tagged(name: str, content: Any) -> Any:
    if name == "int":
        return int(content, 16)
    if name == "float":
        return float.fromhex(content)
    if name == "dict":
        return {decode(key): decode(item) for key, item in content}
    if name in _SEQUENCES:
        return _SEQUENCES[name](decode(item) for item in content)
    if name == "complex":
        return complex(*map(float.fromhex, content))
    if name in ("bytes", "bytearray"):
        return (bytes if name == "bytes" else bytearray).fromhex(content)
    if name == "decimal":
        return decimal.Decimal(content)
    if name == "fraction":
        return fractions.Fraction(content)
    if name == "range":
        return range(*(int(number, 16) for number in content))
    if name == "iterator":
        return iter([decode(item) for item in content])
    if name == "view":
        return [decode(item) for item in content]
    raise Unreadable(f"no value of type {name!r}")


def send(fd: int, message: Any) -> None:
    """Write one message; TypeError or ValueError if it cannot be written as JSON or is too long."""
    text = json.dumps(message).encode()
    if len(text) > MAX_MESSAGE_BYTES:
        raise ValueError(f"{len(text)} bytes are too many")
    unsent = memoryview(_SIZE.pack(len(text)) + text)
    while unsent:
        unsent = unsent[os.write(fd, unsent) :]


def receive(fd: int) -> Any:
    """Read one message.

    Raises:
        Unreadable: the other side ended, or sent no JSON or too much of it.
    """
    received = bytearray(_read(fd))  # the other side waits for an answer: no second message can follow
    while len(received) < _SIZE.size:
        received += _read(fd)
    (size,) = _SIZE.unpack_from(received)
    if size > MAX_MESSAGE_BYTES:
        raise Unreadable(f"{size} bytes are too many")
    while len(received) < _SIZE.size + size:
        received += _read(fd)
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(received[_SIZE.size :])
    raise Unreadable("no JSON")


def _read(fd: int) -> bytes:
    try:
        part = os.read(fd, _READ_BYTES)
    except OSError as error:
        raise Unreadable(str(error)) from error
    if not part:
        raise Unreadable("the other side ended")
    return part
