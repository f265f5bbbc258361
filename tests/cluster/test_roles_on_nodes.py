"""Recipes on nodes for the trainer and others for engines; Ray is started as other projects want it."""

from __future__ import annotations

import pytest

from tests.support.fake_nodes import FakeNodes
from tests.support.placed import (
    BY_NODES,
    PER_NODE,
    Places,
    a_run,
    check_groups,
    check_places,
    placed,
    seen_by_engines,
    seen_by_trainer,
)

# Both change what Ray shows to actors. verl and slime want the first one.
ENVIRONMENT = {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1"}
APART = [recipe for recipe in BY_NODES if "colocated" not in recipe]


def grow(nodes: FakeNodes, of_trainer: int, of_engines: int) -> None:
    for role, number in {"trainer ranks": of_trainer, "engines": of_engines}.items():
        while nodes.roles.count(role) < number:
            nodes.add(PER_NODE, role)


@pytest.mark.parametrize("recipe", APART)
def test_a_recipe_on_nodes_of_two_kinds(fake_nodes: FakeNodes, run, recipe: str):
    args, size, groups = run(recipe)
    engine_gpus = args.rollout_engines * size
    grow(fake_nodes, -(-args.trainer_ranks // PER_NODE), -(-engine_gpus // PER_NODE))
    with placed(args, size) as placement:
        places = Places(placement)
        check_places(places, fake_nodes, size, False)
        check_groups(groups, places)
        assert {fake_nodes.role_of(node) for node, _ in places.trainer} == {"trainer ranks"}
        assert {fake_nodes.role_of(node) for node, _ in places.engines} == {"engines"}


def test_processes_see_their_own_gpus_whatever_ray_shows(fake_nodes: FakeNodes, tmp_path):
    grow(fake_nodes, 1, 1)
    args = a_run(4, 2)
    with placed(args, 2) as placement:
        places = Places(placement)
        assert seen_by_trainer(placement) == places.trainer
        assert seen_by_engines(args, placement, tmp_path) == [gpus for _, gpus in places.engines]


def test_engines_share_no_gpus_with_a_trainer_that_has_its_own_nodes(fake_nodes: FakeNodes):
    grow(fake_nodes, 1, 1)
    args = a_run(8, 4)
    args.colocate = True
    with pytest.raises(ValueError, match="--colocate puts engines on the trainer's GPUs"), placed(args, 2):
        pass
