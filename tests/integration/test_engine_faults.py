"""Whole runs whose engines die, hang or do not start: all optimizer steps are made, on checked weights."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path

import psutil
import pytest

from megatron_vespo.observability.metrics import read_metrics
from megatron_vespo.system.http import EngineRequestError, get_json
from megatron_vespo.system.ports import find_free_port
from tests.support.runs import START_S, Run, nothing_left, train_command
from tests.support.servers import make_tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

STEPS = 5


class Faulty(Run):
    """A run of two engines, if `flags` do not say otherwise. While `gate` exists no reward comes."""

    def __init__(self, model: Path, folder: Path, *flags: str):
        self.gate, self.out = folder / "gate", folder / "out"
        questions = folder / "questions.jsonl"
        rows = [{"question": f"{i} + 1 = ?", "answer": str(self.gate)} for i in range(16)]
        questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
        # long completions: generation takes seconds, and is where an engine is hit
        default = "--rollout-engines 2 --max-completion-tokens 1000 --max-tokens-per-gpu 4096 --no-hf-export "
        default += "--reward-function tests.support.run_rewards:behind_a_gate --reward-timeout 300"
        steps = ("--train-iters", str(STEPS))
        super().__init__(
            train_command(model, questions, self.out, *steps, *default.split(), *flags), folder / "log"
        )

    def wait_for_step(self, step: int) -> None:
        self.wait_for_output(f"\n{step}/{STEPS} ")

    def wait_until_generating(self, url: str) -> None:
        self.wait_until(lambda: sum(x["num_running_reqs"] for x in get_json(url, "/v1/loads", 30)["loads"]))

    def engine(self, number: int) -> psutil.Process:
        """The scheduler, an engine's innermost process."""
        [found] = self.schedulers(number)
        return found

    def finished(self) -> list[dict]:
        """The records of a run that has made all its steps and left nothing behind."""
        self.finish()
        print(*(line for line in self.output.splitlines() if "engine" in line), sep="\n")
        summary = json.loads((self.out / "summary.json").read_text())
        assert summary["steps"] == STEPS and summary["max_logprob_difference"] <= 1e-4
        records = read_metrics(self.out / "metrics.jsonl")
        batches = [record for record in records if "reward/mean" in record]
        assert [record["step"] for record in batches] == list(range(1, STEPS + 1))
        assert all(record["policy/version"] == record["step"] for record in batches)
        assert all(record["sync/weight_check_seconds"] > 0 for record in batches)
        assert records[-1]["check/last_sync_logprob_difference"] <= 1e-4
        return batches


@pytest.fixture(scope="module")
def dense_model(tmp_path_factory) -> Path:
    """In completions so long two experts come so close that engine and trainer may choose differently."""
    return make_tiny_model(tmp_path_factory.mktemp("dense"), seed=0, dense=True)


@pytest.fixture()
def start(dense_model, tmp_path):
    runs = []

    def start(*flags: str) -> Faulty:
        runs.append(Faulty(dense_model, tmp_path, *flags))
        return runs[-1]

    yield start
    for run in runs:
        run.kill()


def wait_until_healthy(url: str) -> None:
    deadline = time.monotonic() + START_S
    while True:
        try:
            get_json(url, "/health", 30)
            break
        except EngineRequestError:
            assert time.monotonic() < deadline
            time.sleep(0.5)
    time.sleep(3)  # whoever looks after it has seen it


def test_an_engine_killed_in_generation_serves_again(start):
    port = find_free_port("127.0.0.1")
    run = start("--rollout-port", str(port))
    run.wait_for_step(1)
    run.wait_until_generating(f"http://127.0.0.1:{port + 1}")
    run.engine(1).kill()
    run.gate.touch()
    run.wait_for_output("is started again", 30)
    wait_until_healthy(f"http://127.0.0.1:{port + 1}")
    run.gate.unlink()
    batches = run.finished()
    assert [record["engines/serving"] for record in batches] == [2, 2, 2, 2, 2]
    assert batches[-1]["engines/restarts"] == 1 and batches[-1]["engines/lost_requests"] > 0
    said = r"engine http://127.0.0.1:\d+ died \(signal SIGKILL\); 1 of 2 engines serve, "
    assert re.search(said + r"engine 1 is started again \(restart 1 of 3\)", run.output)
    assert "engine 1 serves again (2 of 2 engines serve)" in run.output


def test_the_only_engine_is_killed(start):
    """Nobody else can go on: the batch waits until it is back, with the weights that began it."""
    port = find_free_port("127.0.0.1")
    run = start("--rollout-engines", "1", "--rollout-port", str(port))
    run.wait_for_step(2)
    run.wait_until_generating(f"http://127.0.0.1:{port}")
    run.engine(0).kill()
    batches = run.finished()
    assert [record["engines/restarts"] for record in batches] == [0, 0, 1, 1, 1]
    assert batches[-1]["engines/lost_requests"] > 0
    assert "engine 0 serves again (1 of 1 engines serve)" in run.output


def test_an_engine_that_hangs_in_generation_is_started_again(start):
    """In the background, while the rest of the run waits for a reward."""
    port = find_free_port("127.0.0.1")
    flags = ["--max-staleness", "1", "--engine-health-timeout", "15", "--rollout-port", str(port)]
    run = start(*flags)
    run.wait_for_step(1)
    run.gate.touch()
    time.sleep(0.5)
    os.killpg(os.getpgid(run.engine(1).pid), signal.SIGSTOP)
    run.wait_for_output(f"engine http://127.0.0.1:{port + 1} hangs: it has generated nothing for 15 s", 60)
    wait_until_healthy(f"http://127.0.0.1:{port + 1}")
    run.gate.unlink()
    batches = run.finished()
    assert batches[-1]["engines/serving"] == 2 and batches[-1]["engines/restarts"] == 1
    assert all(record["staleness/total_max"] <= 1 for record in batches)
    assert "engine 1 serves again (2 of 2 engines serve)" in run.output


@pytest.mark.parametrize("how", ["killed", "hangs"])
def test_an_engine_lost_in_a_sync(start, how):
    """It hangs when the sync begins, and is killed in it or not: the other one gets the weights anew."""
    run = start("--weight-sync-timeout", "60" if how == "killed" else "15")
    run.wait_for_step(1)
    run.gate.touch()
    time.sleep(5)  # generation has ended, rewards wait
    engine = run.engine(1)
    engine.suspend()
    run.gate.unlink()
    if how == "killed":
        time.sleep(5)
        assert "\n2/" not in run.output
        engine.kill()
    batches = run.finished()
    assert batches[1]["engines/restarts"] == 1 and batches[1]["engines/serving"] == 1
    said = r" died \(signal SIGKILL\)" if how == "killed" else r": /begin_weight_update did not answer: .*"
    assert re.search(rf"engine http://[\d.:]+{said}; 1 of 2 engines serve, engine 1 is st", run.output)


@pytest.mark.parametrize("victim", ["sglang::scheduler", "ray::EngineActor"])
def test_an_engine_killed_while_it_starts(start, victim):
    run = start("--rollout-engines", "1")
    run.wait_until(lambda: run.titled(victim))
    [found, *_] = run.titled(victim)
    time.sleep(2)
    found.kill()
    batches = run.finished()
    assert [record["engines/restarts"] for record in batches] == [1] * STEPS
    assert "0 of 1 engines serve, engine 0 is started again (restart 1 of 3)" in run.output


def test_a_wrong_flag_of_sglangs_ends_the_run_with_the_end_of_its_log(start):
    run = start("--sglang-kv-cache-dtype", "fp99")
    began = time.monotonic()
    assert run.wait(START_S) == 1, run.output
    print(f"{time.monotonic() - began:.0f} s", run.output[-2000:])
    assert nothing_left(run)
    assert re.search(
        r"megatron-vespo: engine http://\S+ died \(exit status \d+\); the end of .*log:", run.output
    )
    assert "fp99" in run.output
