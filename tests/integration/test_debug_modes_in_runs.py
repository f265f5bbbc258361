"""Recorded batches give the recording run's numbers again, without engines; rollouts without a trainer.

The same runs keep all responses with log pi per token, see --record-responses.
"""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from megatron_vespo.data.rollout_file import read_record
from megatron_vespo.data.step_records import StepRecord, read_step, step_files
from megatron_vespo.observability.metrics import batch_records, read_metrics
from tests.support.run_rewards import first_letters
from tests.support.runs import ROOT, finished, train_command, write_questions
from tests.support.step_records import log_w_of_tokens

pytestmark = pytest.mark.timeout(900)

# of the clock, of what comes of it, and of engines, which a replay has not
NOT_COMPARED = (
    "engines/",
    "time",
    "time/",
    "train/tokens_per_second",
    "rollout/tokens_per_second",
    "sync/",
)
FLAGS = "--train-iters 6 --steps-per-rollout 2 --routing-replay R3 --lr 1e-3 --no-hf-export "
FLAGS += "--reward-function tests.support.run_rewards:first_letters"


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> Path:
    return write_questions(tmp_path_factory.mktemp("questions") / "questions.jsonl")


@pytest.fixture(scope="module")
def recorded(tiny_model, questions, tmp_path_factory) -> Path:
    """A run of three rollout batches, two optimizer steps each, as a user starts it; its output folder."""
    output = tmp_path_factory.mktemp("recorded") / "out"
    flags = [*FLAGS.split(), "--record-responses", "--save-rollouts", str(output / "rollouts")]
    print(finished(train_command(tiny_model, questions, output, *flags), output.with_suffix(".log")))
    return output


def numbers(output: Path) -> list[dict[str, float]]:
    records = batch_records(read_metrics(output / "metrics.jsonl"))
    return [{name: value for name, value in r.items() if not name.startswith(NOT_COMPARED)} for r in records]


def test_a_replay_has_the_same_losses_bit_for_bit(recorded, tiny_model, tmp_path):
    command = train_command(tiny_model, Path("none"), tmp_path / "out", *FLAGS.split(), "--record-responses")
    at = command.index("--prompt-data")
    del command[at : at + 2]
    # SGLang's files can be looked at, which patches/cpu does, but nothing of it can be imported
    blocked = tmp_path / "blocked/sglang"
    blocked.mkdir(parents=True)
    (blocked / "__init__.py").write_text("raise ImportError('no SGLang here')\n")
    (blocked / "srt").symlink_to(Path(find_spec("sglang").submodule_search_locations[0]) / "srt")
    paths = os.pathsep.join([str(blocked.parent), str(ROOT)])
    command = ["env", f"PYTHONPATH={paths}", *command, "--train-from", str(recorded / "rollouts")]
    said = finished(command, tmp_path / "log")
    assert "start SGLang" not in said and not list((tmp_path / "out/logs").glob("engine*"))

    expected, seen = numbers(recorded), numbers(tmp_path / "out")
    losses = [record["train/loss"] for record in expected]
    # a batch whose groups all have equal rewards teaches nothing, and tokens are drawn at random
    assert len(losses) == 3 and len(set(losses)) > 1, "nothing was learned"
    assert [record["train/loss"] for record in seen] == losses
    assert seen == expected
    for ours, theirs in zip(steps_of(tmp_path / "out"), steps_of(recorded), strict=True):
        np.testing.assert_array_equal(ours.pi, theirs.pi)
        np.testing.assert_array_equal(ours.expert_differences, theirs.expert_differences)
        assert ours.pieces == theirs.pieces  # of --hf-checkpoint's tokenizer
    assert len(expected[0]) > 50
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["layout"]["engines"] == 0 and list(summary["idle"]) == ["trainer"]


def test_recorded_responses_can_be_read_by_people(recorded, questions):
    asked = [json.loads(line) for line in questions.read_text().splitlines()]
    for path in sorted((recorded / "rollouts").glob("*.npz")):
        completions = [c for group in read_record(path).groups for c in group]
        lines = path.with_suffix(".jsonl").read_text().splitlines()
        for line, completion in zip(map(json.loads, lines), completions, strict=True):
            row = asked[completion.prompt.prompt_id]
            assert (line["prompt_id"], line["prompt"]) == (completion.prompt.prompt_id, row["question"])
            assert (line["answer"], line["reward"]) == (row["answer"], completion.reward)
            assert (line["sampled_tokens"], line["given_tokens"]) == (len(completion.token_ids), 0)
            versions = completion.policy_versions
            assert line["policy_versions"] == [versions.oldest, versions.newest]
            assert line["mean_log_prob"] == pytest.approx(float(completion.log_probs.mean()), rel=1e-5)
            (turn,) = line["turns"]
            assert turn["writer"] == "policy" and isinstance(turn["text"], str)
            if line["finish_reason"] == "stop":
                assert line["reward"] == first_letters(turn["text"], line["answer"], {})


def steps_of(output: Path) -> list[StepRecord]:
    return [read_step(path) for _, path in step_files(output / "responses")]


def test_recorded_tokens_sum_to_log_w(recorded):
    steps = steps_of(recorded)
    assert [(one.step, one.mini_batch) for one in steps] == [(i + 1, i % 2) for i in range(6)]
    for step in steps:
        assert step.pi_old is not None
        assert (np.abs(log_w_of_tokens(step) - step.log_w) <= 1e-6 * step.num_sampled).all()
        mu = np.concatenate([one.log_probs for one in step.completions])
        log_mismatch = [one.sum() for one in step.per_sample(step.pi_old.astype(np.float64) - mu)]
        np.testing.assert_allclose(log_mismatch, step.log_mismatch, rtol=0, atol=1e-4)
    # the second step of a batch is off the policy that generated it, the first is not
    assert all(np.abs(step.log_w).max() == 0.0 for step in steps[::2])
    assert max(np.abs(step.log_w).max() for step in steps[1::2]) > 1e-3

    means = [np.concatenate([a.log_w, b.log_w]).mean() for a, b in zip(steps[::2], steps[1::2], strict=True)]
    batches = batch_records(read_metrics(recorded / "metrics.jsonl"))
    np.testing.assert_allclose([r["ratio/log_w_mean"] for r in batches], means, rtol=0, atol=1e-6)


def test_recorded_steps_are_the_batches(recorded, tiny_model, questions):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    asked = [json.loads(line) for line in questions.read_text().splitlines()]
    steps = iter(steps_of(recorded))
    for path in sorted((recorded / "rollouts").glob("*.npz")):
        expected = [c for group in read_record(path).groups for c in group]
        first, second = next(steps), next(steps)
        pairs = zip([*first.completions, *second.completions], expected, strict=True)
        for step, (ours, theirs) in zip([first] * 8 + [second] * 8, pairs, strict=True):
            np.testing.assert_array_equal(ours.token_ids, theirs.token_ids)
            np.testing.assert_array_equal(ours.log_probs, theirs.log_probs)
            assert (ours.reward, ours.policy_versions) == (theirs.reward, theirs.policy_versions)
            row = asked[ours.prompt.prompt_id]
            assert (ours.prompt.text, ours.prompt.answer) == (row["question"], row["answer"])
            # this tokenizer decodes tokens as words with blanks between them
            assert step.text(ours.token_ids).removeprefix(" ") == tokenizer.decode(ours.token_ids)
        for step in (first, second):
            assert step.group_ids.tolist() == np.repeat(np.unique(step.group_ids), 4).tolist()
            # R3: engine and trainer route by the same weights, or by weights of one step before
            assert step.expert_differences is not None and step.expert_differences.mean() < 0.5
            assert step.settings["ratio_denominator"] == "recomputed"


@pytest.mark.slow
def test_rollouts_alone(recorded, tiny_model, questions, tmp_path):
    rollouts = tmp_path / "rollouts"
    flags = [*FLAGS.split(), "--rollout-only", "--save-rollouts", str(rollouts)]
    said = finished(train_command(tiny_model, questions, tmp_path / "out", *flags), tmp_path / "log")
    assert "start Megatron" not in said and not list((tmp_path / "out/logs").glob("trainer*"))
    names = [f"batch-00000{batch}.npz" for batch in range(3)]
    of_people = [Path(name).with_suffix(".jsonl").name for name in names]
    assert sorted(path.name for path in rollouts.iterdir()) == sorted([*names, *of_people])
    for batch, name in enumerate(names):
        ours, theirs = read_record(rollouts / name), read_record(recorded / "rollouts" / name)
        assert ours.run == theirs.run
        assert [g[0].prompt for g in ours.groups] == [g[0].prompt for g in theirs.groups]
        versions = [
            {v for g in r.groups for c in g for v in c.policy_versions.versions} for r in (ours, theirs)
        ]
        assert versions == [{0}, {2 * batch}]
        assert all(c.routed_experts is not None for g in ours.groups for c in g)
    records = numbers(tmp_path / "out")
    assert [(record["step"], record["policy/version"]) for record in records] == [(2, 0), (4, 0), (6, 0)]
    assert list(json.loads((tmp_path / "out/summary.json").read_text())["idle"]) == ["engines"]


def test_the_timeline_of_a_run(recorded):
    events = json.loads((recorded / "trace.json").read_text())
    rows = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert sorted(rows.values()) == ["MainThread", "engine 0", "rank 0", "rank 1"]
    spans: dict[str, list[str]] = {row: [] for row in rows.values()}
    ends: dict[str, float] = {}
    for event in events:
        if event["ph"] == "X":
            row = rows[event["pid"], event["tid"]]
            spans[row].append(event["name"])
            assert event["dur"] >= 0
            ends[row] = event["ts"] + event["dur"]
    counts = {"generate": 3, "reward": 3, "log-probs": 3, "train": 6, "sync": 4}
    assert {name: spans["MainThread"].count(name) for name in counts} == counts
    counts = {"pack": 6, "old log-probs": 3, "take": 6, "prepare": 3, "train_step": 6, "sync_weights": 4}
    for rank in ("rank 0", "rank 1"):
        assert {name: spans[rank].count(name) for name in counts} == counts
    assert spans["engine 0"] == ["generate"] * 4  # and a few completions after the last sync
    assert max(ends.values()) - min(ends.values()) < 60e6, "microseconds, and one clock"

    idle = json.loads((recorded / "summary.json").read_text())["idle"]
    print(idle)
    assert 0 < idle["trainer"]["generation"] < sum(idle["trainer"].values()) < 1
    assert 0 < idle["engines"]["training"] < sum(idle["engines"].values()) < 1
    said = recorded.with_suffix(".log").read_text()
    assert "trainer idle " in said and "engines idle " in said
