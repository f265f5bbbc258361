"""What trackers have written offline, read with their packages from .venv.trackers."""

from __future__ import annotations

import json
import os
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

PACKAGES = Path(__file__).parents[2] / ".venv.trackers"  # see tests/trackers/install.sh
BLOCK, HEADER = 32768, 7  # of LevelDB's log format


@dataclass
class Found:
    """One tracker's run: an id of each start, and (step, value) of every metric as they were written."""

    ids: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    times: dict[int, float] = field(default_factory=dict)  # step -> Unix seconds of its first record
    texts: list[str] = field(default_factory=list)  # alarms, tables, everything that is no number
    summary: dict[str, Any] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)
    endings: list[str] = field(default_factory=list)

    def add(self, name: str, step: int, value: float) -> None:
        self.metrics.setdefault(name, []).append((step, value))


def use_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skips the test, or on CI fails it, where the packages are not installed."""
    if not (PACKAGES / ".ready").exists():
        reason = "no packages of trackers: tests/trackers/install.sh installs them"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    search = [os.environ.get("PYTHONPATH"), str(PACKAGES)]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, search)))
    for name in list(os.environ):
        if name.startswith(("WANDB_", "MLFLOW_", "SWANLAB_")):
            monkeypatch.delenv(name)
    if str(PACKAGES) not in sys.path:
        sys.path.append(str(PACKAGES))


def log_records(path: Path) -> Iterator[bytes]:
    """The records of a file in LevelDB's log format, which wandb writes after seven bytes of its own."""
    data, whole = path.read_bytes(), b""
    place = HEADER
    while place + HEADER <= len(data):
        if BLOCK - place % BLOCK < HEADER:  # the rest of a block is empty
            place += BLOCK - place % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + HEADER])
        if kind == 0:
            return
        whole += data[place + HEADER : place + HEADER + length]
        place += HEADER + length
        if kind in (1, 4):  # a whole record, or its last part
            yield whole
            whole = b""


def read_wandb(folder: Path) -> Found:
    from wandb.proto.wandb_internal_pb2 import Record

    found = Found()
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for data in log_records(path):
            record = Record()
            record.ParseFromString(data)
            match record.WhichOneof("record_type"):
                case "run":
                    if not found.ids or len(found.ids) < len(found.endings) + 1:
                        found.ids.append(record.run.run_id)
                        found.names.append(record.run.display_name)
                    found.config |= {u.key: json.loads(u.value_json) for u in record.run.config.update}
                case "history":
                    _add_history(found, record.history.item)
                case "alert":
                    found.texts.append(f"{record.alert.title}: {record.alert.text}")
                case "summary":
                    items = record.summary.update
                    found.summary |= {_key(i): json.loads(i.value_json) for i in items}
                case "artifact":
                    found.files += [entry.path for entry in record.artifact.manifest.contents]
                case "exit":
                    found.endings.append(str(record.exit.exit_code))
    return found


def _key(item: Any) -> str:
    return item.key or ".".join(item.nested_key)


def _add_history(found: Found, items: Any) -> None:
    row = {_key(item): json.loads(item.value_json) for item in items}
    step = row.get("optimizer_step")
    if step is None:
        return
    if "_timestamp" in row:
        found.times.setdefault(step, row["_timestamp"])
    nested = {_key(item) for item in items if len(item.nested_key) > 1}
    for name, value in row.items():
        if name in nested:  # a table or a picture
            found.texts.append(f"{name}: {value}")
        elif not name.startswith("_"):
            found.add(name, step, float(value))


def read_mlflow(folder: Path, run_id: str, metrics: list[str]) -> Found:
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow import MlflowClient

    client = MlflowClient((folder / "mlruns").as_uri())
    run, found = client.get_run(run_id), Found()
    experiments = [e for e in client.search_experiments() if e.name != "Default"]
    found.ids = [r.info.run_id for e in experiments for r in client.search_runs([e.experiment_id])]
    found.names, found.config = [run.info.run_name], dict(run.data.params)
    for name in metrics:
        for point in client.get_metric_history(run_id, name):
            found.add(name, point.step, point.value)
            found.times.setdefault(point.step, point.timestamp / 1000)
    found.texts = [f"{name}: {value}" for name, value in run.data.tags.items()]
    found.summary = {k: v for k, v in run.data.metrics.items() if k.startswith("summary/")}
    found.files = [item.path for item in client.list_artifacts(run_id)]
    found.files += [item.path for item in client.list_artifacts(run_id, "samples")]
    found.endings = [run.info.status]
    return found


def read_swanlab(folder: Path) -> Found:
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record
    from swanlab.sdk.internal.core_python.store import DataStoreReader

    found = Found()
    for path in sorted(folder.glob("swanlog/run-*/*.swanlab")):
        reader = DataStoreReader()
        reader.open(path)
        while (data := reader.scan()) is not None:
            record = Record()
            record.ParseFromString(data)
            match record.WhichOneof("record_type"):
                case "start":
                    found.ids.append(record.start.id)
                    found.names.append(record.start.name)
                case "scalar":
                    found.add(record.scalar.key, record.scalar.step, record.scalar.value.number)
                case "media":
                    found.texts.append(f"{record.media.key} at {record.media.step}")
                case "finish":
                    found.endings.append(str(record.finish.state))
    return found
