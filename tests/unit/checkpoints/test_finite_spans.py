"""Every value that passes through a span buffer is finite, wherever it is and whatever its bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_vespo.checkpoints.safetensors_file import TensorInfo
from megatron_vespo.checkpoints.spans import Span, SpanBuffer

INTEGERS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


class OneTensor:
    folder = Path("in memory")

    def __init__(self, values: torch.Tensor):
        self._values = values
        self.tensors = {"x": TensorInfo(values.dtype, tuple(values.shape))}

    def read_rows(self, name: str, start: int, stop: int, out: torch.Tensor) -> None:
        out.copy_(self._values[start:stop].reshape(-1).view(torch.uint8))


def read(values: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    return SpanBuffer().read(OneTensor(values), Span("x", 0, len(values)), dtype)


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
    with pytest.raises(ValueError, match="holds NaN or infinity as torch.float16"):
        read(values, torch.float16)


def test_what_a_reader_leaves_out():
    class Half(OneTensor):
        def read_rows(self, name, start, stop, out):
            super().read_rows(name, start, stop, out[: len(out) // 2])

    source = Half(torch.zeros(4, 3))
    source._values = source._values[:2]
    with pytest.raises(ValueError, match="NaN"):
        SpanBuffer().read(source, Span("x", 0, 4))


def test_nothing_and_integers_pass():
    assert len(read(torch.zeros(0, 3))) == 0
    assert read(torch.full((3,), -1)).equal(torch.full((3,), -1))
