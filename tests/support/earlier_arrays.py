"""Arrays of completions as version 0.2 wrote them: one policy version per token, int64 token ids."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np


def as_before(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays of data/completion_arrays.py in that form; others are kept."""
    before = dict(arrays)
    before["completion_tokens"] = before["completion_tokens"].astype(np.int64)
    del before["span_counts"]
    before["policy_versions"] = np.repeat(before.pop("span_versions"), before.pop("span_lengths"))
    return before
