"""Which bundle and which GPUs each process gets, on clusters that are made up."""

import pytest

from megatron_vespo.cluster.seats import (
    Bundle,
    Seat,
    divided_groups,
    engine_seats,
    shared_seats,
    trainer_seats,
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
    seats = trainer_seats([2, 2, 2, 1, 1], bundles)
    assert seats == [
        Seat(2, "0"), Seat(2, "1"), Seat(0, "2"), Seat(0, "3"), Seat(4, "0"), Seat(3, "1"), Seat(1, "2"),
        Seat(1, "10"),
    ]  # fmt: skip


def test_nodes_with_more_ranks_come_first():
    """Or a group of eight, [0, 8), would begin on the node of four."""
    bundles = [
        Bundle("small", gpus(0, 1, 2, 3)),
        Bundle("large", gpus(0, 1, 2, 3)),
        Bundle("large", gpus(4, 5, 6, 7)),
    ]
    assert [seat.bundle for seat in trainer_seats([4, 4, 4], bundles)] == [1] * 4 + [2] * 4 + [0] * 4


def test_engines_have_the_gpus_of_their_own_bundles():
    bundles = [Bundle("a", gpus(6, 7)), Bundle("b", gpus(3, 2)), Bundle("a", gpus(4, 5))]
    assert engine_seats(bundles, 4) == [Seat(6, "4,5"), Seat(4, "6,7"), Seat(5, "2,3")]


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_an_engine_that_shares_is_on_the_gpus_of_neighbouring_ranks(size):
    """All GPUs of two nodes of eight."""
    bundles = [Bundle("a", gpus(*range(8))), Bundle("b", gpus(*range(8)))]
    trainer = trainer_seats([8, 8], bundles)
    engines = shared_seats(trainer, [8 // size] * 2, size)
    assert [(seat.bundle, gpu) for seat in engines for gpu in seat.devices.split(",")] == [
        (seat.bundle, seat.devices) for seat in trainer
    ]


def test_engines_share_only_the_blocks_that_have_room_for_their_processes():
    """Three engines; Ray has swapped the blocks."""
    trainer = trainer_seats([4, 4], [Bundle("b", gpus(4, 5, 6, 7)), Bundle("b", gpus(0, 1, 2, 3))])
    assert [seat.bundle for seat in trainer] == [1] * 4 + [0] * 4
    assert shared_seats(trainer, [2, 1], 2) == [Seat(1, "0,1"), Seat(0, "4,5"), Seat(0, "6,7")]


def test_without_gpus_nothing_is_shown():
    bundles = [Bundle("a"), Bundle("a")]
    trainer = trainer_seats([2, 1], bundles)
    assert trainer == [Seat(0), Seat(0), Seat(1)]
    assert shared_seats(trainer, [1, 0], 2) == [Seat(0)] and engine_seats(bundles, 3) == [Seat(3), Seat(4)]
    assert without_gpus(trainer) == [Seat(0, ""), Seat(0, ""), Seat(1, "")]


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
