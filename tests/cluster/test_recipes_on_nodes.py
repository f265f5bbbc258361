"""Every recipe of examples/ on the nodes that it is written for."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.fake_nodes import FakeNodes
from tests.support.placed import (
    BY_NODES,
    PER_NODE,
    Places,
    check_groups,
    check_places,
    placed,
    seen_by_engines,
    seen_by_trainer,
)
from tests.support.recipes import RECIPES

# One of each kind of run; the others differ in what is not placed. Their processes are started for real.
STARTED = {"qwen3_30b_a3b/one_node_80gb", "qwen3_8b/colocated_one_node", "qwen3_8b/synchronous_n8"}


@pytest.mark.parametrize("recipe", BY_NODES)
def test_a_recipe_on_its_nodes(fake_nodes: FakeNodes, run, tmp_path: Path, recipe: str):
    args, size, groups = run(recipe)
    while len(fake_nodes.gpus) < RECIPES[recipe] // PER_NODE:
        fake_nodes.add(PER_NODE)
    if "30b" in recipe or args.tensor_model_parallel_size > 1:
        assert groups["tensor"]
    with placed(args, size) as placement:
        places = Places(placement)
        print(recipe, places.trainer, places.engines)
        check_places(places, fake_nodes, size, args.colocate)
        check_groups(groups, places)
        assert placement.divided == ()
        used = {gpu for _, gpus in places.trainer + places.engines for gpu in gpus}
        assert len(used) == RECIPES[recipe]
        if recipe in STARTED:
            if not args.colocate:
                assert seen_by_trainer(placement) == places.trainer
                assert seen_by_engines(args, placement, tmp_path / "logs") == [g for _, g in places.engines]
            else:  # as in a run: both at once
                engines = seen_by_engines(args, placement, tmp_path / "logs")
                assert engines == [gpus for _, gpus in places.engines]
                assert seen_by_trainer(placement) == places.trainer
