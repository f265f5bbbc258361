"""The timeline's file, and the shares of waiting against a count instant by instant."""

from __future__ import annotations

import json
import random
import re
import threading
import time

import numpy as np
import pytest

from megatron_vespo.observability.progress import RunDisplay
from megatron_vespo.observability.report import format_summary
from megatron_vespo.observability.tracing import ENGINES, TRAINER, Spans, Trace, idle_shares

S = 10**9


def events_of(path) -> list[dict]:
    """As a viewer reads them: a missing bracket at the end is forgiven, nothing else."""
    text = path.read_text()
    return json.loads(text if text.endswith("]\n") else text + "]")


def complete(events: list[dict]) -> list[dict]:
    return [event for event in events if event["ph"] == "X"]


def rows(events: list[dict]) -> dict[tuple[int, int], str]:
    return {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}


def test_a_finished_file_is_json_and_names_its_rows(tmp_path):
    now = time.time_ns()
    with Trace(tmp_path / "trace.json") as trace:
        trace.phase("generate", now, now + 2 * S)
        trace.requests(0, now + S, now + 2 * S, 12)
        for rank in (0, 1):
            trace.calls(rank, [("pack", now + S, now + 2 * S), ("prepare", now + S, now + 3 * S)])
    events = json.loads((tmp_path / "trace.json").read_text())
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert names == {0: "driver", 1: "trainer", 2: "engines"}
    assert rows(events) == {(0, 0): "MainThread", (1, 0): "rank 0", (1, 1): "rank 1", (2, 0): "engine 0"}
    [label] = [e["args"]["labels"] for e in events if e["name"] == "process_labels"]
    assert re.fullmatch(r"0 s is \d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC", label)
    spans = complete(events)
    assert [(e["name"], e["pid"], e["tid"], e["dur"]) for e in spans] == [
        ("generate", 0, 0, 2e6), ("generate", 2, 0, 1e6),
        ("pack", 1, 0, 1e6), ("prepare", 1, 0, 2e6), ("pack", 1, 1, 1e6), ("prepare", 1, 1, 2e6),
    ]  # fmt: skip
    assert spans[1]["args"] == {"completions": 12}
    # microseconds since the trace began, which was a moment after `now`
    assert spans[1]["ts"] - spans[0]["ts"] == pytest.approx(1e6) and -1e6 < spans[0]["ts"] <= 0


def test_an_unfinished_file_is_readable_after_every_span(tmp_path):
    trace = Trace(tmp_path / "trace.json")
    assert complete(events_of(tmp_path / "trace.json")) == []
    for number in range(1, 4):
        trace.phase("train", number, number + 1)
        assert len(complete(events_of(tmp_path / "trace.json"))) == number


def test_the_last_run_is_kept_and_a_late_thread_forgiven(tmp_path):
    path = tmp_path / "trace.json"
    for name in ("first", "second"):
        with Trace(path) as trace:
            trace.phase(name, 1, 2)
    trace.phase("late", 1, 2)
    assert [e["name"] for e in complete(events_of(path))] == ["second"]
    assert [e["name"] for e in complete(events_of(tmp_path / "trace.previous.json"))] == ["first"]


def test_threads_of_the_driver_have_rows_of_their_own(tmp_path):
    with Trace(tmp_path / "trace.json") as trace:

        def work():
            for number in range(200):
                trace.phase("generate", number, number + 1)

        threads = [threading.Thread(target=work, name=f"worker-{i}") for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    events = json.loads((tmp_path / "trace.json").read_text())
    assert set(rows(events).values()) == {f"worker-{i}" for i in range(4)}
    assert [sum(e["tid"] == row for e in complete(events)) for row in range(4)] == [200] * 4


def test_phases_of_the_display_and_spans_of_a_worker(capsys):
    seen = []
    display = RunDisplay("test", 1, on_phase=lambda *span: seen.append(span))
    spans = Spans()
    before = time.time_ns()
    with pytest.raises(KeyError), display.phase("train"), spans.span("outer"):
        with display.phase("sync"), spans.span("inner"):
            time.sleep(0.002)
        raise KeyError
    assert [name for name, _, _ in seen] == ["sync", "train"]
    taken = spans.take()
    assert [name for name, _, _ in taken] == ["inner", "outer"] and spans.take() == []
    for inner, outer in (seen, taken):
        assert before <= outer[1] <= inner[1] < inner[2] <= outer[2] <= time.time_ns()
        assert inner[2] - inner[1] >= 2e6


def test_shares_equal_a_count_of_instants():
    draw = random.Random(0)

    def intervals(number: int) -> np.ndarray:
        pairs = [sorted((draw.randrange(-5, 45), draw.randrange(-5, 45))) for _ in range(number)]
        return np.array(pairs, np.int64).reshape(-1, 2)

    for _ in range(200):
        all_rows = [intervals(draw.randrange(4)) for _ in range(draw.randrange(1, 4))]
        causes = {name: intervals(draw.randrange(4)) for name in ("a", "b")}
        start, end = draw.randrange(10), draw.randrange(20, 40)
        expected = dict.fromkeys(("a", "b", "other"), 0.0)
        for row in all_rows:
            for instant in range(start, end):
                holds = [n for n, spans in causes.items() if any(s <= instant < e for s, e in spans)]
                if not any(s <= instant < e for s, e in row):
                    expected[holds[0] if holds else "other"] += 1 / (end - start) / len(all_rows)
        assert idle_shares(all_rows, causes, start, end) == pytest.approx(expected)


def test_what_trainer_and_engines_wait_for(tmp_path):
    """Ten seconds: 4 generating (the second engine 3), 1 rewards, 3 training, 1 sync, 1 nothing."""
    with Trace(tmp_path / "trace.json") as trace:
        for name, start, end in (
            ("generate", 0, 4), ("reward", 4, 5), ("log-probs", 5, 6), ("train", 6, 8), ("sync", 8, 9),
        ):  # fmt: skip
            trace.phase(name, start * S, end * S)
        trace.requests(0, 0, 4 * S, 8)
        trace.requests(1, 0, 3 * S, 8)
        for rank in (0, 1):
            trace.calls(rank, [("pack", 5 * S, 5 * S + 1), ("prepare", 5 * S, 6 * S)])
            # half a second of the phase is not the rank's own
            trace.calls(rank, [("train_step", 6 * S, 7 * S + S // 2), ("sync_weights", 8 * S, 9 * S)])
        idle = trace.idle(0, 10 * S)
    waits = {"generation": 0.4, "rewards": 0.1, "sync": 0.1, "calls": 0.05, "saving": 0, "evaluation": 0}
    assert idle[TRAINER] == pytest.approx(waits | {"other": 0.1})
    waits = {"slower engines": 0.05, "rewards": 0.1, "training": 0.3, "sync": 0.1, "saving": 0, "other": 0.1}
    assert idle[ENGINES] == pytest.approx(waits)
    assert format_summary({"idle": idle}).splitlines() == [
        "trainer idle  75.0% of the time: generation 40.0%, sync 10.0%, rewards 10.0%, other 10.0%, "
        "calls 5.0%",
        "engines idle  65.0% of the time: training 30.0%, sync 10.0%, rewards 10.0%, other 10.0%, "
        "slower engines 5.0%",
    ]


def test_who_has_no_row_has_no_share(tmp_path):
    with Trace(tmp_path / "trace.json") as trace:
        trace.requests(0, 0, S, 1)
        assert list(trace.idle(0, 2 * S)) == [ENGINES]
