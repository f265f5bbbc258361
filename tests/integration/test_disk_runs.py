"""A whole run whose weights go through files: its metrics are those of a run by memory, bit for bit."""

from __future__ import annotations

import pytest

from megatron_vespo.observability.metrics import batch_records, read_metrics
from tests.support.runs import finished, train_command, write_questions

# seconds, memory, and what only one of the two has
OTHER = ("time/", "sync/", "memory/", "throughput/", "perf/")


@pytest.mark.slow
@pytest.mark.timeout(700)
def test_metrics_do_not_depend_on_the_way_of_weights(tiny_model, tmp_path):
    questions = write_questions(tmp_path / "questions.jsonl")
    files = tmp_path / "files"
    ways = {"auto": [], "disk": ["--weight-sync-folder", str(files)]}
    said, found, written = {}, {}, {}
    for way, flags in ways.items():
        output = tmp_path / way
        flags = ["--weight-sync", way, *flags, "--weight-check-interval", "2", "--seed", "3"]
        said[way] = finished(
            train_command(tiny_model, questions, output, *flags), tmp_path / f"{way}.log", 320
        )
        records = batch_records(read_metrics(output / "metrics.jsonl"))
        found[way] = [
            {name: value for name, value in record.items() if not is_measured(name)} for record in records
        ]
        written[way] = [record.get("sync/bytes") for record in records]
    assert len(found["auto"]) == 3
    assert found["disk"] == found["auto"]
    assert any(name.startswith("loss") or "/loss" in name for name in found["auto"][0]), found["auto"][0]
    assert "weights go to the engines shard to shard" in said["auto"]
    assert f"weights go to the engines as changes in files in {files}" in said["disk"]
    assert written["auto"] == [None] * 3 and all(size > 0 for size in written["disk"]), written
    assert list(files.iterdir()) == [], "a run that has ended leaves nothing"


def is_measured(name: str) -> bool:
    return name.startswith(OTHER) or "second" in name or "tokens_per" in name or "memory" in name
