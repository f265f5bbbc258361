"""Starts Ray and the engines of a run: one way for training and evaluation."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from megatron_vespo.cluster.colocated import ColocatedSync
from megatron_vespo.cluster.engine_fleet import EngineFleet, start_engines
from megatron_vespo.cluster.engine_sync import EngineSync
from megatron_vespo.cluster.gpu_sharing import GpuSharing
from megatron_vespo.cluster.placement import Placement, place, start_ray, stop_ray
from megatron_vespo.rollout.api_key import check_flags_with_key, new_api_key
from megatron_vespo.rollout.server_arguments import engine_size


@dataclass(frozen=True)
class StartedFleet:
    """Engines that start in the background, and what brings weights to them."""

    placement: Placement
    engines: EngineFleet
    sync: EngineSync
    api_key: str | None = (
        None  # without it they answer nobody; not in args, which go into logs and checkpoints
    )
    gpu_sharing: GpuSharing | None = None  # where engines and trainer share GPUs


def start_fleet(
    args: Namespace,
    server_args: list[str],
    *,
    on_gpus: bool,
    key_choice: str,
    log_dir: Path,
    log: Callable[[str], None],
    stack: ExitStack,
    trace: Callable[[str, int, int], None] | None = None,
) -> StartedFleet:
    """Start or join Ray, reserve places for all ranks and engines, and begin to start the engines.

    `server_args` are SGLang's own flags for each server, `key_choice` is one of API_KEY_CHOICES. `stack` ends
    what has started. With `trace`, engines and trainer share the GPUs: see GpuSharing.
    Raises ValueError when the cluster is too small and RuntimeError when Ray does not start.
    """
    stack.callback(stop_ray)
    start_ray(args)
    size, colocate = engine_size(args.sglang_flags), trace is not None
    placement = place(args, size, on_gpus, colocate)
    for line in placement.divided:
        log(line)
    api_key = new_api_key(key_choice, placement.loopback)
    if api_key is not None:
        check_flags_with_key(args.sglang_flags)
    engines = start_engines(args, placement, server_args, api_key, log_dir, log)
    stack.callback(engines.stop)
    if trace is None:
        return StartedFleet(placement, engines, EngineSync(engines, size, api_key), api_key)
    sharing = GpuSharing(engines, api_key, args.weight_sync_timeout, trace)
    sync = ColocatedSync(engines, size, api_key, sharing)
    return StartedFleet(placement, engines, sync, api_key, sharing)
