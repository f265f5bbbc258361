"""The state when a signal comes in each phase of the controller; what generates and trains is a stand-in."""

import os
import signal
from dataclasses import asdict

import pytest

from megatron_vespo.observability.metrics import batch_records, read_metrics
from megatron_vespo.system.preemption import Preempted
from tests.support.controllers import MINI_BATCHES, PROMPTS, Controller, controller

BATCHES = 4


@pytest.fixture()
def run(tmp_path) -> Controller:
    run = controller(tmp_path, "warn", BATCHES, set(), eval_interval=1)
    run.eval_prompts = PROMPTS
    before = signal.getsignal(signal.SIGTERM)
    run.preemption.listen()
    yield run
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGTERM, before)


def interrupt(owner, name: str, call: int) -> None:
    """Let the signal come in the so many-th call of a method, which then does its work."""
    original, calls = getattr(owner, name), 0

    def interrupted(*arguments, **named):
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments, **named)

    setattr(owner, name, interrupted)


def train_until_preempted(run: Controller) -> dict:
    with pytest.raises(Preempted), run.preemption.guarded():
        run.train()
    return asdict(run.state)


# calls of `collect` and `score`: held-out prompts before the run, then each batch's, then held-out ones
@pytest.mark.parametrize(("part", "call"), [("collector", 4), ("scorer", 4)])
def test_a_batch_under_way_is_given_up(run, part, call, tmp_path):
    name = {"collector": "collect", "scorer": "score"}[part]
    interrupt(getattr(run.generation, part), name, call)
    state = train_until_preempted(run)
    assert state["iteration"] == MINI_BATCHES
    assert run.source.state().consumed_prompts == len(PROMPTS)
    assert not state["evaluation_due"]
    records = batch_records(read_metrics(tmp_path / "metrics.jsonl"))
    assert [record["step"] for record in records] == [MINI_BATCHES]


@pytest.mark.parametrize("part", ["prepare", "train_step", "sync"])
def test_a_batch_in_training_is_finished(run, part, tmp_path):
    owner = run.engine_sync if part == "sync" else run.trainer
    interrupt(owner, part, {"prepare": 2, "train_step": 3, "sync": 3}[part])
    state = train_until_preempted(run)
    assert state["iteration"] == 2 * MINI_BATCHES
    assert run.source.state().consumed_prompts == 2 * len(PROMPTS)
    records = batch_records(read_metrics(tmp_path / "metrics.jsonl"))
    assert [record["step"] for record in records] == [MINI_BATCHES, 2 * MINI_BATCHES]
    assert state["evaluation_due"], "it is left to the resumed run"
    assert "eval/accuracy" not in records[-1]


def test_an_evaluation_is_made_up_for(run, tmp_path):
    interrupt(run.generation.collector, "collect", 5)
    state = train_until_preempted(run)
    assert state["iteration"] == 2 * MINI_BATCHES and state["evaluation_due"]
    resumed = controller(tmp_path, "warn", BATCHES, set(), state=run.state, eval_interval=1)
    resumed.eval_prompts = PROMPTS
    assert resumed.train().iteration == BATCHES * MINI_BATCHES
    assert not resumed.state.evaluation_due
    records = [r for r in read_metrics(tmp_path / "metrics.jsonl") if "eval/accuracy" in r]
    # the resumed run's file: its batches, and what it has made up for
    assert [record["step"] for record in records] == [2 * MINI_BATCHES, 3 * MINI_BATCHES, 4 * MINI_BATCHES]


def test_save_stores_the_state_of_the_last_batch(run):
    interrupt(run.generation.collector, "collect", 4)
    state = train_until_preempted(run)
    run.save()
    assert run.trainer.saved == [state | {"consumed_prompts": len(PROMPTS)}]
