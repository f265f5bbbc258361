"""Runs a pass over the same weights with other roundings: the difference is numerical noise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from megatron.core.utils import unwrap_model
from torch import Tensor

# Every 127th element is changed. The change stays far below the rounding of one layer, but reaches every
# token. The number is prime, so that it does not hit the same columns again and again.
EVERY = 127


@contextmanager
def rounded_otherwise(model: list, dtype: torch.dtype) -> Iterator[None]:
    """Inside, every 127th element of the embeddings is larger by one rounding of `dtype`.

    In exact arithmetic this adds less than one layer's rounding. But the layers then round other values, up
    or down by chance, as after any optimizer step, however small. Another packing of the sequences is not
    enough: mostly a matmul rounds the rows of a larger batch like those of a smaller one. The pattern
    depends on the position in the tensor, so that copies of the embeddings on several ranks stay equal.
    """

    def nudged(_module, _inputs, output: Tensor) -> Tensor:
        output = output.clone()
        output.view(-1)[::EVERY] *= 1 + torch.finfo(dtype).eps
        return output

    chunks = [chunk for chunk in unwrap_model(model) if chunk.pre_process]
    handles = [chunk.embedding.register_forward_hook(nudged) for chunk in chunks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
