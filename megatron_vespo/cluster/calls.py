"""Waiting for remote calls: with a deadline, and with the first failure said at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import ray

POLL_S = 1.0


class WorkerError(RuntimeError):
    """A remote process that failed, died or did not answer; names it."""


def gather(
    refs: Sequence[ray.ObjectRef],
    names: Sequence[str],
    what: str,
    timeout_s: float,
    explain: Callable[[int], str],
    watch: Callable[[], None] | None = None,
    passed_on: tuple[type[Exception], ...] = (ValueError,),
) -> list:
    """Results in order. Raises as soon as one fails, as the others may wait for it in a collective.

    `names[i]` is who answers ref i, `explain(i)` adds what is known about it, `watch` is called every second
    and may raise. A ValueError is passed on as it is: it is the user's mistake.
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
                cause = f"{type(error.cause).__name__}: {error.cause}"
                raise WorkerError(f"{names[i]} failed in {what}: {cause}\n{explain(i)}") from None
            except ray.exceptions.RayActorError as error:
                reason = str(error).strip().splitlines()[-1]
                raise WorkerError(f"{names[i]} died in {what}: {reason}\n{explain(i)}") from None
        if watch is not None:
            watch()
        if pending and time.monotonic() > deadline:
            late = ", ".join(names[i] for i in pending.values())
            raise WorkerError(f"no answer to {what} within {timeout_s:g} s from {late}")
    return results
