"""The check of repeated experts finds what sorting finds."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from megatron_vespo.data.routes import joined_routes, repeats_expert
from megatron_vespo.types import fetched


@settings(max_examples=300, deadline=None)
@given(arrays(np.uint8, array_shapes(min_dims=3, max_dims=3, max_side=5), elements=st.integers(0, 15)))
def test_any_routes(routes):
    naive = (np.diff(np.sort(routes, axis=-1), axis=-1) == 0).any()
    assert repeats_expert(routes) == naive


def test_the_last_of_many_tokens():
    routes = np.tile(np.arange(8, dtype=np.uint8), (4096, 48, 1))
    assert not repeats_expert(routes)
    routes[-1, -1, -1] = 0
    assert repeats_expert(routes)


class Elsewhere:
    """Routes of another process."""

    def __init__(self, routes: np.ndarray):
        self.routes, self.fetches = routes, 0

    def fetch(self) -> np.ndarray:
        self.fetches += 1
        return self.routes


def test_routes_here_are_joined_at_once_and_others_where_they_are_needed():
    first, second, third = (np.full((n, 2, 1), n, np.uint8) for n in (1, 2, 3))
    whole = np.concatenate([first, second, third])
    np.testing.assert_array_equal(joined_routes(first, second), whole[:3])
    far = Elsewhere(second)
    joined = joined_routes(joined_routes(first, far), third)
    assert far.fetches == 0
    np.testing.assert_array_equal(fetched(joined), whole)
    assert far.fetches == 1
