"""A random model, samples with the reference's log-probs, and training runs of it, one a layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.launch import PROGRAMS, TIMEOUT_S, Result, launch
from tests.support.named_layouts import LAYOUTS
from tests.support.random_task import Task, make_task

TRAINING_FLAGS = "--ratio-denominator decoupled --lr 3e-5 --lr-warmup-iters 3".split()


@pytest.fixture(scope="session")
def task(tmp_path_factory) -> Task:
    return make_task(tmp_path_factory.mktemp("task"))


@pytest.fixture(scope="session")
def on_task(task, tmp_path_factory) -> Callable[..., list[Result]]:
    """Run a program, by its file's name, with the task's model and samples."""

    def run(program: str, num_ranks: int, *flags: str) -> list[Result]:
        arguments = ["--hf-checkpoint", str(task.model), "--samples", str(task.samples_file), *flags]
        folder = tmp_path_factory.mktemp(Path(program).stem)
        return launch(PROGRAMS / program, num_ranks, arguments, TIMEOUT_S, folder)

    return run


@pytest.fixture(scope="session")
def naive_steps(task, tmp_path_factory) -> Result:
    """What programs/naive_steps.py finds."""
    arguments = ["--model", str(task.model), "--samples", str(task.samples_file)]
    folder = tmp_path_factory.mktemp("naive")
    return launch(PROGRAMS / "naive_steps.py", 1, arguments, TIMEOUT_S, folder, preloaded=False)[0]


@pytest.fixture(scope="session")
def train(on_task) -> Callable[..., list[Result]]:
    """Run programs/train.py at a layout of LAYOUTS, with further flags."""

    def run(layout: str, *flags: str) -> list[Result]:
        num_ranks, layout_flags = LAYOUTS[layout]
        more = ["--max-tokens-per-gpu", "256", *TRAINING_FLAGS, *layout_flags.split(), *flags]
        return on_task("train.py", num_ranks, *more)

    return run


@pytest.fixture(scope="session")
def outputs(tmp_path_factory) -> Path:
    """Checkpoints and exports of `training_run`, one folder a layout."""
    return tmp_path_factory.mktemp("outputs")


@pytest.fixture(scope="session")
def training_run(train, outputs) -> Callable[[str], list[Result]]:
    """Four steps at a layout, run once; outputs / layout gets the exports before and after, and saved."""

    finished: dict[str, list[Result] | RuntimeError] = {}

    def start(layout: str) -> list[Result]:
        folder = outputs / layout
        folder.mkdir()
        return train(
            layout, "--export-before", str(folder / "before"), "--export-after", str(folder / "after"),
            "--save", str(folder / "saved"), "--save-after", "2",
        )  # fmt: skip

    def run(layout: str) -> list[Result]:
        if layout not in finished:
            try:
                finished[layout] = start(layout)
            except RuntimeError as error:
                finished[layout] = error  # every test that needs the run shows why there is none
        result = finished[layout]
        if isinstance(result, RuntimeError):
            raise result
        return result

    return run
