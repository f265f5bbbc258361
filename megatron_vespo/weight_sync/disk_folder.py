"""The folder of --weight-sync disk: whose part of it is whose, and what killed runs have left there.

Every run has a folder of its own below the user's. Its name comes from the run's --output-dir, so that a
resumed run finds what an attempt before has left. `owner.json` in it says which process writes, and has a
token: whoever reads another one, or none, sees another file system.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import xxhash

from megatron_vespo.system.disk import write_atomically
from megatron_vespo.weight_sync.engine_admin import WeightSyncError
from megatron_vespo.weight_sync.places import place_of

FLAG = "--weight-sync-folder"
_OWNER = "owner.json"
_PREFIX = "run-"
_END_S = 5.0  # until a process that is killed has ended
_POLL_S = 0.05


class FolderError(WeightSyncError, ValueError):
    """The folder cannot be used, which the user has to change: one line says why."""


@dataclass(frozen=True)
class Owner:
    """A process. `started` is in ticks since the machine has started: process ids are used again."""

    host: str
    pid: int
    started: int
    token: str

    def runs(self) -> bool | None:
        """Whether the process is there; None if it is another host's."""
        if self.host != _host():
            return None
        return _started(self.pid) == self.started


def run_folder(folder: Path, output_dir: Path) -> Path:
    """Below `folder`, for the run with this --output-dir."""
    path = os.path.realpath(output_dir)
    return (
        Path(os.path.abspath(folder))
        / f"{_PREFIX}{Path(path).name}-{xxhash.xxh3_64_hexdigest(os.fsencode(path))[:8]}"
    )


def export_folder(folder: Path, output_dir: Path) -> Path:
    """Below `folder`, for exports that an engine is compared with. It stays where weights differ."""
    own = run_folder(folder, output_dir)
    return own.with_name(own.name.replace(_PREFIX, "weight-check-", 1))


def claim(folder: Path) -> str:
    """Make the run's folder, without what was in it; returns its token.

    What killed runs of this host have left beside it is removed as well. FolderError if a run that goes on
    uses the folder, or if it cannot be made.
    """
    with folder_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        for other in folder.parent.glob(f"{_PREFIX}*"):
            owner = _owner(other)
            if other == folder:
                _check_free(folder, owner)
            elif owner is None or owner.runs() is not False:
                continue
            shutil.rmtree(other)
        folder.mkdir()
        owner = Owner(_host(), os.getpid(), _started(os.getpid()) or 0, secrets.token_hex(8))
        write_atomically(folder / _OWNER, json.dumps(asdict(owner)))
        return owner.token


def release(folder: Path) -> None:
    """Remove the run's folder where this host has it, when the process that has claimed it has ended."""
    deadline = time.monotonic() + _END_S
    while (owner := _owner(folder)) is not None:
        if not owner.runs():
            shutil.rmtree(folder, ignore_errors=True)
            return
        if time.monotonic() > deadline:  # another run's with the same --output-dir
            return
        time.sleep(_POLL_S)


def sees(folder: Path, token: str) -> bool:
    """Whether this process sees the run's folder."""
    owner = _owner(folder)
    return owner is not None and owner.token == token


@contextmanager
def folder_errors(folder: Path) -> Iterator[None]:
    """An OSError in the block is raised as FolderError: below `folder`, a run's, cannot be written."""
    try:
        yield
    except OSError as error:
        text = f"{FLAG} {folder.parent}: {error.strerror or error}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            text += f", {_free(folder.parent)} are free; a sync writes up to all weights of an engine"
        raise FolderError(text) from error


def _check_free(folder: Path, owner: Owner | None) -> None:
    if owner is not None and owner.pid != os.getpid() and owner.runs():
        raise FolderError(
            f"{FLAG} {folder.parent}: process {owner.pid} of a run with the same --output-dir uses it"
        )


def _owner(folder: Path) -> Owner | None:
    try:
        return Owner(**json.loads((folder / _OWNER).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _host() -> str:
    return place_of(torch.device("cpu")).host


def _started(pid: int) -> int | None:
    """When the process has started; None without one."""
    try:
        # behind the name, which may have any character in it
        return int(Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None


def _free(folder: Path) -> str:
    return f"{shutil.disk_usage(folder).free / 1e9:.2f} GB"
