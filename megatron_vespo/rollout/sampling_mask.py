"""Reads which tokens truncated sampling left in each step of a reply: from JSON straight to arrays.

With top-p, the mask of a token has few ids when the policy is sure, and thousands when it is not. The reader
makes no Python object per id. Shapes: C tokens of the reply, S ids of all their supports together.
"""

from __future__ import annotations

import numpy as np

from megatron_vespo.types import TOKEN_ID, TokenSupports

_COMMA, _CLOSE = b",]"
_EMPTY = (b"", b"null", b"[]")
# the beginning of what SGLang says if a support is larger than it returns
OVERFLOW = "Sampling support exceeds --sampling-mask-max-tokens"


def read_supports(mask: bytes) -> TokenSupports:
    """Read the JSON lists [[id, ...], ...], one per token, in any order; ValueError for anything else."""
    mask = bytes(mask)
    if mask in _EMPTY:
        return TokenSupports(np.empty(0, np.int32), np.empty(0, TOKEN_ID))
    if not (mask.startswith(b"[[") and mask.endswith(b"]]")):
        raise ValueError("not a list of lists")
    text = np.frombuffer(mask, np.uint8)
    commas = np.flatnonzero(text == _COMMA)
    ids = np.fromstring(mask.translate(None, b"[]"), np.int64, sep=",")
    if len(ids) != len(commas) + 1:
        raise ValueError("not lists of numbers, or an empty one")
    if not 0 <= ids.min() <= ids.max() <= np.iinfo(TOKEN_ID).max:
        raise ValueError(f"ids from {ids.min()} to {ids.max()} are no tokens")
    # a comma after a bracket lies between two tokens, and every comma between two ids
    starts = np.flatnonzero(text[commas - 1] == _CLOSE) + 1
    counts = np.diff(starts, prepend=0, append=len(ids))
    keys = np.repeat(np.arange(len(counts)), counts) << 32 | ids
    keys.sort()
    if len(repeated := np.flatnonzero(np.diff(keys) == 0)):
        raise ValueError(f"token {keys[repeated[0]] >> 32} has an id twice")
    return TokenSupports(counts.astype(np.int32), (keys & 0xFFFFFFFF).astype(TOKEN_ID))
