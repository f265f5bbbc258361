"""Weights shard to shard: every rank of an engine copies what it holds, and nothing else, out of the memory
of trainer ranks on its host. The bytes go through shared memory; HTTP has only messages.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import cast
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vespo.models.table import Family, ModelShape
from megatron_vespo.system.plugins import WEIGHT_LOADER
from megatron_vespo.weight_sync.agreement import agree, gathered, together
from megatron_vespo.weight_sync.engine_admin import EngineAdmin, EnginesLostError, WeightSyncError
from megatron_vespo.weight_sync.engine_layout import EngineLayout
from megatron_vespo.weight_sync.exact_sender import Packer, introductions
from megatron_vespo.weight_sync.messages import (
    BOARD_SLOT_BYTES,
    Introduction,
    Load,
    pack,
    read_slot,
    write_slot,
)
from megatron_vespo.weight_sync.plan import Plan, make_plan
from megatron_vespo.weight_sync.shared_memory import SharedMemory
from megatron_vespo.weight_sync.trainer_layout import TrainerShard


class NotExactError(WeightSyncError):
    """The plan does not hold for these engines; the message says why."""


@dataclass(frozen=True)
class ExactSource:
    """The model and this rank's part of it. `dtype` is that of the bytes on their way."""

    family: Family
    shape: ModelShape
    shard: TrainerShard
    layout: EngineLayout
    dtype: torch.dtype
    buffer_bytes: int


class Exact:
    """One trainer rank's part. The lowest rank of each host, its leader, speaks to the engines there."""

    def __init__(self, source: ExactSource):
        self._source = source
        self._group: dist.ProcessGroup | None = None
        self._shards: list[TrainerShard] = []  # of this host
        self._hosts: set[str] = set()  # of all ranks
        self._plan: Plan | None = None  # none where no engine is on this host
        self._packer: Packer | None = None
        self._board: SharedMemory | None = None
        self._admin: EngineAdmin | None = None  # of the leader, for its host's engines; None without any

    def connect(self, admin: EngineAdmin) -> None:
        """Plan, and tell the engines of the plan; a collective. NotExactError if that is not possible."""
        self._meet()
        away = sorted({_host(url) for url in admin.urls} - self._hosts)
        if away:
            raise NotExactError(f"no trainer rank runs on {', '.join(away)}, where engines are")
        urls = [url for url in admin.urls if _host(url) == self._source.shard.host]
        together(bool(urls), self._make_plan)
        paths: dict[int, str] = {}
        if self._plan is not None:
            self._packer = Packer(self._plan, self._source.shard.rank, self._source.dtype)
            paths = dict(gathered((self._source.shard.rank, self._packer.path), self._group))
        leads = self._source.shard.rank == self._shards[0].rank
        together(leads and bool(urls), self._introduce, admin, urls, paths)

    def send(self, held: Mapping[str, Tensor], policy_version: int) -> None:
        """All of the weights: a group is packed while the engines copy the one before; a collective.

        `held` are this rank's parameters by their first HF tensor.
        """
        last = self._plan.num_groups - 1 if self._plan is not None else -1
        calls: list[Future] = []
        error: WeightSyncError | None = None
        for group in range(last + 1):
            assert self._packer is not None
            self._packer.pack(group, held)
            error = self._result(calls)
            if any(gathered(error is not None, self._group)):
                break
            calls = self._ask(group, policy_version if group == last else None)
        agree(error or self._result(calls))

    def close(self) -> None:
        """Engines keep the memory that they have opened until they hear of another plan."""
        for part in (self._packer, self._board, self._admin):
            if part is not None:
                part.close()
        self._plan = self._packer = self._board = self._admin = None

    def _meet(self) -> None:
        """Once: who runs where, and a process group for each host."""
        if self._shards:
            return
        shards: list[TrainerShard] = gathered(self._source.shard)
        self._hosts = {shard.host for shard in shards}
        for host in sorted(self._hosts):
            here = [shard for shard in shards if shard.host == host]
            group = dist.new_group([shard.rank for shard in here], backend="gloo")
            if host == self._source.shard.host:
                self._shards, self._group = here, cast(dist.ProcessGroup, group)

    def _make_plan(self) -> None:
        source = self._source
        try:
            self._plan = make_plan(
                source.family,
                source.shape,
                self._shards,
                source.layout,
                source.dtype.itemsize,
                source.buffer_bytes,
            )
        except ValueError as error:
            raise NotExactError(str(error)) from error

    def _introduce(self, admin: EngineAdmin, urls: Sequence[str], paths: Mapping[int, str]) -> None:
        assert self._plan is not None
        size = self._source.layout.tp
        self._admin = admin.of(urls)
        self._board = SharedMemory(BOARD_SLOT_BYTES * size * len(urls))
        messages = [
            introductions(self._plan, paths, self._source.dtype, self._board.path, size * number)
            for number in range(len(urls))
        ]
        self._admin.wait(self._post(lambda number: messages[number], None))
        told = self._told()
        if told:
            raise NotExactError("; ".join(told.values()))

    def _ask(self, group: int, policy_version: int | None) -> list[Future]:
        if self._admin is None:
            return []
        load: Sequence[Introduction | Load] = [Load(group)] * self._source.layout.tp
        return self._post(lambda _: load, policy_version)

    def _post(
        self, messages: Callable[[int], Sequence[Introduction | Load]], policy_version: int | None
    ) -> list[Future]:
        """One call to each engine; its ranks get a message each."""
        assert self._admin is not None
        payload: dict = {"load_format": WEIGHT_LOADER, "selector": "target"}
        # what requests paused in place have in the cache is theirs; it cannot be flushed
        payload["flush_cache"] = policy_version is not None and self._admin.pause != "in_place"
        if policy_version is not None:
            payload["weight_version"] = str(policy_version)
        return [
            self._admin.submit(
                url,
                "/update_weights_from_tensor",
                payload | {"serialized_named_tensors": [pack(message) for message in messages(number)]},
            )
            for number, url in enumerate(self._admin.urls)
        ]

    def _result(self, calls: list[Future]) -> WeightSyncError | None:
        """What went wrong in these calls. An engine that could not load is lost: its weights are mixed."""
        if not calls:
            return None
        assert self._admin is not None
        try:
            self._admin.wait(calls)
        except WeightSyncError as error:
            return error
        told = self._told()
        return EnginesLostError(told) if told else None

    def _told(self) -> dict[str, str]:
        """What the engines have written on the board, by url; it is wiped."""
        assert self._admin is not None and self._board is not None
        found = {}
        for number, url in enumerate(self._admin.urls):
            for slot in range(number * self._source.layout.tp, (number + 1) * self._source.layout.tp):
                if text := read_slot(self._board.bytes, slot):
                    found.setdefault(url, f"engine {url}: {text}")
                    write_slot(self._board.bytes, slot, "")
        return found


def _host(url: str) -> str:
    return urlsplit(url).hostname or ""
