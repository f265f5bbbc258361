"""The check of repeated experts finds what sorting finds."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from megatron_vespo.data.routes import repeats_expert


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
