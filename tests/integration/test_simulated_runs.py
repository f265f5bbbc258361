"""Simulated seconds against those of real runs on this machine."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_vespo.commands.simulate.calibration import measure
from megatron_vespo.commands.simulate.rates import SharedCores
from megatron_vespo.commands.simulate.run import Settings, simulate
from megatron_vespo.observability.metrics import batch_records, read_metrics
from tests.support.runs import finished, train_command, write_questions

TOLERANCE = 0.15
CORES, TRAINER_RANKS = 2, 2  # both ranks and the engine want a core each
BATCHES, MINI_BATCHES, PROMPTS, COMPLETIONS = 12, 2, 16, 4
SCALE = (
    f"--train-iters {BATCHES * MINI_BATCHES} --steps-per-rollout {MINI_BATCHES} "
    f"--rollout-batch-size {PROMPTS} --group-size {COMPLETIONS} --max-completion-tokens 200"
).split()


@pytest.fixture(scope="module")
def run(tiny_model, tmp_path_factory):
    """What a run with these flags has written."""
    folder = tmp_path_factory.mktemp("simulated")
    questions = write_questions(folder / "questions.jsonl", 256)

    def start(name: str, *flags: str):
        out = folder / name
        records = ["--save-rollouts", str(folder / f"{name}-rollouts")]
        command = train_command(tiny_model, questions, out, *SCALE, *records, *flags)
        finished(command, folder / f"{name}.log")
        return out

    return start


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_synchronous_run_tells_how_long_asynchronous_ones_take(run):
    base = measure(run("synchronous"))
    rates = replace(base.rates, shared=SharedCores(CORES, TRAINER_RANKS, 1))
    cases = {0: base}
    for bound in (3, 5):
        out = run(f"bound-{bound}", "--max-staleness", str(bound))
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
