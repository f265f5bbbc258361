"""Sends a run to MLflow through the public API of its package."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_vespo.observability.trackers.tracker import SAMPLE_COLUMNS, Start, State, flat, sample_table

STATUS = {"finished": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}
MOST_PARAMETERS = 100  # of one call
LONGEST_VALUE = 500  # characters, which every version stores


class MlflowTracker:
    """MLFLOW_TRACKING_URI says where; without it, or offline, files in the run's folder `mlruns`."""

    def __init__(self, start: Start):
        uri = "" if start.offline else os.environ.get("MLFLOW_TRACKING_URI", "")
        uri = uri or (Path(start.folder).resolve() / "mlruns").as_uri()
        if uri.startswith("file:"):
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # MLflow 3.17 asks for it
        import mlflow  # pyright: ignore[reportMissingImports]: an optional extra

        self._mlflow = mlflow
        mlflow.set_tracking_uri(uri)
        experiment = mlflow.set_experiment(start.project)
        tags = dict.fromkeys(start.tags, "true") | ({"group": start.group} if start.group else {})
        new = {} if start.run_id else {"run_name": start.name, "experiment_id": experiment.experiment_id}
        run = mlflow.start_run(run_id=start.run_id, tags=tags or None, **new)
        self.run_id: str = run.info.run_id
        self.where = uri
        self._log_config(start.config, run.data.params)

    def log(self, step: int, time: float, metrics: Mapping[str, float]) -> None:
        named = {metric_name(name): value for name, value in metrics.items()}
        self._mlflow.log_metrics(named, step=step, timestamp=round(time * 1000))

    def note(self, step: int, title: str, text: str) -> None:
        self._mlflow.set_tag(metric_name(title), f"step {step}: {text}")

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        table = {"columns": list(SAMPLE_COLUMNS), "data": sample_table(rows)}
        self._mlflow.log_dict(table, f"samples/step-{step:06d}.json")

    def finish(self, state: State, summary: Mapping[str, Any], files: Sequence[Path]) -> None:
        numbers = {k: float(v) for k, v in flat(summary).items() if isinstance(v, int | float)}
        if numbers:
            self._mlflow.log_metrics({metric_name(f"summary/{name}"): v for name, v in numbers.items()})
        for path in files:
            self._mlflow.log_artifact(str(path))
        self._mlflow.end_run(STATUS[state])

    def _log_config(self, config: Mapping[str, Any], known: Mapping[str, str]) -> None:
        """Parameters cannot be changed: of a continued run, new ones are added; all are in an artifact."""
        values = {metric_name(k): str(v)[:LONGEST_VALUE] for k, v in flat(config).items()}
        new = [(name, value) for name, value in values.items() if name not in known]
        for first in range(0, len(new), MOST_PARAMETERS):
            self._mlflow.log_params(dict(new[first : first + MOST_PARAMETERS]))
        self._mlflow.log_dict(dict(config), "config.json")


def metric_name(name: str) -> str:
    """The name with the characters that MLflow takes. Only the first slash stays one.

    In its file store a metric is a file: weight/mean and weight/mean/positive cannot both exist.
    Example: "weight/mean/positive" -> "weight/mean.positive"
    """
    group, slash, rest = re.sub(r"[^\w.\- /]", "_", name).partition("/")
    return group + slash + rest.replace("/", ".")
