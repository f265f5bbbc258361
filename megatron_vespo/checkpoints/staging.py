"""A folder that gets its name only when it is complete.

It is filled as `.NAME.incomplete` in the same parent folder and renamed at the end. So a killed run leaves
nothing that looks like a checkpoint. The next run with the same target removes the leftover.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_vespo.checkpoints.names import INDEX_NAME, METADATA_NAME, SINGLE_NAME, TRACKER_NAME
from megatron_vespo.checkpoints.ranks import Ranks
from megatron_vespo.system.disk import sync

_LOCK_NAME = ".lock"
# every folder that --force may replace holds one of these; other folders hold CONFIG_NAME, too
_MARKS = (SINGLE_NAME, INDEX_NAME, TRACKER_NAME, METADATA_NAME)
_SPARE = 64 * 2**20  # bytes beside the tensors: indices, tokenizer


@contextmanager
def staged(target: Path, num_bytes: int, force: bool, ranks: Ranks) -> Iterator[Path]:
    """Yields the folder to fill. It is renamed to `target` when the block ends, or removed if it fails.

    ValueError if `target` exists (with `force`: and is no checkpoint), cannot be written, or if the disk has
    no room for `num_bytes`. All ranks enter and leave together; rank 0 does the work.
    """
    target = target.resolve()  # replace the target of a link, not the link
    staging = target.with_name(f".{target.name}.incomplete")
    locks: list[int] = []
    ranks.on_first(lambda: locks.append(_begin(target, staging, num_bytes, force)))
    try:
        yield staging
        ranks.on_first(lambda: _finish(target, staging))
    except BaseException:
        if ranks.rank == 0:
            shutil.rmtree(staging, ignore_errors=True)
        raise
    finally:
        for lock in locks:
            os.close(lock)


def _begin(target: Path, staging: Path, num_bytes: int, force: bool) -> int:
    """Returns the descriptor that holds the lock."""
    replaced = _replaced(target)
    if replaced.is_dir() and not target.exists():
        replaced.rename(target)  # a run was killed between its two renames
    if target.exists():
        if not force:
            raise ValueError(f"{target} is already there; --force replaces it")
        if not target.is_dir() or not any((target / mark).exists() for mark in _MARKS):
            raise ValueError(f"{target} is no checkpoint: --force does not replace it")
    if not target.parent.is_dir():
        raise ValueError(f"{target.parent} is no folder")
    try:
        staging.mkdir(exist_ok=True)
        lock = os.open(staging / _LOCK_NAME, os.O_CREAT | os.O_RDWR)
    except OSError as error:
        raise ValueError(f"{target.parent} cannot be written: {error.strerror}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        raise ValueError(f"another process is writing {target}") from error
    for left in staging.iterdir():  # of a run that was killed
        if left.name != _LOCK_NAME:
            shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
    free = shutil.disk_usage(staging).free
    if free < num_bytes + _SPARE:
        os.close(lock)
        shutil.rmtree(staging)
        raise ValueError(
            f"{target.parent} has {free / 2**30:.2f} GiB free, "
            f"{target.name} needs {num_bytes / 2**30:.2f} GiB"
        )
    return lock


def _finish(target: Path, staging: Path) -> None:
    """Sync all files, then rename. An older folder is removed after the new one has its name."""
    for folder, _, files in os.walk(staging):
        for name in files:
            sync(Path(folder) / name)
        sync(Path(folder))
    old = _replaced(target)
    shutil.rmtree(old, ignore_errors=True)
    try:
        if target.exists():
            target.rename(old)
        staging.rename(target)
    except BaseException:
        if old.exists() and not target.exists():
            old.rename(target)
        raise
    (target / _LOCK_NAME).unlink()  # held until here: nobody else may clear the folder away
    sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _replaced(target: Path) -> Path:
    """Where the older folder is kept while the new one is renamed."""
    return target.with_name(f".{target.name}.replaced")
