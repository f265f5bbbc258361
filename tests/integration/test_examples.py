"""Examples as a user starts them: they learn what their README says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_vespo.observability.metrics import batch_records, read_metrics
from tests.support.runs import finished


def summary_of(example: str, folder: Path) -> dict:
    output = folder / "run"
    flags = ["--output-dir", str(output), "--save", str(output / "checkpoints")]
    finished(["bash", f"examples/{example}/run.sh", *flags], folder / "log", 900)
    summary = json.loads((output / "summary.json").read_text())
    print(summary)
    return summary


@pytest.mark.slow
@pytest.mark.timeout(960)
def test_the_calculator_example_learns_to_make_both_calls(tmp_path):
    summary = summary_of("calculator", tmp_path)
    assert summary["eval_accuracy_before"] <= 0.35
    assert summary["eval_accuracy_after"] >= summary["eval_accuracy_before"] + 0.4
    assert summary["layout"]["trainer_ranks"] == 4
    records = batch_records(read_metrics(tmp_path / "run/metrics.jsonl"))
    assert {record["check/unchanged_log_w_abs_max"] for record in records} == {0.0}
    assert max(record["check/max_logprob_difference"] for record in records) <= 1e-4


@pytest.mark.slow
@pytest.mark.timeout(960)
def test_the_code_example_learns_from_hidden_tests(tmp_path):
    summary = summary_of("code", tmp_path)
    assert summary["eval_accuracy_before"] <= 0.35
    assert summary["eval_accuracy_after"] >= summary["eval_accuracy_before"] + 0.4
    assert summary["layout"]["trainer_ranks"] == 4
