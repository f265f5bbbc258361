"""Waits for remote calls with a deadline; the first failure is raised at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import ray
import ray.exceptions

POLL_S = 1.0
DEATH_NOTICE_S = 3.0  # how much later than its peers Ray may notice a dead process


class WorkerError(RuntimeError):
    """A remote process failed, died or did not answer; the message names it."""

    died = False


class TrainerError(WorkerError):
    """A trainer rank failed. The other ranks cannot continue; the run can restart the trainer."""


def gather(
    refs: Sequence[ray.ObjectRef],
    names: Sequence[str],
    what: str,
    timeout_s: float,
    explain: Callable[[int], str],
    watch: Callable[[], None] | None = None,
    passed_on: tuple[type[Exception], ...] = (ValueError,),
    failure: type[WorkerError] = WorkerError,
) -> list:
    """Results in order. Raises as soon as one call fails, as the others may wait for it in a collective.

    `names[i]` is the process that answers ref i; `explain(i)` adds details about it. `watch` is called
    every second and may raise. Errors of the classes `passed_on` are raised unchanged: a ValueError, for
    example, is the user's mistake. All other errors are raised as `failure`.
    """
    deadline = time.monotonic() + timeout_s
    pending = {ref: i for i, ref in enumerate(refs)}
    results: list = [None] * len(refs)
    while pending:
        ready, _ = ray.wait(list(pending), num_returns=len(pending), timeout=POLL_S)
        for ref in ready:
            i = pending.pop(ref)
            try:
                results[i] = ray.get(ref)
            except ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, passed_on):
                    raise error.cause from None
                _raise_if_one_died(pending, names, what, explain, failure)
                _watch_a_while(watch)
                cause = f"{type(error.cause).__name__}: {error.cause}"
                raise failure(f"{names[i]} failed in {what}: {cause}\n{explain(i)}") from None
            except ray.exceptions.RayActorError as error:
                raise _death(failure, error, names[i], what, explain(i)) from None
        if watch is not None:
            watch()
        if pending and time.monotonic() > deadline:
            late = ", ".join(names[i] for i in pending.values())
            raise failure(f"no answer to {what} within {timeout_s:g} s from {late}")
    return results


def _raise_if_one_died(
    pending: dict[ray.ObjectRef, int],
    names: Sequence[str],
    what: str,
    explain: Callable[[int], str],
    failure: type[WorkerError],
) -> None:
    """When a process dies, others fail with broken connections. Name the dead process, not the others."""
    ready, _ = (
        ray.wait(list(pending), num_returns=len(pending), timeout=DEATH_NOTICE_S) if pending else ([], [])
    )
    for ref in ready:
        try:
            ray.get(ref)
        except ray.exceptions.RayTaskError:
            continue
        except ray.exceptions.RayActorError as error:
            raise _death(failure, error, names[pending[ref]], what, explain(pending[ref])) from None


def _watch_a_while(watch: Callable[[], None] | None) -> None:
    """Give `watch` time to find a dead process, whose connections break a moment earlier."""
    deadline = time.monotonic() + DEATH_NOTICE_S
    while watch is not None and time.monotonic() < deadline:
        watch()
        time.sleep(POLL_S / 2)


def _death(
    failure: type[WorkerError], error: ray.exceptions.RayActorError, name: str, what: str, explanation: str
) -> WorkerError:
    reason = str(error).strip().splitlines()[-1]
    death = failure(f"{name} died in {what}: {reason}\n{explanation}")
    death.died = True
    return death
