"""Which bundle and which GPUs each process gets, on clusters that are made up."""

import pytest

from megatron_vespo.cluster.assignments import (
    Assignment,
    Bundle,
    assigned,
    divided_groups,
    engine_assignments,
    shared_assignments,
    trainer_assignments,
    without_gpus,
    wrong_gpus,
)


def gpus(*ids: int) -> tuple[str, ...]:
    return tuple(map(str, ids))


def test_ranks_are_numbered_by_node_and_gpu():
    """Ray has put the blocks down in its own order, and says GPUs in any."""
    bundles = [
        Bundle("b", gpus(3, 2)), Bundle("a", gpus(10, 2)), Bundle("b", gpus(0, 1)), Bundle("a", gpus(1)),
        Bundle("a", gpus(0)),
    ]  # fmt: skip
    assignments = trainer_assignments([2, 2, 2, 1, 1], bundles)
    assert assignments == [
        Assignment(2, "0"), Assignment(2, "1"), Assignment(0, "2"), Assignment(0, "3"),
        Assignment(4, "0"), Assignment(3, "1"), Assignment(1, "2"), Assignment(1, "10"),
    ]  # fmt: skip


def test_nodes_with_more_ranks_come_first():
    """Or a group of eight, [0, 8), would begin on the node of four."""
    bundles = [
        Bundle("small", gpus(0, 1, 2, 3)),
        Bundle("large", gpus(0, 1, 2, 3)),
        Bundle("large", gpus(4, 5, 6, 7)),
    ]
    assert [a.bundle for a in trainer_assignments([4, 4, 4], bundles)] == [1] * 4 + [2] * 4 + [0] * 4


def test_engines_have_the_gpus_of_their_own_bundles():
    bundles = [Bundle("a", gpus(6, 7)), Bundle("b", gpus(3, 2)), Bundle("a", gpus(4, 5))]
    assert engine_assignments(bundles, 4) == [
        Assignment(6, "4,5"),
        Assignment(4, "6,7"),
        Assignment(5, "2,3"),
    ]


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_an_engine_that_shares_is_on_the_gpus_of_neighbouring_ranks(size):
    """All GPUs of two nodes of eight."""
    bundles = [Bundle("a", gpus(*range(8))), Bundle("b", gpus(*range(8)))]
    trainer = trainer_assignments([8, 8], bundles)
    engines = shared_assignments(trainer, [8 // size] * 2, size)
    assert [(a.bundle, gpu) for a in engines for gpu in a.devices.split(",")] == [
        (a.bundle, a.devices) for a in trainer
    ]


def test_engines_share_only_the_blocks_that_have_room_for_their_processes():
    """Three engines; Ray has swapped the blocks."""
    trainer = trainer_assignments([4, 4], [Bundle("b", gpus(4, 5, 6, 7)), Bundle("b", gpus(0, 1, 2, 3))])
    assert [a.bundle for a in trainer] == [1] * 4 + [0] * 4
    assert shared_assignments(trainer, [2, 1], 2) == [
        Assignment(1, "0,1"),
        Assignment(0, "4,5"),
        Assignment(0, "6,7"),
    ]


def test_without_gpus_nothing_is_shown():
    bundles = [Bundle("a"), Bundle("a")]
    trainer = trainer_assignments([2, 1], bundles)
    assert trainer == [Assignment(0), Assignment(0), Assignment(1)]
    assert shared_assignments(trainer, [1, 0], 2) == [Assignment(0)] and engine_assignments(bundles, 3) == [
        Assignment(3),
        Assignment(4),
    ]
    assert without_gpus(trainer) == [Assignment(0, ""), Assignment(0, ""), Assignment(1, "")]


def test_groups_across_nodes_are_counted():
    nodes = ["a"] * 3 + ["b"] * 5
    groups = {"tensor-parallel": 2, "expert-parallel": 4, "context-parallel": 8, "data-parallel": 1}
    tensor, expert = divided_groups(groups, nodes, 4)
    assert tensor.startswith("1 of 4 tensor-parallel groups of 2 ranks are across nodes")
    assert expert.startswith("1 of 2 expert-parallel groups of 4 ranks are across nodes")
    assert divided_groups(groups, ["a"] * 4 + ["b"] * 4, 4) == ()


def test_gpus_that_ray_gives_twice_or_not_are_refused():
    assert wrong_gpus([Bundle("a", ("0", "1")), Bundle("b", ("0",)), Bundle("b")], [2, 1, 0]) is None
    for gpus in [("0",), ("2",)], [("0", "1"), ("1",)], [("0", "1", "2"), ("3",)]:
        bundles = [Bundle("a", of_bundle) for of_bundle in gpus]
        assert "CUDA_VISIBLE_DEVICES and ray start --num-gpus disagree" in wrong_gpus(bundles, [2, 1])


@pytest.mark.parametrize("colocate", [False, True])
def test_teachers_have_the_last_bundles_and_gpus_of_their_own(colocate):
    """Two ranks, an engine of two, and two teacher engines of one; the engine's GPUs may be the ranks'."""
    located = [Bundle("a", gpus(0, 1)), *([] if colocate else [Bundle("a", gpus(2, 3))])]
    located += [Bundle("b", gpus(5)), Bundle("b", gpus(4))]
    trainer, engines, teachers = assigned([2], [1], located, 2, colocate, teachers=2)
    first = len(located) - 2
    assert trainer == [Assignment(0, "0"), Assignment(0, "1")]
    assert engines == [Assignment(0, "0,1") if colocate else Assignment(1, "2,3")]
    assert teachers == [Assignment(first + 1, "4"), Assignment(first, "5")]
