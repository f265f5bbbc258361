"""Which bundle and which GPUs each process gets, on clusters that are made up."""

import pytest

from megatron_vespo.cluster.seats import SHARED_GPU, Bundle, Seat, separate, shared, shared_sizes


def test_apart_each_has_a_bundle_of_its_own():
    trainer, engines = separate(3, 2, 1, 4)
    assert trainer == [Seat(0, 1), Seat(1, 1), Seat(2, 1)]
    assert engines == [Seat(3, 4), Seat(4, 4)]


@pytest.mark.parametrize(
    ("ranks", "engines", "size", "expected"),
    [(8, 4, 2, [2, 2, 2, 2]), (8, 3, 2, [2, 2, 2, 1, 1]), (4, 1, 4, [4]), (2, 0, 1, [1, 1])],
)
def test_an_engine_takes_as_many_ranks_as_it_has_gpus(ranks, engines, size, expected):
    assert shared_sizes(ranks, engines, size) == expected


def test_ranks_are_numbered_by_node_and_gpu():
    """Two nodes of four GPUs, three engines of two: Ray has put the bundles down in its own order."""
    bundles = [
        Bundle("b", ("2", "3")), Bundle("a", ("2", "10")), Bundle("b", ("0", "1")), Bundle("a", ("1",)),
        Bundle("a", ("0",)),
    ]  # fmt: skip
    trainer, engines = shared([2, 2, 2, 1, 1], 3, bundles)
    assert [seat.bundle for seat in trainer] == [2, 2, 0, 0, 4, 3, 1, 1]
    assert all(seat.num_gpus == SHARED_GPU and seat.devices is None for seat in trainer)
    assert engines == [Seat(2, 0, "0,1"), Seat(0, 0, "2,3"), Seat(1, 0, "2,10")]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_gpu_has_one_rank_and_at_most_one_engine(size):
    """All GPUs of two nodes of eight."""
    num = 16 // size
    bundles = [
        Bundle(f"node {index * size // 8}", tuple(str((index * size + i) % 8) for i in range(size)))
        for index in range(num)
    ]
    trainer, engines = shared([size] * num, num, bundles)
    assert len(trainer) == 16 and len(engines) == num
    assert all(sum(seat.bundle == bundle for seat in trainer) == size for bundle in range(num))
    seen = [(bundles[seat.bundle].node, gpu) for seat in engines for gpu in seat.devices.split(",")]
    assert len(set(seen)) == len(seen) == 16
    # neighbours of a group of eight are on one node
    assert {bundles[seat.bundle].node for seat in trainer[:8]} == {"node 0"}


def test_two_ranks_never_share_a_gpu():
    assert 0.5 < SHARED_GPU < 1


def test_without_gpus_nothing_is_shown():
    trainer, engines = shared([2, 1], 1, [Bundle("a", ()), Bundle("a", ())])
    assert trainer == [Seat(0), Seat(0), Seat(1)] and engines == [Seat(0)]
