from __future__ import annotations

import json
import math

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from megatron_vespo.algorithms.alarms import RULES
from megatron_vespo.observability.metrics import MetricsWriter, read_metrics
from megatron_vespo.observability.report import (
    PANELS,
    _fits,
    _mark_alarms,
    format_summary,
    plot_curves,
    write_summary,
)
from tests.support.step_metrics import STEP_METRICS

# Metrics on disk


@pytest.fixture(autouse=True)
def event_files_in_order(monkeypatch):
    """Files of one second are read in the order of a counter's text, where 10 comes before 9."""
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))


def write_records(directory, resume_step, records, **options):
    writer = MetricsWriter(directory, resume_step, **options)
    for step, metrics in records:
        writer.write(step, metrics)
    writer.close()


def write_steps(directory, resume_step, steps, offset=0.0, **options):
    write_records(
        directory, resume_step, [(step, {"reward/mean": step + offset}) for step in steps], **options
    )


def rewards(directory):
    return [(r["step"], r["reward/mean"]) for r in read_metrics(directory / "metrics.jsonl")]


def tensorboard_points(directory):
    events = EventAccumulator(str(directory / "tensorboard")).Reload()
    return [(event.step, event.value) for event in events.Scalars("reward/mean")]


def test_metrics_keep_every_bit_and_stay_valid_json(tmp_path):
    metrics = {"a": 0.1 + 0.2, "b": 5e-324, "c": math.nan, "d": math.inf, "e": -math.inf, "policy/version": 3}
    writer = MetricsWriter(tmp_path, None)
    writer.write(7, metrics)
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()  # flushed before close
    writer.close()

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    raw = json.loads(line, parse_constant=refuse)
    assert (raw["c"], raw["d"], raw["e"]) == ("NaN", "Infinity", "-Infinity")
    (record,) = read_metrics(tmp_path / "metrics.jsonl")
    assert list(record) == ["step", "time", *metrics]
    assert record["step"] == 7 and record["time"] > 1.7e9
    assert (record["a"], record["b"], record["policy/version"]) == (0.1 + 0.2, 5e-324, 3.0)
    assert math.isnan(record["c"]) and record["d"] == math.inf and record["e"] == -math.inf


def test_metrics_may_not_shadow_the_records_own_keys(tmp_path):
    writer = MetricsWriter(tmp_path, None)
    with pytest.raises(AssertionError, match="step and time are the record's own keys"):
        writer.write(1, {"time": 3.0})
    writer.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == []


@pytest.mark.parametrize("torn", [b"", b'{"step": 5, "rew', b"\0\0\0\0", b'{"step": 2, "reward/mean": "\xc3'])
def test_resume_drops_later_steps_and_a_torn_last_line(tmp_path, torn):
    write_steps(tmp_path, None, [1, 2, 3, 4])
    with (tmp_path / "metrics.jsonl").open("ab") as stream:
        stream.write(torn)
    write_steps(tmp_path, 2, [3, 4, 5], offset=0.5)
    expected = [(1, 1.0), (2, 2.0), (3, 3.5), (4, 4.5), (5, 5.5)]
    assert rewards(tmp_path) == expected
    assert tensorboard_points(tmp_path) == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "tensorboard"]


def test_going_back_keeps_what_it_cuts_off(tmp_path):
    write_steps(tmp_path, None, [1, 2, 3])
    for offset in (0.5, 0.25):
        write_steps(tmp_path, 1, [2], offset, keep_cut=True)
    assert rewards(tmp_path) == tensorboard_points(tmp_path) == [(1, 1.0), (2, 2.25)]
    cut = read_metrics(tmp_path / "metrics.previous.jsonl")
    assert [(r["step"], r["reward/mean"]) for r in cut] == [(2, 2.0), (3, 3.0), (2, 2.5)]


def test_resume_keeps_a_whole_last_line_that_lacks_its_newline(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "time": 0.5, "reward/mean": 1.0}')
    write_steps(tmp_path, 1, [2])
    assert rewards(tmp_path) == [(1, 1.0), (2, 2.0)]


def test_a_fresh_start_sets_the_old_curve_aside(tmp_path):
    write_steps(tmp_path, None, [1, 2])
    write_steps(tmp_path, None, [1], offset=0.5)
    assert rewards(tmp_path) == tensorboard_points(tmp_path) == [(1, 1.5)]
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.previous.jsonl")] == [1, 2]


def test_a_bad_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: not a JSON record"):
        read_metrics(path)


# The report


def png_size(path):
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(header[16:20]), int.from_bytes(header[20:24])


@pytest.mark.long
def test_plot_curves_draws_any_run(tmp_path):
    record = STEP_METRICS | {"time": 0.0, "time/custom": 1.0}
    run = [{"step": 0, "time": 0.0, "eval/accuracy": 0.33}]
    run += [record | {"step": step} for step in range(1, 6)]
    bad = {"ratio/log_w_mean": math.nan, "reward/mean": math.inf, "check/max_logprob_difference": 0.0}
    run.append(record | bad | {"step": 6})
    for name, metrics in (("run", run), ("empty", []), ("one", run[1:2])):
        plot_curves(metrics, tmp_path / name / "curves.png", "a run")
        assert png_size(tmp_path / name / "curves.png") == (2400, 1120)
    assert (tmp_path / "run/curves.png").stat().st_size > (tmp_path / "empty/curves.png").stat().st_size


def test_panels_plot_the_values(tmp_path):
    from matplotlib.figure import Figure

    run = [{"step": 0, "eval/accuracy": 0.25}]
    log_w = {"ratio/log_w_mean": -1.0, "ratio/log_w_std": 0.5}
    run += [{"step": step, "reward/mean": step / 4, **log_w} for step in (1, 2)]
    seconds = {"time/generate": 2.0, "time/train": 3.0, "time/custom": 1.0}
    run += [{"step": 4, "eval/accuracy": 0.75, "reward/mean": math.nan, **seconds}]
    run += [{"step": 5 + k, "check/max_logprob_difference": diff} for k, diff in enumerate((1e-6, 0.0, 2e-6))]
    figure = Figure().subplots(2, 4)
    axes = {}
    for panel, (draw, _) in zip(figure.flat, PANELS, strict=True):
        draw(panel, run)
        axes[draw.__name__] = panel
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes["_plot_accuracy"].lines}
    assert lines == {"training reward": [[1, 0.25], [2, 0.5]], "held-out accuracy": [[0, 0.25], [4, 0.75]]}
    assert [text.get_text() for text in axes["_plot_accuracy"].texts] == ["25%", "75%"]
    band = axes["_plot_log_w"].collections[0].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == (-1.5, -0.5)
    assert axes["_plot_logprob_difference"].get_yscale() == "log" and axes["_plot_logprob_difference"].lines[
        -1
    ].get_ydata() == [1e-4, 1e-4]
    assert axes["_plot_logprob_difference"].lines[0].get_xydata().tolist() == [
        [5, 1e-6],
        [7, 2e-6],
    ]  # 0 is not on a log scale
    bars = [(bar.get_y(), bar.get_height()) for bar in axes["_plot_phases"].patches if bar.get_height()]
    assert bars == [(0.0, 2.0), (2.0, 3.0), (5.0, 1.0)]  # each stands on those before


def test_the_picture_shows_mean_rewards_that_are_no_shares():
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    PANELS[0][0](axes, [{"step": step, "eval/accuracy": value} for step, value in ((0, -3.0), (4, 5.0))])
    assert [text.get_text() for text in axes.texts] == ["-3.00", "5.00"]
    assert axes.get_title() == "Mean reward" and axes.get_ylim()[0] < -3.0 and axes.get_ylim()[1] > 5.0


def test_alarms_are_marked_where_they_come_on(tmp_path):
    from matplotlib.figure import Figure

    on = {"alarm/ess_collapse": 1.0}
    run = [{"step": 0, "eval/accuracy": 0.5}]
    for step, alarms in ((2, {}), (4, on), (6, on), (8, {}), (10, on)):
        run.append({"step": step, "policy/version": float(step), **alarms})
        run.append({"step": step, "check/other": 0.0})  # not a batch: no alarm has ended here
    axes = Figure().subplots()
    _mark_alarms(axes, run, ("dead_sequences", "ess_collapse"))
    assert [line.get_xdata()[0] for line in axes.lines] == [4, 10]
    assert axes.get_legend_handles_labels()[1] == ["! ess collapse"]


def test_every_alarm_has_its_panel():
    assert sorted(name for _, alarms in PANELS for name in alarms) == sorted(rule.__name__ for rule in RULES)


@pytest.mark.parametrize(
    ("labels", "rows"), [(["short"], 1), (["x" * 60], 1), (["x" * 20, "y" * 20], 2), (["x" * 9] * 4, 2)]
)
def test_a_legend_gets_the_rows_that_it_needs(labels, rows):
    assert next(n for n in range(1, 9) if _fits(labels, n)) == rows


SUMMARY = {
    "eval_accuracy_before": 0.33,
    "eval_interval_before": [0.269, 0.398],
    "eval_accuracy_after": 0.95,
    "eval_interval_after": [0.9099, 0.9731],
    "eval_prompts": 200,
    "steps": 100,
    "train_seconds": 750.2,
    "setup_seconds": 42.13,
    "max_logprob_difference": 3.14e-6,
    "layout": {"tensor": 2, "pipeline": 2, "expert": 2, "data": 1, "trainer_ranks": 4, "engines": 1},
    "paths": {"metrics": "runs/tiny/metrics.jsonl", "TensorBoard": "runs/tiny/tensorboard"},
    "seed": math.nan,
}


def test_format_summary():
    assert format_summary(SUMMARY).splitlines() == [
        "held-out accuracy before   33.0%   95% interval 26.9% to 39.8% (200 prompts)",
        "held-out accuracy after    95.0%   95% interval 91.0% to 97.3% (200 prompts)",
        "steps                     100",
        "training                  12 min 30 s (7.50 s per step)",
        "set-up                    42.1 s",
        "layout                    tensor 2, pipeline 2, expert 2, data 1, trainer ranks 4, engines 1",
        "max log-prob difference   3.1e-06 (engine and trainer)",
        "metrics                   runs/tiny/metrics.jsonl",
        "TensorBoard               runs/tiny/tensorboard",
    ]


def test_a_mean_reward_that_is_no_share_is_a_number():
    rewards = {"eval_accuracy_before": -0.5, "eval_interval_before": [-0.61, -0.39]}
    lines = format_summary(SUMMARY | rewards).splitlines()
    assert lines[:2] == [
        "held-out accuracy before  -0.500   95% interval -0.610 to -0.390 (200 prompts)",
        "held-out accuracy after    0.950   95% interval 0.910 to 0.973 (200 prompts)",
    ]


def test_format_summary_leaves_out_what_is_missing():
    assert format_summary({}) == ""
    summary = {"steps": 0, "train_seconds": 7380.0, "exported_max_logprob_difference": 0.0}
    assert format_summary(summary).splitlines() == [
        "steps                  0",
        "training               2 h 03 min",
        "the same after export  0.0e+00 (exported checkpoint and trainer)",
    ]


def test_write_summary_keeps_unknown_keys(tmp_path):
    path = tmp_path / "summary.json"
    path.write_text("old")
    write_summary(path, SUMMARY)
    assert json.loads(path.read_text()) == SUMMARY | {"seed": "NaN"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["summary.json"]


def test_a_resume_drops_checks_that_came_after_the_save_it_goes_on_from(tmp_path):
    records = [
        (0, {"eval/accuracy": 0.1}),
        (4, {"policy/version": 4.0, "eval/accuracy": 0.2}),
        (8, {"policy/version": 8.0, "eval/accuracy": 0.3}),
        (8, {"checkpoint/seconds": 1.0}),
        (8, {"eval/accuracy": 0.3}),
        (8, {"check/last_sync_logprob_difference": 0.0}),
    ]
    write_records(tmp_path, None, records)
    MetricsWriter(tmp_path, 8).close()
    kept = [(record["step"], record.keys()) for record in read_metrics(tmp_path / "metrics.jsonl")]
    assert kept == [(step, {"step", "time", *metrics}) for step, metrics in records[:4]]
