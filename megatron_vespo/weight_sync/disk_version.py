"""What one sync has written: a folder with a file of each trainer rank, and a manifest of what is in them.

A part of a file is what a trainer rank has for one engine rank in one group of the plan. An engine rank reads
and checks its own parts alone. Its answer is a file as well: it may reach nothing else of the trainer's.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass
from pathlib import Path

import xxhash

from megatron_vespo.system.disk import write_atomically

MANIFEST = "manifest.json"
_POLL_S = 0.05


class DamagedError(ValueError):
    """A file is not what was written; the message names it."""


@dataclass(frozen=True)
class Part:
    """`size` bytes at `offset` in the file of rank `source`. `whole`: all elements; else `changes`."""

    source: int
    group: int
    engine_rank: int
    offset: int
    size: int
    checksum: str  # XXH3, 64 bits, of the bytes
    whole: bool


@dataclass(frozen=True)
class Manifest:
    """Of sync number `sync` of a connection. `base` is the sync that engines need to have, None: none.

    `files` has sizes in bytes by trainer rank.
    """

    sync: int
    base: int | None
    files: Mapping[int, int]
    parts: list[Part]


def file_of(folder: Path, rank: int) -> Path:
    """Of trainer rank `rank`; one that has nothing to write has none."""
    return folder / f"rank-{rank}.weights"


def write_manifest(folder: Path, manifest: Manifest) -> str:
    """Returns its checksum."""
    text = json.dumps({
        "sync": manifest.sync,
        "base": manifest.base,
        "files": {str(rank): size for rank, size in manifest.files.items()},
        "parts": [astuple(part) for part in manifest.parts],
    })  # fmt: skip
    write_atomically(folder / MANIFEST, text)
    return checksum_of(text.encode())


def read_manifest(folder: Path, checksum: str) -> Manifest:
    """DamagedError if it is missing, or another one than `checksum` is of."""
    path = folder / MANIFEST
    text = _read(path, 0, None)
    if checksum_of(text) != checksum:
        raise DamagedError(f"{path} is damaged: another checksum than the trainer has told")
    fields = json.loads(text)
    files = {int(rank): size for rank, size in fields["files"].items()}
    return Manifest(fields["sync"], fields["base"], files, [Part(*part) for part in fields["parts"]])


def read_part(folder: Path, manifest: Manifest, part: Part) -> bytearray:
    """DamagedError if the file is missing, has another size, or the part another checksum."""
    path = file_of(folder, part.source)
    data = _read(path, part.offset, part.size, manifest.files[part.source])
    if checksum_of(data) != part.checksum:
        raise DamagedError(f"{path} is damaged: another checksum of the {part.size} bytes at {part.offset}")
    return data


def checksum_of(data: bytes | bytearray | memoryview) -> str:
    return xxhash.xxh3_64_hexdigest(data)


def _read(path: Path, offset: int, size: int | None, file_size: int | None = None) -> bytearray:
    """By reads, not by mmap: a file that is cut off meanwhile would kill the process.

    Without `size` all of the file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise DamagedError(f"{path} cannot be read: {error.strerror}") from error
    try:
        found = os.fstat(descriptor).st_size
        if file_size is not None and found != file_size:
            raise DamagedError(f"{path} has {found} bytes, written were {file_size}")
        data = bytearray(found if size is None else size)
        view = memoryview(data)
        while view:
            number = os.preadv(descriptor, [view], offset)
            if not number:
                raise DamagedError(f"{path} ends at byte {offset}")
            view, offset = view[number:], offset + number
        return data
    finally:
        os.close(descriptor)


def answer(folder: Path, slot: int, error: str | None) -> None:
    """Say that an engine rank has done what a message about this folder has told it; or why not."""
    write_atomically(_answer(folder, slot), json.dumps({"error": error}))


def answers(folder: Path, slots: Iterable[int], patience_s: float) -> dict[int, str | None]:
    """By slot. Those that are not there after `patience_s`, in which other hosts may see them, are left out.

    The folder can take answers to another message afterwards.
    """
    found: dict[int, str | None] = {}
    deadline = time.monotonic() + patience_s
    missing = list(slots)
    while missing:
        for slot in missing:
            path = _answer(folder, slot)
            if path.exists():
                found[slot] = json.loads(path.read_text())["error"]
                path.unlink()
        missing = [slot for slot in missing if slot not in found]
        if missing and time.monotonic() > deadline:
            break
        time.sleep(_POLL_S if missing else 0)
    return found


def _answer(folder: Path, slot: int) -> Path:
    return folder / f"engine-rank-{slot}.answer"
