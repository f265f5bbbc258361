"""Connects a run to the trackers and the Prometheus endpoint that its flags ask for."""

from __future__ import annotations

import errno
import json
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any

from megatron_vespo.arguments.train_settings import TrainSettings
from megatron_vespo.observability.trackers.packages import PACKAGES
from megatron_vespo.observability.trackers.process import TrackerProcess
from megatron_vespo.observability.trackers.prometheus import Health, PrometheusEndpoint
from megatron_vespo.observability.trackers.tensorboard import TensorBoardEvents
from megatron_vespo.observability.trackers.tracker import Start, State
from megatron_vespo.system.disk import write_atomically

IDS = "trackers.json"  # tracker -> {"project", "id", "where"} of its run
FINISH_S, INTERRUPTED_S = 30.0, 10.0  # for all trackers together to take the end of a run
END_FILES = ("curves.png", "summary.json", "report.html")
VERSIONS = (
    "torch", "megatron-core", "sglang", "ray", "transformers", "transformer_engine", "numpy",
)  # fmt: skip


class Tracking:
    """The trackers of one start of a run. No method waits for a tracker, except for the end of the run.

    Leaving it ends the trackers' runs, with the files that were written meanwhile. `config` is the content of
    the run's record. With `resumes`, the runs named in trackers.json are continued. ValueError if the port of
    --prometheus-port cannot be opened.
    """

    def __init__(
        self, settings: TrainSettings, config: Mapping[str, Any], resumes: bool, say: Callable[[str], None]
    ):
        self._settings, self._folder, self._say = settings.tracking, settings.run.output_dir, say
        self._name = self._settings.tracker_run_name or self._folder.resolve().name
        self._ids = _Ids(self._folder / IDS, keep=resumes)
        self._config = tracker_config(config)
        self._processes: dict[str, TrackerProcess] = {}
        self._started_at = time.time()
        self._step = 0
        self.trainer_restarts = 0
        self._endpoint = self._open_endpoint(settings.run.train_iters)

    @property
    def tensorboard(self) -> bool:
        return "tensorboard" in self._settings.names

    def __enter__(self) -> Tracking:
        for name in self._settings.names:
            if name in PACKAGES:
                try:
                    self._processes[name] = self._start(name)
                except OSError as error:  # no memory for a process, for example
                    self._say(f"tracker {name}: cannot be started ({error}), the run continues without it")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        state: State = "finished"
        if kind is not None:
            state = "failed" if issubclass(kind, Exception) else "interrupted"
        try:
            self._finish(state)
        finally:
            for process in self._processes.values():
                process.kill()
            if self._endpoint is not None:
                self._endpoint.close()

    def record(self, step: int, now: float, metrics: Mapping[str, float]) -> None:
        """Takes a record of metrics, see `MetricsWriter`."""
        self._step = step
        self._send("log", step=step, time=now, metrics=metrics)
        if self._endpoint is not None:
            self._endpoint.record(step, now, metrics)

    def alarm(self, step: int, name: str, text: str) -> None:
        self._send("note", step=step, title=f"alarm.{name}", text=text)

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Takes the rows of sample-responses.jsonl of one step."""
        self._send("samples", step=step, rows=[_readable(row) for row in rows])

    def attempt_started(self, number: int, step: int) -> None:
        """Says that the trainer continues after optimizer step `step`; its start `number` 0 is the first."""
        self.trainer_restarts = number
        if step or number:
            what = f"restart {number} of the trainer" if number else "the run was resumed"
            self._send("note", step=step, title="continued", text=f"{what}: it continues after step {step}")

    def watch(self, phase: Callable[[], str], engines: Any) -> None:
        """Serves the health of the run: `engines` is its EngineFleet, `phase` returns the driver's phase."""
        if self._endpoint is None:
            return

        def health() -> Health:
            counts = engines.metrics()
            return Health(
                phase=phase(),
                trainer_restarts=self.trainer_restarts,
                engines={number: float(url is not None) for number, url in enumerate(engines.urls)},
                engines_lost=len(engines.states().lost),
                engine_restarts=int(counts.get("engines/restarts", 0)),
                lost_requests=int(counts.get("engines/lost_requests", 0)),
            )

        self._endpoint.health = health

    def _send(self, kind: str, **content: Any) -> None:
        for process in self._processes.values():
            process.send(kind, **content)

    def _start(self, name: str) -> TrackerProcess:
        settings, project = self._settings, self._settings.tracker_project
        start = Start(
            folder=str(self._folder.resolve()),
            project=project,
            name=self._name,
            group=settings.tracker_group,
            tags=settings.tracker_tags or (),
            offline=settings.tracker_offline,
            run_id=self._ids.of(name, project),
            config=self._config,
        )
        log = self._folder / "logs" / f"tracker-{name}.log"
        return TrackerProcess(name, start, log, self._say, partial(self._on_started, name, project))

    def _on_started(self, name: str, project: str, run_id: str, where: str) -> None:
        try:
            self._ids.set(name, project, run_id, where)
        except OSError as error:  # a full disk; this is the thread that hears the tracker
            self._say(f"tracker {name}: a resume will begin a new run: {IDS} cannot be written ({error})")
        self._say(f"tracker {name}: run {run_id} of project {project}, {where}")

    def _open_endpoint(self, steps: int) -> PrometheusEndpoint | None:
        host, port = self._settings.prometheus_host, self._settings.prometheus_port
        if port is None:
            return None
        try:
            endpoint = PrometheusEndpoint(host, port, self._name, steps)
        except (OSError, UnicodeError) as error:
            why, other = error, "address"  # UnicodeError: no name of a host
            if isinstance(error, OSError):
                why = error.strerror
                other = "port" if error.errno in (errno.EADDRINUSE, errno.EACCES) else "address"
            raise ValueError(
                f"--prometheus-port {port}: cannot listen on {host} ({why}): choose another {other}"
            ) from error
        self._say(f"metrics for Prometheus: http://{host}:{endpoint.port}/metrics")
        return endpoint

    def _finish(self, state: State) -> None:
        files = [path for name in END_FILES if _is_newer(path := self._folder / name, self._started_at)]
        try:
            self._draw(files)
        except OSError as error:
            self._say(f"the picture for TensorBoard cannot be written: {error}")
        if not self._processes:
            return
        summary = next((json.loads(path.read_text()) for path in files if path.name == "summary.json"), {})
        self._send("finish", state=state, summary=summary, files=[str(path.resolve()) for path in files])
        deadline = time.monotonic() + (INTERRUPTED_S if state == "interrupted" else FINISH_S)
        for process in self._processes.values():
            process.join(deadline)

    def _draw(self, files: Sequence[Path]) -> None:
        """The picture, for TensorBoard."""
        pictures = [path for path in files if path.suffix == ".png"]
        if self.tensorboard and pictures:
            events = TensorBoardEvents(self._folder / "tensorboard", None)
            for path in pictures:
                events.picture(self._step, path.stem, path.read_bytes())
            events.close()


class _Ids:
    """The file of the trackers' runs. Without `keep`, it starts afresh."""

    def __init__(self, path: Path, keep: bool):
        self._path, self._lock = path, Lock()
        self._known: dict[str, dict[str, str]] = {}
        if keep and path.is_file():
            try:
                self._known = json.loads(path.read_text())
            except (ValueError, RecursionError) as error:
                raise ValueError(
                    f"{path}: not JSON ({error}): remove it to begin new runs of trackers"
                ) from error
            entries = self._known.values() if isinstance(self._known, dict) else [None]
            if not all(isinstance(entry, dict) for entry in entries):
                raise ValueError(f"{path}: holds no ids of runs: remove it to begin new runs of trackers")

    def of(self, name: str, project: str) -> str | None:
        """The tracker's run in this project."""
        entry = self._known.get(name, {})
        return entry.get("id") if entry.get("project") == project else None

    def set(self, name: str, project: str, run_id: str, where: str) -> None:
        with self._lock:
            self._known[name] = {"project": project, "id": run_id, "where": where}
            write_atomically(self._path, json.dumps(self._known, indent=1) + "\n")


def tracker_config(record: Mapping[str, Any]) -> dict[str, Any]:
    """What trackers show of a run's record: changed flags, seed, commit and the main packages' versions.

    Keys and passwords are left out of the record already.
    """
    packages, machine = record.get("packages", {}), record.get("machine", {})
    return {
        **record.get("changed", {}),
        "seed": record.get("seed"),
        "command": record.get("command"),
        "commit": (record.get("source") or {}).get("commit"),
        "host": machine.get("host"),
        "gpus": ", ".join(machine.get("gpus", ())),
        **{f"version.{name}": packages[name] for name in VERSIONS if name in packages},
    }


def _is_newer(path: Path, than: float) -> bool:
    return path.is_file() and path.stat().st_mtime >= than


def _readable(value: Any) -> Any:
    """`value` with its texts as any encoder takes them: a response may hold half a character."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, Mapping):
        return {key: _readable(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_readable(inner) for inner in value]
    return value
