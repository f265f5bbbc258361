"""Simulated seconds against those of real runs on this machine."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from megatron_vespo.commands.simulate.calibration import measure
from megatron_vespo.commands.simulate.rates import SharedCores
from megatron_vespo.commands.simulate.run import Settings, simulate
from megatron_vespo.observability.metrics import batch_records, read_metrics
from tests.support.runs import Run, train_command
from tests.support.servers import START_TIMEOUT_S

TOLERANCE = 0.15
CORES, TRAINER_RANKS = (
    2,
    2,
)  # both ranks and the engine want a core each
BATCHES, MINI_BATCHES, PROMPTS, COMPLETIONS = 12, 2, 16, 4
SCALE = [
    *("--train-iters", str(BATCHES * MINI_BATCHES), "--steps-per-rollout", str(MINI_BATCHES)),
    *("--rollout-batch-size", str(PROMPTS), "--group-size", str(COMPLETIONS)),
    *("--max-completion-tokens", "200"),
]


@pytest.fixture(scope="module")
def finished(tiny_model, tmp_path_factory):
    """What a run with these flags has written."""
    folder = tmp_path_factory.mktemp("simulated")
    questions = folder / "questions.jsonl"
    rows = [{"question": f"{i} + 1 = ?", "answer": str(i + 1)} for i in range(256)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def finished(name: str, *flags: str):
        out = folder / name
        records = ["--save-rollouts", str(folder / f"{name}-rollouts")]
        run = Run(train_command(tiny_model, questions, out, *SCALE, *records, *flags), folder / f"{name}.log")
        try:
            assert run.wait(START_TIMEOUT_S) == 0, run.output
        finally:
            run.kill()
        return out

    return finished


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_synchronous_run_tells_how_long_asynchronous_ones_take(finished):
    base = measure(finished("synchronous"))
    rates = replace(base.rates, shared=SharedCores(CORES, TRAINER_RANKS, 1))
    cases = {0: base}
    for bound in (3, 5):
        out = finished(f"bound-{bound}", "--max-staleness", str(bound))
        cases[bound] = measure(out)
        staleness = [r["staleness/total_mean"] for r in batch_records(read_metrics(out / "metrics.jsonl"))]
        print(f"bound {bound}: mean lag measured {sum(staleness) / len(staleness):.2f}")
    errors = {}
    for bound, measured in cases.items():
        settings = Settings(
            train_steps=BATCHES * MINI_BATCHES, steps_per_rollout=MINI_BATCHES, rollout_batch_size=PROMPTS,
            group_size=COMPLETIONS, num_engines=1, max_staleness=bound,
        )  # fmt: skip
        result = simulate(settings, rates, base.lengths)
        errors[bound] = result.seconds / measured.seconds - 1
        print(
            f"bound {bound}: {result.seconds:.2f} s simulated, {measured.seconds:.2f} s measured "
            f"({errors[bound]:+.1%})"
        )
    assert max(map(abs, errors.values())) <= TOLERANCE
