"""Real SGLang servers on tiny random weights."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from megatron_vespo.system.plugins import load_runtime_plugins
from megatron_vespo.types import Prompt
from tests.support.servers import make_tiny_model, start_in_short_lived_thread, tiny_engine


def pytest_collection_modifyitems(items):
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.integration)


@pytest.fixture(scope="session", autouse=True)
def runtime_plugins() -> None:
    """On a machine without CUDA, sets what the servers inherit in their environment."""
    load_runtime_plugins()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory, runtime_plugins) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny_model"), seed=0)


@pytest.fixture(scope="session")
def engine(tiny_model, tmp_path_factory):
    """One running server for all tests that leave it as they found it (the weights, that is)."""
    engine = tiny_engine(tiny_model, tmp_path_factory.mktemp("engine") / "engine.log")
    start_in_short_lived_thread(engine)
    yield engine
    engine.stop(timeout_s=0)


@pytest.fixture(scope="session")
def prompts() -> list[Prompt]:
    draw = random.Random(0)
    return [
        Prompt(prompt_id, [draw.randrange(3, 98) for _ in range(length)], answer="", text="")
        for prompt_id, length in enumerate((1, 2, 5, 14, 60))
    ]
