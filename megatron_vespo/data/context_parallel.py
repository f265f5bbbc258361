"""The only module that knows which rank holds which tokens under context and sequence parallelism.

Context parallelism cuts every sequence into 2 * size equal chunks. Rank r holds chunks r and 2 * size - 1 - r
(zig-zag), so that all ranks have the same share of causal attention. Sequence parallelism then cuts the
tokens of each rank into equal slices, in order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class TokenLayout:
    """One rank's share of a pack."""

    cp_size: int = 1
    cp_rank: int = 0
    sequence_parallel_size: int = 1

    @property
    def sequence_multiple(self) -> int:
        """Each sequence is padded to a multiple of this."""
        return 2 * self.cp_size if self.cp_size > 1 else 1

    @property
    def pack_multiple(self) -> int:
        """A pack is padded to a multiple of this."""
        return math.lcm(self.sequence_multiple, self.cp_size * self.sequence_parallel_size)

    def padded_length(self, length: int) -> int:
        """Return the length of a sequence of `length` tokens in a pack, with padding."""
        return -(-length // self.sequence_multiple) * self.sequence_multiple

    def padded_pack(self, length: int) -> int:
        """Return the length of a pack, with padding; its padded sequences have `length` tokens in total."""
        return -(-length // self.pack_multiple) * self.pack_multiple

    def local_indices(self, cu_seqlens: np.ndarray) -> np.ndarray:
        """Return the pack indices of this rank's tokens, int64 [T / cp_size], in the rank's order.

        `cu_seqlens` [S + 1] are the boundaries of the padded sequences.
        """
        if self.cp_size == 1:
            return np.arange(cu_seqlens[-1])
        parts = []
        for start, end in zip(cu_seqlens[:-1], cu_seqlens[1:], strict=True):
            chunks = np.arange(start, end).reshape(2 * self.cp_size, -1)
            parts += [chunks[self.cp_rank], chunks[-1 - self.cp_rank]]
        return np.concatenate(parts)


def gathered_order(cu_seqlens: np.ndarray, cp_size: int) -> np.ndarray:
    """Return the index of each token of the pack in the concatenation of the ranks' parts, int64 [T]."""
    held = [TokenLayout(cp_size, rank).local_indices(cu_seqlens) for rank in range(cp_size)]
    return np.argsort(np.concatenate(held))
