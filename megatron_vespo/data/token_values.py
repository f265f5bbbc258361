"""What an optimizer step has measured of every sampled token, as the trainer's ranks hold it.

Each rank hands back the values of its own tokens, with their places among all sampled tokens of the
mini-batch. They are put together where they are written: no rank holds them all, and no rank waits for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# what an optimizer step hands back beside the fields of StepResult, if recorded: list[TokenValues]
TOKENS = "tokens"
_MOST = np.iinfo(np.uint8).max


@dataclass(frozen=True)
class TokenValues:
    """One rank's values. Places count the mini-batch's sampled tokens from 0, sample after sample."""

    places: np.ndarray  # int32 [n]
    pi: np.ndarray  # float32 [n], log pi in the training pass
    pi_old: np.ndarray | None  # float32 [n], log pi_old; None if it was not computed
    # of these tokens the rank knows how many imposed experts its routers would not have chosen
    routed_places: np.ndarray | None  # int32 [r]; None if no routes were imposed
    expert_differences: np.ndarray | None  # uint8 [r], summed over all layers


@dataclass(frozen=True)
class JoinedTokens:
    """The values of all sampled tokens, end to end in the order of the samples."""

    pi: np.ndarray  # float32 [sum N]
    pi_old: np.ndarray | None  # float32 [sum N]
    expert_differences: np.ndarray | None  # uint8 [sum N]


def joined(parts: Sequence[TokenValues], num_tokens: int) -> JoinedTokens:
    """Put the ranks' values together. ValueError unless every token is there once."""
    pi = [(part.places, part.pi) for part in parts]
    old = [(part.places, part.pi_old) for part in parts]
    experts = [(part.routed_places, part.expert_differences) for part in parts]
    found = _placed(pi, num_tokens, np.float32)
    assert found is not None, "ranks without values hand nothing back"
    return JoinedTokens(found, _placed(old, num_tokens, np.float32), _placed(experts, num_tokens, np.uint8))


def saturated(counts: np.ndarray) -> np.ndarray:
    """Return counts as uint8; 255 stands for more."""
    return np.minimum(counts, _MOST).astype(np.uint8)


def _placed(
    parts: Sequence[tuple[np.ndarray | None, np.ndarray | None]], num_tokens: int, dtype: type
) -> np.ndarray | None:
    """Return values at their places, [num_tokens]; None if no part has any."""
    known = [(where, those) for where, those in parts if where is not None and those is not None]
    if not known:
        return None
    found, times = np.zeros(num_tokens, dtype), np.zeros(num_tokens, np.uint8)
    for where, those in known:
        found[where] = those
        times[where] += 1
    if not (times == 1).all():
        raise ValueError(
            f"{int((times != 1).sum())} of {num_tokens} sampled tokens have not exactly one value"
        )
    return found
