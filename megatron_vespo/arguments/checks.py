"""What the commands check of their flags alike."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from argparse import ArgumentTypeError
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_vespo.data.jsonl import kind
from megatron_vespo.data.located import reason

MOST_SEED = 2**32 - 1  # numpy's


def check_folder(flag: str, folder: Path | str | None, writable: bool = False) -> None:
    """ValueError where `folder` cannot be made, as it or one above it is no folder. None passes.

    With `writable` also where nothing can be written into it. It is not made here.
    """
    if folder:
        _check_folder(f"{flag} {folder}", Path(folder), writable)


def check_seed(seed: int, least: int = 0, most: int = MOST_SEED) -> None:
    """ValueError for a seed that the generators of random numbers do not take."""
    if not least <= seed <= most:
        raise ValueError(f"--seed is {seed}, must be between {least} and {most}")


def check_positive(args: Any, names: Iterable[str]) -> None:
    """ValueError for the first of these numbers that is 0, negative or NaN; one that is not given passes."""
    for name in names:
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise ValueError(f"--{name.replace('_', '-')} is {value:g}, must be positive")


def json_object(text: str) -> dict[str, Any]:
    """The type of a flag whose value is a JSON object."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ArgumentTypeError(f"{text!r}: {reason(error)}") from error
    if not isinstance(value, dict):
        raise ArgumentTypeError(f"{text!r}: must be a JSON object, it is {kind(value)}")
    return value


def check_output_file(flag: str, path: Path | None) -> None:
    """ValueError where a file cannot be written; its folder may be made. None passes."""
    if path is None:
        return
    _check_reachable(f"{flag} {path}", path)
    if path.is_dir():
        raise ValueError(f"{flag} {path}: is a folder, not a file")
    _check_folder(f"{flag} {path}", path.parent, writable=True)


def _check_reachable(where: str, path: Path) -> None:
    try:
        os.stat(path)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR):  # a name too long, links that go in a circle
            raise ValueError(f"{where}: {error.strerror}") from error


def _check_folder(where: str, folder: Path, writable: bool) -> None:
    folder = Path(os.path.abspath(folder))
    _check_reachable(where, folder)
    while not os.path.lexists(folder):
        folder = folder.parent
    if not folder.is_dir():
        raise ValueError(f"{where}: {folder} is not a folder")
    if not writable:
        return
    try:
        with tempfile.TemporaryFile(dir=folder):  # permissions alone do not tell of read-only file systems
            pass
    except OSError as error:
        raise ValueError(f"{where}: nothing can be written into {folder}: {error.strerror}") from error
