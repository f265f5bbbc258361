"""Checks and orders supports: the tokens that truncated sampling left to choose from, per sampled token."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_vespo.types import TOKEN_ID, TokenSupports, TrainingSample


def check_supports(sample: TrainingSample, vocab_size: int, where: str) -> None:
    """ValueError, which names `where` and the first wrong token, if the sample has impossible supports.

    The ids of a support must ascend and be in the vocabulary, and the sampled token must be one of them.
    """
    if sample.supports is None:
        return
    token_ids = sample.token_ids[sample.prompt_length :][sample.sampled_mask()]
    counts, ids = sample.supports.counts, sample.supports.token_ids
    if len(counts) != len(token_ids):
        raise ValueError(f"{where} has supports of {len(counts)} tokens for {len(token_ids)} sampled tokens")
    if (empty := np.flatnonzero(counts < 1)).size:
        raise ValueError(f"{where} has an empty support at sampled token {empty[0]}")
    if counts.sum() != len(ids):
        raise ValueError(f"{where} has supports of {counts.sum()} ids by their counts, but {len(ids)} ids")
    token_of = np.repeat(np.arange(len(counts)), counts)
    if (unknown := np.flatnonzero((ids < 0) | (ids >= vocab_size))).size:
        raise ValueError(
            f"{where} has the id {ids[unknown[0]]} in the support of sampled token {token_of[unknown[0]]}, "
            f"the vocabulary has 0 to {vocab_size - 1}"
        )
    falls = (np.diff(ids) <= 0) & (np.diff(token_of) == 0)
    if falls.any():
        raise ValueError(
            f"{where} has ids that do not ascend in the support of sampled token {token_of[np.argmax(falls)]}"
        )
    if (lost := sample.supports.first_outside(token_ids)) is not None:
        raise ValueError(
            f"{where} has the token {token_ids[lost]} at sampled token {lost}, whose support does not "
            "include it"
        )


def joined_supports(samples: Sequence[TrainingSample]) -> TokenSupports | None:
    """Return the supports of all sampled tokens, sample after sample; None if no sample has any.

    Tokens of samples without supports have a count of 0.
    """
    parts = [sample.supports for sample in samples]
    if all(part is None for part in parts):
        return None
    return TokenSupports.joined(
        [
            TokenSupports(np.zeros(sample.num_trained, np.int32), np.empty(0, TOKEN_ID))
            if sample.supports is None
            else sample.supports
            for sample in samples
        ]
    )


def chosen_supports(supports: TokenSupports, tokens: np.ndarray) -> TokenSupports:
    """Return the supports of `tokens`, indices [n], in that order."""
    starts = np.cumsum(supports.counts, dtype=np.int64) - supports.counts
    counts = supports.counts[tokens]
    # the k-th id of a token is k places after its first one, before as after
    shifts = starts[tokens] - (np.cumsum(counts, dtype=np.int64) - counts)
    return TokenSupports(
        counts, supports.token_ids[np.repeat(shifts, counts) + np.arange(counts.sum(dtype=np.int64))]
    )
