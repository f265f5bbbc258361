"""Changes of a part: what comes out is the new part, and takes as few bytes as the smallest form."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vespo.weight_sync.changes import BLOCK, Elements, decode, encode, integers

HEAD = 9  # bytes for each block


def applied(said: bytes | None, old: Elements) -> Elements:
    new = old.copy()
    if said is not None:
        changes = decode(said, len(old), old.itemsize)
        new[changes.positions] = changes.values
        for start, values in changes.ranges:
            new[start : start + len(values)] = values
    return new


def parts(length: int, share: float, itemsize: int, seed: int) -> tuple[Elements, Elements]:
    draw = np.random.default_rng(seed)
    old = draw.integers(0, 2 ** (8 * itemsize - 1), length).astype(integers(itemsize))
    changed = draw.random(length) < share
    return np.where(changed, old + 1, old).astype(old.dtype), old


@settings(max_examples=150, deadline=None)
@given(
    length=st.one_of(st.integers(0, 600), st.sampled_from([BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 77])),
    share=st.sampled_from([0.0, 0.0001, 0.002, 0.05, 0.2, 0.6, 0.99, 1.0]),
    itemsize=st.sampled_from([1, 2, 4, 8]), seed=st.integers(0, 10**6),
)  # fmt: skip
def test_the_new_part_comes_out(length, share, itemsize, seed):
    new, old = parts(length, share, itemsize, seed)
    said, number = encode(new, old)
    np.testing.assert_array_equal(applied(said, old), new)
    assert number == np.count_nonzero(new != old)
    assert (said is None) == (number == 0)


@pytest.mark.parametrize(
    ("share", "each"),
    [
        (0.05, 1.0),  # of a byte for each changed element: gaps
        (0.3, 1 / 8 / 0.3),  # bits
        (1.0, 0.0),
    ],
)
def test_bytes_beside_the_changed_values(share, each):
    new, old = parts(8 * BLOCK, share, 2, 1)
    said, number = encode(new, old)
    assert said is not None
    assert len(said) - 2 * number == pytest.approx(each * number + 8 * HEAD, rel=0.01)


def test_blocks_choose_for_themselves():
    old = np.zeros(3 * BLOCK, integers(2))
    new = old.copy()
    new[BLOCK : 2 * BLOCK] = 7  # an expert whose every element has changed
    new[-1] = 7
    said, number = encode(new, old)
    assert said is not None and number == BLOCK + 1
    # the last one is behind 65,535 elements: 257 times 255 of them
    assert len(said) == 3 * HEAD + 2 * BLOCK + 258 + 2
    np.testing.assert_array_equal(applied(said, old), new)


def test_weights_are_compared_by_their_bits():
    old = np.array([np.nan, 0.0, 1.0], np.float32).view(integers(4))
    new = np.array([np.nan, -0.0, 1.0], np.float32).view(integers(4))
    said, number = encode(new, old)
    assert number == 1
    np.testing.assert_array_equal(applied(said, old), new)
