"""What a run leaves when it ends, whatever the end is."""

from __future__ import annotations

import json
import signal

import pytest

from megatron_vespo.driver import run_end
from megatron_vespo.driver.controller import StoppedByAlarm
from megatron_vespo.driver.run_end import end_early, leave_report, record_end
from megatron_vespo.driver.run_record import RunRecord
from megatron_vespo.system.preemption import EndedBySignal, Preempted
from tests.support.finished_runs import batch, start_record, write_run


class Run:
    has_started = True
    restarts = ["2026-01-02T03:04:05+00:00 RESTART OF THE TRAINER"]

    def idle_so_far(self):
        return {"trainer": {"sync": 0.5}}


@pytest.fixture
def folder(tmp_path):
    return write_run(tmp_path, [(4, batch(4))])


def record_of(folder):
    return json.loads((folder / "run-001.json").read_text())


@pytest.mark.parametrize(
    ("error", "how", "message"),
    [
        (StoppedByAlarm("stopped by alarm ess_collapse"), "alarm", "stopped by alarm ess_collapse"),
        (Preempted("ended by SIGTERM at step 4"), "preempted", "ended by SIGTERM at step 4"),
        (EndedBySignal("ended by SIGTERM, not saved"), "preempted", "ended by SIGTERM, not saved"),
        (KeyboardInterrupt("interrupted at step 4"), "interrupted", "interrupted at step 4"),
        (RuntimeError("rank 1 died \ud800"), "failed", r"rank 1 died \ud800"),
        (KeyError("x"), "failed", "KeyError: 'x'"),
    ],
)
def test_the_record_and_the_report_say_how(folder, error, how, message):
    end_early(folder, RunRecord(folder, start_record()), Run(), error)
    record = record_of(folder)
    assert (record["outcome"]["how"], record["outcome"]["message"]) == (how, message)
    assert record["outcome"]["ended"].startswith("20") and record["trainer_restarts"] == Run.restarts
    assert record["idle"] == {"trainer": {"sync": 0.5}} and record["command"] == start_record()["command"]
    report = (folder / "report.html").read_text()
    assert message.replace("'", "&#x27;") in report and "RESTART OF THE TRAINER" in report


def test_a_finished_run(folder):
    record_end(RunRecord(folder, start_record()), Run(), None)
    assert record_of(folder)["outcome"]["how"] == "finished"


@pytest.mark.parametrize("run", [None, type("NotStarted", (Run,), {"has_started": False})()])
def test_before_training_there_is_no_report_of_an_earlier_runs_metrics(folder, run):
    end_early(folder, RunRecord(folder, start_record()), run, ValueError("no engine"))
    assert record_of(folder)["outcome"]["message"] == "no engine"
    assert not (folder / "report.html").exists()


@pytest.mark.parametrize("error", [OSError(28, "No space left"), KeyError("x"), MemoryError()])
def test_a_report_that_fails_is_one_line(folder, monkeypatch, capsys, error):
    def fail(folder):
        raise error

    monkeypatch.setattr(run_end, "write_report", fail)
    leave_report(folder)
    end_early(folder, RunRecord(folder, start_record()), Run(), RuntimeError("the first one"))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all("report.html could not be written" in line for line in lines)


def test_a_record_that_cannot_be_written_is_one_line(folder, monkeypatch, capsys):
    record = RunRecord(folder, start_record())

    def fail(**more):
        raise OSError(28, "No space left")

    monkeypatch.setattr(record, "add", fail)
    end_early(folder, record, Run(), RuntimeError("the first one"))
    assert capsys.readouterr().err.splitlines() == [
        "megatron-vespo: the run's end could not be recorded: [Errno 28] No space left"
    ]
    assert (folder / "report.html").exists()


def test_a_second_ctrl_c_does_not_hide_the_first_error(folder, monkeypatch, capsys):
    monkeypatch.setattr(run_end, "write_report", lambda folder: signal.raise_signal(signal.SIGINT))
    end_early(folder, RunRecord(folder, start_record()), Run(), Preempted("ended by SIGTERM"))
    assert "interrupted before report.html was written" in capsys.readouterr().err
