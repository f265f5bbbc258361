"""The real wandb, mlflow and swanlab, without a network: what they write, and a run that is continued."""

from __future__ import annotations

import json
import math
import struct
import time
import zlib
from pathlib import Path

import pytest

from megatron_vespo.observability.trackers.packages import PACKAGES
from megatron_vespo.observability.trackers.process import TrackerProcess
from megatron_vespo.observability.trackers.tracker import Start, flat, sample_text
from tests.support.tracker_files import Found, read_mlflow, read_swanlab, read_wandb, use_packages

ROWS = [
    {"step": 2, "why": "largest log W", "prompt": "1 + 1 = ?", "answer": "2", "advantage": -0.5,
     "log_w": 3.25, "weight": 0.02, "turns": [{"writer": "policy", "text": "```\n<b>2</b> é"}], "reward": 1.0,
     "finish_reason": "stop"},
]  # fmt: skip
TIME = 1_790_000_000.0
SECRET = "0123456789abcdef0123456789abcdef01234567"


def picture(path: Path) -> Path:
    """A PNG of one pixel."""
    parts = (
        (b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"\0\0")),
        (b"IEND", b""),
    )
    chunks = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts
    ]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    return path


def track(folder: Path, name: str, steps: range, run_id: str | None, state: str = "finished") -> str:
    """A start of a run; the id of the tracker's run."""
    said, started = [], []
    config = {"lr": 1e-6, "version.torch": "2.14", "values": [1, 2]}
    start = Start(str(folder), "project", "name", "group", ("one", "two"), True, run_id, config)
    process = TrackerProcess(
        name, start, folder / "logs" / f"{name}.log", said.append, lambda *told: started.append(told)
    )
    for step in steps:
        metrics = {"weight/mean": step / 2, "weight/mean/positive": math.nan, "policy/version": float(step)}
        process.send("log", step=step, time=TIME + step, metrics=metrics)
    process.send("log", step=steps[-1], time=TIME + steps[-1], metrics={"eval/accuracy": 0.5})
    process.send("samples", step=steps[-1], rows=ROWS)
    process.send("note", step=steps[-1], title="alarm.dead_share", text="half are dead")
    (report := folder / "report.html").write_text("<p>report</p>")
    files = [picture(folder / "curves.png"), report]
    process.send(
        "finish", state=state, summary={"steps": 4, "layout": {"data": 2}}, files=list(map(str, files))
    )
    process.join(time.monotonic() + 60)
    assert said == [], (folder / "logs" / f"{name}.log").read_text()
    [(found, _)] = started
    return found


def check_metrics(found: Found, positive: str) -> None:
    """Steps 1 to 4, and 3 to 5 after going back to the save of step 2."""
    steps = [1, 2, 3, 4, 3, 4, 5]
    assert found.metrics["weight/mean"] == [(step, step / 2) for step in steps]
    assert [step for step, value in found.metrics[positive] if math.isnan(value)] == steps
    assert found.metrics["eval/accuracy"] == [(4, 0.5), (5, 0.5)]


@pytest.fixture(params=sorted(PACKAGES))
def tracked(request, tmp_path, monkeypatch) -> tuple[str, str, Path]:
    """Tracker, id and folder of a run that was interrupted, went back and was finished."""
    use_packages(monkeypatch)
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.setenv("SWANLAB_API_KEY", SECRET)
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", SECRET)
    name = request.param
    first = track(tmp_path, name, range(1, 5), None, "interrupted")
    assert track(tmp_path, name, range(3, 6), first) == first
    return name, first, tmp_path


@pytest.mark.long
def test_a_run_that_is_continued_is_one_run(tracked):
    name, run_id, folder = tracked
    {"wandb": check_wandb, "mlflow": check_mlflow, "swanlab": check_swanlab}[name](folder, run_id)
    written = [path for path in folder.rglob("*") if path.is_file()]
    assert len(written) > 5
    assert not [path for path in written if SECRET.encode() in path.read_bytes()]


def check_wandb(folder: Path, run_id: str) -> None:
    found = read_wandb(folder)
    assert found.ids == [run_id, run_id] and found.names == ["name", "name"]
    check_metrics(found, "weight/mean/positive")
    assert found.times[4] == TIME + 4
    assert found.config["lr"] == 1e-6 and found.config["values"] == [1, 2]
    assert "alarm.dead_share: step 4: half are dead" in found.texts
    assert found.summary["steps"] == 4 and found.summary["layout/data"] == 2
    assert {"report.html", "samples.table.json"} <= set(found.files)
    assert found.endings == ["130", "0"]
    [table, _] = [json.loads(path.read_text()) for path in folder.rglob("*.table.json")]
    row = dict(zip(table["columns"], table["data"][0], strict=True))
    assert row["response"] == "```\n<b>2</b> é" and row["log_w"] == 3.25
    assert list(folder.rglob("media/images/curves_*.png"))


def check_mlflow(folder: Path, run_id: str) -> None:
    found = read_mlflow(folder, run_id, ["weight/mean", "weight/mean.positive", "eval/accuracy"])
    assert found.ids == [run_id] and found.names == ["name"]
    check_metrics(found, "weight/mean.positive")
    assert found.times[4] == TIME + 4
    assert found.config["lr"] == "1e-06" and found.config["version.torch"] == "2.14"
    assert {"alarm.dead_share: step 5: half are dead", "group: group", "one: true"} <= set(found.texts)
    assert found.summary["summary/layout.data"] == 2
    assert {"curves.png", "report.html", "samples/step-000004.json", "samples/step-000005.json"} <= set(
        found.files
    )
    assert found.endings == ["FINISHED"]


def check_swanlab(folder: Path, run_id: str) -> None:
    found = read_swanlab(folder)
    assert found.ids == [run_id, run_id] and found.names == ["name", "name"]
    check_metrics(found, "weight/mean/positive")
    for name in ("samples", "alarm.dead_share", "summary", "curves", "report"):
        assert [f"{name} at {step}" for step in (4, 5)] == [
            text for text in found.texts if text.startswith(f"{name} at")
        ]
    assert len(found.endings) == 2 and found.endings[0] != found.endings[1]
    texts = [path.read_text() for path in folder.rglob("media/text/*.txt")]
    assert any("````\n```\n<b>2</b> é\n````" in text and "log_w 3.25" in text for text in texts)


def test_a_response_cannot_leave_its_block():
    text = sample_text([ROWS[0] | {"turns": [{"writer": "policy", "text": "````\n# big\n```"}]}])
    assert "`````\n````\n# big\n```\n`````" in text


def test_nested_values_get_one_name():
    assert flat({"a": {"b": {"c": 1}}, "d": [2]}) == {"a/b/c": 1, "d": [2]}
