"""Records how a run has ended in its run-NNN.json, and writes report.html, whatever the end is."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from pathlib import Path

from megatron_vespo.driver.controller import StoppedByAlarm
from megatron_vespo.driver.run import Run
from megatron_vespo.driver.run_record import RunRecord
from megatron_vespo.observability.html_report import write_report
from megatron_vespo.system.preemption import EndedBySignal

MAX_MESSAGE = 2000  # characters


def record_end(record: RunRecord, run: Run | None, error: BaseException | None) -> None:
    """Adds `outcome`, idle time and restarts to the record. `error` ended the run; None: it has finished."""
    ended = datetime.now(UTC).isoformat(timespec="seconds")
    try:
        record.add(
            outcome={"how": _how(error), "message": _message(error), "ended": ended},
            idle=run.idle_so_far() if run else {},
            trainer_restarts=run.restarts if run else [],
        )
    except OSError as problem:
        _warn(f"the run's end could not be recorded: {problem}")


def leave_report(output_dir: Path) -> None:
    """Writes report.html. If that fails, one line says so and the run ends as it would have."""
    try:
        write_report(output_dir)
    except Exception as error:
        _warn(f"report.html could not be written: {type(error).__name__}: {error}")


def end_early(output_dir: Path, record: RunRecord, run: Run | None, error: BaseException) -> None:
    """For a run that `error` ends. Before training starts the metrics are an earlier run's: no report."""
    try:
        record_end(record, run, error)
        if run is not None and run.has_started:
            leave_report(output_dir)
    except KeyboardInterrupt:  # the first error is the one to report
        _warn("interrupted before report.html was written")


def _warn(text: str) -> None:
    print("megatron-vespo: " + " ".join(text.split()), file=sys.stderr, flush=True)


def _how(error: BaseException | None) -> str:
    """One of html_report.OUTCOMES."""
    match error:
        case None:
            return "finished"
        case StoppedByAlarm():
            return "alarm"
        case EndedBySignal():
            return "preempted"
        case KeyboardInterrupt():
            return "interrupted"
    return "failed"


def _message(error: BaseException | None) -> str:
    if error is None:
        return ""
    known = isinstance(error, RuntimeError | ValueError | KeyboardInterrupt)
    text = str(error) if known else f"{type(error).__name__}: {error}"
    return text.encode("utf-8", "backslashreplace").decode()[:MAX_MESSAGE]
