"""How trainer ranks are divided into bundles, for clusters that are made up."""

from __future__ import annotations

import random
from argparse import Namespace
from itertools import product

import pytest

from megatron_vespo.cluster.blocks import Run, block_sizes, neighbours, packed, requested
from megatron_vespo.cluster.roles import ROLES
from megatron_vespo.commands.plan.gpu_count import too_few_gpus

TRAINER, ENGINE = ROLES.values()


def nodes(*gpus: int, **more: float) -> list[dict[str, float]]:
    return [{"CPU": 64, "GPU": number, **more} for number in gpus]


def run(ranks: int, groups: list[int], engines: int = 0, size: int = 1, colocate: bool = False) -> Run:
    return Run(ranks, {str(number): number for number in groups}, engines, size, True, colocate)


def test_neighbours_by_megatrons_flags():
    args = Namespace(
        tensor_model_parallel_size=4, context_parallel_size=2, expert_model_parallel_size=8,
        expert_tensor_parallel_size=1,
    )  # fmt: skip
    assert neighbours(args) == {"tensor-parallel": 4, "expert-parallel": 8, "context-parallel": 8}


def test_the_best_division_comes_first():
    divisions = list(block_sizes(12, [2, 4], 8))
    assert divisions[:6] == [[8, 4], [4, 4, 4], [8, 4], [6, 6], [4, 4, 4], [2] * 6]
    assert divisions[-1] == [1] * 12


@pytest.mark.parametrize(
    ("ranks", "groups", "engines", "size", "there", "expected"),
    [
        (16, [2, 8], 8, 2, [8] * 4, [8, 8]),
        (16, [4, 8], 24, 2, [8] * 8, [8, 8]),
        (4, [2, 4], 2, 2, [8], [4]),
        (8, [2], 8, 1, [8, 8], [8]),
        (12, [4], 1, 4, [8, 8], [8, 4]),
        (12, [2, 4], 3, 2, [6] * 3, [4, 4, 4]),  # the largest that fit, 6, would cut a group of 4
        (16, [16, 8], 0, 1, [8, 8], [8, 8]),  # what fits no node does not count
        (24, [2], 0, 1, [8, 8, 4, 4], [4] * 6),
        (6, [2], 2, 5, [8, 8], [3, 3]),  # engines leave three GPUs on each: a pair has to be cut
        (0, [], 4, 2, [8], []),
    ],
)
def test_blocks_keep_groups_whole(ranks, groups, engines, size, there, expected):
    request = requested(run(ranks, groups, engines, size), nodes(*there))
    assert request.blocks == expected and request.per_node == max(there)
    assert request.bundles[: len(expected)] == [{"CPU": block, "GPU": block} for block in expected]
    assert request.bundles[len(expected) :] == [{"CPU": 1, "GPU": size}] * engines


@pytest.mark.parametrize(
    ("ranks", "engines", "size", "there", "expected", "sharing"),
    [
        (32, 16, 2, [8] * 4, [8] * 4, [4] * 4),
        (8, 3, 2, [8], [8], [3]),
        (16, 3, 4, [8, 8], [8, 8], [2, 1]),
        (6, 2, 2, [3, 3], [3, 3], [1, 1]),
        (5, 1, 3, [3, 1, 1], [3, 1, 1], [1, 0, 0]),  # ranks alone take what engines leave
    ],
)
def test_engines_lie_inside_blocks(ranks, engines, size, there, expected, sharing):
    request = requested(run(ranks, [2], engines, size, colocate=True), nodes(*there))
    assert (request.blocks, request.sharing) == (expected, sharing)
    assert request.bundles == [
        {"CPU": block + here, "GPU": block} for block, here in zip(expected, sharing, strict=True)
    ]


def test_ranks_on_nodes_of_their_own_role():
    there = nodes(8, 8, **{TRAINER: 1}) + nodes(4, 4, 4, **{ENGINE: 1}) + nodes(16)
    request = requested(run(16, [2, 8], 3, 4), there)
    assert request.blocks == [8, 8] and request.per_node == 8
    assert [TRAINER in bundle for bundle in request.bundles] == [True] * 2 + [False] * 3


def test_without_gpus_each_rank_has_a_bundle():
    request = requested(Run(4, {"tensor-parallel": 2}, 2, 2, False, False), nodes(8))
    assert request.bundles == [{"CPU": 1}] * 6


@pytest.mark.parametrize(
    ("asked", "there", "message"),
    [
        (
            run(16, [2], 9, 2), nodes(8, 8, 8, 8),
            "16 trainer ranks and 9 engines of 2 ranks find no place: they need 34 GPUs and 25 CPUs, no "
            "engine across nodes; the Ray cluster's nodes: 4 of 8 GPUs and 64 CPUs",
        ),
        (
            run(4, [1], 1, 8), nodes(4, 8, 4, **{TRAINER: 1}),
            "4 trainer ranks and 1 engines of 8 ranks find no place: they need 12 GPUs and 5 CPUs, no "
            "engine across nodes; the Ray cluster's nodes: 2 of 4 GPUs and 64 CPUs, 1 of 8 GPUs and 64 CPUs; "
            "engines ask for {'CPU': 1, 'GPU': 8}, the nodes with vespo_engine (0) have {'CPU': 0, 'GPU': 0}",
        ),
        (
            run(8, [2], 4, 4, colocate=True), nodes(8),
            "8 trainer ranks and 4 engines of 4 ranks on their GPUs find no place",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(asked, there, message):
    with pytest.raises(ValueError) as error:
        requested(asked, there)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_what_a_plan_accepts_is_placed(size):
    """And nothing else."""
    for ranks, engines, number, per_node in product((0, 1, 3, 4, 9), range(5), (1, 2, 3), (1, 2, 3, 4, 7)):
        for colocate in (False, True):
            all_ranks = ranks + engines * size * colocate
            wrong = too_few_gpus(all_ranks, engines, size, number, per_node, colocate)
            try:
                requested(run(all_ranks, [2], engines, size, colocate), nodes(*[per_node] * number))
            except ValueError as error:
                assert wrong is not None, error
            else:
                assert wrong is None


def test_the_order_of_bundles_does_not_matter():
    bundles = [{"CPU": 1, "GPU": gpus} for gpus in (8, 8, 4, 2, 2, 2, 2, 1, 1, 1, 1)]
    for seed in range(20):
        random.Random(seed).shuffle(bundles)
        assert packed(bundles, nodes(8, 8, 8, 7)) is None
        found = packed(bundles, nodes(8, 8, 8, 8))
        assert found is not None
        for node in range(4):
            assert sum(bundle["GPU"] for bundle, at in zip(bundles, found, strict=True) if at == node) == 8


@pytest.mark.parametrize("colocate", [False, True])
def test_teachers_ask_for_gpus_of_their_own(colocate):
    wanted = Run(4, {"4": 4}, 1, 4, True, colocate, teachers=2, teacher_size=2)
    request = requested(wanted, nodes(8, 8))
    assert [bundle["GPU"] for bundle in request.bundles] == [4, *([] if colocate else [4]), 2, 2]
    with pytest.raises(ValueError, match="2 teacher engines of 2 ranks find no place"):
        requested(wanted, nodes(4, 3))
