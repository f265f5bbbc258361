"""Real SGLang servers on tiny random weights."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import pytest

from megatron_vespo.system.plugins import load_runtime_plugins
from megatron_vespo.types import Prompt
from tests.support.references import transformers_model
from tests.support.servers import make_tiny_model, start_in_short_lived_thread, tiny_engine


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


@pytest.fixture(scope="module")
def own_engine(tiny_model, tmp_path_factory):
    """A server of one module's, whose tests may change its weights and kill it."""
    engine = tiny_engine(tiny_model, tmp_path_factory.mktemp("own_engine") / "engine.log")
    engine.start()
    yield engine
    engine.stop(timeout_s=0)


@pytest.fixture(scope="session")
def reference(tiny_model):
    """The tiny model in transformers."""
    return transformers_model(tiny_model)


@pytest.fixture
def sglang_plugin(tmp_path, monkeypatch):
    """Call it with a name: all servers of this test load programs/NAME.py, if there is one."""

    def add(name: str) -> None:
        folder = tmp_path / "plugin"
        metadata = folder / f"{name}-1.dist-info"
        metadata.mkdir(parents=True)
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
        (metadata / "entry_points.txt").write_text(f"[sglang.srt.plugins]\n{name} = {name}:activate\n")
        program = Path(__file__).parent / f"programs/{name}.py"
        if program.exists():
            shutil.copy(program, folder)
        search = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(search))

    return add


@pytest.fixture(scope="session")
def prompts() -> list[Prompt]:
    draw = random.Random(0)
    return [
        Prompt(prompt_id, [draw.randrange(3, 98) for _ in range(length)], answer="", text="")
        for prompt_id, length in enumerate((1, 2, 5, 14, 60))
    ]
