"""The sentences about what a run does."""

from __future__ import annotations

import math

import pytest

from megatron_vespo.observability.activity import (
    NO_ENGINES,
    Background,
    EngineStates,
    Noteworthy,
    OpenPhase,
    sentence,
)

TWO = EngineStates(2, 2, 2, (), 3)
ONE = EngineStates(1, 1, 1)
DOWN = EngineStates(2, 0, 1, ((1, 2),), 3)


@pytest.mark.parametrize(
    ("phase", "engines", "words"),
    [
        (OpenPhase("generate", 310, 512), TWO, "Generating 512 responses with 2 engines: 310 done"),
        (OpenPhase("generate", 0, 4096), ONE, "Generating 4,096 responses with 1 engine: 0 done"),
        (OpenPhase("generate"), NO_ENGINES, "Generating responses"),
        (
            OpenPhase("generate", 3, 4),
            DOWN,
            "Waiting for engines: 1 of 2 ready, restarting engine 1 (restart 2 of 3)",
        ),
        (OpenPhase("evaluate", 3, 4), EngineStates(1, 0, 0), "Waiting for engines: 0 of 1 ready"),
        (
            OpenPhase("sync"),
            EngineStates(1, 0, 0, ((0, 1),), 3),
            "Waiting for engines: 0 of 1 ready, restarting engine 0 (restart 1 of 3)",
        ),
        (OpenPhase("sync"), DOWN, "Syncing weights to 1 engine"),
        (OpenPhase("reward", 0, 512), TWO, "Scoring 512 responses"),
        (OpenPhase("train", 2, 4), TWO, "Training step 3 of 4 in this batch"),
        (OpenPhase("train"), TWO, "Training"),
        (OpenPhase("sync"), TWO, "Syncing weights to 2 engines"),
        (OpenPhase("sync"), NO_ENGINES, "Syncing weights"),
        (OpenPhase("evaluate", 3, 512), TWO, "Evaluating on held-out prompts: 3 of 512 responses"),
        (OpenPhase("save"), TWO, "Saving a checkpoint"),
        (OpenPhase("start SGLang"), EngineStates(2, 0, 1, ((1, 0),)), "Starting 2 engines: 1 ready"),
        (OpenPhase("start Ray"), NO_ENGINES, "Starting Ray"),
        (OpenPhase("another phase"), TWO, "Another phase"),
    ],
)
def test_sentences(phase, engines, words):
    assert sentence(phase, engines, None) == words


def test_generation_in_the_background():
    phase, ready = OpenPhase("generate"), Background(3, 8)
    assert sentence(phase, TWO, ready) == "Waiting for a rollout batch: 3 of 8 groups are ready"
    assert sentence(phase, DOWN, ready).startswith("Waiting for engines: 1 of 2 ready")


@pytest.mark.parametrize(
    ("engines", "words"),
    [
        (NO_ENGINES, ""),
        (ONE, "1 engine serves"),
        (TWO, "all 2 engines serve"),
        (DOWN, "0 of 2 engines serve, restarting engine 1 (restart 2 of 3)"),
        (EngineStates(3, 2, 2, (), 3, (0,)), "2 of 3 engines serve, engine 0 is given up"),
    ],
)
def test_the_engines_condition(engines, words):
    assert engines.condition() == words


def test_alarms_are_told_with_the_step_they_came_on():
    seen = Noteworthy()
    on = {"alarm/ess_collapse": 1.0}
    for step, alarms in ((4, {}), (8, on), (12, on | {"alarm/gradient_spike": 1.0})):
        seen.update(step, alarms)
    assert seen.warnings() == ["2 alarms: ess collapse since step 8, gradient spike since step 12"]
    seen.update(16, {"alarm/gradient_spike": 1.0})
    assert seen.warnings() == ["1 alarm: gradient spike since step 12"]
    seen.update(20, {})
    assert seen.warnings() == ["no alarm now, the last was gradient spike at step 12"]
    seen.update(24, on)
    assert seen.warnings() == ["1 alarm: ess collapse since step 24"]


def test_failed_rewards_and_checkpoints():
    seen = Noteworthy()
    assert seen.warnings() == [] and seen.checkpoint(0.0) == "" and seen.accuracy() == ""
    seen.update(4, {"reward/error_count": 3.0, "reward/timeout_count": 2.0})
    assert seen.warnings() == ["5 rewards failed or timed out in the last batch"]
    seen.update(8, {"reward/error_count": math.nan})
    assert seen.warnings() == []
    seen.saved = 8, 100.0
    assert [seen.checkpoint(100.0 + s) for s in (5, 130, 3 * 3600 + 70)] == [
        "last checkpoint: step 8, just now",
        "last checkpoint: step 8, 2 min ago",
        "last checkpoint: step 8, 3 h 1 min ago",
    ]
