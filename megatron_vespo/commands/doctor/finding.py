"""The result of a check, and how checks run: in parallel, each with a deadline."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Thread
from typing import Literal

Status = Literal["ok", "warn", "FAIL"]


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    `fix` says what to do if it is not ok. `alike`: the text must be the same on all nodes. `measured` is a
    number that should be about the same on all nodes, the higher the better.
    """

    check: str
    status: Status
    text: str
    fix: str = ""
    alike: bool = False
    measured: float | None = None


@dataclass(frozen=True)
class Check:
    name: str
    function: Callable[[], Finding]
    deadline_s: float


def run_checks(checks: Sequence[Check]) -> list[Finding]:
    """One finding per check, in their order, also for a check that raises or does not return in time."""
    found: list[Finding | None] = [None] * len(checks)

    def run(number: int) -> None:
        check = checks[number]
        try:
            found[number] = check.function()
        except Exception as error:  # a check that raises also says something about the machine
            text = f"the check itself failed: {type(error).__name__}: {error}"
            found[number] = Finding(check.name, "FAIL", text)

    # daemons: a hanging file system blocks its thread for ever
    threads = [Thread(target=run, args=(number,), daemon=True) for number in range(len(checks))]
    started = time.monotonic()
    for thread in threads:
        thread.start()
    for check, thread in zip(checks, threads, strict=True):
        thread.join(max(0.0, started + check.deadline_s - time.monotonic()))
    return [
        Finding(check.name, "FAIL", f"no answer within {check.deadline_s:g} s")
        if finding is None
        else finding
        for check, finding in zip(checks, list(found), strict=True)
    ]


def with_deadline(name: str, function: Callable[[], Finding], deadline_s: float) -> Finding:
    """Runs one check with its own deadline."""
    return run_checks([Check(name, function, deadline_s)])[0]
