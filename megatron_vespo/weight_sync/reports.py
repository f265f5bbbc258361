"""What engine ranks have to say to the trainer: where they run, and what failed.

It goes through a store that rank 0 of the trainer keeps. An exception in the engine would end its process.
"""

from __future__ import annotations

import json
from dataclasses import asdict

from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]

from megatron_vespo.weight_sync.places import Place

_FAILURES = "failures"


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
