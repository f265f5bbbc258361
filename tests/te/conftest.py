"""Runs under Transformer Engine, in processes that alone can import it, and the same runs without."""

from __future__ import annotations

import functools
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from megatron_vespo.commands.check_layout.layout import Layout
from tests.support import launch as launcher
from tests.support.launch import REPOSITORY, TIMEOUT_S, Result
from tests.support.random_task import Task, make_task

QWEN3_MOE = "qwen3 moe"
HERE = Path(__file__).parent
PACKAGES = REPOSITORY / ".venv.te"  # see install.sh
TASK_FLAGS = "--max-tokens-per-gpu 256 --ratio-denominator decoupled --lr 3e-5".split()
SERVER_ENVIRONMENT = {
    "PYTHONPATH": ":".join(map(str, (REPOSITORY, PACKAGES, HERE / "support"))),
    "TRITON_INTERPRET": "1",  # TE's permutations are Triton kernels
}


@pytest.fixture(scope="session")
def make_model(tmp_path_factory) -> Callable[[str], Task]:
    """A random model of a kind, and samples of it; each is made once."""

    @functools.cache
    def make(kind: str) -> Task:
        return make_task(tmp_path_factory.mktemp("task"), kind)

    return make


@pytest.fixture(scope="session")
def task(make_model) -> Task:
    return make_model(QWEN3_MOE)


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
def launch(with_te, tmp_path_factory) -> Callable[..., list[Result]]:
    """`launch(te, program, num_ranks, arguments)`: with Transformer Engine, or without."""

    def start(te: bool, program: Path, num_ranks: int, arguments: Sequence[str]) -> list[Result]:
        folder = tmp_path_factory.mktemp(f"{program.stem}-{'te' if te else 'local'}-")
        call = (launcher.launch, program, num_ranks, arguments, TIMEOUT_S, folder)
        return with_te.submit(*call).result() if te else call[0](*call[1:])

    return start


@pytest.fixture(scope="session")
def on_task(launch, make_model) -> Callable[..., list[Result]]:
    """`on_task(te, program, layout, *flags)`: a program with a random model and samples of it."""

    def start(te: bool, program: Path, layout_name: str, *flags: str, kind: str = QWEN3_MOE) -> list[Result]:
        layout, task = Layout.parse(layout_name), make_model(kind)
        arguments = ["--hf-checkpoint", str(task.model), "--samples", str(task.samples_file), *TASK_FLAGS]
        del (layout_flags := layout.flags())[:2]  # the number of ranks
        return launch(te, program, layout.world_size, [*arguments, *layout_flags, *flags])

    return start
