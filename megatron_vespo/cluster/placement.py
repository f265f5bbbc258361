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

START_TIMEOUT_S = 120.0
# Batches of samples pass through it; Ray's default, 30% of memory, is too much beside trainer and engines.
LOCAL_OBJECT_STORE_BYTES = 512 * 2**20


@dataclass(frozen=True)
class Placement:
    """Bundle i < trainer_ranks is trainer rank i, the others are engines. `loopback`: all on one machine."""

    group: PlacementGroup
    gpus_per_rank: int
    gpus_per_engine: int
    loopback: bool

    def options(self, bundle: int, num_gpus: int) -> dict:
        strategy = PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=bundle)
        return {"num_cpus": 1, "num_gpus": num_gpus, "scheduling_strategy": strategy}

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


def place(args: Namespace, engine_size: int) -> Placement:
    """Reserve a bundle for every rank and engine; ValueError when the cluster is too small."""
    with_gpus = ray.cluster_resources().get("GPU", 0) > 0 or torch.cuda.is_available()
    per_rank, per_engine = (1, engine_size) if with_gpus else (0, 0)
    bundles = [{"CPU": 1, "GPU": per_rank}] * args.trainer_ranks
    bundles += [{"CPU": 1, "GPU": per_engine}] * args.rollout_engines
    bundles = [{name: number for name, number in bundle.items() if number} for bundle in bundles]
    bundles = by_role(bundles, args.trainer_ranks, ray.cluster_resources())
    group = placement_group(bundles, strategy="PACK")
    try:
        ray.get(group.ready(), timeout=START_TIMEOUT_S)
    except ray.exceptions.GetTimeoutError:
        have = {name: ray.cluster_resources().get(name, 0) for name in ("CPU", "GPU")}
        remove_placement_group(group)
        engines = (
            f" and {args.rollout_engines} engines of {engine_size} ranks" if args.rollout_engines else ""
        )
        raise ValueError(
            f"{args.trainer_ranks} trainer ranks{engines} found no place within {START_TIMEOUT_S:g} s: "
            f"the Ray cluster has {have}{shortage(bundles, ray.nodes())}"
        ) from None
    loopback = len([node for node in ray.nodes() if node["Alive"]]) == 1
    return Placement(group, per_rank, per_engine, loopback)


def host_address(loopback: bool) -> str:
    """Address of this node as the other processes of the run reach it."""
    return "127.0.0.1" if loopback else ray.util.get_node_ip_address()
