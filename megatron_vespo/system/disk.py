"""Writes that survive a kill or a power failure."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, BinaryIO


def sync(written: Path | IO | int) -> None:
    """Wait until the bytes of a file, or the names in a folder, are on disk.

    `written` is a path, a descriptor, or an open stream, whose buffer is flushed first.
    """
    if isinstance(written, Path):
        descriptor = os.open(written, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    elif isinstance(written, int):
        os.fsync(written)
    else:
        written.flush()
        os.fsync(written.fileno())


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A stream for new content, which replaces the file at `path` when the block ends without an error.

    If the process is killed, the file holds either the old or the new content, never a part.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as stream:
            yield stream
            sync(stream)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    partial.replace(path)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace the content of `path`, see `replacing`. Text is written as UTF-8."""
    with replacing(path) as stream:
        stream.write(content.encode() if isinstance(content, str) else content)
