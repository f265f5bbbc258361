"""What has been written outlives a machine that stops now."""

from __future__ import annotations

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Bytes of a file, or names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
