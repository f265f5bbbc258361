"""A small terminal: what a person sees after a program's output, for the control codes that rich writes."""

from __future__ import annotations

import codecs
import fcntl
import os
import pty
import re
import select
import struct
import termios
import time

CODE = re.compile(r"\x1b\[(\??)([\d;]*)([A-Za-z])|([\r\n])|([^\x1b\r\n]+)")

QUIET_S, MAX_CODE = 0.15, 12  # seconds after a picture; characters of a control code


class Screen:
    """All lines so far; those from `top` on are on the screen."""

    def __init__(self, columns: int, rows: int):
        self.columns, self.rows = columns, rows
        self.lines, self.top, self.row, self.column = [""], 0, 0, 0
        self.cursor_shown = True

    def resize(self, columns: int, rows: int) -> None:
        """Wraps lines anew, as many terminals do: an old line may take several rows then."""
        self.columns, self.rows = columns, rows
        self.lines = [
            line[i : i + columns] for line in self.lines for i in range(0, max(len(line), 1), columns)
        ]
        self.row, self.column = len(self.lines) - 1, 0
        self.top = max(0, len(self.lines) - rows)

    def feed(self, output: str) -> None:
        for private, number, code, move, text in CODE.findall(output):
            if text:
                self._write(text)
            elif move == "\r":
                self.column = 0
            elif move == "\n":
                self._newline()
            elif code == "A":
                self.row = max(self.row - int(number or 1), self.top)
            elif code == "K":
                self.lines[self.row] = ""
            elif code == "H":
                self.row, self.column = self.top, 0
            elif code == "J":
                self.lines[self.top :] = [""] * (len(self.lines) - self.top)
            elif private and number == "25":
                self.cursor_shown = code == "h"
            else:
                assert code == "m", (private, number, code)

    def _newline(self) -> None:
        self.row += 1
        if self.row == len(self.lines):
            self.lines.append("")
        self.top = max(self.top, self.row - self.rows + 1)

    def _write(self, text: str) -> None:
        for character in text:
            if self.column == self.columns:
                self._newline()
                self.column = 0
            line = self.lines[self.row].ljust(self.column)
            self.lines[self.row] = line[: self.column] + character + line[self.column + 1 :]
            self.column += 1

    def shown(self) -> list[str]:
        return [line.rstrip() for line in self.lines[self.top : self.top + self.rows]]


class Terminal:
    """Runs a command on a terminal of its own."""

    def __init__(self, command: list[str], columns: int, rows: int, environment: dict[str, str]):
        self.screen = Screen(columns, rows)
        self._decoder, self._text = codecs.getincrementaldecoder("utf-8")(), ""
        self._pid, self._file = pty.fork()
        if self._pid == 0:
            time.sleep(0.2)  # until the size is set
            os.execvpe(command[0], command, environment)
        self._set_size()
        attributes = termios.tcgetattr(self._file)
        attributes[3] &= ~termios.ECHO  # what is typed is not shown
        termios.tcsetattr(self._file, termios.TCSANOW, attributes)

    def type(self, text: str) -> None:
        os.write(self._file, text.encode())

    def resize(self, columns: int, rows: int) -> None:
        self.screen.resize(columns, rows)
        self._set_size()

    def _set_size(self) -> None:
        size = struct.pack("HHHH", self.screen.rows, self.screen.columns, 0, 0)
        fcntl.ioctl(self._file, termios.TIOCSWINSZ, size)

    def read_until(self, words: str | None, timeout_s: float) -> None:
        """Shows the output until `words` are on the screen and a picture is complete; None: until the end."""
        deadline = time.monotonic() + timeout_s
        while True:
            assert time.monotonic() < deadline, (words, self.screen.shown())
            # a picture comes in pieces, one right after the other
            if select.select([self._file], [], [], QUIET_S)[0]:
                try:
                    self._text += self._decoder.decode(os.read(self._file, 65536))
                except OSError:  # the program has ended
                    break
            elif words is not None and any(words in line for line in self.screen.shown()):
                return
            cut = self._text.rfind("\x1b")
            if cut < len(self._text) - MAX_CODE:
                cut = len(self._text)
            self.screen.feed(self._text[:cut])
            self._text = self._text[cut:]
        self.screen.feed(self._text)
        assert words is None, (words, self.screen.shown())

    def wait(self) -> int:
        os.close(self._file)
        return os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
