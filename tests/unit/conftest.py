"""Settings of all unit tests."""

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor

import pytest
from hypothesis import settings

# no deadline: on a busy machine the first example pays for what torch loads; derandomised: a failure repeats
settings.register_profile("unit", deadline=None, derandomize=True)
settings.load_profile("unit")


@pytest.fixture(autouse=True)
def _environment() -> Iterator[None]:
    """What a test changes in this process's environment, no other sees."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(scope="session")
def child() -> Iterator[Callable]:
    """Calls a function in the one process of all tests that imports Megatron, which takes seconds."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield lambda function, *arguments: pool.submit(function, *arguments).result(timeout=120)
