"""Starts Ray and the engines of a run: one way for training and evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

from megatron_vespo.arguments.engines import EngineSettings
from megatron_vespo.arguments.trainer import TrainerSettings
from megatron_vespo.cluster.blocks import neighbours
from megatron_vespo.cluster.colocated import ColocatedSync
from megatron_vespo.cluster.engine_fleet import EngineFleet, start_engines
from megatron_vespo.cluster.engine_sync import EngineSync
from megatron_vespo.cluster.gpu_sharing import GpuSharing
from megatron_vespo.cluster.placement import Placement, place, start_ray, stop_ray
from megatron_vespo.cluster.reply_collectors import ReplyCollectors
from megatron_vespo.rollout.api_key import check_flags_with_key, new_api_key
from megatron_vespo.rollout.server_arguments import engine_size


@dataclass(frozen=True)
class StartedFleet:
    """Engines that start in the background, and what brings weights to them."""

    placement: Placement
    engines: EngineFleet
    sync: EngineSync
    replies: ReplyCollectors
    api_key: str | None = None  # without it they answer nobody; logs and checkpoints do not have it
    gpu_sharing: GpuSharing | None = None  # where engines and trainer share GPUs
    teachers: tuple[EngineFleet, ...] = ()  # as in the arguments


@dataclass(frozen=True)
class TeacherServers:
    """The engines of one teacher: `settings.rollout_engines` of `settings.hf_checkpoint`."""

    name: str  # in log lines
    settings: EngineSettings
    server_args: list[str]

    @property
    def number(self) -> int:
        return self.settings.rollout_engines


@dataclass(frozen=True)
class Sharing:
    """How engines and trainer share GPUs: the limit of a call to the engines, and who is told of phases."""

    timeout_s: float
    trace: Callable[[str, int, int], None]


def start_fleet(
    settings: EngineSettings,
    server_args: list[str],
    *,
    on_gpus: bool,
    log_dir: Path,
    log: Callable[[str], None],
    stack: ExitStack,
    trainer: TrainerSettings | None = None,
    sharing: Sharing | None = None,
    teachers: Sequence[TeacherServers] = (),
) -> StartedFleet:
    """Start or join Ray, reserve places for all ranks and engines, and begin to start the engines.

    `server_args` are SGLang's own flags for each server. `stack` ends what has started. Without `trainer` no
    places are reserved for its ranks. With `sharing` engines and trainer share the GPUs. `teachers` have GPUs
    of their own; the numbers of their engines follow.
    Raises ValueError when the cluster is too small and RuntimeError when Ray does not start.
    """
    stack.callback(stop_ray)
    ranks, number = trainer.trainer_ranks if trainer else 0, settings.rollout_engines
    all_engines = number + sum(teacher.number for teacher in teachers)
    ports = range(settings.rollout_port, settings.rollout_port + all_engines) if settings.rollout_port else ()
    start_ray(settings.ray_address, ranks + all_engines, ports)
    size, groups = engine_size(settings.sglang_flags), neighbours(trainer) if trainer and ranks else {}
    placement = place(
        ranks, groups, number, size, on_gpus, colocate=sharing is not None, teachers=all_engines - number,
        teacher_size=engine_size(teachers[0].settings.sglang_flags) if teachers else 1,
    )  # fmt: skip
    for line in placement.divided:
        log(line)
    api_key = new_api_key(settings.engine_api_key, placement.loopback)
    if api_key is not None:
        check_flags_with_key(settings.sglang_flags)
    engines = start_engines(settings, placement, placement.engines, server_args, api_key, log_dir, log)
    stack.callback(engines.stop)
    of_teachers = _start_teachers(teachers, placement, number, api_key, log_dir, log, stack)
    replies = ReplyCollectors(placement, log_dir, api_key)
    stack.callback(replies.stop)
    if sharing is None:
        sync = EngineSync(engines, size, api_key, log=log)
        return StartedFleet(placement, engines, sync, replies, api_key, teachers=of_teachers)
    gpu_sharing = GpuSharing(engines, api_key, sharing.timeout_s, sharing.trace)
    sync = ColocatedSync(engines, size, api_key, gpu_sharing, log=log)
    return StartedFleet(placement, engines, sync, replies, api_key, gpu_sharing, of_teachers)


def _start_teachers(
    teachers: Sequence[TeacherServers],
    placement: Placement,
    first: int,
    api_key: str | None,
    log_dir: Path,
    log: Callable[[str], None],
    stack: ExitStack,
) -> tuple[EngineFleet, ...]:
    """Their engines are numbered from `first` on, as their places are."""
    fleets, places = [], iter(placement.teachers)
    for teacher in teachers:
        fleet = start_engines(
            teacher.settings, placement, list(islice(places, teacher.number)), teacher.server_args, api_key,
            log_dir, partial(_log_of, teacher.name, log), first=first, fixed_weights=True,
        )  # fmt: skip
        stack.callback(fleet.stop)
        fleets.append(fleet)
        first += teacher.number
    return tuple(fleets)


def _log_of(name: str, log: Callable[[str], None], line: str) -> None:
    log(f"{name}: {line}")
