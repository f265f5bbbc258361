"""A cluster takes the machine back: SIGTERM or SIGUSR1 makes a run save and end, within a deadline.

Where generation, rewards or an evaluation go on, they are given up at once; what trains, syncs or saves goes
on to the end of its rollout batch. The exit code says how it went, see `EndedBySignal`. A second signal, and
the deadline, end the run at once; but the same signal within a moment is the first one once more, as some
programs send it to a process and to its group. Ctrl-C is none of this.

Signal handlers belong to a process's main thread, and so does everything here.
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
EXIT_RESUME = 75  # EX_TEMPFAIL of sysexits.h: try again. Everything is saved, or nothing was to be
EXIT_UNSAVED = 76  # the last checkpoint counts, what came after it is lost
SAME_SIGNAL_S = 2.0  # timeout(1), for one, reaches a process twice
LAST_GRACE_S = 30.0  # to end everything after the deadline; then this process ends without


class EndedBySignal(KeyboardInterrupt):
    """Ends the run. Like Ctrl-C no `except Exception` holds it up, and asyncio lets it through."""

    exit_code = EXIT_UNSAVED


class Preempted(EndedBySignal):
    """There is time to save; when this leaves the program all is saved, or nothing was to be."""

    exit_code = EXIT_RESUME


class Preemption:
    """Hears the signals from `listen` on and tells the run, which works inside `guarded`."""

    def __init__(self, deadline_s: float = 0.0):
        self._deadline_s = deadline_s
        self._guarded = self._interruptible = False
        self.signal: str | None = None  # the first one's name
        self._since = 0.0  # when it came, of the monotonic clock

    def listen(self) -> None:
        """From now on; another part of the program that sets handlers has to set these again."""
        for number in SIGNALS:
            signal.signal(number, self._on_signal)
        signal.signal(signal.SIGALRM, self._on_deadline)

    def conclude(self, exit_code: int) -> None:
        """Nothing more will be saved: further signals say nothing new, the end has a little time."""

        def give_up(number: int, frame: FrameType | None) -> None:
            print("megatron-vespo: the run does not end, its process does", file=sys.stderr, flush=True)
            os._exit(exit_code)  # what it has started ends with it

        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGALRM, give_up)
        signal.setitimer(signal.ITIMER_REAL, LAST_GRACE_S)

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """A signal does not interrupt what is inside, but in `interruptible` parts and at `stop_here`."""
        self._guarded = True
        try:
            yield
        finally:
            self._guarded = False

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """What is inside can be given up at any moment: no state changes before its end."""
        self._interruptible = True
        try:
            self.stop_here()
            yield
        finally:
            self._interruptible = False

    def stop_here(self) -> None:
        """Raises Preempted if a signal has come: the state is that of the end of a rollout batch."""
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
    """Processes started inside never get the signals: schedulers send them to all processes of a job.

    A blocked signal stays blocked in children whatever handlers they set.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def shield_process() -> None:
    """The same for this process, a worker, and all that it will start: the driver decides for them."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
