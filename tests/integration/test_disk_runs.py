"""A whole run whose weights go through files: its metrics are those of a run by memory, bit for bit."""

from __future__ import annotations

import pytest

from megatron_vespo.observability.metrics import read_metrics
from tests.support.interrupted import command, curve
from tests.support.runs import finished

# deterministic engines; a few steps, and responses that have room to end: others get no reward
FLAGS = "--train-iters 4 --save-interval 4 --weight-check-interval 2 --max-completion-tokens 48".split()


@pytest.mark.slow
@pytest.mark.timeout(700)
def test_metrics_do_not_depend_on_the_way_of_weights(tiny_model, tmp_path):
    files = tmp_path / "files"
    ways = {"auto": [], "disk": ["--weight-sync-folder", str(files)]}
    said, written = {}, {}
    for way, flags in ways.items():
        folder = tmp_path / way
        run = command(tiny_model, folder, *FLAGS, "--weight-sync", way, *flags)
        said[way] = finished(run, tmp_path / f"{way}.log", 320)
        records = read_metrics(folder / "out/metrics.jsonl")
        written[way] = [record["sync/bytes"] for record in records if "sync/bytes" in record]
    auto, disk = (curve(tmp_path / way) for way in ways)
    assert disk == auto
    assert any(record.get("train/grad_norm", 0) > 0 for record in auto), "nothing was trained"
    assert "weights go to the engines shard to shard" in said["auto"]
    assert f"weights go to the engines as changes in files in {files}" in said["disk"]
    assert not written["auto"]
    assert written["disk"] and all(size > 0 for size in written["disk"]), written
    assert list(files.iterdir()) == [], "a run that has ended leaves nothing"
