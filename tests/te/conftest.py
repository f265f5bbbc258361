"""Runs under Transformer Engine, in processes that alone can import it, and the same runs without."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from tests.distributed import launch as launcher
from tests.distributed.launch import REPOSITORY, TIMEOUT_S, Result
from tests.distributed.random_task import Task, make_task

HERE = Path(__file__).parent
PACKAGES = REPOSITORY / ".venv.te"  # see install.sh
SERVER_ENVIRONMENT = {
    "PYTHONPATH": ":".join(map(str, (REPOSITORY, PACKAGES, HERE / "support"))),
    "TRITON_INTERPRET": "1",  # TE's permutations are Triton kernels
}


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.te)


@pytest.fixture(scope="session")
def task(tmp_path_factory) -> Task:
    def transformers_log_probs(model: Path, samples_file: Path, *flags: str) -> np.ndarray:
        arguments = ["--model", str(model), "--samples", str(samples_file), *flags]
        program = launcher.PROGRAMS / "transformers_log_probs.py"
        folder = tmp_path_factory.mktemp("transformers")
        return launcher.launch(program, 1, arguments, TIMEOUT_S, folder, preloaded=False)[0]["log_probs"]

    return make_task(tmp_path_factory.mktemp("task"), transformers_log_probs)


@pytest.fixture(scope="session")
def with_te() -> Iterator[ProcessPoolExecutor]:
    """A process whose `launch` forks ranks from a server that has imported Transformer Engine."""
    if not (PACKAGES / ".ready").exists():
        pytest.fail("run tests/te/install.sh, as tests/run.sh does")
    with ProcessPoolExecutor(
        1,
        multiprocessing.get_context("spawn"),
        launcher.configure,
        (["te_on_cpu"], SERVER_ENVIRONMENT),
    ) as executor:
        yield executor


@pytest.fixture(scope="session")
def run(with_te, task, tmp_path_factory) -> Callable[..., list[Result]]:
    """Run one of the programs here on the task: `run(te, program, num_ranks, *flags)`."""

    def start(te: bool, program: str, num_ranks: int, *flags: str) -> list[Result]:
        arguments = ["--hf-checkpoint", str(task.model), "--samples", str(task.samples_file), *flags]
        folder = tmp_path_factory.mktemp(f"{Path(program).stem}-{'te' if te else 'local'}-")
        call = (launcher.launch, HERE / "programs" / program, num_ranks, arguments, TIMEOUT_S, folder)
        return with_te.submit(*call).result() if te else call[0](*call[1:])

    return start
