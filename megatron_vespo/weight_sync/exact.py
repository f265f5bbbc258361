"""Weights shard to shard: every engine rank gets the bytes that it holds, and nothing else.

They go through memory that both processes can open, or as messages between their ranks. HTTP has only words.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from megatron_vespo.models.table import Family, ModelShape
from megatron_vespo.weight_sync.agreement import agree, from_rank_0, gathered, together
from megatron_vespo.weight_sync.engine_admin import EngineAdmin, EnginesLostError, WeightSyncError
from megatron_vespo.weight_sync.engine_calls import post_messages
from megatron_vespo.weight_sync.engine_layout import EngineLayout
from megatron_vespo.weight_sync.exact_sender import ExactSender, Handles, introduction
from megatron_vespo.weight_sync.messages import Hello, Join, Load, Message
from megatron_vespo.weight_sync.outside_group import client_store, join_group, leave_group, meet, open_store
from megatron_vespo.weight_sync.plan import Plan, make_plan
from megatron_vespo.weight_sync.reports import announce, failures, places, wait_until_staged
from megatron_vespo.weight_sync.teams import teams_of
from megatron_vespo.weight_sync.trainer_layout import TrainerShard
from megatron_vespo.weight_sync.wiring import EngineRank, Wiring

BUFFERS = 2  # of each rank: engines read one while the other is filled


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
    device: torch.device
    buffer_bytes: int
    host: str  # the address of this rank's host
    staging: bool = False  # engines have room for all weights beside those that they use

    def plan(self, shards: Sequence[TrainerShard]) -> Plan:
        """From these trainer ranks. ValueError as in `make_plan`."""
        return make_plan(self.family, self.shape, shards, self.layout, self.dtype.itemsize, self.buffer_bytes)

    @property
    def backend(self) -> str:
        return "nccl" if self.device.type == "cuda" else "gloo"


class Exact:
    """One trainer rank's part. Rank 0 speaks to the engines."""

    way = "weights go to the engines shard to shard"
    in_session = True  # engines load between their begin and end of a weight update

    def __init__(self, source: ExactSource):
        self._source = source
        self._leads = source.shard.rank == 0
        self._senders: list[ExactSender] = []
        self._num_groups = self._num_staged = 0
        self._group: dist.ProcessGroup | None = None  # with engine ranks that read no memory of the trainer's
        self._ranks: dict[EngineRank, int] = {}  # theirs in it
        self._store: TCPStore | None = None  # on rank 0
        self._admin: EngineAdmin | None = None

    def connect(self, admin: EngineAdmin, number: int) -> None:
        """Plan, and tell the engines of the plan; a collective. NotExactError if that is not possible.

        `number` has not been used before with these engines.
        """
        self._admin = admin
        found = from_rank_0(together(self._leads, self._say_hello))
        shards: list[TrainerShard] = gathered(self._source.shard)
        wirings: list[Wiring] = together(True, self._plan, shards, found)
        source = self._source
        self._num_groups = max(wiring.plan.num_groups for wiring in wirings)
        ring = self._num_groups if source.staging else BUFFERS
        self._num_staged = 0
        self._senders = [
            ExactSender(wiring, source.shard.rank, source.dtype, source.device, ring) for wiring in wirings
        ]
        self._introduce(wirings, ring)
        self._join(wirings, len(shards), f"megatron_vespo_{number}_exact")

    def stage(self, held: Mapping[str, Tensor]) -> None:
        """With staging: bring all weights to where engines read them, while these generate; a collective."""
        if not self._source.staging:
            return
        self._num_staged += 1
        if self._leads:
            announce(self._open_store, self._num_staged)
        works = [work for group in range(self._num_groups) for work in self._prepare(group, held)]
        # with NCCL all work of this GPU would wait behind what is sent, also that of `gathered`
        waits = self._source.backend == "gloo"
        error = _finished(works) if waits else None
        failed = any(gathered(error is not None))
        if self._leads:
            error = self._lost() if failed else self._staged()
        if failed or any(gathered(error is not None)):
            self._leave()
        agree(error)
        agree(None if waits else _finished(works))  # a second wait of gloo's would never end

    def send(self, held: Mapping[str, Tensor], policy_version: int) -> None:
        """All of the weights: a group is packed while the engines copy the one before; a collective.

        `held` are this rank's parameters by their first HF tensor. With staging, `stage` has sent them.
        """
        if self._source.staging:
            load = Load(0, self._num_groups, staged=True)
            agree(self._result(self._post(lambda _: load, policy_version)))
            return
        calls: list[Future] = []
        works: list[dist.Work] = []
        error: WeightSyncError | None = None
        for group in range(self._num_groups):
            started = self._prepare(group, held)
            error = error or self._result(calls)  # before `_finished`, as in `stage`
            if any(gathered(error is not None)):
                self._leave()  # engines that wait for a part that will not come give up
                break
            error = _finished(works)
            works = started
            last = group == self._num_groups - 1
            calls = self._post(
                lambda _, group=group: Load(group, group + 1, False), policy_version if last else None
            )
        error = error or self._result(calls)
        if any(gathered(error is not None)):
            self._leave()
        agree(error)
        agree(_finished(works))

    def close(self) -> None:
        """Engines keep the memory that they have opened until they hear of another connection."""
        self._leave()
        for sender in self._senders:
            sender.close()
        self._senders, self._ranks, self._store, self._admin = [], {}, None, None

    def _say_hello(self) -> list[EngineRank]:
        """Where the engines' ranks run."""
        admin, source = self._engines, self._source
        self._store = open_store(source.host, admin.timeout_s)
        admin.wait(self._post(
            lambda slot: Hello(source.host, self._open_store.port, admin.timeout_s, slot), None
        ))  # fmt: skip
        size, found = source.layout.tp, []
        for slot, place in enumerate(places(self._store, size * len(admin.urls))):
            if place is None:
                url = admin.urls[slot // size]
                raise NotExactError(f"engine {url} cannot reach the trainer at {source.host}; see its log")
            found.append(EngineRank(slot // size, slot % size, slot, place))
        return found

    def _plan(self, shards: Sequence[TrainerShard], engine_ranks: Sequence[EngineRank]) -> list[Wiring]:
        """One for each team. The plan of teams that hold the same parts is made once."""
        size, known, found = self._source.layout.tp, {}, []
        by_engine = [engine_ranks[start : start + size] for start in range(0, len(engine_ranks), size)]
        for team in teams_of(shards, [[rank.place for rank in ranks] for ranks in by_engine]):
            if team.parts not in known:
                known[team.parts] = self._plan_of(team.numbered)
            plan = known[team.parts].sent_by([shard.rank for shard in team.sources])
            receivers = [rank for engine in team.engines for rank in by_engine[engine]]
            found.append(Wiring(plan, team.sources, shards, receivers, self._source.dtype.itemsize))
        return found

    def _plan_of(self, shards: Sequence[TrainerShard]) -> Plan:
        try:
            return self._source.plan(shards)
        except ValueError as error:
            raise NotExactError(str(error)) from error

    def _introduce(self, wirings: Sequence[Wiring], ring: int) -> None:
        # of each wiring: a rank may pack for several
        everybodys: list[list[Handles]] = gathered([sender.handles for sender in self._senders])
        handles = [
            {key: text for of_rank in everybodys for key, text in of_rank[number].items()}
            for number in range(len(wirings))
        ]
        wired = {
            rank.slot: (wiring, rank, handles[number])
            for number, wiring in enumerate(wirings)
            for rank in wiring.engine_ranks
        }

        def message(slot: int) -> Message:
            return introduction(*wired[slot], self._source.dtype, ring)

        def introduce() -> None:
            self._engines.wait(self._post(message, None))
            if told := self._told():
                raise NotExactError("; ".join(told.values()))

        together(self._leads, introduce)

    def _join(self, wirings: Sequence[Wiring], num_ranks: int, name: str) -> None:
        """A group of all trainer ranks, and of the engine ranks that have no home."""
        receivers = [
            rank for wiring in wirings for rank in wiring.engine_ranks
            if wiring.landing(rank).size and wiring.landing(rank).home is None
        ]  # fmt: skip
        if not receivers:
            return
        source, timeout_s = self._source, self._engines.timeout_s
        self._ranks = {receiver: num_ranks + number for number, receiver in enumerate(receivers)}
        by_slot = {receiver.slot: rank for receiver, rank in self._ranks.items()}
        world = num_ranks + len(receivers)
        host, port = from_rank_0((source.host, self._open_store.port) if self._leads else None)
        calls = self._post(
            lambda slot: Join(name, source.backend, by_slot.get(slot), world, source.staging), None
        )

        def join() -> None:
            store = self._store or client_store(host, port, timeout_s)
            try:
                self._group = join_group(source.backend, store, source.shard.rank, world, name, timeout_s)
                meet(self._group, source.device)
            except RuntimeError as error:
                raise WeightSyncError(f"no group with {', '.join(self._engines.urls)}: {error}") from error

        error = None
        try:
            join()
        except WeightSyncError as failure:
            error = failure
        agree(self._result(calls) or error)

    def _prepare(self, group: int, held: Mapping[str, Tensor]) -> list[dist.Work]:
        """Fill the group's buffers; what engine ranks receive themselves is on its way afterwards."""
        relayed: list[dist.P2POp] = []
        sent: list[dist.P2POp] = []
        for sender in self._senders:
            sender.pack(group, held)
            relayed += sender.relayed(group)
            if self._group is not None:
                sent += sender.sent(group, self._ranks, self._group)
        works = _started(sent)
        for work in _started(relayed):
            work.wait()
        if self._source.device.type == "cuda":
            torch.cuda.current_stream(self._source.device).synchronize()  # engines read what is there now
        return works

    def _post(self, message: Callable[[int], Message], policy_version: int | None) -> list[Future]:
        """One call to each engine, by rank 0; its ranks get a message each, by slot."""
        if not self._leads:
            return []
        return post_messages(self._engines, self._source.layout.tp, message, policy_version)

    def _result(self, calls: list[Future]) -> WeightSyncError | None:
        """What went wrong in these calls. An engine that could not load is lost: its weights are mixed."""
        if not calls:
            return None
        try:
            self._engines.wait(calls)
        except WeightSyncError as error:
            return error
        told = self._told()
        return EnginesLostError(told) if told else None

    def _staged(self) -> WeightSyncError | None:
        """Wait for the engine ranks that receive; what went wrong."""
        urls, size = self._engines.urls, self._source.layout.tp
        slots = [receiver.slot for receiver in self._ranks]
        late = wait_until_staged(self._open_store, self._num_staged, slots, self._engines.timeout_s)
        lost = self._told() or {
            url: f"engine {url} did not receive its weights in time"
            for url in (urls[slot // size] for slot in late)
        }
        return EnginesLostError(lost) if lost else None

    def _lost(self) -> WeightSyncError | None:
        """Engines that have reported a failure, or do not answer at all."""
        try:
            self._engines.infos()
        except WeightSyncError as error:
            return error
        told = self._told()
        return EnginesLostError(told) if told else None

    def _told(self) -> dict[str, str]:
        """What engine ranks have reported, by url."""
        urls, size = self._engines.urls, self._source.layout.tp
        found: dict[str, str] = {}
        for slot, text in failures(self._open_store, size * len(urls)).items():
            found.setdefault(urls[slot // size], f"engine {urls[slot // size]}: {text}")
        return found

    def _leave(self) -> None:
        group, self._group = self._group, None
        if group is not None:
            leave_group(group)

    @property
    def _engines(self) -> EngineAdmin:
        assert self._admin is not None, "connect comes first"
        return self._admin

    @property
    def _open_store(self) -> TCPStore:
        assert self._store is not None
        return self._store


def _started(operations: list[dist.P2POp]) -> list[dist.Work]:
    return dist.batch_isend_irecv(operations) if operations else []


def _finished(works: list[dist.Work]) -> WeightSyncError | None:
    try:
        for work in works:
            work.wait()
    except RuntimeError as error:
        return WeightSyncError(f"weights could not be sent: {error}")
    return None
