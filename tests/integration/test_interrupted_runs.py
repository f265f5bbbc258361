"""Runs that are killed, preempted or lose a trainer rank end with the numbers of a run that was not."""

from __future__ import annotations

import random
import re
import time
from pathlib import Path

import pytest

from megatron_vespo.system.preemption import EXIT_RESUME
from tests.support.interrupted import LAST, MINI_BATCHES, STEPS, command, curve
from tests.support.runs import START_S, Run, finished, nothing_left


def finish(model: Path, folder: Path, *flags: str) -> str:
    """Run to the end; what it has said."""
    return finished(command(model, folder, *flags), folder / "log")


@pytest.fixture(scope="module")
def uninterrupted(tiny_model, tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    command(tiny_model, folder)  # makes its files
    finish(tiny_model, folder)
    points = curve(folder)
    steps = [record["step"] for record in points if "train/loss" in record]
    assert steps == list(range(MINI_BATCHES, STEPS + 1, MINI_BATCHES))
    norms = [record["train/grad_norm"] for record in points if "train/loss" in record]
    assert sum(norm > 0 for norm in norms) > len(norms) / 2
    return points


@pytest.mark.slow
def test_a_dead_trainer_rank_is_replaced(tiny_model, tmp_path, uninterrupted):
    with Run(command(tiny_model, tmp_path), tmp_path.with_suffix(".log")) as run:
        run.wait_for_output(f" 6/{STEPS} ", START_S)
        run.titled("ray::TrainerWorker")[-1].kill()
        run.finish()
    assert len(re.findall(r"RESTART OF THE TRAINER from .*iter_0000004 .* died in ", run.output)) == 1
    assert "resumed at optimizer step 4," in run.output
    assert curve(tmp_path) == uninterrupted


@pytest.mark.parametrize("seconds", [0.3, pytest.param(1.5, marks=pytest.mark.slow)])
def test_a_preempted_run_goes_on_exactly(tiny_model, tmp_path, uninterrupted, seconds):
    with Run(command(tiny_model, tmp_path), tmp_path.with_suffix(".log")) as run:
        run.wait_for_output(f" 6/{STEPS} ", START_S)
        time.sleep(seconds)
        for process in run.survivors():  # as scancel does
            process.terminate()
        asked = time.monotonic()
        run.finish(60, code=EXIT_RESUME)
        print(f"ended {time.monotonic() - asked:.1f} s after SIGTERM")
    [step] = re.findall(r"ended by SIGTERM at optimizer step (\d+), which is saved: ", run.output)
    assert int(step) == curve(tmp_path)[-1]["step"] >= 6
    said = finish(tiny_model, tmp_path)
    assert f"resumed at optimizer step {step}," in said
    assert "log-probs saved with it differ by 0.0e+00 at most" in said
    assert curve(tmp_path) == uninterrupted


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_ten_kills_at_random_moments(tiny_model, tmp_path, uninterrupted):
    """The driver gets SIGKILL; what it had started must vanish by itself."""
    draw = random.Random(0)
    folder = tmp_path / "run"
    for kill in range(10):
        with Run(command(tiny_model, folder), tmp_path.with_suffix(f".{kill}")) as run:
            run.wait_for_output("start SGLang ...", START_S)
            # some fall into the start, most into training or a save of it
            time.sleep(draw.uniform(0.4, 4.0))
            run.process.kill()
            run.process.wait()
            assert nothing_left(run, timeout_s=30.0)
        print(f"kill {kill} after {run.output.splitlines()[-1][:60]!r}")
        if LAST in run.output:  # the next kill needs a run that still trains
            finish(tiny_model, folder)
            assert curve(folder) == uninterrupted
            folder = tmp_path / f"run after kill {kill}"
    finish(tiny_model, folder)
    assert curve(folder) == uninterrupted


@pytest.mark.slow
def test_a_trainer_rank_dies_while_engines_generate_in_the_background(tiny_model, tmp_path):
    flags = ["--max-staleness", "4", "--trainer-restarts", "1"]
    with Run(command(tiny_model, tmp_path, *flags), tmp_path.with_suffix(".log")) as run:
        run.wait_for_output(f" 6/{STEPS} ", START_S)
        run.titled("ray::TrainerWorker")[0].kill()
        run.finish()
    assert "RESTART OF THE TRAINER from " in run.output
    steps = [record["step"] for record in curve(tmp_path) if "train/loss" in record]
    assert steps == list(range(MINI_BATCHES, STEPS + 1, MINI_BATCHES))
