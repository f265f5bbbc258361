"""Marks that all tests of a folder have."""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).parent
MARKS = {
    "cluster": [pytest.mark.integration, pytest.mark.timeout(180)],
    "distributed": [pytest.mark.distributed],
    "integration": [pytest.mark.integration],
    "slurm": [pytest.mark.integration],
    "te": [pytest.mark.te],
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for mark in MARKS.get(item.path.relative_to(HERE).parts[0], []):
            item.add_marker(mark)
