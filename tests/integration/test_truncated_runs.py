"""Whole runs with truncated sampling: asynchronous, with R3, resumed in mid-flight; and recorded batches."""

from __future__ import annotations

import json

import numpy as np
import pytest

from megatron_vespo.checkpoints.names import BUFFER_NAME
from megatron_vespo.checkpoints.run_folder import newest_save
from megatron_vespo.data.rollout_file import batch_path, read_record
from megatron_vespo.observability.metrics import batch_records, read_metrics
from tests.support.runs import finished, train_command, write_questions
from tests.support.servers import ROUTES

TRUNCATED = "--rollout-top-p 0.9 --rollout-min-p 0.01"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_asynchronous_run_that_is_resumed_in_mid_flight(tiny_model, tmp_path):
    questions = write_questions(tmp_path / "questions.jsonl", 64)
    flags = f"{TRUNCATED} --steps-per-rollout 2 --max-staleness 3 --sync-interval 1 --on-weight-update abort "
    flags += f"--routing-replay R3 --save {tmp_path / 'checkpoints'} --no-hf-export "
    flags += f"--max-completion-tokens 200 --max-logprob-difference 1e-3 --eval-data {questions} "
    flags += "--eval-prompts 2 --record-responses"
    for train_iters, more in ((4, ""), (8, f"--load {tmp_path / 'checkpoints'}")):
        recorded = tmp_path / f"rollouts-{train_iters}"
        now = f"{flags} --train-iters {train_iters} --save-rollouts {recorded} {more}".split()
        output = finished(train_command(tiny_model, questions, tmp_path / "out", *now), tmp_path / "log", 400)
        assert "every token is drawn from the 2048 likeliest at most" in output
        if train_iters == 4:
            state = np.load(newest_save(tmp_path / "checkpoints") / BUFFER_NAME)
            print(
                f"{len(state['supported'])} beginnings in the checkpoint, {state['supported'].sum()} masked"
            )
            assert state["supported"].all() and len(state["support_token_ids"])
    records = batch_records(read_metrics(tmp_path / "out/metrics.jsonl"))
    assert [record["step"] for record in records] == [2, 4, 6, 8]
    mixed = 0
    for batch in range(4):
        record = read_record(batch_path(tmp_path / f"rollouts-{4 if batch < 2 else 8}", batch))
        for completion in (completion for group in record.groups for completion in group):
            assert len(completion.supports) == completion.num_sampled
            assert completion.supports.first_outside(completion.token_ids) is None
            entered = len(completion.prompt.token_ids) + len(completion.token_ids) - 1
            assert completion.routed_experts.shape == (entered, *ROUTES)
            mixed += len(completion.policy_versions.versions) > 1
    for record in records:
        floors = {name: value for name, value in record.items() if "floor_std" in name}
        print(record["step"], record["rollout/support_size_mean"], floors)
        assert 1 < record["rollout/support_size_mean"] < 128
        assert all(abs(value) < 1e-3 for value in floors.values())
    last = read_metrics(tmp_path / "out/metrics.jsonl")[-1]
    print(f"after the last sync log-probs differ by {last['check/last_sync_logprob_difference']:.1e}")
    assert last["check/last_sync_logprob_difference"] <= 1e-4
    print(f"{mixed} responses of several policies")
    assert mixed > 0
    text = (tmp_path / "rollouts-8/batch-000003.jsonl").read_text().splitlines()
    assert all(json.loads(line)["mean_support"] >= 1 for line in text)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_recorded_batches_are_trained_on_as_they_were_drawn(tiny_model, tmp_path):
    """--train-from has no engines, and takes supports from the files, whatever its own flags."""
    questions = write_questions(tmp_path / "questions.jsonl")
    flags = f"--train-iters 2 --no-hf-export --save-rollouts {tmp_path / 'rollouts'} {TRUNCATED} "
    flags += "--ratio-denominator rollout --reward-function tests.support.run_rewards:first_letters"
    finished(train_command(tiny_model, questions, tmp_path / "out", *flags.split()), tmp_path / "log")
    again = flags.replace("--save-rollouts", "--train-from").replace(TRUNCATED, "")
    finished(train_command(tiny_model, questions, tmp_path / "again", *again.split()), tmp_path / "log-again")
    first, second = (
        batch_records(read_metrics(tmp_path / name / "metrics.jsonl")) for name in ("out", "again")
    )
    for one, other in zip(first, second, strict=True):
        assert one["train/loss"] == other["train/loss"] and one["train/grad_norm"] == other["train/grad_norm"]
        print(one["ratio/log_w_std"], one["train/loss"])
    assert first[0]["ratio/log_w_std"] <= 1e-4
