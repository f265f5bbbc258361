"""Checks whether all processes see each other's files in a folder, and how fast the folder is."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path

from megatron_vespo.commands.doctor.finding import Finding
from megatron_vespo.system.disk import sync

SIZE_BYTES = 64 * 2**20
BLOCK = 2**20
SLOW_GB_S = 0.1
FIX = "--shared-dir: a folder on the cluster's file system, mounted on every node"
VISIBLE_WITHIN_S = 10.0  # NFS caches for some seconds that a file is missing


def path_of(folder: Path, word: str, rank: int) -> Path:
    return folder / f".megatron-vespo-doctor-{word}-{rank}"


def write(folder: Path, word: str, rank: int) -> float:
    """Writes this rank's file, which is on disk on return; GB/s."""
    block = _header(rank) + os.urandom(BLOCK - len(_header(rank)))
    started = time.monotonic()
    with path_of(folder, word, rank).open("wb") as file:
        for _ in range(SIZE_BYTES // BLOCK):
            file.write(block)
        sync(file)
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # reads must not come from memory
    return SIZE_BYTES / (time.monotonic() - started) / 1e9


def read(folder: Path, word: str, rank: int) -> float:
    """Reads the file of `rank` and checks its content; GB/s."""
    started = time.monotonic()
    with path_of(folder, word, rank).open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        length = 0
        while block := file.read(BLOCK):
            if length == 0 and not block.startswith(_header(rank)):
                raise ValueError(f"the file of rank {rank} has other content")
            length += len(block)
    if length != SIZE_BYTES:
        raise ValueError(f"the file of rank {rank} has {length} bytes of {SIZE_BYTES}")
    return SIZE_BYTES / (time.monotonic() - started) / 1e9


def unseen(folder: Path, word: str, ranks: Iterable[int], timeout_s: float = VISIBLE_WITHIN_S) -> list[int]:
    """Ranks whose files this process does not see."""
    deadline = time.monotonic() + timeout_s
    while True:
        missing = [rank for rank in ranks if not path_of(folder, word, rank).exists()]
        if not missing or time.monotonic() > deadline:
            return missing
        os.listdir(folder)  # makes NFS ask the server again
        time.sleep(0.5)


def check(folder: Path, word: str, rank: int, writers: list[int], size: int, write_speed: float) -> Finding:
    """Checks that the files of all `writers` are visible, and reads the next rank's. All have written."""
    name = "shared folder"
    if missing := unseen(folder, word, writers):
        text = f"{folder}: the files of ranks {', '.join(map(str, missing))} are not seen"
        return Finding(name, "FAIL", text, FIX)
    later = [other for other in writers if other > rank]
    read_speed = read(folder, word, (later or writers)[0])
    text = f"{folder}: writes {write_speed:.2f}, reads {read_speed:.2f} GB/s"
    slowest = min(write_speed, read_speed)
    if slowest < SLOW_GB_S:
        fix = "checkpoints and models need a faster file system"
        return Finding(name, "warn", text, fix, measured=slowest)
    seen = f", all {size} ranks see each other" if size > 1 else " (srun on several nodes: do they share it?)"
    return Finding(name, "ok", text + seen, measured=slowest)


def _header(rank: int) -> bytes:
    return f"rank {rank}\n".encode()
