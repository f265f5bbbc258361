"""Engines in the places of trainer ranks: the same numbers, and turns that really are taken."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest

from megatron_vespo.observability.metrics import batch_records, read_metrics
from megatron_vespo.system.preemption import EXIT_RESUME
from tests.support.interrupted import command, curve
from tests.support.runs import Run, finished

pytestmark = pytest.mark.slow

STEPS = 6  # three rollout batches of two
FLAGS = (
    f"--train-iters {STEPS} --rollout-engines 2 --weight-check-interval 1 --max-logprob-difference 1e-4 "
    "--sglang-log-level info"
).split()
RELEASE, SYNC, RESUME = "release_memory_occupation", "begin_weight_update", "resume_memory_occupation"
TURN = [RELEASE, RESUME, SYNC, RESUME]  # the trainer's, and back by a weight sync
FIRST_TURN = [RELEASE, RESUME, SYNC, SYNC, RESUME]  # engines hear of the plan before the first sync
LENT = [RELEASE, RESUME]  # for log-probs: of the checkpoint after four steps, of the last, of the last sync


def run_to_the_end(model: Path, folder: Path, *flags: str) -> str:
    return finished(command(model, folder, *FLAGS, *flags), folder.with_suffix(".log"))


def numbers(folder: Path) -> list[dict]:
    """The curve, without the clock of the turns and what engines that died have cost."""
    return [{k: v for k, v in r.items() if not k.startswith("engines/")} for r in curve(folder)]


def calls(folder: Path, engine: int) -> list[str]:
    """What the engine answered well, in order, of what moves memory and weights."""
    said = re.findall(r'"POST /(\w+)[^"]* HTTP/1.1" 200', log_of(folder, engine))
    return [call for call in said if call in (RELEASE, RESUME, SYNC, "generate")]


def log_of(folder: Path, engine: int) -> str:
    path = folder / f"out/logs/engine-{engine}.log"
    return path.read_text(errors="replace") if path.exists() else ""


@pytest.fixture(scope="module")
def separate(tiny_model, tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("separate")
    run_to_the_end(tiny_model, folder)
    return numbers(folder)


@pytest.fixture
def lost_memory(sglang_plugin) -> None:
    """Engines of this test lose what they give back: see programs/lost_memory.py."""
    sglang_plugin("lost_memory")


@pytest.mark.timeout(900)
def test_colocated_is_bit_for_bit_what_it_is_apart(tiny_model, tmp_path, lost_memory, separate):
    run_to_the_end(tiny_model, tmp_path / "run", "--colocate")
    assert numbers(tmp_path / "run") == separate
    steps = [record for record in separate if "train/loss" in record]
    assert len(steps) == STEPS / 2 and max(record["train/grad_norm"] for record in steps) > 0
    records = batch_records(read_metrics(tmp_path / "run/out/metrics.jsonl"))
    assert all(record["sync/weight_check_seconds"] > 0 for record in records)
    assert records[-1]["engines/turn_seconds"] > 0
    for engine in (0, 1):
        lost = re.findall("^lost: (.*)", log_of(tmp_path / "run", engine), re.MULTILINE)
        rest = "kv_cache cuda_graph"
        assert lost == [*[f"{rest} weights"] * 3, rest, f"{rest} weights", rest, rest]
        said = calls(tmp_path / "run", engine)
        assert [call for call in said if call != "generate"] == (
            FIRST_TURN + TURN + TURN + LENT + TURN + LENT + LENT
        )
    names = [event["name"] for event in json.loads((tmp_path / "run/out/trace.json").read_text())]
    assert names.count("release") == 7


@pytest.mark.timeout(900)
def test_an_engine_that_dies_in_the_trainers_turn_comes_back(tiny_model, tmp_path, lost_memory, separate):
    folder = tmp_path / "run"
    with Run(command(tiny_model, folder, *FLAGS, "--colocate"), tmp_path / "log") as run:
        run.wait_until(lambda: all(calls(folder, engine).count(RELEASE) == 2 for engine in (0, 1)))
        trainer = run.titled("ray::TrainerWorker")
        for process in trainer:
            process.suspend()
        [engine] = run.schedulers(1)
        engine.kill()
        run.wait_for_output("engine 1 is started again (restart 1 of 3)", 30)
        time.sleep(3)
        assert calls(folder, 1)[-1] == RELEASE  # not before the trainer has had its turn
        assert len(run.titled("sglang::scheduler")) == 1
        for process in trainer:
            process.resume()
        run.finish()
    assert "engine 1 serves again (2 of 2 engines serve)" in run.output
    assert numbers(folder) == separate


@pytest.mark.timeout(900)
def test_a_dead_trainer_rank_is_replaced_beside_the_engines(tiny_model, tmp_path, lost_memory, separate):
    folder = tmp_path / "run"
    with Run(command(tiny_model, folder, *FLAGS, "--colocate"), tmp_path / "log") as run:
        # given back at the start, for two batches, for the checkpoint after them: this is the third batch
        run.wait_until(lambda: calls(folder, 0).count(RELEASE) == 5)
        run.titled("ray::TrainerWorker")[-1].kill()
        run.finish()
    assert len(re.findall(r"RESTART OF THE TRAINER from .* died in ", run.output)) == 1
    assert numbers(folder) == separate


@pytest.mark.timeout(900)
def test_a_preempted_run_goes_on_beside_the_engines(tiny_model, tmp_path, lost_memory, separate):
    """In the engines' turn: what they still do must not keep them from giving way for the checkpoint."""
    folder = tmp_path / "run"
    with Run(command(tiny_model, folder, *FLAGS, "--colocate"), tmp_path / "log") as run:
        # an answer of the second batch: the weights came twice before
        run.wait_until(lambda: "generate" in " ".join(calls(folder, 0)).partition(SYNC)[2].partition(SYNC)[2])
        run.process.terminate()
        run.finish(60, code=EXIT_RESUME)
    assert "is started again" not in run.output
    said = run_to_the_end(tiny_model, folder, "--colocate")
    assert "resumed at optimizer step" in said
    assert numbers(folder) == separate


@pytest.mark.timeout(400)
def test_an_engine_of_two_ranks_beside_two(tiny_model, tmp_path, lost_memory):
    flags = ["--colocate", "--rollout-engines", "1", "--sglang-tp-size", "2"]
    run_to_the_end(tiny_model, tmp_path / "run", *flags)
    lost = log_of(tmp_path / "run", 0).count("lost: kv_cache cuda_graph weights\n")
    assert lost == 2 * 4  # by both of its ranks
    records = read_metrics(tmp_path / "run/out/metrics.jsonl")
    assert records[-1]["check/last_sync_logprob_difference"] <= 1e-4
