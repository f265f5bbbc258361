"""Starts or joins Ray, and creates one placement group for every trainer rank and every engine."""

from __future__ import annotations

import logging
import os
import secrets
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
import ray.exceptions
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from megatron_vespo.cluster.assignments import (
    Assignment,
    Bundle,
    assigned,
    divided_groups,
    without_gpus,
    wrong_gpus,
)
from megatron_vespo.cluster.blocks import Run, requested
from megatron_vespo.system import ray_variables
from megatron_vespo.system.ports import PortError, require_free_ports
from megatron_vespo.system.preemption import SIGNALS, shielded
from megatron_vespo.system.time_limits import IMPORT_TIMEOUT_S

START_TIMEOUT_S = 120.0
LOOPBACK = "127.0.0.1"
# It holds a mini-batch of samples. Ray's default, 30% of memory, is too much beside trainer and engines.
LOCAL_OBJECT_STORE_BYTES = 512 * 2**20


@dataclass(frozen=True)
class Placement:
    """Assignments of the trainer's ranks and of the engines. `loopback`: all on one machine.

    `teachers` are the engines of all teachers, one teacher after the other.

    `divided` has one line per kind of group whose ranks could share a node but do not.
    """

    group: PlacementGroup
    trainer: list[Assignment]
    engines: list[Assignment]
    loopback: bool
    divided: tuple[str, ...] = ()
    teachers: list[Assignment] = field(default_factory=list)

    def options(self, assignment: Assignment) -> dict:
        """Ray's options for the actor of `assignment`, which decides, instead of Ray, which GPUs it sees."""
        options = _options(self.group, assignment.bundle, num_gpus=0)
        if assignment.devices is None:
            return options
        # Ray leaves the first one alone unless the second, which a node may have set, makes it hide all GPUs
        visible = {"CUDA_VISIBLE_DEVICES": assignment.devices, "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
        return options | {"runtime_env": {"env_vars": visible}}

    def release(self) -> None:
        """Give the bundles back to the cluster; Ray kills every process that still runs in them."""
        remove_placement_group(self.group)


def has_gpus(ray_address: str | None) -> bool:
    """Whether the run's nodes have GPUs: those of `--ray-address`, which this joins, or else this node."""
    if not ray_address:
        return _own_gpus() > 0
    start_ray(ray_address)
    return cluster_has_gpus()


def _own_gpus() -> int:
    import torch  # here, as it takes seconds: most processes that import this module do not need it

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def stop_ray() -> None:
    """Leave Ray; end it if this process started it."""
    ray.shutdown()


def node_resources() -> list[dict[str, float]]:
    """The resources that Ray has on each live node."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def object_store_bytes() -> int:
    """The capacity of Ray's object store on this node."""
    here = ray.get_runtime_context().get_node_id()
    return int(
        next(node["Resources"]["object_store_memory"] for node in ray.nodes() if node["NodeID"] == here)
    )


def cluster_has_gpus() -> bool:
    return ray.cluster_resources().get("GPU", 0) > 0


def start_ray(address: str | None, num_processes: int = 1, engine_ports: Sequence[int] = ()) -> None:
    """Join `address`, or start a Ray on this machine. RuntimeError if that fails.

    A Ray started here has room for `num_processes` trainer ranks and engines. ValueError for environment
    variables with which it cannot start, and for `engine_ports` that are in use on this machine.

    Does nothing if Ray is already joined. This process keeps its signal handlers.
    """
    if ray.is_initialized():
        return
    if not address:
        _check_own(engine_ports)
    handlers = {number: signal.getsignal(number) for number in SIGNALS}  # Ray sets its own
    try:
        with shielded():
            try:
                _init(address, num_processes)
            finally:
                for number, handler in handlers.items():
                    signal.signal(number, handler)
    except Exception as error:  # Ray raises no narrower class if its own processes do not start
        where = f"--ray-address {address} cannot be joined" if address else "Ray did not start"
        raise RuntimeError(f"{where}: {' '.join(str(error).split())}") from error


def _check_own(engine_ports: Sequence[int]) -> None:
    """ValueError if Ray or the engines could not start on this machine; called before they start."""
    if problem := ray_variables.problem(os.environ):
        raise ValueError(": ".join(problem))
    for port in engine_ports:
        try:
            require_free_ports(LOOPBACK, port)
        except PortError as error:
            raise ValueError(str(error)) from error


def _init(address: str | None, num_processes: int) -> None:
    if address:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        return
    if "RAY_AUTH_TOKEN_PATH" not in os.environ:
        # Ray listens on all interfaces and asks for a token, but stores its own in a file that all may read
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    # bundles of one CPU are only Ray's bookkeeping: two cores may carry more processes
    ray.init(
        address="local",  # otherwise it joins a Ray that somebody runs, or ran, on this machine
        num_cpus=max(num_processes, os.cpu_count() or 1),
        num_gpus=_own_gpus(),
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=LOCAL_OBJECT_STORE_BYTES,
    )


def place(
    ranks: int,
    groups: Mapping[str, int],
    engines: int,
    engine_size: int,
    on_gpus: bool,
    colocate: bool = False,
    teachers: int = 0,
    teacher_size: int = 1,
) -> Placement:
    """Reserve places for trainer ranks and engines. ValueError if the cluster is too small.

    `groups`, name -> number of neighbouring ranks, should be inside a node, see `neighbours`. With `colocate`
    an engine of n ranks shares the GPUs of n trainer ranks; otherwise every process has its own GPUs.
    `teachers` engines of `teacher_size` ranks always have their own.
    """
    if on_gpus and not cluster_has_gpus():
        raise ValueError("--distributed-backend nccl needs GPUs, the Ray cluster has none")
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    run = Run(
        ranks=ranks,
        groups=groups,
        engines=engines,
        engine_size=engine_size,
        on_gpus=on_gpus,
        colocate=colocate,
        teachers=teachers,
        teacher_size=teacher_size,
    )
    request = requested(run, nodes)
    group = _reserved(request.bundles)
    located = _located(group, request.bundles)
    roles = assigned(request.blocks, request.sharing, located, engine_size, colocate, teachers)
    if not on_gpus and cluster_has_gpus():
        roles = tuple(map(without_gpus, roles))
    trainer, servers, of_teachers = roles
    divided = divided_groups(run.groups, [located[rank.bundle].node for rank in trainer], request.per_node)
    return Placement(group, trainer, servers, len(nodes) == 1, divided, of_teachers)


def _reserved(bundles: list[dict[str, float]]) -> PlacementGroup:
    group = placement_group(bundles, strategy="PACK")
    try:
        ray.get(group.ready(), timeout=START_TIMEOUT_S)
    except ray.exceptions.GetTimeoutError:
        remove_placement_group(group)
        free = {name: ray.available_resources().get(name, 0) for name in ("CPU", "GPU")}
        raise ValueError(
            f"the run found no place in the Ray cluster within {START_TIMEOUT_S:g} s: others use it, {free} "
            f"are left, bundles of {bundles} are wanted"
        ) from None
    return group


def _options(group: PlacementGroup, bundle: int, num_gpus: float) -> dict:
    strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle)
    return {"num_cpus": 1, "num_gpus": num_gpus, "scheduling_strategy": strategy}


def _located(group: PlacementGroup, bundles: list[dict[str, float]]) -> list[Bundle]:
    """Node and GPUs of each bundle. Only a task inside a bundle, alone there, can see its GPUs."""
    nodes = placement_group_table(group)["bundles_to_node_id"]
    gpu_ids = ray.remote(_gpu_ids)
    calls = {
        index: gpu_ids.options(**_options(group, index, bundle["GPU"])).remote()
        for index, bundle in enumerate(bundles)
        if "GPU" in bundle
    }
    try:
        answers = ray.get(list(calls.values()), timeout=IMPORT_TIMEOUT_S)
    except ray.exceptions.GetTimeoutError:
        remove_placement_group(group)
        raise ValueError(
            f"the nodes of the Ray cluster have not said within {IMPORT_TIMEOUT_S:g} s which GPUs they give: "
            "do its workers start?"
        ) from None
    gpus = dict(zip(calls, answers, strict=True))
    located = [Bundle(nodes[index], gpus.get(index, ())) for index in range(len(bundles))]
    if problem := wrong_gpus(located, [int(bundle.get("GPU", 0)) for bundle in bundles]):
        remove_placement_group(group)
        raise ValueError(problem)
    return located


def _gpu_ids() -> tuple[str, ...]:
    return tuple(ray.get_runtime_context().get_accelerator_ids()["GPU"])


def host_address(loopback: bool) -> str:
    """The address at which the run's other processes reach this node."""
    return LOOPBACK if loopback else ray.util.get_node_ip_address()


def cores_of_a_gpu() -> int:
    """CPU cores that this process may use, divided by the GPUs that Ray has on this node."""
    own = ray.get_runtime_context().get_node_id()
    [gpus] = [node["Resources"].get("GPU", 0) for node in ray.nodes() if node["NodeID"] == own]
    return max(1, len(os.sched_getaffinity(0)) // max(1, int(gpus)))


def nodes_of_the_cluster() -> list[dict[str, Any]]:
    """Ray's nodes, for the run record: host, CPUs, GPUs and the kind of GPU that Ray detects."""
    return [
        {
            "host": node["NodeManagerHostname"],
            "cpus": node["Resources"].get("CPU", 0),
            "gpus": node["Resources"].get("GPU", 0),
            "kinds": sorted(name for name in node["Resources"] if name.startswith("accelerator_type:")),
        }
        for node in ray.nodes()
        if node["Alive"]
    ]
