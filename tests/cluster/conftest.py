"""Ray's fake nodes, started once for all tests that want such nodes."""

from __future__ import annotations

import json
import multiprocessing
from argparse import Namespace
from concurrent.futures import ProcessPoolExecutor

import pytest

from megatron_vespo.arguments.recipe import read_recipe
from megatron_vespo.rollout.server_arguments import engine_size
from tests.cluster.programs.megatron_groups import Groups, parsed
from tests.support.fake_nodes import FakeNodes
from tests.support.recipes import CONFIGS, EXAMPLES


@pytest.fixture(scope="session")
def megatron():
    """A process that imports Megatron, which changes it: `megatron(function, *arguments)`."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield lambda function, *arguments: pool.submit(function, *arguments).result(timeout=120)


@pytest.fixture(scope="module")
def fake_nodes(request):
    """Nodes are added by the tests. A module may name variables for them in ENVIRONMENT."""
    nodes = FakeNodes(**getattr(request.module, "ENVIRONMENT", {}))
    yield nodes
    nodes.close()


@pytest.fixture
def run(megatron, tmp_path):
    """`run(recipe)`: its arguments, GPUs of an engine, and the groups that Megatron makes of its ranks."""

    def read(recipe: str) -> tuple[Namespace, int, Groups]:
        (tmp_path / "config.json").write_text(json.dumps(CONFIGS[recipe.partition("/")[0]]))
        flags = read_recipe(EXAMPLES / f"{recipe}.flags")
        args, groups = megatron(parsed, [*flags, "--hf-checkpoint", str(tmp_path)])
        return args, engine_size(args.sglang_flags), groups

    return read
