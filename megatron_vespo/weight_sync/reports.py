"""What engine ranks have to say to the trainer: where they run, and what failed.

It goes through a store that rank 0 of the trainer keeps. An exception in the engine would end its process.
With staging, the trainer announces there that it sends, and engine ranks report that all has arrived.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import timedelta

from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]

from megatron_vespo.weight_sync.places import Place

_FAILURES = "failures"
_POLL_S = 0.01
_FOREVER = timedelta(days=365)  # until the trainer's store is gone


def _place(slot: int) -> str:
    return f"place/{slot}"


def _failure(slot: int) -> str:
    return f"failure/{slot}"


def report_place(store: Store, slot: int, place: Place) -> None:
    store.set(_place(slot), json.dumps(asdict(place)))


def places(store: Store, number: int) -> list[Place | None]:
    """By slot; None for a rank that has not reported."""
    return [
        Place(**json.loads(store.get(_place(slot)))) if store.check([_place(slot)]) else None
        for slot in range(number)
    ]


def report_failure(store: Store, slot: int, text: str) -> None:
    store.set(_failure(slot), text)
    store.add(_FAILURES, 1)


def failures(store: Store, number: int) -> dict[int, str]:
    """By slot, of the `number` engine ranks."""
    if not store.add(_FAILURES, 0):
        return {}
    return {
        slot: store.get(_failure(slot)).decode(errors="replace")
        for slot in range(number)
        if store.check([_failure(slot)])
    }


def announce(store: Store, number: int) -> None:
    """Say that sync `number` of this connection, from 1 on, is on its way to the engines' staging memory."""
    store.set(f"announced/{number}", "")


def wait_for_announcement(store: Store, number: int) -> None:
    """RuntimeError when the trainer has closed its store."""
    store.wait([f"announced/{number}"], _FOREVER)


def report_staged(store: Store, number: int, slot: int) -> None:
    store.set(f"staged/{number}/{slot}", "")


def wait_until_staged(store: Store, number: int, slots: Sequence[int], timeout_s: float) -> list[int]:
    """Until all of `slots` have reported, or one a failure; returns those that have not in time."""
    deadline = time.monotonic() + timeout_s
    missing = list(slots)
    while missing and not store.add(_FAILURES, 0):
        missing = [slot for slot in missing if not store.check([f"staged/{number}/{slot}"])]
        if missing and time.monotonic() > deadline:
            return missing
        time.sleep(_POLL_S if missing else 0)
    return []
