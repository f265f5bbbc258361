"""Process groups of processes that have no world in common: ranks of the trainer and of engines."""

from __future__ import annotations

import socket
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed import Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.distributed_c10d import Backend, PrefixStore, _new_process_group_helper, _world


def open_store(host: str, timeout_s: float, world_size: int | None = None) -> TCPStore:
    """A store on a free port of this address only. By default torch would listen on all interfaces."""
    listener = socket.create_server((host, 0))
    port = listener.getsockname()[1]
    return TCPStore(
        host, port, world_size, is_master=True, timeout=timedelta(seconds=timeout_s), wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )  # fmt: skip


def client_store(host: str, port: int, timeout_s: float) -> TCPStore:
    """The store of another process. RuntimeError if it cannot be reached in time."""
    return TCPStore(host, port, is_master=False, timeout=timedelta(seconds=timeout_s))


def join_group(
    backend: str, store: Store, rank: int, world_size: int, name: str, timeout_s: float
) -> dist.ProcessGroup:
    """Join as `rank`, by internal functions of torch: its public ones know one world only.

    RuntimeError if the others do not come in time.
    """
    prefixed = PrefixStore(name, store)
    named = cast(Any, name)  # a GroupName in new versions of torch
    group, _ = _new_process_group_helper(
        world_size, rank, [], Backend(backend), prefixed, group_name=named,
        timeout=timedelta(seconds=timeout_s),
    )  # fmt: skip
    assert isinstance(group, dist.ProcessGroup)
    _world.pg_group_ranks[group] = {rank: rank for rank in range(world_size)}
    return group


def meet(group: dist.ProcessGroup, device: torch.device) -> None:
    """Wait for all. NCCL connects the ranks in their first collective, and all of them have to be in it."""
    dist.all_reduce(torch.zeros(1, device=device), group=group)


def leave_group(group: dist.ProcessGroup) -> None:
    """Leave without waiting for the others."""
    group.abort()
    dist.destroy_process_group(group)
