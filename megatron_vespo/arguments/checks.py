"""Checks of flags that several commands share."""

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
    """ValueError if `folder` cannot be created, because it or a parent is no folder. None passes.

    With `writable`, also if it cannot be written to. The folder is not created here.
    """
    if folder:
        _check_folder(f"{flag} {folder}", Path(folder), writable)


def check_seed(seed: int, least: int = 0, most: int = MOST_SEED) -> None:
    """ValueError for a seed that the random number generators do not accept."""
    if not least <= seed <= most:
        raise ValueError(f"--seed is {seed}, must be between {least} and {most}")


def check_positive(args: Any, names: Iterable[str]) -> None:
    """ValueError for the first of these numbers that is 0, negative or NaN; None passes."""
    for name in names:
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise ValueError(f"--{name.replace('_', '-')} is {value:g}, must be positive")


def json_object(text: str) -> dict[str, Any]:
    """The argparse type of a flag whose value is a JSON object."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ArgumentTypeError(f"{text!r}: {reason(error)}") from error
    if not isinstance(value, dict):
        raise ArgumentTypeError(f"{text!r}: must be a JSON object, it is {kind(value)}")
    return value


def check_output_file(flag: str, path: Path | None) -> None:
    """ValueError if the file cannot be written; its folder may be missing. None passes."""
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
        if error.errno not in (errno.ENOENT, errno.ENOTDIR):  # a name that is too long, a loop of links
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
        with tempfile.TemporaryFile(dir=folder):  # permissions do not show a read-only file system
            pass
    except OSError as error:
        raise ValueError(f"{where}: nothing can be written into {folder}: {error.strerror}") from error
