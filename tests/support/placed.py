"""A run that Ray has placed on fake nodes, and what is asked of every one."""

from __future__ import annotations

import contextlib
import json
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import ray

from megatron_vespo.cluster.assignments import Assignment
from megatron_vespo.cluster.blocks import neighbours
from megatron_vespo.cluster.engine_fleet import start_engines
from megatron_vespo.cluster.placement import Placement, place
from tests.cluster.programs.megatron_groups import Groups
from tests.cluster.programs.reporter import Reporter
from tests.support.fake_nodes import FakeNodes
from tests.support.recipes import RECIPES

PATIENCE_S = 120
PARALLEL = ("tensor_model", "context", "expert_model", "expert_tensor")
# of engines that are to start at once, or not at all
ENGINE_FLAGS = {
    "ray_address": None, "rollout_port": None, "hf_checkpoint": "model", "engine_start_timeout": PATIENCE_S,
    "engine_health_timeout": PATIENCE_S, "engine_restarts": 0, "min_engines": 1,
}  # fmt: skip

PER_NODE = 8
BY_NODES = sorted(RECIPES, key=RECIPES.get)  # nodes are only added


def a_run(ranks: int, engines: int, **parallel: int) -> Namespace:
    """Example: a_run(16, 8, tensor_model=2)"""
    sizes = {f"{kind}_parallel_size": parallel.get(kind, 1) for kind in PARALLEL}
    return Namespace(trainer_ranks=ranks, rollout_engines=engines, colocate=False, **sizes)


@contextlib.contextmanager
def placed(args: Namespace, engine_size: int) -> Iterator[Placement]:
    groups = neighbours(args) if args.trainer_ranks else {}
    placement = place(
        args.trainer_ranks, groups, args.rollout_engines, engine_size, on_gpus=True, colocate=args.colocate
    )
    try:
        yield placement
    finally:
        placement.release()


class Places:
    """`trainer[rank]` and `engines[number]`: (node, its GPUs in CUDA_VISIBLE_DEVICES)."""

    def __init__(self, placement: Placement):
        table = ray.util.placement_group_table(placement.group)["bundles_to_node_id"]

        def place_of(assignment: Assignment) -> tuple[str, list[str]]:
            return table[assignment.bundle], assignment.devices.split(",")

        self.trainer = [place_of(assignment) for assignment in placement.trainer]
        self.engines = [place_of(assignment) for assignment in placement.engines]


def check_places(places: Places, nodes: FakeNodes, engine_size: int, colocate: bool) -> None:
    """GPUs are the node's own, an engine's consecutive, nobody's are another's."""
    for node, gpus in places.trainer + places.engines:
        assert set(gpus) <= set(nodes.gpus[node])
    assert all(len(gpus) == 1 for _, gpus in places.trainer)
    for _, gpus in places.engines:
        first = int(gpus[0])
        assert gpus == [str(number) for number in range(first, first + engine_size)]
    of_ranks = [gpu for _, gpus in places.trainer for gpu in gpus]
    of_engines = [gpu for _, gpus in places.engines for gpu in gpus]
    assert len(set(of_ranks)) == len(of_ranks) and len(set(of_engines)) == len(of_engines)
    if colocate:
        assert of_engines == of_ranks[: len(of_engines)]  # rank i of all engines on the GPU of trainer rank i
    else:
        assert not set(of_ranks) & set(of_engines)


def divided(groups: list[list[int]], places: Places) -> list[list[int]]:
    """Those that lie on several nodes."""
    return [group for group in groups if len({places.trainer[rank][0] for rank in group}) > 1]


def seen_by_trainer(placement: Placement) -> list[tuple[str, list[str]]]:
    """What actors in the ranks' places say of themselves."""
    actor = ray.remote(Reporter)
    actors = [actor.options(**placement.options(assignment)).remote() for assignment in placement.trainer]
    seen = ray.get([one.seen.remote() for one in actors], timeout=PATIENCE_S)
    return [(node, visible.split(",")) for node, visible in seen]


def seen_by_engines(args: Namespace, placement: Placement, logs: Path) -> list[list[str]]:
    """CUDA_VISIBLE_DEVICES of the processes that the run's own supervisors start as SGLang."""
    args = Namespace(**vars(args) | ENGINE_FLAGS)
    fleet = start_engines(args, placement, placement.engines, [], None, logs, log=print)
    try:
        fleet.wait_until_ready()
        assert len(fleet.endpoints()) == args.rollout_engines
    finally:
        fleet.stop()
    environments = [json.loads((logs / f"engine-{i}.log").read_text()) for i in range(args.rollout_engines)]
    return [environment["CUDA_VISIBLE_DEVICES"].split(",") for environment in environments]


def check_groups(groups: Groups, places: Places) -> None:
    """All recipes' groups fit a node."""
    assert all(len(group) <= PER_NODE for kind in groups.values() for group in kind)
    assert {kind: divided(of_kind, places) for kind, of_kind in groups.items()} == dict.fromkeys(groups, [])
