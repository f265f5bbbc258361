"""The display of a run: lines where the output is no terminal, a panel that fits any terminal."""

from __future__ import annotations

import io
import math

import pytest
from rich.console import Console

from megatron_vespo.observability import progress
from megatron_vespo.observability.activity import EngineStates
from megatron_vespo.observability.display_rows import ACCURACY, ROWS, clock, sparkline
from megatron_vespo.observability.progress import HEADER_INTERVAL, RunDisplay
from tests.support.step_metrics import STEP_METRICS


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def now(monkeypatch):
    """A clock that stands still until the test moves it: now[0] is the time in seconds."""
    now = [1000.0]
    monkeypatch.setattr(progress, "monotonic", lambda: now[0])
    return now


def test_sparkline():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert sparkline([-1.0, math.nan, 1.0, math.inf]) == "▁ █ "
    assert sparkline([3.0, 3.0]) == "▁▁"
    assert sparkline([math.nan]) == " "
    assert sparkline([]) == ""


def test_clock():
    assert [clock(seconds) for seconds in (0.9, 61, 90000)] == ["0:00:00", "0:01:01", "25:00:00"]


def test_plain_mode_text(now):
    stream = io.StringIO()
    with RunDisplay("tiny", 100, stream) as display:
        now[0] += 2
        with display.phase("start engines"):
            now[0] += 60
        display.message("1 engine is [ready]")
        with display.phase("generate"):
            now[0] += 3
        display.update(8, STEP_METRICS)
        now[0] += 10
        display.update(10, {"reward/mean": math.nan, "not/shown": 1.0})
    assert stream.getvalue().splitlines() == [
        "tiny: 100 steps",
        "[0:00:02] start engines ...",
        "1 engine is [ready]",
        "   step    left  reward held-out  length     logW      std weight  wght+  wght-    ESS   dead   lag"
        " trained/s sampled/s  maxdiff   gen   rew  logp train  sync  save  eval",
        "  8/100       -   0.500    93.8%    21.2  -0.0123   0.0456  0.980  0.991  0.962  0.875  12.5%  1.50"
        "     1,234       987  3.1e-06   3.1     -     -  12.0     -     -     -",
        " 10/100 0:07:30     nan        -       -        -        -      -      -      -      -      -     -"
        "         -         -        -     -     -     -     -     -     -     -",
    ]


def test_plain_mode_repeats_the_header(now):
    stream = io.StringIO()
    with RunDisplay("tiny", 50, stream) as display:
        for step in range(1, 2 * HEADER_INTERVAL + 2):
            display.update(step, STEP_METRICS)
    lines = stream.getvalue().splitlines()[1:]
    headers = [index for index, line in enumerate(lines) if line.split()[0] == "step"]
    assert headers == [0, HEADER_INTERVAL + 1, 2 * HEADER_INTERVAL + 2]
    assert len({len(line) for line in lines}) == 1  # aligned


def test_a_log_file_gets_no_control_characters_even_where_colour_is_forced(monkeypatch, now):
    monkeypatch.setenv("FORCE_COLOR", "1")
    stream = io.StringIO()
    with RunDisplay("tiny", 10, stream) as display, display.phase("start engines"):
        display.update(1, STEP_METRICS)
        display.message("done")
    assert all(character.isprintable() or character == "\n" for character in stream.getvalue())
    assert stream.getvalue().isascii()


def test_phases_are_measured_exclusively_and_reset(now):
    display = RunDisplay("tiny", 10, io.StringIO())
    with display.phase("generate"):
        now[0] += 3
        with display.phase("reward"):
            now[0] += 1
        now[0] += 0.5
    now[0] += 100  # in no phase
    with pytest.raises(RuntimeError), display.phase("train"):
        now[0] += 2
        raise RuntimeError
    with display.phase("generate"):
        now[0] += 0.25
        assert display.phase_seconds() == {"generate": 3.75, "reward": 1.0, "train": 2.0}
        now[0] += 4
    assert display.phase_seconds() == {"generate": 4.0}
    assert display.phase_seconds() == {}


def rendered_lines(display, width=100, height=40):
    console = Console(file=io.StringIO(), force_terminal=True, width=width, height=height, color_system=None)
    console.print(display)
    return console.file.getvalue().splitlines()


def test_live_panel(now):
    display = RunDisplay("tiny run", 100, Terminal())
    display.update(8, STEP_METRICS | {"weight/ess": 0.5, "ratio/log_w_mean": 0.5})
    now[0] += 10
    display.update(10, {name: value for name, value in STEP_METRICS.items() if name != "eval/accuracy"})
    with display.phase("generate"):
        now[0] += 3.1
        lines = rendered_lines(display)
    text = "\n".join(lines)
    assert "tiny run" in lines[0]
    assert "step 10/100" in lines[1] and "0:00:13 passed, 0:07:26 left" in lines[1]  # 450 s less 3.1
    assert "▶ Generating responses (3.1 s)" in lines[2]
    assert "held-out accuracy 93.8%" in lines[3]  # the newest there is
    for expected in (
        r"log W                    -0.0123 ± 0.0456  █▁",
        r"effective sample size               0.875  ▁█",
        r"max log-prob difference           3.1e-06",
        r"tokens/s trained                    1,234",
        r"truncated                               -",
        "▶ generate       3.1",
        "  train         12.0",
        "  save             -",
    ):
        assert expected in text
    assert all(row.label in text for row in ROWS)
    assert {len(line) for line in lines} == {100}
    assert len(lines) <= 24
    assert "▶" not in "\n".join(rendered_lines(display))  # the phase is over


def test_a_slow_batch_takes_no_time_from_the_others(now):
    display = RunDisplay("tiny run", 100, Terminal())
    for step in (10, 20):
        now[0] += 10
        display.update(step, STEP_METRICS)
    now[0] += 500
    assert "0:01:10 left" in rendered_lines(display)[1]


def test_what_is_known_before_the_first_step_is_shown(now):
    display = RunDisplay("tiny run", 100, Terminal())
    display.recall({"eval/accuracy": 0.25})
    assert "step 0/100" in rendered_lines(display)[1]
    assert any("held-out accuracy 25.0% " in line for line in rendered_lines(display))
    display.update(8, STEP_METRICS)
    assert any("held-out accuracy 93.8% (was 25.0%)" in line for line in rendered_lines(display))


def busy_display(now):
    """A display with all that it can show."""
    display = RunDisplay("VESPO: " + "/a/long/path" * 20, 100_000, Terminal())
    display.recall({"eval/accuracy": 0.25})
    for step in range(50):
        now[0] += 3
        display.update(
            step,
            STEP_METRICS
            | {f"time/{phase}": 1234.5 for phase in progress.PHASE_COLUMNS}
            | {"alarm/ess_collapse": 1.0, "alarm/truncated_responses": 1.0, "reward/error_count": 3.0},
        )
    display.saved(40)
    display.background(3, 1024)
    display.watch_engines(lambda: EngineStates(64, 61, 61, ((3, 2), (17, 1)), 3, (5,)))
    return display


@pytest.mark.parametrize("width", [1, 5, 14, 20, 40, 60, 75, 80, 100, 119, 200])
@pytest.mark.parametrize("height", [1, 2, 5, 8, 12, 24, 50])
def test_the_panel_fits_any_terminal(now, width, height):
    display = busy_display(now)
    with display.phase("sync"):
        lines = rendered_lines(display, width, height)
    assert len(lines) <= max(1, height - 1) and max(map(len, lines)) <= width
    if width >= 60 and height >= 12:
        text = " ".join(" ".join(line.strip("│ ") for line in lines).split())
        assert "▶ Syncing weights to 61 engines (0.0 s)" in text
        assert "61 of 64 engines serve, restarting engine 3 (restart 2 of 3)" in text
        assert "reward" in text or height < 24


@pytest.mark.parametrize(
    ("width", "height", "number"), [(80, 24, 11), (60, 24, 5), (100, 40, 14), (200, 40, 14)]
)
def test_how_many_metrics_a_terminal_shows(now, width, height, number):
    text = "\n".join(rendered_lines(busy_display(now), width, height))
    shown = [row for row in ROWS if row is not ACCURACY and f"│ {row.label}  " in text]
    assert len(shown) >= number and shown[0].metric == "reward/mean"


def test_counts_belong_to_their_phase(now):
    display = RunDisplay("tiny", 10, Terminal())
    display.watch_engines(lambda: EngineStates(2, 2, 2))
    display.progress(1, 2)  # outside a phase
    with display.phase("generate"):
        assert "Generating responses with 2 engines (" in rendered_lines(display)[2]
        display.progress(310, 512)
        with display.phase("sync"):
            assert "Syncing weights to 2 engines (" in rendered_lines(display)[2]
        assert "Generating 512 responses with 2 engines: 310 done (" in rendered_lines(display)[2]
    with display.phase("generate"):
        assert "Generating responses with 2 engines (" in rendered_lines(display)[2]


def test_generation_beside_training(now):
    display = RunDisplay("tiny", 10, Terminal())
    display.background(5, 8)
    with display.phase("train"):
        display.progress(2, 4)
        text = "\n".join(rendered_lines(display))
    assert "Training step 3 of 4 in this batch" in text
    assert "in the background: 5 of 8 groups of the next batch are ready" in text
    with display.phase("generate"):
        text = "\n".join(rendered_lines(display))
    assert "Waiting for a rollout batch: 5 of 8 groups are ready" in text and "background" not in text


def test_mean_rewards_that_are_no_shares_are_numbers(now):
    stream = io.StringIO()
    display = RunDisplay("tiny", 10, stream)
    for step, accuracy in ((1, -0.5), (2, 0.25)):
        display.update(step, {"eval/accuracy": accuracy})
    cells = [line.split()[3] for line in stream.getvalue().splitlines()]
    assert cells == ["held-out", "-0.500", "0.250"]
    panel = "\n".join(rendered_lines(display))
    assert "held-out accuracy 0.250 (was -0.500)" in panel


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_live_mode_gives_the_terminal_back(monkeypatch, error):
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    display = RunDisplay("tiny", 10, stream)
    with pytest.raises(error), display, display.phase("generate"):
        display.update(1, STEP_METRICS)
        display.message("a line of its [own]")
        raise error
    hide_cursor, show_cursor = "\x1b[?25l", "\x1b[?25h"
    assert 0 <= stream.getvalue().rfind(hide_cursor) < stream.getvalue().rfind(show_cursor)
    assert "a line of its [own]" in stream.getvalue()
    assert "93.8%" in stream.getvalue()
    display.stop()  # a second time


@pytest.mark.parametrize("terminal, encoding", [("dumb", "utf-8"), ("xterm", "ascii")])
def test_a_terminal_that_cannot_draw_gets_plain_lines(monkeypatch, terminal, encoding):
    monkeypatch.setenv("TERM", terminal)
    buffer = io.BytesIO()
    stream = io.TextIOWrapper(buffer, encoding=encoding)
    monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
    with RunDisplay("tiny", 10, stream) as display:
        display.message("ready")
    assert buffer.getvalue() == b"tiny: 10 steps\nready\n"
