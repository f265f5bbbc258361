"""`megatron-vespo smoke` as a user runs it: all is well here, and whatever is broken is said in one line."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from tests.support.runs import Run

TIMEOUT_S = 400.0
pytestmark = pytest.mark.timeout(TIMEOUT_S + 60)
COMMAND = [sys.executable, "-m", "megatron_vespo", "smoke"]
MOST_S = 180.0  # on two cores that do nothing else


def smoke(folder: Path, *words: str) -> Run:
    return Run([*COMMAND, *words, "--output-dir", str(folder)], folder.with_suffix(".log"))


def ended(run: Run, folder: Path, code: int) -> dict:
    """smoke.json of a run that ended with this exit code and left no process."""
    with run:
        run.finish(TIMEOUT_S, code)
    print(run.output)
    return json.loads((folder / "smoke.json").read_text())


def failed(told: dict, name: str) -> dict:
    """The row of the one stage that failed; those after it did not run."""
    assert not told["ok"]
    results = [stage["result"] for stage in told["stages"]]
    [row] = [stage for stage in told["stages"] if stage["result"] == "FAIL"]
    assert row["name"] == name, row
    assert set(results[results.index("FAIL") + 1 :]) == {"not run"}
    return row


def test_all_is_well(tmp_path):
    folder = tmp_path / "out"
    run = smoke(folder)
    told = ended(run, folder, code=0)
    assert told["ok"]
    stages = {stage["name"]: stage for stage in told["stages"]}
    assert all(stage["result"] == "ok" and stage["seconds"] >= 0 for stage in stages.values())
    assert told["layout"] == "tp2,ep2 on 2 ranks, 1 engine of 1" and told["dtype"] == "torch.float32"
    model = stages["model"]["bytes"]
    assert stages["weight sync"]["bytes"] == model and stages["weight sync"]["bytes_per_second"] > 0
    assert stages["checkpoint"]["bytes"] > 3 * model  # with Adam's two moments
    assert stages["train"]["detail"].startswith("2 steps: loss ")
    assert sum(stage["seconds"] for stage in stages.values()) < MOST_S
    assert os.listdir(folder) == ["smoke.json"], "it cleans up"
    for name in stages:
        assert f" {name}: ok, " in run.output, "a live line"


@pytest.mark.slow
def test_a_colocated_recipe_that_is_too_large(tmp_path):
    recipe = tmp_path / "large.flags"
    recipe.write_text(
        "--hf-checkpoint nowhere --prompt-data nowhere --output-dir nowhere --save c --load c --async-save\n"
        "--train-iters 1500 --steps-per-rollout 4 --rollout-batch-size 1024 --lr 1e-6 --bf16 --colocate\n"
        "--trainer-ranks 32 --tensor-model-parallel-size 2 --expert-model-parallel-size 8\n"
        "--expert-tensor-parallel-size 1 --rollout-engines 16 --sglang-tp-size 2\n"
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1\n"
        "--generate-timeout 57600 --sglang-mem-fraction-static 0.6\n"
    )
    folder = tmp_path / "out"
    run = smoke(folder, str(recipe))
    told = ended(run, folder, code=0)
    assert told["ok"]
    assert told["wanted"] == "tp2,ep8 on 32 ranks, 16 engines of 2 on the same GPUs"
    assert f"wanted: {told['wanted']}\n" in run.output and told["layout"] in run.output
    assert told["layout"].startswith("tp2,ep2 on 2 ranks, 1 engine of ")
    [turn] = [stage for stage in told["stages"] if stage["name"] == "colocated turn"]
    assert turn["result"] == "ok" and turn["seconds"] > 0


@pytest.mark.slow
def test_an_engine_dies(tmp_path):
    folder = tmp_path / "out"
    run = smoke(folder)
    run.wait_for_output("start SGLang: ok", TIMEOUT_S)
    run.titled("sglang::scheduler")[0].kill()
    told = ended(run, folder, code=1)
    [row] = [stage for stage in told["stages"] if stage["result"] == "FAIL"]
    assert "engine " in row["problem"] and "\n" not in row["problem"]
    assert "logs/engine-N.log" in row["hint"]
    [logs] = folder.glob("smoke-*/logs")
    assert (logs / "engine-0.log").exists()
    assert {path.name for path in logs.parent.iterdir()} <= {"logs", "trace.json"}, "it cleans up the rest"


@pytest.mark.slow
def test_a_trainer_rank_dies(tmp_path):
    folder = tmp_path / "out"
    run = smoke(folder)
    run.wait_for_output("start Megatron: ok", TIMEOUT_S)
    run.titled("ray::TrainerWorker")[0].kill()
    told = ended(run, folder, code=1)
    assert "trainer rank" in failed(told, "first weight sync")["problem"]


@pytest.mark.slow
def test_a_weight_that_arrives_wrong(tmp_path, sglang_plugin):
    """One element of one tensor, in the engine."""
    sglang_plugin("corrupted_sync")
    folder = tmp_path / "out"
    told = ended(smoke(folder), folder, code=1)
    problem = failed(told, "weight sync")["problem"]
    assert "weights differ after the sync of version 2" in problem and "model.norm.weight" in problem


@pytest.mark.slow
def test_a_flag_that_sglang_refuses(tmp_path):
    folder = tmp_path / "out"
    told = ended(smoke(folder, "--sglang-load-format", "nonsense"), folder, code=1)
    row = failed(told, "start SGLang")
    assert "nonsense" in row["problem"] and row["problem"].startswith("engine ")


@pytest.mark.slow
def test_interrupted(tmp_path):
    folder = tmp_path / "out"
    with smoke(folder) as run:
        run.wait_for_output("start SGLang ...", TIMEOUT_S)
        run.interrupt()
        run.finish(60, code=130)
    assert run.output.endswith("megatron-vespo: interrupted\n")
