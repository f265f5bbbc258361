"""Ray itself, and one placement group that holds every trainer rank and every engine."""

from __future__ import annotations

import os
import secrets
from argparse import Namespace
from dataclasses import dataclass

import ray
import torch
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from megatron_vespo.cluster.roles import by_role, shortage
from megatron_vespo.cluster.seats import Bundle, Seat, separate, shared, shared_sizes

START_TIMEOUT_S = 120.0
# Batches of samples pass through it; Ray's default, 30% of memory, is too much beside trainer and engines.
LOCAL_OBJECT_STORE_BYTES = 512 * 2**20


@dataclass(frozen=True)
class Placement:
    """Seats of the trainer's ranks and of the engines. `loopback`: all on one machine."""

    group: PlacementGroup
    trainer: list[Seat]
    engines: list[Seat]
    loopback: bool

    def options(self, seat: Seat) -> dict:
        return _options(self.group, seat.bundle, seat.num_gpus)

    def release(self) -> None:
        """Give the bundles back to the cluster; whoever still runs in them is killed."""
        remove_placement_group(self.group)


def start_ray(args: Namespace) -> None:
    """Join `--ray-address`, or start a Ray of our own on this machine; RuntimeError if that fails."""
    try:
        _init(args)
    except Exception as error:  # where its own processes do not come up, Ray raises no narrower class
        where = (
            f"--ray-address {args.ray_address} cannot be joined" if args.ray_address else "Ray did not start"
        )
        raise RuntimeError(f"{where}: {' '.join(str(error).split())}") from error


def _init(args: Namespace) -> None:
    if args.ray_address:
        ray.init(address=args.ray_address, log_to_driver=False, logging_level="ERROR")
        return
    if "RAY_AUTH_TOKEN_PATH" not in os.environ:
        # Ray listens on all interfaces and asks for a token, but leaves its own in a file that all may read
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    # bundles of one CPU are only Ray's bookkeeping: two cores may carry more processes
    needed = args.trainer_ranks + args.rollout_engines
    ray.init(
        num_cpus=max(needed, os.cpu_count() or 1),
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        object_store_memory=LOCAL_OBJECT_STORE_BYTES,
    )


def place(args: Namespace, engine_size: int, colocate: bool = False) -> Placement:
    """Reserve places for every rank and engine; ValueError when the cluster is too small.

    With `colocate` an engine shares the GPUs of as many trainer ranks, else everybody has GPUs of their own.
    """
    ranks, engines = args.trainer_ranks, args.rollout_engines
    with_gpus = ray.cluster_resources().get("GPU", 0) > 0 or torch.cuda.is_available()
    if colocate:
        sizes = shared_sizes(ranks, engines, engine_size)
        bundles = [{"CPU": size + (i < engines), "GPU": size * with_gpus} for i, size in enumerate(sizes)]
    else:
        gpus = (1, engine_size) if with_gpus else (0, 0)
        bundles = [{"CPU": 1, "GPU": gpus[0]}] * ranks + [{"CPU": 1, "GPU": gpus[1]}] * engines
    bundles = [{name: number for name, number in bundle.items() if number} for bundle in bundles]
    bundles = by_role(bundles, ranks, ray.cluster_resources(), colocate)
    group = placement_group(bundles, strategy="PACK")
    try:
        ray.get(group.ready(), timeout=START_TIMEOUT_S)
    except ray.exceptions.GetTimeoutError:
        have = {name: ray.cluster_resources().get(name, 0) for name in ("CPU", "GPU")}
        remove_placement_group(group)
        where = " on their GPUs" if colocate else ""
        beside = f" and {engines} engines of {engine_size} ranks{where}" if engines else ""
        raise ValueError(
            f"{ranks} trainer ranks{beside} found no place within {START_TIMEOUT_S:g} s: "
            f"the Ray cluster has {have}{shortage(bundles, ray.nodes())}"
        ) from None
    seats = shared(sizes, engines, _located(group, bundles)) if colocate else separate(ranks, engines, *gpus)
    loopback = len([node for node in ray.nodes() if node["Alive"]]) == 1
    return Placement(group, *seats, loopback)


def _options(group: PlacementGroup, bundle: int, num_gpus: float) -> dict:
    strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle)
    return {"num_cpus": 1, "num_gpus": num_gpus, "scheduling_strategy": strategy}


def _located(group: PlacementGroup, bundles: list[dict[str, int]]) -> list[Bundle]:
    """Asked inside each bundle, while nobody else is there."""
    look = ray.remote(_look_around)
    calls = [
        look.options(**_options(group, index, bundle.get("GPU", 0))).remote()
        for index, bundle in enumerate(bundles)
    ]
    return ray.get(calls, timeout=START_TIMEOUT_S)


def _look_around() -> Bundle:
    context = ray.get_runtime_context()
    return Bundle(context.get_node_id(), tuple(context.get_accelerator_ids()["GPU"]))


def host_address(loopback: bool) -> str:
    """Address of this node as the other processes of the run reach it."""
    return "127.0.0.1" if loopback else ray.util.get_node_ip_address()


def cores_of_a_gpu() -> int:
    """CPU cores that this process may use, divided by the GPUs that Ray has on this node."""
    own = ray.get_runtime_context().get_node_id()
    [gpus] = [node["Resources"].get("GPU", 0) for node in ray.nodes() if node["NodeID"] == own]
    return max(1, len(os.sched_getaffinity(0)) // max(1, int(gpus)))
