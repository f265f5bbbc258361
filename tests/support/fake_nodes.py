"""Ray on several nodes of this machine, each with GPUs that it is only told of."""

from __future__ import annotations

import os
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

from megatron_vespo.cluster.roles import ROLES

STUB = Path(__file__).parents[1] / "cluster/stub_engine"  # what engines start in the place of SGLang
QUIET = {"log_to_driver": False, "logging_level": "ERROR"}


class FakeNodes:
    """Nodes are only added; `gpus[node id]` are the ids of its GPUs, which no other node has."""

    def __init__(self, **environment: str):
        self.gpus: dict[str, list[str]] = {}
        self.roles: list[str | None] = []  # of the nodes, in the same order
        self._environment = environment
        self._cluster = Cluster()

    def add(self, num_gpus: int = 8, role: str | None = None) -> None:
        """One more node; `role` is a key of ROLES."""
        first = 4 + 100 * len(self.gpus)  # a job may have a part of a node; and 10 comes after 9
        ids = [str(first + number) for number in range(num_gpus)]
        path = os.pathsep.join([str(STUB), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {"CUDA_VISIBLE_DEVICES": ",".join(ids), "PYTHONPATH": path}
        before = {name: os.environ.get(name) for name in environment}
        os.environ.update(environment)
        try:
            node = self._cluster.add_node(
                num_cpus=16,
                num_gpus=num_gpus,
                resources={ROLES[role]: 1} if role else {},
                object_store_memory=80 * 2**20,
                include_dashboard=False,
                env_vars=environment | self._environment,
            )
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)
        if not self.gpus:
            ray.init(address=self.address, **QUIET)
        self._cluster.wait_for_nodes()
        self.gpus[node.node_id] = ids
        self.roles.append(role)

    def role_of(self, node: str) -> str | None:
        return self.roles[list(self.gpus).index(node)]

    @property
    def address(self) -> str:
        return self._cluster.address

    def close(self) -> None:
        ray.shutdown()
        self._cluster.shutdown()
