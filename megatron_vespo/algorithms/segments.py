"""Sums over the sequences of a pack, and slices of a pack that fit into a processor core's cache.

Shape suffixes: T packed tokens, S sequences. On a CPU each pass over a pack of millions of tokens would go
through main memory. Slices of whole sequences stay in the cache from pass to pass. A GPU takes a pack whole.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

# of one slice; a longer sequence is a slice of its own
CACHED_TOKENS = 2**18


def in_host_memory(tensor: Tensor) -> bool:
    """Whether slices pay, and reading values waits for no device."""
    return tensor.device.type == "cpu"


def boundaries(sequence_ids_T: Tensor, num_sequences: int) -> Tensor:
    """First token of every sequence and the end of the last one, int64 [S + 1]; `sequence_ids_T` ascend."""
    bounds = torch.arange(num_sequences + 1, device=sequence_ids_T.device)
    return torch.searchsorted(sequence_ids_T, bounds)


def cached_runs(bounds: Sequence[int]) -> list[tuple[slice, slice]]:
    """Sequences and tokens of each slice; `bounds` are `boundaries` on the host."""
    runs, first = [], 0
    for end in range(1, len(bounds)):
        is_full = end + 1 == len(bounds) or bounds[end + 1] - bounds[first] > CACHED_TOKENS
        if is_full:
            runs.append((slice(first, end), slice(bounds[first], bounds[end])))
            first = end
    return runs


def mask_of_some(loss_mask_T: Tensor) -> Tensor | None:
    """The mask, 0 or 1, on the host; None if every token is trained, as masking costs more than this sum."""
    return None if float(loss_mask_T.sum()) == len(loss_mask_T) else loss_mask_T


def segment_sums(values_T: Tensor, bounds: Tensor) -> Tensor:
    """Sums of `values_T` [T, ...] per sequence, [S, ...] float64; `bounds` are its `boundaries`.

    The sum is in float64, as fp32 sums of 32k tokens drift.
    """
    values_T = values_T.detach()
    if not in_host_memory(values_T):
        return torch.segment_reduce(values_T.double(), "sum", offsets=bounds, initial=0.0)
    if values_T.dtype != torch.float32 or values_T.dim() > 1:  # numpy widens plain float32 as it sums
        values_T = values_T.double()
    starts, ends = bounds[:-1].numpy(), bounds[1:].numpy()
    sums = np.zeros((len(starts), *values_T.shape[1:]))
    has_tokens = ends > starts  # numpy takes an empty segment for one element
    if has_tokens.any():
        sums[has_tokens] = np.add.reduceat(values_T.numpy(), starts[has_tokens], axis=0, dtype=np.float64)
    return torch.from_numpy(sums)
