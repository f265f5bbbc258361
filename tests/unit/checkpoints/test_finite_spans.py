"""Spans of rows come back as they were, and every value of one is finite, wherever it is."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from megatron_vespo.checkpoints.spans import Span, SpanBuffer
from tests.support.stored_tensors import StoredTensors

INTEGERS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


def read(values: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    return SpanBuffer().read(StoredTensors({"x": values}), Span("x", 0, len(values)), dtype)


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_any_rows_come_back(dtype):
    values, buffer = torch.rand(6, 4).to(dtype), SpanBuffer()
    for start, stop in [(0, 6), (2, 3), *pairwise(range(7))]:
        found = buffer.read(StoredTensors({"x": values}), Span("x", start, stop))
        assert found.equal(values[start:stop])
    assert read(values, torch.bfloat16).equal(values.to(torch.bfloat16))


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_wherever_it_is(dtype, bad):
    for length in (1, 2, 7, 16, 33, 131):  # less and more than registers hold
        values = torch.zeros(length, dtype=dtype)
        for position in range(length):
            values[position] = bad
            with pytest.raises(ValueError, match=r"x\[0:\d+\] holds NaN or infinity$"):
                read(values)
            values[position] = 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_whatever_its_bits(dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    finite = every.isfinite()
    kept = read(every[finite])
    assert kept.view(torch.int16).equal(every[finite].view(torch.int16))
    for value in every[~finite]:
        values = torch.ones(40, dtype=dtype)
        values[17] = value
        with pytest.raises(ValueError):
            read(values)


def test_a_value_too_large_for_the_output():
    values = torch.tensor([1.0, 1e30])
    assert read(values, torch.bfloat16).isfinite().all()
    with pytest.raises(ValueError, match=r"^memory: x\[0:2\] holds NaN or infinity as torch.float16$"):
        read(values, torch.float16)


def test_what_a_reader_leaves_out_and_a_buffer_held_before():
    buffer, span = SpanBuffer(), Span("x", 0, 2)
    buffer.read(StoredTensors({"x": torch.ones(2, 3)}), span)
    with pytest.raises(ValueError, match=r"^memory: x\[0:2\] holds NaN or infinity$"):
        buffer.read(StoredTensors({"x": torch.ones(2, 3)}, left_out=4), span)


def test_nothing_and_integers_pass():
    assert len(read(torch.zeros(0, 3))) == 0
    assert read(torch.full((3,), -1)).equal(torch.full((3,), -1))
