"""Broadcasts from one trainer rank to all engines, controlled over HTTP.

Every pipeline stage has one sender and one process group: the sender is rank 0, the engines' ranks follow.
SGLang joins on /init_weights_update_group and receives one flattened bucket per call of
/update_weights_from_distributed. It loads weights only between /begin_weight_update and /end_weight_update.
"""

from __future__ import annotations

import time
from concurrent.futures import Future
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from megatron_vespo.weight_sync.engine_admin import EngineAdmin, WeightSyncError
from megatron_vespo.weight_sync.outside_group import join_group, leave_group, open_store

ARRIVAL_POLL_S = 0.05
SyncBackend = Literal["nccl", "gloo"]


def sync_backend(on_gpus: bool, colocated: bool) -> SyncBackend:
    """NCCL, or gloo for colocated engines, as NCCL refuses two processes on one GPU, and for CPUs."""
    return "nccl" if on_gpus and not colocated else "gloo"


class BucketSender:
    """One pipeline stage's end of the broadcast group `name`; lives on the rank that sends."""

    def __init__(self, admin: EngineAdmin, engine_size: int, name: str, host: str, backend: SyncBackend):
        """`engine_size` is the number of ranks of each engine. Blocks until all have joined."""
        self.admin, self.name = admin, name
        self.group: dist.ProcessGroup | None = None
        world_size = 1 + engine_size * len(admin.urls)
        store = open_store(host, admin.timeout_s, world_size)
        joins = [
            admin.submit(
                url,
                "/init_weights_update_group",
                {
                    "master_address": host,
                    "master_port": store.port,
                    "rank_offset": 1 + number * engine_size,
                    "world_size": world_size,
                    "group_name": self.name,
                    "backend": backend,
                },
            )
            for number, url in enumerate(admin.urls)
        ]
        if not _all_have_arrived(store, world_size - 1, joins, admin.timeout_s):
            del store  # the engines that wait at it for others give up
            admin.wait(joins)
        try:
            self.group = join_group(backend, store, 0, world_size, self.name, admin.timeout_s)
        except RuntimeError as error:
            admin.wait([join for join in joins if join.done()])
            raise WeightSyncError(f"no group with {', '.join(admin.urls)}: {error}") from error
        admin.wait(joins)

    def send(self, bucket: dict[str, Tensor], policy_version: int | None) -> None:
        """Broadcast one bucket. The last one has `policy_version`: engines label later tokens with it."""
        # SGLang reads the flat bytes back in this order and wants every tensor aligned to its element size
        ordered = sorted(bucket.items(), key=lambda item: -item[1].element_size())
        payload = {
            "names": [name for name, _ in ordered],
            "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in ordered],
            "shapes": [list(tensor.shape) for _, tensor in ordered],
            "group_name": self.name,
            "load_format": "flattened_bucket",
            # what requests paused in place have in the cache is theirs; it cannot be flushed
            "flush_cache": policy_version is not None and self.admin.pause != "in_place",
        }
        if policy_version is not None:
            payload["weight_version"] = str(policy_version)
        receiving = self.admin.post("/update_weights_from_distributed", payload)
        flat = torch.cat([tensor.contiguous().view(-1).view(torch.uint8) for _, tensor in ordered])
        broken = None
        try:
            dist.broadcast(flat, src=0, group=self.group)
        except RuntimeError as error:
            broken = str(error)  # the error itself would keep the group alive
            self.close()  # engines that wait for a part that will not come give up
        try:
            self.admin.wait(receiving)  # an engine's own words say more than a broken connection
        except WeightSyncError:
            self.close()  # with NCCL it is the GPU that waits, and all work behind it
            raise
        if broken is not None:
            raise WeightSyncError(f"broadcast to {', '.join(self.admin.urls)} failed: {broken}")

    def close(self) -> None:
        """Leave the group without waiting for the engines."""
        group, self.group = self.group, None
        if group is not None:
            leave_group(group)


def _all_have_arrived(store: TCPStore, number: int, joins: list[Future], timeout_s: float) -> bool:
    """True when `number` ranks wait at the store for rank 0, or have joined, and none of `joins` has failed.

    gloo's ranks leave their addresses under keys that end in their number; NCCL's ranks do not wait. If one
    join fails, the others are still waited for: a rank that waits at a store which closes gives up at once. A
    rank that arrives later would look for the store until its timeout.
    """
    deadline = time.monotonic() + timeout_s
    size = number // len(joins)  # ranks of an engine
    while time.monotonic() < deadline:
        here = {key.rpartition("/")[2] for key in store.list_keys()}
        done = [join.done() for join in joins]
        failed = any(join.exception() for join, over in zip(joins, done, strict=True) if over)
        on_the_way = [rank for rank in range(number) if not done[rank // size] and str(1 + rank) not in here]
        if not on_the_way:
            return not failed
        time.sleep(ARRIVAL_POLL_S)
    return False
