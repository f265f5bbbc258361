"""Places in a Ray of one node, which has a role and no GPUs."""

from __future__ import annotations

import pytest
import ray

from megatron_vespo.cluster import placement
from megatron_vespo.cluster.roles import ROLES
from tests.support.fake_nodes import FakeNodes

ENGINE = ROLES["engines"]


@pytest.fixture
def one_node(fake_nodes: FakeNodes) -> FakeNodes:
    """Of the trainer, and of nobody else."""
    if not fake_nodes.gpus:
        fake_nodes.add(0, "trainer ranks")
    return fake_nodes


def test_engines_find_no_place_on_the_trainers_node(one_node):
    place = placement.place(3, {}, 0, 1, on_gpus=False)
    nodes = ray.util.placement_group_table(place.group)["bundles_to_node_id"]
    assert list(nodes.values()) == [ray.nodes()[0]["NodeID"]] * 3
    place.release()
    with pytest.raises(ValueError, match="1 trainer ranks and 2 engines of 1 ranks find no place") as error:
        placement.place(1, {}, 2, 1, on_gpus=False)
    assert str(error.value).endswith(
        f"; engines ask for {{'CPU': 2, 'GPU': 0}}, the nodes with {ENGINE} (0) have {{'CPU': 0, 'GPU': 0}}"
    )


def test_a_driver_with_a_gpu_joins_a_cluster_without(one_node, monkeypatch):
    monkeypatch.setattr(placement, "_own_gpus", lambda: 8)
    assert placement.has_gpus(None)
    assert not placement.has_gpus("auto")
    with pytest.raises(ValueError, match="--distributed-backend nccl needs GPUs, the Ray cluster has none"):
        placement.place(1, {}, 0, 1, on_gpus=True)
