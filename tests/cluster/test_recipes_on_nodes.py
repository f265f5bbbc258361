"""Every recipe of examples/ on the nodes that it is written for."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import pytest

from megatron_vespo.recipe import read_recipe
from megatron_vespo.rollout.server_arguments import engine_size
from tests.cluster.fake_nodes import FakeNodes
from tests.cluster.placed import (
    Places,
    check_places,
    divided,
    placed,
    seen_by_engines,
    seen_by_trainer,
)
from tests.cluster.programs.megatron_groups import Groups, parsed
from tests.unit.test_recipes import CONFIGS, EXAMPLES, RECIPES

PER_NODE = 8
BY_NODES = sorted(RECIPES, key=RECIPES.get)  # nodes are only added
# One of each kind of run; the others differ in what is not placed. Their processes are started for real.
STARTED = {"qwen3_30b_a3b/one_node_80gb", "qwen3_8b/colocated_one_node", "qwen3_8b/synchronous_n8"}


@pytest.fixture
def run(megatron, tmp_path):
    """`run(recipe)`: its arguments, GPUs of an engine, and the groups that Megatron makes of its ranks."""

    def read(recipe: str) -> tuple[Namespace, int, Groups]:
        (tmp_path / "config.json").write_text(json.dumps(CONFIGS[recipe.partition("/")[0]]))
        flags = read_recipe(EXAMPLES / f"{recipe}.flags")
        args, groups = megatron(parsed, [*flags, "--hf-checkpoint", str(tmp_path)])
        return args, engine_size(args.sglang_flags), groups

    return read


def check_groups(groups: Groups, places: Places) -> None:
    """All recipes' groups fit a node."""
    assert all(len(group) <= PER_NODE for kind in groups.values() for group in kind)
    assert {kind: divided(of_kind, places) for kind, of_kind in groups.items()} == dict.fromkeys(groups, [])


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
