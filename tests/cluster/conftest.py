"""Ray's fake nodes, started once for all tests that want such nodes."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest

from tests.cluster.fake_nodes import FakeNodes


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/cluster" in item.path.as_posix():
            item.add_marker(pytest.mark.integration)
            item.add_marker(pytest.mark.timeout(180))


@pytest.fixture(scope="session")
def megatron():
    """A process that imports Megatron, which changes it: `megatron(function, *arguments)`."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield lambda function, *arguments: pool.submit(function, *arguments).result(timeout=120)


@pytest.fixture(scope="module")
def fake_nodes(request):
    """Nodes are added by the tests. A module may name variables for them in ENVIRONMENT."""
    nodes = FakeNodes(**getattr(request.module, "ENVIRONMENT", {}))
    yield nodes
    nodes.close()
