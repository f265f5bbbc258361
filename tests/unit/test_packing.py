"""Packing of whole sequences under a token budget."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vespo.data.packing import imbalance, pack_sequences

BUDGET = 64


@st.composite
def batches(draw):
    """(lengths, ranks) as training has them: the ranks divide the number of sequences."""
    num_ranks = draw(st.integers(1, 5))
    per_rank = draw(st.integers(1, 12))
    size = num_ranks * per_rank
    return draw(st.lists(st.integers(1, BUDGET), min_size=size, max_size=size)), num_ranks


@given(batches())
def test_every_bin_keeps_the_contract(batch):
    lengths, num_ranks = batch
    bins = pack_sequences(lengths, num_ranks, BUDGET)
    assert len(bins) == num_ranks
    assert len({len(rank) for rank in bins}) == 1
    micro_batches = [micro_batch for rank in bins for micro_batch in rank]
    assert all(micro_batches)
    assert sorted(i for micro_batch in micro_batches for i in micro_batch) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in micro_batch) <= BUDGET for micro_batch in micro_batches)
    assert bins == pack_sequences(list(lengths), num_ranks, BUDGET)


@given(batches())
def test_at_most_twice_the_least_number_of_micro_batches(batch):
    """Longest first fails only when every bin is more than half full."""
    lengths, num_ranks = batch
    steps = len(pack_sequences(lengths, num_ranks, BUDGET)[0])
    least = -(-sum(lengths) // (BUDGET * num_ranks))
    assert least <= steps <= 2 * least


def test_literal_packing():
    # longest first: 6 | 5, then 4 joins the 5, 3 joins the 6
    assert pack_sequences([3, 6, 4, 5], 1, 9) == [[[0, 1], [2, 3]]]
    assert pack_sequences([3, 6, 4, 5], 2, 9) == [[[0, 1]], [[2, 3]]]


def test_one_micro_batch_where_all_fits():
    assert pack_sequences([4, 4, 4, 4], 2, 8) == [[[0, 2]], [[1, 3]]]


def test_sequences_as_long_as_the_budget():
    assert pack_sequences([8, 8, 8, 8], 2, 8) == [[[0], [2]], [[1], [3]]]


def test_similar_loads_meet_in_one_step():
    lengths = [10, 9, 8, 7, 6, 5]
    bins = pack_sequences(lengths, 2, 13)
    loads = [[sum(lengths[i] for i in micro_batch) for micro_batch in rank] for rank in bins]
    assert loads == [[13, 10], [13, 9]]


def test_too_long_a_sequence_is_named():
    with pytest.raises(ValueError) as error:
        pack_sequences([3, 9, 4], 1, 8)
    assert str(error.value) == (
        "sample 1 has 9 tokens, more than --max-tokens-per-gpu 8: raise the budget or shorten the completions"
    )


def test_fewer_sequences_than_ranks():
    with pytest.raises(ValueError, match=r"^3 sequences cannot feed 4 data-parallel ranks$"):
        pack_sequences([1, 1, 1], 4, 8)


def test_no_bin_is_ever_empty():
    """Five full sequences need two steps of four ranks, which are eight bins."""
    with pytest.raises(ValueError) as error:
        pack_sequences([8] * 5, 4, 8)
    assert str(error.value) == (
        "5 sequences cannot fill 2 micro-batches of 8 tokens on each of 4 data-parallel ranks: "
        "their number should be a multiple of the ranks"
    )


def test_imbalance_compares_the_busiest_rank_with_the_mean():
    lengths = [3, 1, 2, 2]
    assert imbalance([[[0], [1]], [[2], [3]]], lengths) == 0.0
    assert imbalance([[[0, 2]], [[1, 3]]], lengths) == pytest.approx(5 / 4 - 1)
    assert imbalance([[[0, 1, 2, 3]]], lengths) == 0.0
