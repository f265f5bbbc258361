"""What the tab Curves gets: metrics read as they grow, also after a cut; alarms, restarts, idle time."""

import asyncio
import json
import math
import os

import pytest
from aiohttp.test_utils import TestClient, TestServer

from megatron_vespo.commands.view.explanations import PAGE, explanations, parse
from megatron_vespo.commands.view.growing_file import GrowingFile
from megatron_vespo.commands.view.idle_time import IdleTime
from megatron_vespo.commands.view.metrics_api import read_curves
from megatron_vespo.commands.view.metrics_log import MetricsLog
from megatron_vespo.commands.view.runs import Run, Runs
from megatron_vespo.commands.view.server import make_app
from megatron_vespo.observability.metrics import MetricsWriter, read_metrics
from megatron_vespo.observability.tracing import Trace
from tests.support import run_folders


class TestGrowingFile:
    def test_each_line_comes_once_and_a_half_one_not_at_all(self, tmp_path):
        path = tmp_path / "file"
        path.write_bytes(b"one\ntwo\nthr")
        file = GrowingFile(path)
        assert file.read() == (True, [b"one", b"two"])
        assert file.read() == (False, [])
        with path.open("ab") as stream:
            stream.write(b"ee\nfour\n")
        assert file.read() == (False, [b"three", b"four"])

    @pytest.mark.parametrize("after", [b"one\n", b"one\nTWO\nthree\nfour\n", b""])
    def test_a_file_that_was_replaced_begins_anew(self, tmp_path, after):
        path = tmp_path / "file"
        path.write_bytes(b"one\ntwo\nthree\n")
        file = GrowingFile(path)
        file.read()
        path.with_name("new").write_bytes(after)
        os.replace(path.with_name("new"), path)
        assert file.read() == (True, after.splitlines())

    @pytest.mark.parametrize("after", [b"one\n", b"one\nTWO\nthree\nfour\n"])
    def test_also_if_its_inode_is_the_same(self, tmp_path, after):
        path = tmp_path / "file"
        path.write_bytes(b"one\ntwo\nthree\n")
        file = GrowingFile(path)
        file.read()
        path.write_bytes(after)  # truncates
        assert file.read() == (True, after.splitlines())

    def test_long_lines_and_many(self, tmp_path, monkeypatch):
        monkeypatch.setattr("megatron_vespo.commands.view.growing_file._CHUNK", 7)
        path = tmp_path / "file"
        lines = [b"x" * (i % 40) for i in range(3000)]
        path.write_bytes(b"\n".join(lines))
        file = GrowingFile(path)
        assert file.read()[1] == lines[:-1]
        with path.open("ab") as stream:
            stream.write(b"\nend\n")
        assert file.read() == (False, [lines[-1], b"end"])


@pytest.fixture
def run(tmp_path) -> Run:
    return Run("one", run_folders.write_run(tmp_path / "one", 10))


def read(log: MetricsLog, *names: str, since: dict | None = None) -> dict:
    before = since or {"generation": 0, "records": 0}
    return read_curves(log, list(names), before["generation"], before["records"])


def test_all_values_and_their_places(run):
    wanted = read_metrics(run.path / "metrics.jsonl")
    found = read(MetricsLog(run), "reward/mean", "eval/accuracy", "no/such")
    assert (
        found["records"] == len(wanted) == 16 and found["bad_lines"] == 0 and "no/such" not in found["series"]
    )
    assert found["step"] == [record["step"] for record in wanted]
    assert found["time"] == [record["time"] for record in wanted]
    for name in ("reward/mean", "eval/accuracy"):
        series = found["series"][name]
        assert dict(zip(series["at"], series["value"], strict=True)) == {
            index: record[name] for index, record in enumerate(wanted) if name in record
        }
    tokens = [record.get("train/tokens", 0.0) for record in wanted]
    assert found["tokens"] == [math.fsum(tokens[: index + 1]) for index in range(len(tokens))]
    assert found["names"] == sorted({name for record in wanted for name in record} - {"step", "time"})
    assert found["started"] == run_folders.BEGIN - 60


def test_only_what_is_new(run):
    log = MetricsLog(run)
    first = read(log, "reward/mean")
    more = list(run_folders.records(12))[-3:]
    half = json.dumps({"step": 99, "time": 1.0, "reward/mean": 0.5})
    run_folders.append(run.path, *more)
    with (run.path / "metrics.jsonl").open("a") as stream:
        stream.write(half[:20])
    second = read(log, "reward/mean", since=first)
    assert (second["from"], second["records"]) == (16, 19) and second["generation"] == first["generation"]
    assert second["series"]["reward/mean"]["value"] == [r["reward/mean"] for r in more if "reward/mean" in r]
    assert set(second["series"]["reward/mean"]["at"]) <= {16, 17, 18}
    with (run.path / "metrics.jsonl").open("a") as stream:
        stream.write(half[20:] + "\n")
    third = read(log, "reward/mean", since=second)
    assert third["step"] == [99] and third["series"]["reward/mean"] == {"at": [19], "value": [0.5]}


def test_a_resume_that_cuts_the_file_begins_anew(run):
    log = MetricsLog(run)
    first = read(log, "reward/mean")
    writer = MetricsWriter(run.path, resume_step=20)  # as the training does it
    writer.write(24, {"reward/mean": 0.125, "policy/version": 6.0})
    writer.close()
    second = read(log, "reward/mean", since=first)
    assert second["generation"] > first["generation"] and second["from"] == 0
    assert second["step"] == [record["step"] for record in read_metrics(run.path / "metrics.jsonl")]
    assert max(second["step"]) == 24 and second["series"]["reward/mean"]["value"][-1] == 0.125
    assert second["tokens"][-1] < first["tokens"][-1]


def test_a_file_that_vanishes_and_comes_again(run):
    log = MetricsLog(run)
    first = read(log, "reward/mean")
    (run.path / "metrics.jsonl").rename(run.path / "metrics.previous.jsonl")
    gone = read(log, "reward/mean", since=first)
    assert gone["records"] == 0 and gone["names"] == []
    run_folders.append(run.path, *run_folders.records(2))
    assert read(log, "reward/mean", since=gone)["records"] == 4


def test_what_json_does_not_know_and_lines_that_are_no_records(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "time": 1.0, "a/b": "NaN", "c/d": "-Infinity", "heldout/accuracy": 0.5}\n'
        'rubbish\n[1]\n{"step": 2}\n{"step": 3, "time": 2.0, "a/b": 1.0}\n\n'
    )
    log = MetricsLog(Run("x", tmp_path))
    found = read(log, "a/b", "c/d", "eval/accuracy")
    assert found["step"] == [1, 3] and found["bad_lines"] == 4
    assert math.isnan(found["series"]["a/b"]["value"][0]) and found["series"]["c/d"]["value"] == [-math.inf]
    assert found["series"]["eval/accuracy"]["value"] == [0.5]


def test_a_counter_of_engines_that_is_no_number(tmp_path):
    lines = [
        {"step": step, "time": float(step), "policy/version": step, "engines/restarts": count}
        for step, count in enumerate((0.0, float("nan"), float("inf"), 2.0, float("-inf"), 2.0))
    ]
    run_folders.append(tmp_path, *lines)
    [event] = read(MetricsLog(Run("x", tmp_path)))["events"]
    assert (event["name"], event["step"]) == ("2 engines were restarted", 3)


NESTED = "[" * 100_000  # deeper than json follows


def test_a_line_that_json_cannot_follow_loses_no_other_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(f'{NESTED}\n{{"step": 3, "time": 2.0, "a": 1.0}}\n')
    (tmp_path / "run-001.json").write_text(NESTED)
    found = read(MetricsLog(Run("x", tmp_path)), "a")
    assert found["step"] == [3] and found["bad_lines"] == 1 and found["started"] == 2.0


@pytest.mark.parametrize(
    "line", [NESTED, '{"ph": "X", "pid": 0, "tid": 0, "name": "train", "ts": 1, "dur": 1e40}']
)
def test_a_line_of_the_timeline_that_is_no_event_is_left_out(run, line):
    idle = IdleTime(run).read()
    with (run.path / "trace.json").open("a") as stream:
        stream.write(f"\n{line},\n")
    (run.path / "summary.json").write_text(NESTED)
    assert IdleTime(run).read() == idle


def test_a_star_stands_for_all_names_that_begin_so(run):
    found = read(MetricsLog(run), "time/*", "reward/mean", "time/train")
    assert set(found["series"]) == {"reward/mean"} | {
        f"time/{phase}" for phase in ("generate", "reward", "log-probs", "train", "sync")
    }


def test_alarms_where_they_go_on(tmp_path):
    log = MetricsLog(Run("x", tmp_path))
    on = {4: False, 8: True, 12: True, 16: False, 20: True}
    for step, alarm in on.items():
        values = {"policy/version": 1.0} | ({"alarm/gradient_spike": 1.0} if alarm else {})
        run_folders.append(tmp_path, {"step": step, "time": float(step), **values})
        run_folders.append(tmp_path, {"step": step, "time": float(step), "eval/accuracy": 0.5})
    events = read(log)["events"]
    assert [(event["kind"], event["name"], event["step"]) for event in events] == [
        ("alarm", "gradient spike", 8),
        ("alarm", "gradient spike", 20),
    ]


def test_restarts_of_the_run_and_of_engines(run):
    began = run_folders.BEGIN + 5 * run_folders.BATCH_S + 10
    run_folders.write_start(run.path, 2, began, resumed_from="/ckpt/iter_0000020")
    run_folders.append(
        run.path,
        {"step": 44, "time": run_folders.BEGIN + 400, "engines/restarts": 2.0, "policy/version": 1.0},
    )
    events = read(MetricsLog(run))["events"]
    assert [(event["kind"], event["name"], event["step"]) for event in events] == [
        ("restart", "start 2: resumed from iter_0000020", 20),
        ("engine", "2 engines were restarted", 44),
    ]
    assert events[0]["time"] == pytest.approx(began, abs=1) and events[0]["tokens"] > 0


class TestIdleTime:
    def test_a_finished_run_says_it_in_its_summary(self, tmp_path):
        path = run_folders.write_run(tmp_path / "x", 4, finished=True)
        found = IdleTime(Run("x", path)).read()
        assert found["source"] == "summary.json" and found["idle"] == run_folders.idle_shares()

    def test_a_run_that_went_on_since_has_an_old_summary(self, tmp_path):
        path = run_folders.write_run(tmp_path / "x", 4, finished=True)
        os.utime(path / "summary.json", (1, 1))
        assert IdleTime(Run("x", path)).read()["source"] == "trace.json"

    def test_a_run_that_goes_on_has_its_timeline(self, run):
        idle = IdleTime(run)
        found = idle.read()
        # the last event of a file that is being written has no end of line yet
        seconds = 9 * 30 + 29.0
        assert found["source"] == "trace.json"
        assert found["idle"]["trainer"]["generation"] == pytest.approx(10 * 18 / seconds)
        assert found["idle"]["engines"]["training"] == pytest.approx(10 * 10.5 / seconds)
        assert idle.read() == found
        mean = sum(part["idle"]["trainer"]["generation"] for part in found["parts"]) / len(found["parts"])
        assert mean == pytest.approx(found["idle"]["trainer"]["generation"], rel=1e-3)

    def test_it_is_what_the_run_itself_says(self, tmp_path):
        second = 10**9
        with Trace(tmp_path / "trace.json") as trace:
            begin = trace._origin
            for batch in range(3):
                at = begin + 10 * second * batch
                trace.phase("generate", at, at + 6 * second)
                trace.requests(0, at, at + 6 * second, 8)
                trace.requests(1, at, at + (3 + batch) * second, 8)
                trace.phase("train", at + 6 * second, at + 10 * second)
                trace.calls(0, [("train_step", at + 6 * second, at + 9 * second)])
            wanted = trace.idle(begin, begin + 30 * second)
        found = IdleTime(Run("x", tmp_path)).read()["idle"]
        assert found.keys() == wanted.keys() == {"trainer", "engines"}
        for kind, shares in wanted.items():
            assert found[kind] == pytest.approx(shares, abs=1e-6)

    def test_no_file_no_answer(self, tmp_path):
        assert IdleTime(Run("x", tmp_path)).read() == {"source": None, "idle": {}, "parts": []}


def test_explanations_are_those_of_the_page():
    found = explanations()
    assert PAGE.is_file() and found["eval/accuracy"].startswith("mean reward on the held-out prompts")
    assert "](" not in "".join(found.values()) and "weight/<name>/positive" in found


def test_the_same_names_what_it_is_the_same_as():
    page = "| `a/b`, `a/c` | [sums](x.md#y) of `z` |\n| `a/d` | the same: mean |\n| `a/e` | the same: max |\n"
    assert parse(page) == {
        "a/b": "sums of z",
        "a/c": "sums of z",
        "a/d": "the same: mean (as for a/b, a/c: sums of z)",
        "a/e": "the same: max (as for a/b, a/c: sums of z)",
    }


@pytest.mark.parametrize(
    ("path", "status", "said"),
    [
        ("runs/one/curves?name=a/b", 200, None),
        ("runs/one/curves?generation=-1", 400, "generation"),
        ("runs/one/curves?from=1e9", 400, "from"),
        ("runs/two/curves", 404, "there is no run two"),
        ("runs/one/idle", 200, None),
        ("runs/one/nothing", 404, "Not Found"),
        ("metrics", 200, None),
    ],
)
def test_replies(run, path, status, said):
    found, body = asyncio.run(ask(run, path))
    assert found == status and (said is None or said in body["error"])


def test_a_folder_that_has_gone_is_said(run):
    runs = Runs([run.path])
    run.path.rename(run.path.with_name("moved"))
    found, body = asyncio.run(ask(run, "runs/one/curves", runs))
    assert found == 410 and "has gone" in body["error"]


async def ask(run: Run, path: str, runs: Runs | None = None) -> tuple[int, dict]:
    async with TestClient(TestServer(make_app(runs or Runs([run.path]), "t"))) as client:
        joint = "&" if "?" in path else "?"
        async with client.get(f"/api/{path}{joint}token=t") as reply:
            return reply.status, await reply.json()
