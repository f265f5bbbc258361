"""Whole runs whose responses have several turns."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_vespo.data.rollout_file import batch_path, read_record
from megatron_vespo.data.step_records import read_step, step_files
from megatron_vespo.observability.metrics import read_metrics
from tests.support.runs import finished, train_command, write_questions
from tests.support.servers import ROUTES, make_tiny_model
from tests.support.step_records import log_w_of_tokens

STOPS = [1, *range(10, 25)]  # of 128 tokens: a random turn has about eight
FLAGS = (
    "--routing-replay R3 --max-completion-tokens 120 --max-logprob-difference 1e-3 "
    "--reward-function environment"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = make_tiny_model(tmp_path_factory.mktemp("stops-often"), seed=3)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": STOPS}))
    return folder


def run(model: Path, folder: Path, environment: str, *flags: str, code: int = 0) -> str:
    questions = write_questions(folder / "questions.jsonl", 64)
    chosen = f"--environment tests.support.environments:{environment} {FLAGS}".split()
    return finished(
        train_command(model, questions, folder / "out", *chosen, *flags), folder / "log", code=code
    )


def completions(folder: Path, batches: int):
    for batch in range(batches):
        record = read_record(batch_path(folder, batch))
        yield from (completion for group in record.groups for completion in group)


def check(completion) -> int:
    """Its sampled and given tokens, and how many turns it has."""
    segments = completion.segments
    given = 0
    if segments is not None:
        assert segments.writers == ("policy", "environment") * (segments.num_turns - 1) + ("policy",)
        given = len(segments) - segments.num_sampled
    sampled = len(completion.token_ids) - given
    assert len(completion.log_probs) == len(completion.policy_versions) == completion.num_sampled == sampled
    assert completion.routed_experts.shape == (
        len(completion.prompt.token_ids) + len(completion.token_ids) - 1,
        *ROUTES,
    )
    assert completion.reward == sum(completion.turn_rewards)
    return 1 if segments is None else segments.num_turns


def check_records(folder: Path, batches: int) -> None:
    """What people read of the episodes is what was recorded of them."""
    lines = [
        json.loads(line)
        for batch in range(batches)
        for line in batch_path(folder, batch).with_suffix(".jsonl").read_text().splitlines()
    ]
    for line, completion in zip(lines, completions(folder, batches), strict=True):
        writers = completion.segments.writers if completion.segments else ("policy",)
        assert [turn["writer"] for turn in line["turns"]] == list(writers)
        told = [turn["text"] for turn in line["turns"] if turn["writer"] == "environment"]
        said = [turn["text"] for turn in line["turns"] if turn["writer"] == "policy"]
        # the tiny tokenizer decodes with a space between any two tokens
        assert all(answer.replace(" ", "").endswith("letters.") for answer in told)
        assert not any("letters." in text.replace(" ", "") for text in said)
        assert line["turn_rewards"] == list(completion.turn_rewards)
        assert (line["reward"], line["sampled_tokens"]) == (completion.reward, completion.num_sampled)
        assert line["given_tokens"] == len(completion.token_ids) - completion.num_sampled


def check_recorded_tokens(folder: Path, records: list[dict]) -> None:
    """Of the run and of the one that resumed it: given tokens have no ratio, sampled ones sum to log W."""
    steps = [read_step(path) for _, path in step_files(folder / "out/responses")]
    assert [one.step for one in steps] == list(range(1, 9))
    given = 0
    for step in steps:
        assert (np.abs(log_w_of_tokens(step) - step.log_w) <= 1e-6 * step.num_sampled).all()
        assert step.expert_differences is not None
        given += sum(len(one.token_ids) - one.num_sampled for one in step.completions)
    assert given > 0
    means = [np.concatenate([a.log_w, b.log_w]).mean() for a, b in zip(steps[::2], steps[1::2], strict=True)]
    np.testing.assert_allclose([r["ratio/log_w_mean"] for r in records], means, rtol=0, atol=1e-6)


@pytest.mark.timeout(400)
def test_a_run_trains_on_the_turns_of_the_policy(model, tmp_path):
    """Engine and trainer agree on every sampled token, so the given tokens between them are the same."""
    run(model, tmp_path, "CountsLetters", "--save-rollouts", str(tmp_path / "rollouts"))
    turns = [check(completion) for completion in completions(tmp_path / "rollouts", 3)]
    check_records(tmp_path / "rollouts", 3)
    print("turns:", np.bincount(turns))
    assert max(turns) == 3
    records = [r for r in read_metrics(tmp_path / "out/metrics.jsonl") if "reward/mean" in r]
    assert [record["step"] for record in records] == [1, 2, 3]
    sampled = [c.num_sampled for c in completions(tmp_path / "rollouts", 3)]
    assert sum(record["train/tokens"] for record in records) == sum(sampled)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("on_update", ["abort", "in-place"])
@pytest.mark.parametrize("environment", ["CountsLetters", "CountsLettersAnew"])
def test_an_asynchronous_run_goes_on_with_its_episodes(model, tmp_path, on_update, environment):
    flags = "--steps-per-rollout 2 --max-staleness 3 --sync-interval 1 --no-hf-export"
    flags += f" --on-weight-update {on_update} --save {tmp_path / 'checkpoints'} --record-responses"
    for train_iters, more in ((4, ""), (8, f"--load {tmp_path / 'checkpoints'}")):
        recorded = tmp_path / f"rollouts-{train_iters}"
        now = f"{flags} --train-iters {train_iters} --save-rollouts {recorded} {more}".split()
        run(model, tmp_path, environment, *now)
    mixed = 0
    for folder, batch in ((4, 0), (4, 1), (8, 2), (8, 3)):
        record = read_record(batch_path(tmp_path / f"rollouts-{folder}", batch))
        for completion in (completion for group in record.groups for completion in group):
            check(completion)
            mixed += len(completion.policy_versions.versions) > 1
    print(mixed, "episodes of several policies")
    assert mixed > 0
    records = [r for r in read_metrics(tmp_path / "out/metrics.jsonl") if "reward/mean" in r]
    assert [record["step"] for record in records] == [2, 4, 6, 8]
    check_recorded_tokens(tmp_path, records)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_failures_of_an_environment_are_counted(model, tmp_path):
    run(model, tmp_path, "FailsSometimes", "--save-rollouts", str(tmp_path / "rollouts"))
    failed = [c for c in completions(tmp_path / "rollouts", 3) if c.environment_error]
    records = [r for r in read_metrics(tmp_path / "out/metrics.jsonl") if "reward/mean" in r]
    assert len(failed) == sum(record["reward/error_count"] for record in records) > 0
    assert {c.environment_error for c in failed} == {"RuntimeError: a quarter of all lengths"}
    assert {(c.reward, c.reward_status) for c in failed} == {(0.0, "error")}


@pytest.mark.timeout(100)
def test_a_template_without_tools_is_one_line(model, tmp_path):
    output = run(model, tmp_path, "Multiplies", code=2)
    assert "Multiplies reads tool calls as <tool_call>" in output and output.count("\n") == 1
