"""Every item of the pack as a test, with the packages that are installed (pytest -s prints the figures)."""

from __future__ import annotations

import os
import time

import pytest

from tests.gpu import run
from tests.gpu.items.table import ITEMS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("gpu_items")


@pytest.fixture(scope="module")
def machine():
    return run.look(os.environ)


@pytest.mark.parametrize("item", ITEMS, ids=lambda item: item.name)
def test_item(item, machine, folder):
    deadline = time.monotonic() + item.limit_s
    [result] = run.run_items([item], "cuda", machine, folder, [], deadline)
    print("\n" + run.table(result))
    if result["outcome"] == "skipped":
        pytest.skip(result["reason"])
    assert result["outcome"] == "ok", result["reason"] + "\n" + result["log"]
