"""Buckets of bounded size."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_vespo.checkpoints.buckets import buckets


def stream(sizes):
    return [(f"t{i}", torch.zeros(size, dtype=torch.uint8)) for i, size in enumerate(sizes)]


def sizes_of(cut) -> list[list[int]]:
    return [[tensor.nbytes for tensor in bucket.values()] for bucket in cut]


def test_bytes_count_not_elements():
    tensors = [("a", torch.zeros(4)), ("b", torch.zeros(4, dtype=torch.bfloat16)), ("c", torch.zeros(1))]
    assert [list(bucket) for bucket in buckets(tensors, 24)] == [["a", "b"], ["c"]]


def test_a_bucket_is_handed_out_before_the_stream_goes_on():
    """The stream is a collective that gathers tensors: at most one bucket and one tensor are alive."""
    drawn = []

    def generator():
        for name, tensor in stream([6, 6, 6]):
            drawn.append(name)
            yield name, tensor

    cut = buckets(generator(), 10)
    assert list(next(cut)) == ["t0"]
    assert drawn == ["t0", "t1"]


@given(st.lists(st.integers(0, 20), max_size=30), st.integers(1, 30))
def test_order_is_kept_and_bounds_hold(sizes, max_bytes):
    tensors = stream(sizes)
    cut = list(buckets(tensors, max_bytes))
    assert [name for bucket in cut for name in bucket] == [name for name, _ in tensors]
    for bucket in cut:
        assert bucket
        assert len(bucket) == 1 or sum(tensor.nbytes for tensor in bucket.values()) <= max_bytes
    joined = [sum(a) + b[0] for a, b in zip(sizes_of(cut), sizes_of(cut)[1:], strict=False)]
    assert all(size > max_bytes for size in joined)  # no bucket was closed early
