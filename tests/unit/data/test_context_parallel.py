"""Where tokens live when context and sequence parallelism cut a pack."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megatron_vespo.data.context_parallel import TokenLayout, gathered_order


def bounds_of(lengths: list[int], layout: TokenLayout) -> np.ndarray:
    return np.concatenate([[0], np.cumsum([layout.padded_length(n) for n in lengths])])


def test_zig_zag_of_two_ranks_literally():
    bounds = np.array([0, 8, 12])
    assert TokenLayout(2, 0).local_indices(bounds).tolist() == [0, 1, 6, 7, 8, 11]
    assert TokenLayout(2, 1).local_indices(bounds).tolist() == [2, 3, 4, 5, 9, 10]
    assert TokenLayout().local_indices(bounds).tolist() == list(range(12))


def test_multiples():
    assert TokenLayout().padded_length(7) == TokenLayout().padded_pack(7) == 7
    assert TokenLayout(4).padded_length(9) == 16
    assert TokenLayout(1, 0, 4).padded_length(7) == 7 and TokenLayout(1, 0, 4).padded_pack(7) == 8
    # cut in 3 by context, each part in 4 by sequence parallelism; padding is cut in 6 like a sequence
    assert TokenLayout(3, 0, 4).padded_pack(6) == 12
    assert TokenLayout(3, 0, 8).padded_pack(6) == 24


@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.integers(1, 4))
def test_every_token_is_held_once_and_found_again(lengths, size):
    bounds = bounds_of(lengths, TokenLayout(size))
    held = [TokenLayout(size, rank).local_indices(bounds) for rank in range(size)]
    assert len({len(part) for part in held}) == 1
    gathered = np.concatenate(held)
    np.testing.assert_array_equal(gathered[gathered_order(bounds, size)], np.arange(bounds[-1]))


@given(st.integers(1, 40), st.integers(2, 4))
def test_every_rank_has_the_same_share_of_causal_attention(length, size):
    layout = TokenLayout(size)
    bounds = bounds_of([length], layout)
    pairs = {int((TokenLayout(size, rank).local_indices(bounds) + 1).sum()) for rank in range(size)}
    assert len(pairs) == 1
