"""report.html: what it says of a run, of any folder, and that text in it stays text."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser

import pytest

from megatron_vespo.observability.html_charts import Curve, Panel, draw, log_ticks, thinned, ticks
from megatron_vespo.observability.html_parts import safe
from megatron_vespo.observability.html_report import alarm_episodes, render, write_report
from megatron_vespo.observability.run_files import RunFiles
from tests.support.finished_runs import (
    batch,
    evaluation,
    finished,
    sample,
    start_record,
    whole_run,
    write_run,
)

VOID = {"meta", "br", "img", "link", "input", "hr"}
LIMIT = 2 * 2**20  # bytes that can be mailed


class Page(HTMLParser):
    """The text and elements of a page whose tags are all closed in order."""

    def __init__(self, source: str):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], ""
        self.feed(source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data


def page(folder) -> Page:
    written = write_report(folder)
    assert written == folder / "report.html" and written.stat().st_size < LIMIT
    return Page(written.read_text(encoding="utf-8"))


def test_a_whole_run(tmp_path):
    found = page(whole_run(tmp_path / "tiny"))
    for words in (
        "Run tiny",
        "The run has finished. 40 of 40 optimizer steps are done.",
        "models/base",
        "25.0% → 80.0%",
        "12 min 30 s",
        "75% of the responses reach --max-completion-tokens.",  # the alarm's rule says it again
        "Raise it, or make responses end",
        "8 to 12",
        "35.0% to 45.0%",
        "on 200 prompts",
        "Optimizer step 20",
        "/data/checkpoints/iter_0000020",
        "RESTART OF THE TRAINER from x: rank 1 died",
        "megatron-vespo train --lr 1e-6 --sglang-api-key '<left out>'",
        "/home/user/work",
        "commit 0123abcd, without changes",
        "node-1",
        "all 3 applied",
        "trainer idle: 25.0% of the time: generation 25.0%",
    ):
        assert words in found.text, words
    assert found.tags.count("figure") == 8
    assert "step 8: truncated responses" in found.text and "step 20: resumed" in found.text


def test_it_loads_nothing_and_runs_nothing(tmp_path):
    found = page(whole_run(tmp_path))
    assert not {"script", "img", "link", "iframe", "object", "form", "base"} & set(found.tags)
    names = {name for name, _ in found.attributes}
    assert not {name for name in names if name.startswith("on")} | (names & {"src", "srcset", "style"})
    links = [value for name, value in found.attributes if name in ("href", "xlink:href")]
    assert links and all(link.startswith("#") for link in links)
    (policy,) = [value for name, value in found.attributes if name == "content" and "default-src" in value]
    assert policy.startswith("default-src 'none'; style-src 'sha256-")


def test_hostile_text_stays_text(tmp_path):
    found = page(whole_run(tmp_path))
    assert "<script>document.title='hacked'</script><img src=x onerror=alert(1)>" in found.text
    assert (
        "</pre></body></html>" in found.text and "&lt;b&gt;" in found.text and "שלום עולם مرحبا" in found.text
    )
    assert r"lone \ud800 nul \x00 escape \x1b[31m" in found.text
    assert ("dir", "auto") in found.attributes


def test_long_texts_are_cut(tmp_path):
    turns = [{"writer": "policy" if i % 2 == 0 else "tool", "text": "&" * 10**5} for i in range(50)]
    rows = [sample(step, "", turns=turns, prompt='"' * 10**6) for step in (4, 4, 4, 4, 4, 8, 12)]
    record = start_record(
        command="x" * 10**6,
        changed={f"flag_{i}": "y" * 10**4 for i in range(200)},
        outcome=finished("failed", "z" * 10**6),
    )
    folder = write_run(tmp_path, [(s, batch(s)) for s in range(1, 5001)], starts=[record], samples=rows)
    found = page(folder)
    assert "… and 94,000 more characters" in found.text and "and 30 more turns" in found.text
    assert found.text.count("Largest log W") == 6  # four of a step


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("alarm", "An alarm stopped the run."),
        ("preempted", "The run was preempted."),
        ("interrupted", "The run was interrupted."),
        ("failed", "The run failed."),
    ],
)
def test_other_ends(tmp_path, how, words):
    record = start_record(outcome=finished(how, "why <it> ended"))
    stale = {"steps": 4, "train_seconds": 99.0, "paths": {"checkpoint": "of an earlier run"}}
    folder = write_run(tmp_path, [(4, batch(4))], starts=[record], summary=stale)
    text = page(folder).text
    assert f"{words} 4 of 40 optimizer steps are done." in text and "why <it> ended" in text
    assert "of an earlier run" not in text


def test_an_old_folder_has_metrics_alone(tmp_path):
    text = page(write_run(tmp_path, [(4, batch(4)), (8, batch(8))])).text
    assert "has not ended yet, or was killed" in text and "8 optimizer steps are done" in text
    assert "Accuracy" in text and "Sample responses" not in text and "Flags" not in text


def test_a_folder_without_metrics_gets_no_report(tmp_path):
    assert write_report(tmp_path) is None and not list(tmp_path.iterdir())


def test_a_summary_of_fewer_steps_is_an_earlier_one(tmp_path):
    folder = write_run(tmp_path, [(8, batch(8))], starts=[start_record()], summary={"steps": 4})
    assert RunFiles.read(folder).summary == {}
    (folder / "summary.json").write_text(json.dumps({"steps": 8}))
    assert RunFiles.read(folder).summary == {"steps": 8}


def test_broken_files_are_as_if_missing(tmp_path):
    folder = whole_run(tmp_path)
    with (folder / "metrics.jsonl").open("a") as stream:
        stream.write('[1]\n{"step": "x"}\n')
    with (folder / "sample-responses.jsonl").open("a") as stream:
        stream.write('{"step": 44, "wh')
    for name in ("summary.json", "run-001.json", "run-002.json"):
        (folder / name).write_text("{")
    (folder / "run-abc.json").write_text("{}")
    run = RunFiles.read(folder)
    assert (run.last_step, len(run.samples), run.starts, run.summary) == (40, 5, [], {})
    assert "40 optimizer steps are done" in Page(render(run)).text


def test_a_part_that_cannot_be_made_is_one_line(tmp_path):
    record = start_record(packages=5, changed="lr", outcome="finished")
    text = page(write_run(tmp_path, [(4, batch(4))], starts=[record])).text
    assert text.count("This part could not be made: ") == 2  # flags and software
    assert "10.0% → 10.0%" in text and "4 of 40 optimizer steps are done" in text


def test_rewards_that_are_no_shares_are_numbers(tmp_path):
    records = [(0, evaluation(-0.5)), (4, batch(4, **{"reward/mean": -3.0})), (8, evaluation(1.5))]
    text = page(write_run(tmp_path, records)).text
    assert "-0.500 → 1.500" in text and "-0.550 to -0.450" in text and "Mean reward" in text
    assert "-50.0%" not in text and "Accuracy" not in text


def test_numbers_that_are_none_are_not_drawn(tmp_path):
    bad = {"reward/mean": math.nan, "train/grad_norm": math.inf, "ratio/log_w_mean": 1e308}
    records = [(4, batch(4)), (8, batch(8, **bad)), (12, batch(12, **{"check/max_logprob_difference": 0.0}))]
    source = write_report(write_run(tmp_path, records)).read_text()
    drawn = re.findall(r' (?:d|x|y|x1|y1)="([^"]*)"', source)
    assert drawn and not any(word in value for value in drawn for word in ("nan", "inf", "e+"))


def test_alarms_in_stretches():
    on = {"alarm/a": 1.0}
    batches = [
        {"step": s} | (on if s in (2, 3, 6) else {}) | ({"alarm/b": 1.0} if s == 3 else {}) for s in range(8)
    ]
    assert alarm_episodes(batches) == {"a": [(2, 3), (6, 6)], "b": [(3, 3)]}


def test_text_that_html_cannot_hold():
    assert safe("a\x00\x9f\ud800\ufdd0\U0001ffff\t\n<") == r"a\x00\x9f\ud800\ufdd0\U0001ffff" + "\t\n&lt;"
    assert safe("abcd", 2) == "ab … and 2 more characters"


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.25, 0.5, 0.75, 1]),
        (0.25, 0.98, [0.2, 0.4, 0.6, 0.8, 1]),
        (-0.3, 0.1, [-0.3, -0.2, -0.1, 0, 0.1]),
        (3, 3, [1, 2, 3, 4, 5]),
    ],
)
def test_ticks_are_round_and_hold_the_values(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize("high", [1e-9, 5e-7, 0.7, 123.0, 1e40])
def test_ticks_hold_any_range(high):
    found = ticks(-high / 3, high)
    assert found[0] <= -high / 3 and found[-1] >= high * (1 - 1e-9) and 3 <= len(found) <= 7
    powers = log_ticks(1e-12, high)
    assert powers[0] <= 1e-12 and powers[-1] >= high and len(powers) <= 7


def test_a_thinned_curve_keeps_its_peaks():
    points = [(float(i), 0.0) for i in range(10_000)]
    points[5001], points[5002] = (5001.0, 7.0), (5002.0, -7.0)
    kept = thinned(points, 300)
    assert len(kept) <= 300 and {points[5001], points[5002]} <= set(kept) and kept == sorted(kept)


def test_values_are_where_they_should_be():
    chart = draw(Panel("t", [Curve("c", [(0, 0.0), (5, 0.5), (10, 1.0)], "c1")]))
    assert 'd="M50.0 196.0L241.0 102.0L432.0 8.0"' in chart  # 0 to 1 over the whole area
    assert "step 5\nc: 0.5" in chart
    assert draw(Panel("t", [Curve("c", [], "c1")])) == ""


def test_bars_stand_on_each_other():
    curves = [Curve("a", [(1, 1.0), (2, 1.0)], "c1"), Curve("b", [(1, 3.0), (2, 1.0)], "c2")]
    heights = re.findall(r'class="bar (c\d)" x="[\d.]+" y="([\d.]+)" width="[\d.]+" height="([\d.]+)"', draw(
        Panel("t", curves, stacked=True)
    ))  # fmt: skip
    assert heights == [
        ("c1", "149.0", "47.0"),
        ("c1", "149.0", "47.0"),
        ("c2", "8.0", "141.0"),
        ("c2", "102.0", "47.0"),
    ]
