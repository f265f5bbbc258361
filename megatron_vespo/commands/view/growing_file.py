"""Reads a file of lines while another process appends to it, or replaces it."""

from __future__ import annotations

import os
from pathlib import Path

_CHECKED = 512  # bytes before the offset that must still be the same
_CHUNK = 1 << 22


class GrowingFile:
    """Hands out every complete line once. A last line without its end is left until it has one."""

    def __init__(self, path: Path):
        self._path = path
        self._inode = -1
        self._offset = 0  # of the first byte that was not handed out
        self._before = b""  # the bytes before the offset

    def read(self) -> tuple[bool, list[bytes]]:
        """(whether the file is another one than before, new lines without their ends).

        A resumed run replaces the file by a shorter one, whose lines then all are new. FileNotFoundError if
        there is none.
        """
        with self._path.open("rb") as stream:
            inode = os.fstat(stream.fileno()).st_ino
            changed = inode != self._inode or not self._is_the_same(stream)
            if changed:
                self._inode, self._offset, self._before = inode, 0, b""
            stream.seek(self._offset)
            lines: list[bytes] = []
            rest = b""
            while chunk := stream.read(_CHUNK):
                *complete, rest = (rest + chunk).split(b"\n")
                lines += complete
                self._offset += sum(map(len, complete)) + len(complete)
                handed_out = b"".join(line + b"\n" for line in complete[-_CHECKED:])
                self._before = (self._before + handed_out)[-_CHECKED:]
        return changed, lines

    def _is_the_same(self, stream) -> bool:
        """Whether the lines that were handed out still are there. An inode's number may be used again."""
        stream.seek(self._offset - len(self._before))
        return stream.read(len(self._before)) == self._before
