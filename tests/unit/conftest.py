"""Settings of all unit tests."""

import os
from collections.abc import Iterator

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
