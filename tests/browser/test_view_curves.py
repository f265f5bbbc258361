"""The viewer's tabs Curves and Compare in a browser, over the real command and the files of runs."""

import os
import re
import shutil
import time
from statistics import fmean

import pytest

from megatron_vespo.observability.metrics import MetricsWriter, read_metrics
from tests.support import run_folders
from tests.support.view_server import view_server

WIDTHS = [(1280, 900), (390, 800)]


@pytest.fixture
def folder(tmp_path):
    """A finished run, one that resumed and raised an alarm, and one that still writes."""
    runs = tmp_path / "runs"
    run_folders.write_run(runs / "done", 30, seed=1, gain=2.0, finished=True, arguments={"lr": 2e-6})
    resumed = run_folders.write_run(runs / "resumed", 16, seed=2)
    run_folders.write_start(resumed, 2, run_folders.BEGIN + 8 * 30 + 5, resumed_from="/c/iter_0000032")
    [*_, newest] = (record for record in run_folders.records(17, 2) if "reward/mean" in record)
    run_folders.append(resumed, {**newest, "alarm/gradient_spike": 1.0, "train/entropy": float("nan")})
    run_folders.write_run(runs / "going", 6, seed=3)
    return runs


@pytest.fixture
def server(folder, tmp_path):
    with view_server(folder, cache=tmp_path / "cache") as server:
        yield server


@pytest.fixture(params=WIDTHS, ids=["desktop", "narrow"])
def visit(open_tab, request):
    return open_tab("", *request.param)


def show(visit, server, fragment: str = "") -> None:
    visit.page.goto(f"{server.url}{fragment}")
    visit.page.locator(".chart canvas").first.wait_for()


def value(page, chart: str, series: str = ""):
    """The element with the value of a series in a chart's legend."""
    entry = page.locator(f'[data-chart="{chart}"] .entry')
    return (entry.filter(has_text=series) if series else entry).first.locator(".value")


def series_of(folder, run: str, name: str) -> list[float]:
    return [record[name] for record in read_metrics(folder / run / "metrics.jsonl") if name in record]


def as_shown(number: float) -> str:
    """Four digits, as on the page."""
    return f"{number:.4g}"


def wait_for_text(locator, text: str, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while (found := locator.inner_text()) != text:
        assert time.monotonic() < deadline, (found, text)
        time.sleep(0.1)


def fits(page) -> bool:
    return page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_values_are_those_of_the_file(visit, server, folder):
    show(visit, server, "#curves?runs=done")
    page = visit.page
    for chart, name in (
        ("reward", "reward/mean"),
        ("accuracy", "eval/accuracy"),
        ("entropy", "train/entropy"),
    ):
        newest = series_of(folder, "done", name)[-1]
        assert value(page, chart).inner_text() == as_shown(newest), name
        assert float(value(page, chart).get_attribute("data-value")) == newest
    assert "token" not in page.url and fits(page)
    assert page.locator("#runs .run").first.inner_text().split() == ["done", "finished"]


def test_keys_move_to_a_step_and_its_value_is_shown(visit, server, folder):
    show(visit, server, "#curves?runs=done")
    page = visit.page
    page.locator('[data-chart="reward"] .plot').focus()
    page.keyboard.press("Home")
    for _ in range(4):
        page.keyboard.press("ArrowRight")
    legend = page.locator('[data-chart="reward"] .legend')
    assert "at 20" in legend.inner_text()
    assert value(page, "reward", "mean").inner_text() == as_shown(series_of(folder, "done", "reward/mean")[4])


def test_the_mouse_shows_the_value_under_it(visit, server, folder):
    show(visit, server, "#curves?runs=done")
    page = visit.page
    plot = page.locator('[data-chart="accuracy"] .u-over')
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    page.mouse.move(box["x"] + box["width"] - 2, box["y"] + box["height"] / 2)
    wait_for_text(
        value(page, "accuracy", "accuracy"), as_shown(series_of(folder, "done", "eval/accuracy")[-1])
    )
    assert "at 120" in page.locator('[data-chart="accuracy"] .legend').inner_text()


def test_a_run_that_is_still_being_written_grows_on_the_page(visit, server, folder):
    show(visit, server, "#curves?runs=going")
    page = visit.page
    before = series_of(folder, "going", "reward/mean")[-1]
    assert value(page, "reward").inner_text() == as_shown(before)
    more = [record for record in run_folders.records(8, 3) if record["step"] > 24]
    run_folders.append(folder / "going", *more)
    half = '{"step": 36, "time": 1790000400.0, "reward/mean": 0.4242'
    with (folder / "going" / "metrics.jsonl").open("a") as stream:
        stream.write(half)
    newest = [record["reward/mean"] for record in more if "reward/mean" in record][-1]
    wait_for_text(value(page, "reward"), as_shown(newest))
    with (folder / "going" / "metrics.jsonl").open("a") as stream:
        stream.write(', "policy/version": 9.0}\n')
    wait_for_text(value(page, "reward"), "0.4242")


def test_a_resume_that_cuts_the_file_is_followed(visit, server, folder):
    show(visit, server, "#curves?runs=going")
    writer = MetricsWriter(folder / "going", resume_step=12)
    writer.write(16, {"reward/mean": 0.1234, "policy/version": 4.0})
    writer.close()
    wait_for_text(value(visit.page, "reward"), "0.1234")
    page = visit.page
    page.locator('[data-chart="reward"] .plot').focus()
    page.keyboard.press("End")
    assert "at 16" in page.locator('[data-chart="reward"] .legend').inner_text()


def test_nothing_is_asked_while_the_page_is_hidden(visit, server):
    show(visit, server, "#curves?runs=going")
    page = visit.page
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.wait_for_timeout(5000)
    assert any("/curves" in url for url in asked)
    hidden = "Object.defineProperty(document, 'hidden', {configurable: true, get: () => true})"
    page.evaluate(hidden)
    page.wait_for_timeout(2500)
    asked.clear()
    page.wait_for_timeout(5000)
    assert asked == []


def test_a_run_that_vanishes_is_said(visit, server, folder):
    show(visit, server, "#curves?runs=going")
    page = visit.page
    shutil.rmtree(folder / "going")
    page.locator(".notes .bad", has_text="has gone").wait_for()
    assert "its folder has gone" in page.locator("#runs .run", has_text="going").inner_text()
    assert value(page, "reward").inner_text()  # what was read stays
    visit.faults[:] = [fault for fault in visit.faults if "410" not in fault]


def test_several_runs_lie_over_each_other(visit, server, folder):
    show(visit, server, "#curves?runs=done,resumed&show=reward")
    page = visit.page
    for run in ("done", "resumed"):
        assert value(page, "reward", run).inner_text() == as_shown(series_of(folder, run, "reward/mean")[-1])
    page.locator("#runs input[value=done]").uncheck()
    page.locator('[data-chart="reward"] .entry', has_text="mean").wait_for()
    assert page.locator('[data-chart="reward"] .entry').count() == 1
    assert page.url.endswith("#curves?runs=resumed&show=reward")


def test_alarms_and_restarts_have_their_names(visit, server):
    show(visit, server, "#curves?runs=resumed")
    found = visit.page.locator(".events li").all_inner_texts()
    assert found == ["start 2: resumed from iter_0000032 step 32", "gradient spike step 68"]


def test_a_metric_is_found_by_its_meaning_and_added(visit, server, folder):
    show(visit, server, "#curves?runs=done")
    page = visit.page
    page.get_by_label("Add a metric").fill("nats per token loss")
    page.locator(".hit", has_text="train/loss").wait_for()
    page.keyboard.press("Enter")
    page.locator('[data-chart="train/loss"] canvas').wait_for()
    assert "show=train/loss,reward" in page.url
    page.reload()
    assert value(page, "train/loss").inner_text() == "-0.02"
    page.get_by_label("Remove train/loss").click()
    page.locator('[data-chart="train/loss"]').wait_for(state="detached")


def test_axes_smoothing_and_log(visit, server, folder):
    show(visit, server, "#curves?runs=done&x=tokens&smooth=0.5&log=reward")
    page = visit.page
    values, average, weight = series_of(folder, "done", "reward/mean"), 0.0, 0.0
    for one in values:
        average, weight = 0.5 * average + one, 0.5 * weight + 1
    assert float(value(page, "reward").get_attribute("data-value")) == pytest.approx(
        average / weight, rel=1e-12
    )
    assert (
        page.locator('[data-chart="reward"] button', has_text="log").get_attribute("aria-pressed") == "true"
    )
    page.locator('[data-chart="reward"] .plot').focus()
    page.keyboard.press("Home")
    assert "at 40,010" in page.locator('[data-chart="reward"] .legend').inner_text()
    page.get_by_label("x axis").select_option("time")
    page.locator(".hint", has_text="minutes since the run began").wait_for()
    page.keyboard.press("End")
    page.locator('[data-chart="reward"] .plot').focus()
    page.keyboard.press("End")
    assert "at 16" in page.locator('[data-chart="reward"] .legend').inner_text()  # 60 s + 30 batches of 30 s


def test_a_value_that_is_no_number_is_a_gap(visit, server):
    show(visit, server, "#curves?runs=resumed&show=entropy")
    assert value(visit.page, "entropy").inner_text() == "–"


def test_where_the_seconds_went(visit, server):
    show(visit, server, "#curves?runs=done")
    page = visit.page
    shares = run_folders.idle_shares()["trainer"]
    page.locator("[data-idle=trainer]").wait_for()
    assert page.locator("[data-idle=trainer]").inner_text() == f"{100 * sum(shares.values()):.1f}%"
    phases = page.locator('[data-chart="done phases"] .entry')
    assert phases.filter(has_text="generate").count() == 1 and fits(page)


def test_two_runs_are_compared(visit, server, folder):
    page = visit.page
    page.goto(f"{server.url}#compare?a=resumed&b=done&last=10")
    page.locator("tr[data-metric='reward/mean']").wait_for()
    a, b = (
        {
            r["step"]: r["reward/mean"]
            for r in read_metrics(folder / run / "metrics.jsonl")
            if "reward/mean" in r
        }
        for run in ("resumed", "done")
    )
    steps = sorted(a.keys() & b.keys())[-10:]
    shown = page.locator("tr[data-metric='reward/mean'] .difference")
    assert float(shown.get_attribute("data-value")) == pytest.approx(
        fmean(b[step] - a[step] for step in steps)
    )
    assert f"steps {steps[0]} to {steps[-1]}" in page.locator(".compare").inner_text()
    row = page.locator("tr[data-name=lr]")
    assert re.split(r"\s+", row.inner_text().strip()) == ["lr", "1e-6", "2e-6"]
    page.get_by_label("Run b").select_option("going")
    page.locator("p", has_text="6 steps are common; compared are steps 4 to 24").wait_for()
    assert "b=going" in page.url and page.locator("tr[data-name=lr]").count() == 0
    assert fits(page)


def test_without_the_cookie_the_page_says_what_to_do(open_tab, server):
    visit = open_tab("")
    visit.page.goto(server.home)
    assert "open the address that megatron-vespo view printed" in visit.page.locator("body").inner_text()
    visit.faults.clear()


@pytest.mark.skipif("VIEW_RUN" not in os.environ, reason="VIEW_RUN names the folder of a real run")
def test_a_real_run(visit, tmp_path):
    folder = tmp_path / "real"
    shutil.copytree(os.environ["VIEW_RUN"], folder)
    with view_server(folder, cache=tmp_path / "cache") as server:
        show(visit, server)
        for chart, name in (("reward", "reward/mean"), ("accuracy", "eval/accuracy")):
            newest = series_of(tmp_path, "real", name)[-1]
            assert float(value(visit.page, chart).get_attribute("data-value")) == newest
        visit.page.locator("[data-idle=trainer]").wait_for()
        assert fits(visit.page)
