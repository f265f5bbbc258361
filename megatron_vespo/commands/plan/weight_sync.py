"""Estimates the seconds of a weight sync, from the bytes of its plan or of a broadcast."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from megatron_vespo.arguments.train_settings import TrainSettings
from megatron_vespo.checkpoints.block_fp8 import is_quantised
from megatron_vespo.checkpoints.fp8_report import sent_bytes
from megatron_vespo.commands.plan.places import planned_places
from megatron_vespo.commands.simulate.rates import MEMORY_EFFICIENCY
from megatron_vespo.models.family import Family
from megatron_vespo.models.stage import Stage
from megatron_vespo.models.table import ModelShape
from megatron_vespo.rollout.server_arguments import engine_size, expert_parallel_size, other_layout
from megatron_vespo.system.hardware import GLOO, LINK_SHARE, Gpu
from megatron_vespo.weight_sync.engine_layout import EngineLayout
from megatron_vespo.weight_sync.exact import BUFFERS
from megatron_vespo.weight_sync.places import Place
from megatron_vespo.weight_sync.plan import count
from megatron_vespo.weight_sync.traffic import LINKS, Link, Traffic, traffic
from megatron_vespo.weight_sync.trainer_layout import TrainerShard

CALL = 10e-3  # HTTP, JSON and SGLang's queues, for each group or bucket: an estimate
SESSION = 0.1  # pause, begin, end and continue: an estimate
CHECKSUMS = 0.3  # an estimate
# Python and a kernel launch for one piece: 13 us of Python were measured, on one CPU core.
PIECE = 15e-6
# The trainer converts Megatron's tensors to HF and launches their gathers: 1.9 s for the 18,867 of
# Qwen3-30B-A3B, measured without a network.
EXPORT_TENSOR = 1e-4
# An engine rank looks up each tensor by its name (0.33 s for those 18,867, measured) and copies its part of
# it (80 us in SGLang's weight loaders, an estimate).
LOAD_TENSOR = 1e-4


@dataclass(frozen=True)
class Broadcast:
    """Full HF tensors, gathered from the ranks that share them, to all engine ranks; stage after stage."""

    bytes: float  # broadcast
    gathered_bytes: float  # of the same tensors before they are quantised, if they are
    tensors: int
    buckets: int
    gathered: float  # bytes per second, like `broadcast`
    broadcast: float
    link: str  # name of the broadcast's link

    @property
    def transfer(self) -> float:
        return self.gathered_bytes / self.gathered + self.bytes / self.broadcast

    @property
    def loading(self) -> float:
        """Seconds without network traffic: each bucket waits until the previous one is loaded."""
        return self.tensors * (EXPORT_TENSOR + LOAD_TENSOR) + self.buckets * CALL + SESSION + CHECKSUMS

    @property
    def seconds(self) -> float:
        return self.transfer + self.loading


@dataclass(frozen=True)
class Exact:
    """Every engine rank gets the bytes that it holds. Groups are packed, sent and loaded at the same time."""

    traffic: Traffic
    gpu: Gpu
    trainer_ranks: int
    colocate: bool
    staging: bool

    @property
    def sending(self) -> float:
        """Seconds to pack what is sent, or to send it over the slowest link, whichever takes longer."""
        packing = 2 * max(self.traffic.packed.values()) / self._memory_rate + self._pieces(0) * PIECE
        return max(packing, *(self.seconds_over(over) for over in self.links))

    @property
    def loading(self) -> float:
        """Seconds of an engine rank to copy its pieces into its parameters, call after call."""
        copying = 2 * max(self.received.values()) / self._memory_rate
        return copying + self._pieces(1) * PIECE + (1 if self.staging else self.traffic.calls) * CALL

    @property
    def seconds(self) -> float:
        """The first group is packed and sent before anything is loaded, with staging all of them are."""
        if self.staging:
            return self.sending + self.loading + self.around
        first = self.sending / self.traffic.calls
        return first + max(self.sending, self.loading) + self.around

    @property
    def ring(self) -> int:
        """Groups that are in buffers at once."""
        return self.traffic.calls if self.staging else BUFFERS

    @property
    def around(self) -> float:
        """Seconds of what comes before the first group and after the last one."""
        return SESSION + CHECKSUMS

    @property
    def links(self) -> list[Link]:
        """Between different memories, as far as they are used."""
        return [over for over in LINKS if over != "memory" and self.traffic.received[over]]

    def rate(self, over: Link) -> float:
        """Bytes per second and direction of one GPU's link."""
        return LINK_SHARE * (self.gpu.network if over == "network" else self.gpu.nvlink)

    def seconds_over(self, over: Link) -> float:
        """Of the busiest GPU. A group waits for the rank that sends the most of it."""
        uneven = max(part.totals.uneven for part in self.traffic.teams)
        busiest = uneven * max(self.traffic.sent[over].values()), max(self.traffic.received[over].values())
        return max(busiest) / self.rate(over)

    @property
    def received(self) -> dict[tuple[int, int], int]:
        """Bytes by (engine, its rank)."""
        return _summed(self.traffic.received.values())

    @property
    def sent(self) -> dict[int, int]:
        """Bytes by trainer rank."""
        return _summed(self.traffic.sent.values())

    @property
    def pieces(self) -> int:
        """Of one engine."""
        return max(sum(flow.pieces for flow in part.totals.flows.values()) for part in self.traffic.teams)

    @property
    def _memory_rate(self) -> float:
        # colocated, the trainer packs on the GPU on which the engine loads
        return MEMORY_EFFICIENCY * self.gpu.memory_bandwidth / (2 if self.colocate else 1)

    def _pieces(self, side: int) -> int:
        """Most pieces of a trainer rank (side 0) or of an engine rank (side 1) in one plan."""
        most = 0
        for part in self.traffic.teams:
            found = _summed({ranks[side]: flow.pieces} for ranks, flow in part.totals.flows.items())
            most = max(most, *found.values())
        return most


@dataclass(frozen=True)
class WeightSync:
    """`exact` is None where weights are broadcast; then `why_broadcast` says why."""

    exact: Exact | None
    why_broadcast: str | None
    broadcast: Broadcast

    @property
    def seconds(self) -> float:
        return (self.exact or self.broadcast).seconds


def weight_sync(
    settings: TrainSettings,
    stages: Sequence[Stage],
    family: Family,
    shape: ModelShape,
    gpu: Gpu,
    nodes: int,
    gpus_per_node: int,
) -> WeightSync:
    """`shape` has the trainer's padded vocabulary. ValueError if the cluster is too small."""
    broadcast = broadcast_cost(
        settings, [stage.whole for stage in stages], family.hf_tensors(shape), gpu, nodes, gpus_per_node
    )
    flags = settings.engines.sglang_flags
    if (reason := other_layout(flags, settings.engines.rollout_quantization)) is not None:
        return WeightSync(None, reason, broadcast)
    trainer, engines = planned_places(settings, engine_size(flags), nodes, gpus_per_node)
    totals = partial(
        count,
        family,
        shape,
        layout=EngineLayout(engine_size(flags), expert_parallel_size(flags)),
        element_bytes=_item(settings),
        buffer_bytes=_bucket(settings),
    )
    try:
        moved = traffic(trainer_shards(settings, stages, trainer), engines, totals)
    except ValueError as error:
        return WeightSync(None, str(error), broadcast)
    sync = settings.sync
    exact = Exact(moved, gpu, len(trainer), sync.colocate, sync.weight_sync_staging)
    return WeightSync(exact, None, broadcast)


def trainer_shards(
    settings: TrainSettings, stages: Sequence[Stage], places: Sequence[Place]
) -> list[TrainerShard]:
    """What each trainer rank holds; stages are runs of ranks."""
    each = settings.trainer.trainer_ranks // len(stages)
    experts = settings.trainer.expert_model_parallel_size
    return [
        TrainerShard(rank, place, stages[rank // each].part.on_rank(rank % each, experts))
        for rank, place in enumerate(places)
    ]


def broadcast_cost(
    settings: TrainSettings,
    stage_parameters: Iterable[int],
    hf_tensors: Mapping[str, tuple[int, ...]],
    gpu: Gpu,
    nodes: int,
    gpus_per_node: int,
) -> Broadcast:
    """With several nodes the broadcast has the network's speed.

    FP8 tensors are gathered as they are trained. Tensors are gathered inside nodes if the groups that share
    them fit. With --colocate gloo broadcasts through the hosts, hop after hop down a binomial tree.
    """
    item, bucket = _item(settings), _bucket(settings)
    sizes = [parameters * item for parameters in stage_parameters]
    gathered_bytes, tensors = sum(sizes), len(hf_tensors)
    if settings.engines.rollout_quantization is not None:
        share = sent_bytes(hf_tensors, item) / gathered_bytes
        sizes = [size * share for size in sizes]
        tensors += sum(map(is_quantised, hf_tensors))
    broadcast, link = (gpu.network, "network") if nodes > 1 else (gpu.nvlink, "NVLink")
    expert_tensor = (
        settings.trainer.expert_tensor_parallel_size or settings.trainer.tensor_model_parallel_size
    )
    shared = max(
        settings.trainer.tensor_model_parallel_size,
        settings.trainer.expert_model_parallel_size * expert_tensor,
    )
    gathered = LINK_SHARE * (gpu.nvlink if shared <= gpus_per_node else gpu.network)
    broadcast *= LINK_SHARE
    if settings.sync.colocate:
        receivers = settings.engines.rollout_engines * engine_size(settings.engines.sglang_flags)
        broadcast, link = GLOO / math.ceil(math.log2(1 + receivers)), "gloo, through the hosts"
    buckets = sum(math.ceil(size / bucket) for size in sizes)
    return Broadcast(sum(sizes), gathered_bytes, tensors, buckets, gathered, broadcast, link)


def _item(settings: TrainSettings) -> int:
    return 2 if settings.trainer.bf16 else 4


def _bucket(settings: TrainSettings) -> int:
    return settings.sync.weight_sync_bucket_mb * 2**20


def _summed[Key](parts: Iterable[dict[Key, int]]) -> dict[Key, int]:
    found: dict[Key, int] = {}
    for part in parts:
        for key, number in part.items():
            found[key] = found.get(key, 0) + number
    return found
