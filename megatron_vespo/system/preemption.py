"""Handles preemption: on SIGTERM or SIGUSR1 a run saves and ends within a deadline.

Generation, rewards and evaluation stop at once. Training, syncing and saving continue to the end of the
rollout batch. The exit code says whether everything is saved, see `EndedBySignal`. A second signal, or the
deadline, ends the run at once. The same signal within two seconds counts as the first one, as some programs
send it to a process and to its group. Ctrl-C is not handled here.

Signal handlers belong to a process's main thread: call everything here from it.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
EXIT_RESUME = 75  # EX_TEMPFAIL of sysexits.h: try again. Everything is saved, or there was nothing to save
EXIT_UNSAVED = 76  # all work after the last checkpoint is lost
SAME_SIGNAL_S = 2.0  # timeout(1), for example, signals a process twice
LAST_GRACE_S = 30.0  # to end everything after the deadline; then this process exits anyway


class EndedBySignal(KeyboardInterrupt):
    """Ends the run. As with Ctrl-C, no `except Exception` catches it, and asyncio lets it through."""

    exit_code = EXIT_UNSAVED


class Preempted(EndedBySignal):
    """Ends the run with time to save. When this leaves the program, everything is saved."""

    exit_code = EXIT_RESUME


class Preemption:
    """Handles the signals once `listen` is called, and interrupts the run inside `guarded`."""

    def __init__(self, deadline_s: float = 0.0):
        self._deadline_s = deadline_s
        self._guarded = self._interruptible = False
        self.signal: str | None = None  # the name of the first signal
        self._since = 0.0  # when it came, on the monotonic clock

    def listen(self) -> None:
        """Set the signal handlers. Code that sets others later must restore these."""
        for number in SIGNALS:
            signal.signal(number, self._on_signal)
        signal.signal(signal.SIGALRM, self._on_deadline)

    def conclude(self, exit_code: int) -> None:
        """Ignore further signals, as nothing more will be saved, and exit if the end takes too long."""

        def give_up(number: int, frame: FrameType | None) -> None:
            print("megatron-vespo: the run does not end, its process does", file=sys.stderr, flush=True)
            os._exit(exit_code)  # its child processes end with it

        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGALRM, give_up)
        signal.setitimer(signal.ITIMER_REAL, LAST_GRACE_S)

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Inside, a signal interrupts the run only in `interruptible` parts and at `stop_here`."""
        self._guarded = True
        try:
            yield
        finally:
            self._guarded = False

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Marks work that may be given up at any moment, as it changes no state before its end."""
        self._interruptible = True
        try:
            self.stop_here()
            yield
        finally:
            self._interruptible = False

    def stop_here(self) -> None:
        """Raise Preempted if a signal has come. Call it at the end of a rollout batch."""
        if self.signal is not None:
            raise Preempted(f"ended by {self.signal}")

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if name == self.signal and time.monotonic() < self._since + SAME_SIGNAL_S:
            return
        if self.signal is not None:
            self.conclude(EXIT_UNSAVED)
            raise EndedBySignal(f"ended by {self.signal} and then {name}, nothing is saved")
        self.signal, self._since = name, time.monotonic()
        if self._deadline_s:
            signal.setitimer(signal.ITIMER_REAL, self._deadline_s)
        if self._interruptible or not self._guarded:
            self.stop_here()

    def _on_deadline(self, number: int, frame: FrameType | None) -> None:
        self.conclude(EXIT_UNSAVED)
        raise EndedBySignal(
            f"ended by {self.signal}, not saved within --preemption-deadline {self._deadline_s:g} seconds"
        )


@contextmanager
def shielded() -> Iterator[None]:
    """Processes started inside never get the signals, which schedulers send to all processes of a job.

    A blocked signal stays blocked in children, whatever handlers they set.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def shield_process() -> None:
    """Ignore the signals in this worker process and its children: the driver decides for them."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
