"""Runs a tracker in a process of its own, which a run never waits for before its end."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import megatron_vespo
from megatron_vespo.observability.trackers.child import EXIT_NO_TRACKER
from megatron_vespo.observability.trackers.tracker import Start
from megatron_vespo.system.preemption import shielded

MOST_WAITING = 1000  # messages; more are dropped
SILENT_S = 60.0  # without progress, after which the run says so
POLL_S = 1.0
ROOT = Path(megatron_vespo.__file__).parents[1]


def child_command(name: str) -> list[str]:
    return [sys.executable, "-m", "megatron_vespo.observability.trackers.child", name]


class TrackerProcess:
    """One tracker of a run. `send` returns at once, whatever the tracker does.

    `say` gets a line for people at the first problem of each sort. `on_started` gets the id of the tracker's
    run and where it is. Both are called from threads of this object.
    """

    def __init__(
        self,
        name: str,
        start: Start,
        log: Path,
        say: Callable[[str], None],
        on_started: Callable[[str, str], None],
        command: Sequence[str] | None = None,
    ):
        self._name, self._log, self._say, self._on_started = name, log, say, on_started
        self._changed = threading.Condition()  # guards the fields up to the process
        self._waiting: deque[Mapping[str, Any]] = deque()
        self._sent = self._done = self._dropped = 0
        self._over = self._finished = False
        self._said: set[str] = set()
        self._progress_at = time.monotonic()
        log.parent.mkdir(parents=True, exist_ok=True)
        search = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        with log.open("ab") as errors, shielded():
            self._process = subprocess.Popen(
                command or child_command(name),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=os.environ | {"PYTHONPATH": search},
                start_new_session=True,  # Ctrl-C in a terminal does not reach it
            )
        self._threads = [
            threading.Thread(target=target, name=f"tracker-{name}", daemon=True)
            for target in (self._write, self._read)
        ]
        self.send("start", **asdict(start))
        for thread in self._threads:
            thread.start()

    def send(self, kind: str, **content: Any) -> None:
        """Hands over a message. It is dropped if the tracker is gone, or too many wait."""
        with self._changed:
            if self._over:
                return
            full = len(self._waiting) >= MOST_WAITING and kind != "finish"
            if full:
                self._dropped += 1
            else:
                if self._sent == self._done:
                    self._progress_at = time.monotonic()
                self._sent += 1
                self._waiting.append({"kind": kind, **content})
                self._changed.notify()
        if full:
            self._say_once("full", f"is too slow: records are dropped while {MOST_WAITING} wait")

    def join(self, deadline: float) -> None:
        """After "finish": waits until the tracker has ended; kills it at `deadline` (monotonic clock)."""
        try:
            self._process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            with self._changed:
                self._over, left = True, self._sent - self._done
            self._say_once("late", f"has not taken the end of the run in time, {left} records are missing")
        finally:
            self.kill()
        if self._dropped:
            self._say_once("dropped", f"{self._dropped} records were dropped")

    def kill(self) -> None:
        """Kills the process and its children, and waits for its threads."""
        with self._changed:
            self._over = True
            self._changed.notify()
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for thread in self._threads:
            thread.join(POLL_S)

    def _write(self) -> None:
        pipe = self._process.stdin
        assert pipe is not None
        with suppress(OSError):  # the tracker is gone; `_read` says so
            while (message := self._next()) is not None:
                pipe.write(json.dumps(message, default=str).encode() + b"\n")
                pipe.flush()
        with suppress(OSError):
            pipe.close()

    def _next(self) -> Mapping[str, Any] | None:
        with self._changed:
            while not self._waiting and not self._over:
                self._changed.wait()
            return self._waiting.popleft() if self._waiting and not self._over else None

    def _read(self) -> None:
        pipe = self._process.stdout
        assert pipe is not None
        with pipe:
            rest = b""
            while True:
                if not select.select([pipe], [], [], POLL_S)[0]:
                    self._check_progress()
                    continue
                if not (new := os.read(pipe.fileno(), 65536)):
                    break
                *lines, rest = (rest + new).split(b"\n")
                for line in lines:
                    self._hear(json.loads(line))
        with self._changed:
            expected = self._over or self._finished
            self._over = True
            self._changed.notify()
        code = self._process.wait()
        if not expected and code != EXIT_NO_TRACKER:  # with that code it has said why
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            self._say_once("end", f"has ended ({how}), the run continues without it; see {self._log}")

    def _hear(self, reply: Mapping[str, Any]) -> None:
        if "started" in reply:
            self._on_started(reply["started"], reply["where"])
        elif "problem" in reply:
            self._say_once("problem", f"{reply['problem']}; see {self._log}")
        with self._changed:
            self._done = reply.get("done", self._done)
            self._finished |= reply.get("finished", False)
            self._progress_at = time.monotonic()

    def _check_progress(self) -> None:
        with self._changed:
            silent = self._sent > self._done and time.monotonic() - self._progress_at > SILENT_S
        if silent:
            self._say_once("silent", f"has not answered for {SILENT_S:g} s, the run does not wait for it")

    def _say_once(self, sort: str, text: str) -> None:
        with self._changed:
            new = sort not in self._said
            self._said.add(sort)
        if new:
            self._say(f"tracker {self._name}: {text}")
