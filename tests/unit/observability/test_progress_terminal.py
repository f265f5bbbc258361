"""The live display on a real terminal device, whose size changes."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.support.terminal import Screen, Terminal

PROGRAM = """
import sys
from megatron_vespo.observability.progress import RunDisplay

with RunDisplay("VESPO: tiny", 100) as display, display.phase("generate"):
    for number in range(30):
        display.message(f"message {number}")
    for step in (4, 8):
        display.update(step, {"reward/mean": 0.5, "time/generate": 1.0, "eval/accuracy": step / 10})
    for often in ("once", "twice"):
        sys.stdin.readline()
        display.message(f"the size has changed {often}")
    sys.stdin.readline()
    display.update(12, {"eval/accuracy": 0.9})
"""


def panel(screen: Screen) -> list[str]:
    """The lines of the only panel on the screen."""
    lines = screen.shown()
    (top,) = [i for i, line in enumerate(lines) if line.startswith("╭")]
    (bottom,) = [i for i, line in enumerate(lines) if line.startswith("╰")]
    assert not [line for line in lines[:top] if line.startswith(("│", "╰"))], lines
    return lines[top : bottom + 1]


@pytest.mark.long
def test_the_size_changes(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    environment = {"PATH": os.environ["PATH"], "TERM": "xterm", "LANG": "C.UTF-8", "PYTHONUTF8": "1"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[3])
    terminal = Terminal([sys.executable, str(tmp_path / "program.py")], 80, 24, environment)
    screen = terminal.screen
    terminal.read_until("(was 40.0%)", 60.0)
    assert {len(line) for line in panel(screen)} == {80} and not screen.cursor_shown
    for columns, rows, said in ((60, 20, "changed once"), (132, 40, "changed twice")):
        terminal.resize(columns, rows)
        terminal.type("\n")
        terminal.read_until(said, 20.0)
        assert {len(line) for line in panel(screen)} == {min(columns, 120)}
        assert len(panel(screen)) < rows
    assert any("message 29" in line for line in screen.shown())
    terminal.type("\n")
    terminal.read_until(None, 20.0)
    assert any("held-out accuracy 90.0% (was 40.0%)" in line for line in panel(screen))
    assert screen.cursor_shown and terminal.wait() == 0


def test_the_screen_itself():
    screen = Screen(5, 3)
    screen.feed("one\r\ntwo\r\nthree\r\nfourfive\x1b[1A\r\x1b[2Kx\x1b[?25l")
    assert screen.shown() == ["three", "x", "ive"] and not screen.cursor_shown
    screen.feed("\x1b[2J\x1b[Hnew\r\n")
    assert screen.shown() == ["new", "", ""]
