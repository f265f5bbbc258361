"""Places in a real Ray whose nodes have roles."""

from __future__ import annotations

from argparse import Namespace

import pytest
import ray

from megatron_vespo.cluster import placement
from megatron_vespo.cluster.roles import ROLES

TRAINER, ENGINE = ROLES.values()


@pytest.fixture
def one_node(monkeypatch):
    """Of the trainer, and of nobody else."""
    monkeypatch.setenv("RAY_AUTH_TOKEN", "x" * 64)
    monkeypatch.setattr(placement, "START_TIMEOUT_S", 5.0)
    ray.init(
        num_cpus=4, num_gpus=0, resources={TRAINER: 1}, include_dashboard=False,
        object_store_memory=2**27, log_to_driver=False, logging_level="ERROR",
    )  # fmt: skip
    yield
    ray.shutdown()


def test_engines_find_no_place_on_the_trainers_node(one_node):
    place = placement.place(Namespace(trainer_ranks=3, rollout_engines=0), 1)
    nodes = ray.util.placement_group_table(place.group)["bundles_to_node_id"]
    assert list(nodes.values()) == [ray.nodes()[0]["NodeID"]] * 3
    place.release()
    with pytest.raises(ValueError, match="1 trainer ranks and 2 engines of 1 ranks found no place") as error:
        placement.place(Namespace(trainer_ranks=1, rollout_engines=2), 1)
    assert str(error.value).endswith(
        f"; engines (2) ask for {{'CPU': 2, 'GPU': 0}}, "
        f"the nodes with {ENGINE} (0) have {{'CPU': 0, 'GPU': 0}}"
    )
