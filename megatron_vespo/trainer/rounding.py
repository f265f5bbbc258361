"""A pass over the same weights whose roundings are other ones: what differs is numerical noise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from megatron.core.utils import unwrap_model
from torch import Tensor

# One element of so many: few enough that what is added is far below what one layer rounds, enough for every
# token. A prime, as it should not meet the same columns again and again.
EVERY = 127


@contextmanager
def rounded_otherwise(model: list, dtype: torch.dtype) -> Iterator[None]:
    """Passes inside start from embeddings of which every 127th element is one rounding of `dtype` larger.

    In exact arithmetic this adds less than one layer's rounding. But as after an optimizer step, however
    small, the layers then round other values, up or down by chance. Merely packing the sequences in another
    way would not do: a matmul rounds the rows of a larger batch as those of a smaller one, mostly. The
    pattern follows the place in the tensor, so that ranks with copies of the embeddings keep equal ones.
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
