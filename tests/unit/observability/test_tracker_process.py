"""Trackers that hang, raise, die or are slow: a run goes on, and says once what is wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from megatron_vespo.observability.trackers import process as module
from megatron_vespo.observability.trackers.child import serve
from megatron_vespo.observability.trackers.process import MOST_WAITING, TrackerProcess
from megatron_vespo.observability.trackers.tracker import Start

FAKE = Path(__file__).parents[2] / "support/fake_tracker.py"
METRICS = {f"group/metric_{i}": i / 7 for i in range(100)}  # as many as a rollout batch has


class Faked:
    """A tracker's process in one of the fake's modes, what was said about it, and what it has got."""

    def __init__(self, folder: Path, mode: str):
        self.path, self.said, self.started = folder / "messages", [], []
        command = [sys.executable, "-S", str(FAKE), mode, str(self.path)]
        start, log = Start(str(folder), "project", "name"), folder / "logs/tracker-fake.log"
        self.process = TrackerProcess(
            "fake", start, log, self.said.append, lambda *told: self.started.append(told), command
        )

    def log(self, number: int) -> None:
        for step in range(number):
            self.process.send("log", step=step, time=0.0, metrics=METRICS)

    def finish(self, seconds: float) -> float:
        """The seconds that the end took."""
        began = time.monotonic()
        self.process.send("finish", state="finished", summary={}, files=[])
        self.process.join(began + seconds)
        return time.monotonic() - began

    @property
    def kinds(self) -> list[str]:
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        return [line if line == "end" else json.loads(line)["kind"] for line in lines]


@pytest.fixture
def faked(tmp_path):
    made = []

    def make(mode: str) -> Faked:
        made.append(Faked(tmp_path, mode))
        return made[-1]

    yield make
    for one in made:
        one.process.kill()


def wait_for(condition, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it has not come"
        time.sleep(0.01)


def test_a_tracker_gets_everything_in_order(faked):
    one = faked("good")
    one.log(50)
    one.finish(20)
    assert one.kinds == ["start", *["log"] * 50, "finish", "end"]
    assert one.started == [("fake-id", "nowhere")] and one.said == []
    [*_, record, _, _] = one.path.read_text().splitlines()
    assert json.loads(record) == {"kind": "log", "step": 49, "time": 0.0, "metrics": METRICS}


def test_one_that_hangs_costs_nothing_and_is_named(faked, monkeypatch):
    monkeypatch.setattr(module, "SILENT_S", 0.2)
    monkeypatch.setattr(module, "POLL_S", 0.05)
    one = faked("hang")
    began = time.monotonic()
    one.log(MOST_WAITING + 100)
    took = time.monotonic() - began
    assert took < 1.0
    wait_for(lambda: any("has not answered" in line for line in one.said))
    assert 0.4 < one.finish(0.5) < 3.0
    assert not psutil.pid_exists(one.process._process.pid)
    for words in (
        "is too slow",
        "has not answered for 0.2 s",
        "not taken the end of the run",
        "records were dropped",
    ):
        assert len([line for line in one.said if words in line]) == 1, (words, one.said)


def test_one_that_raises_is_named_once_and_gets_the_rest(faked):
    one = faked("raise")
    one.log(5)
    one.finish(20)
    [line] = one.said
    assert "OSError: no route to host" in line and "tracker-fake.log" in line
    assert one.kinds[-2:] == ["finish", "end"]


def test_one_that_dies_is_named_and_left_alone(faked):
    one = faked("die")
    one.log(3)
    wait_for(lambda: one.said)
    one.log(2000)
    assert one.finish(20) < 2.0
    [line] = one.said
    assert "has ended (signal 9), the run continues without it" in line


def test_a_slow_one_gets_the_end_although_its_queue_is_full(faked, monkeypatch):
    monkeypatch.setattr(module, "MOST_WAITING", 5)
    one = faked("slow")
    one.log(100)
    one.finish(20)
    assert one.kinds[-2:] == ["finish", "end"] and len(one.kinds) < 100
    dropped = 100 - one.kinds.count("log")
    assert one.said[1:] == [f"tracker fake: {dropped} records were dropped"] and "is too slow" in one.said[0]


def test_one_that_never_ends_is_killed_at_the_deadline(faked):
    one = faked("late")
    one.log(3)
    assert 0.9 < one.finish(1.0) < 3.0
    assert one.kinds[-1] == "finish"
    assert any("1 records are missing" in line for line in one.said)


def test_a_record_costs_less_than_a_tenth_of_a_millisecond(faked):
    one = faked("good")
    wait_for(lambda: one.started)
    costs = []
    for step in range(400):
        began = time.perf_counter()
        one.process.send("log", step=step, time=0.0, metrics=METRICS)
        costs.append(time.perf_counter() - began)
    median = sorted(costs)[200]
    print(f"{median * 1e6:.1f} us a record of {len(METRICS)} metrics")
    assert median < 1e-4
    one.finish(20)
    assert one.kinds.count("log") == 400


DRIVER = """
    import sys, time
    from pathlib import Path
    from megatron_vespo.observability.trackers.process import TrackerProcess
    from megatron_vespo.observability.trackers.tracker import Start
    folder, fake = map(Path, sys.argv[1:])
    command = [sys.executable, "-S", str(fake), "good", str(folder / "messages")]
    one = TrackerProcess("fake", Start("", "", ""), folder / "log", print, lambda *told: None, command)
    print("ready", flush=True)
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        time.sleep(0.3)
        one.send("finish", state="interrupted", summary={}, files=[])
        one.join(time.monotonic() + 20)
"""


@pytest.mark.parametrize(
    ("number", "last"), [(signal.SIGINT, ["finish", "end"]), (signal.SIGKILL, ["start", "end"])]
)
def test_signals_to_the_group_leave_the_end_to_the_driver(tmp_path, number, last):
    """Ctrl-C reaches the driver's whole process group. If the driver is killed, the tracker's input ends."""
    driver = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(DRIVER), str(tmp_path), str(FAKE)],
        stdout=subprocess.PIPE, start_new_session=True, text=True,
    )  # fmt: skip
    messages = tmp_path / "messages"
    try:
        assert driver.stdout.readline() == "ready\n"
        wait_for(lambda: messages.exists() and messages.read_text())
        os.killpg(driver.pid, number)
        driver.wait(30)
        wait_for(lambda: messages.read_text().endswith("end\n"))
    finally:
        driver.kill()
        driver.wait()
        driver.stdout.close()
    lines = messages.read_text().splitlines()
    assert [line if line == "end" else json.loads(line)["kind"] for line in lines][-2:] == last


class Recording:
    """A tracker in this process whose `log` fails."""

    run_id, where = "7", "here"

    def __init__(self, start: Start):
        self.calls: list[str] = []
        made.append(self)

    def log(self, step, time, metrics):
        raise OSError("no\nroute")

    def note(self, step, title, text):
        self.calls.append(f"{step} {title} {text}")

    def samples(self, step, rows):
        self.calls.append("samples")

    def finish(self, state, summary, files):
        self.calls.append(state)


made: list[Recording] = []
START = {"kind": "start", "folder": "", "project": "p", "name": "n"}
LOG = {"kind": "log", "step": 1, "time": 0.0, "metrics": {}}
NOTE = {"kind": "note", "step": 2, "title": "alarm.x", "text": "y"}


def served(*messages: dict) -> tuple[int, list[dict]]:
    replies: list[dict] = []
    made.clear()
    return serve(Recording, [json.dumps(message) for message in messages], replies.append), replies


def test_the_first_problem_is_reported_and_the_rest_goes_on():
    code, replies = served(
        START, LOG, LOG, NOTE, {"kind": "finish", "state": "finished", "summary": {}, "files": []}
    )
    assert code == 0 and made[0].calls == ["2 alarm.x y", "finished"]
    assert [reply for reply in replies if "problem" in reply] == [{"problem": "OSError: no route"}]
    assert replies[0] == {"started": "7", "where": "here"} and replies[-2:] == [
        {"done": 5},
        {"finished": True},
    ]


def test_a_driver_that_is_gone_ends_the_run_as_failed():
    code, _ = served(START, NOTE)
    assert code == 1 and made[0].calls == ["2 alarm.x y", "failed"]


def test_a_tracker_that_cannot_start_says_why_and_ends():
    def refuse(start: Start):
        raise SystemExit("no key")

    replies: list[dict] = []
    assert serve(refuse, [json.dumps(START), json.dumps(LOG)], replies.append) == 3
    assert replies == [{"problem": "SystemExit: no key, the run continues without it"}]
