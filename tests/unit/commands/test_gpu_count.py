"""The rule of the nodes' GPUs against trying every way to lay engines out."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace

import pytest

from megatron_vespo.commands.plan.gpu_count import too_few_gpus
from megatron_vespo.commands.submit.engine_nodes import described_use


def can_be_placed(ranks: int, engines: int, size: int, nodes: int, per_node: int) -> bool:
    for on_node in product(range(engines + 1), repeat=nodes):
        free = [per_node - here * size for here in on_node]
        if sum(on_node) == engines and min(free) >= 0 and sum(free) >= ranks:
            return True
    return False


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_what_can_be_placed(size):
    for ranks, engines, nodes, per_node in product((0, 1, 3, 4, 9), range(5), (1, 2, 3), (1, 2, 3, 4, 7)):
        wrong = too_few_gpus(ranks, engines, size, nodes, per_node)
        assert (wrong is None) == can_be_placed(ranks, engines, size, nodes, per_node), wrong
        wrong = too_few_gpus(ranks + engines * size, engines, size, nodes, per_node, colocate=True)
        assert (wrong is None) == can_be_placed(ranks, engines, size, nodes, per_node), wrong


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ((8, 8, 2, 2, 8), "24 GPUs are needed, 2 nodes x 8 = 16 are there: --nodes 3 or --rollout-engines 4"),
        ((32, 8, 2, 2, 8), "48 GPUs are needed, 2 nodes x 8 = 16 are there: --nodes 6 or a smaller layout"),
        (
            (9, 4, 2, 1, 8, True),
            "9 GPUs are needed, 1 node x 8 = 8 are there: --nodes 2 or a smaller layout",
        ),
        ((4, 1, 16, 3, 8), "an engine of 16 GPUs does not fit a node of 8: lower --sglang-tp-size"),
        (
            (3, 2, 2, 1, 3, True),
            "1 node x 3 holds 1 engine of 2 GPUs, none across nodes: --rollout-engines 1",
        ),
        ((6, 9, 2, 8, 3), "8 nodes x 3 hold 8 engines of 2 GPUs, none across nodes: --rollout-engines 8"),
    ],
)
def test_what_would_be_right(run, message):
    assert too_few_gpus(*run) == message


@pytest.mark.parametrize("colocate", [False, True])
def test_engines_and_teachers_of_other_sizes_must_fit_the_nodes_together(colocate):
    """Two of 6 GPUs leave 2 and 2, no place for one of 4. What fits does so in every number of GPUs."""
    ranks = 12 if colocate else 0
    wrong = too_few_gpus(ranks, 2, 6, 2, 8, colocate, [4])
    assert wrong is not None and "6, 6, 4 GPUs" in wrong and "take 3 nodes" in wrong
    assert too_few_gpus(ranks, 2, 6, 3, 8, colocate, [4]) is None
    assert too_few_gpus(ranks, 2, 6, 2, 8, colocate, [2, 2]) is None


def test_the_nodes_of_engines_have_room_for_teachers():
    asked = SimpleNamespace(engine_nodes=2, engine_gpus_per_node=4, gpus_per_node=8, nodes=1)
    assert "2 engines of 2 GPUs and 1 teacher engine" in described_use(asked, 8, 2, 2, [4])
    with pytest.raises(ValueError, match="a teacher engine of 6 GPUs does not fit a node of 4"):
        described_use(asked, 8, 1, 2, [6])
    with pytest.raises(ValueError, match="teacher engines of 3, 3, 2 GPUs find no room"):
        described_use(asked, 8, 2, 3, [2])


def test_teachers_are_counted():
    """They share no GPU, also where engines and trainer do."""
    assert too_few_gpus(4, 1, 2, 1, 8, teacher_sizes=[2]) is None
    assert too_few_gpus(8, 4, 2, 2, 8, colocate=True, teacher_sizes=[4, 4]) is None
    short = too_few_gpus(4, 2, 2, 1, 8, teacher_sizes=[2])
    assert short is not None and short.startswith("10 GPUs are needed, 1 node x 8 = 8 are there: --nodes 2")
    assert short.endswith("or --rollout-engines 1")
    wide = too_few_gpus(4, 1, 2, 4, 8, teacher_sizes=[16])
    assert wide is not None and "a teacher engine of 16 GPUs" in wide and "--teacher-tp-size" in wide
