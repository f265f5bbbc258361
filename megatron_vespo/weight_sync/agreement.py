"""Ranks exchange their errors before any of them goes on, so that none waits for one that has failed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from megatron_vespo.weight_sync.engine_admin import EnginesLostError, WeightSyncError


def agree(error: WeightSyncError | None) -> None:
    """A collective of all ranks: if one of them has an error, all raise it; lost engines are joined."""
    failures = [failure for failure in gathered(error) if failure is not None]
    if failures:
        lost: dict[str, str] = {}
        for failure in failures:
            lost |= failure.lost if isinstance(failure, EnginesLostError) else {}
        raise EnginesLostError(lost) if lost else failures[0]


def together(mine: bool, action: Callable[..., Any], *arguments: Any) -> Any:
    """Run `action` on the ranks where `mine` is true; all ranks raise if it fails on one of them."""
    result = error = None
    if mine:
        try:
            result = action(*arguments)
        except WeightSyncError as failure:
            error = failure
    agree(error)
    return result


def gathered(value: Any) -> list[Any]:
    """Every rank's value, in the order of the ranks."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def from_rank_0(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]
