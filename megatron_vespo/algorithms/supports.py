"""Restricts tiles of logits to the tokens that truncated sampling left to choose from.

Shape suffixes: T tokens, M pairs of a token and an id of its support, W columns of a tile of logits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

# Takes the place of logits outside of a support. Over any temperature, and summed over a vocabulary, it must
# stay finite in float32: minus infinity times a probability of 0 would be NaN.
OUTSIDE = -1e20


@dataclass(frozen=True)
class Supports:
    """The support of each token, a part of the vocabulary; tokens without one have the whole vocabulary."""

    restricted_T: Tensor  # bool, has a support
    tokens_M: Tensor  # int64, index of the pair's token; -1: none of these tokens
    ids_M: Tensor  # int64, in the vocabulary

    @classmethod
    def of(cls, counts_T: Tensor, ids_M: Tensor) -> Self:
        """Return supports of `counts_T` ids, token after token; a token with 0 ids has no support.

        Example: of([2, 0, 1], [5, 9, 7]) are {5, 9} of the first token and {7} of the third.
        """
        index_T = torch.arange(len(counts_T), device=counts_T.device)
        # without the size, a GPU would wait for the sum of the counts
        tokens_M = index_T.repeat_interleave(counts_T, output_size=len(ids_M))
        return cls(counts_T > 0, tokens_M, ids_M.long())

    def counted_from(self, first_id: int) -> Self:
        """Return the supports with ids counted from `first_id`."""
        return replace(self, ids_M=self.ids_M - first_id)

    def of_tokens(self, tokens_R: Tensor) -> Self:
        """Return the supports of the tokens with these indices, int64 [R]."""
        index_T = torch.full_like(self.restricted_T, -1, dtype=torch.int64)
        index_T[tokens_R] = torch.arange(len(tokens_R), device=tokens_R.device)
        return replace(self, restricted_T=self.restricted_T[tokens_R], tokens_M=index_T[self.tokens_M])

    def restrict(self, memory: Tensor, logits_TW: Tensor, start: int) -> None:
        """Put OUTSIDE in place of the logits outside of the supports.

        `logits_TW` are those of the ids from `start` on; they lie at the beginning of `memory`, which has at
        least one element more.
        """
        width = logits_TW.shape[1]
        columns_M = self.ids_M - start
        in_tile_M = (self.tokens_M >= 0) & (columns_M >= 0) & (columns_M < width)
        # pairs of other tiles read and write the last element: to select pairs, a GPU would have to wait
        places_M = torch.where(in_tile_M, self.tokens_M * width + columns_M, len(memory) - 1)
        kept_M = memory[places_M]
        logits_TW.masked_fill_(self.restricted_T[:, None], OUTSIDE)
        memory.index_copy_(0, places_M, kept_M)
