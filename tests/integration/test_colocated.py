"""Engines in the places of trainer ranks: the same numbers, and turns that really are taken."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from interrupted import command, curve
from runs import Run, nothing_left

START_S = 300.0
STEPS = 6  # three rollout batches of two
FLAGS = (
    f"--train-iters {STEPS} --rollout-engines 2 --weight-check-interval 1 --max-logprob-difference 1e-4 "
    "--sglang-log-level info"
).split()
TURNS = ("release_memory_occupation", "resume_memory_occupation")


def run_to_the_end(model: Path, folder: Path, *flags: str) -> str:
    run = Run(command(model, folder, *FLAGS, *flags), folder.with_suffix(".log"))
    try:
        assert run.wait(START_S) == 0, run.output
        assert nothing_left(run)
    finally:
        run.kill()
    return run.output


def numbers(folder: Path) -> list[dict]:
    """The curve, without the clock of the turns and what engines that died have cost."""
    return [{k: v for k, v in r.items() if not k.startswith("engines/")} for r in curve(folder)]


def calls(folder: Path, engine: int) -> list[str]:
    """What the engine answered well, in order, of what moves memory and weights."""
    log = (folder / f"out/logs/engine-{engine}.log").read_text(errors="replace")
    said = re.findall(r'"POST /(\w+)[^"]* HTTP/1.1" 200', log)
    return [call for call in said if call in (*TURNS, "begin_weight_update", "generate")]


@pytest.fixture(scope="module")
def separate(tiny_model, tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("separate")
    run_to_the_end(tiny_model, folder)
    return numbers(folder)


@pytest.mark.timeout(900)
def test_colocated_is_bit_for_bit_what_it_is_apart(tiny_model, tmp_path, separate):
    run_to_the_end(tiny_model, tmp_path, "--colocate")
    assert numbers(tmp_path) == separate
    steps = [record for record in separate if "train/loss" in record]
    assert len(steps) == STEPS / 2 and max(record["train/grad_norm"] for record in steps) > 0
    for engine in (0, 1):
        said = calls(tmp_path, engine)
        moves = [call for call in said if call != "generate"]
        sync = ["resume_memory_occupation", "begin_weight_update", "resume_memory_occupation"]
        print(moves)
        assert moves[:4] == ["release_memory_occupation", *sync]
    trace = (tmp_path / "out/trace.json").read_text()
    names = [event["name"] for event in json.loads(trace)]
    print(names.count("release"), names.count("resume"))
