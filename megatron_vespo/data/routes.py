"""Routes: which experts ran for each token. Joins those of a response made in pieces, and checks them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_vespo.types import Routes, fetched


@dataclass(frozen=True)
class JoinedRoutes:
    """Routes of which a part lies in another process: they are brought together where they are needed."""

    parts: tuple[np.ndarray | Routes, ...]

    def fetch(self) -> np.ndarray:
        return np.concatenate([fetched(part) for part in self.parts])


def joined_routes(begun: np.ndarray | Routes, rest: np.ndarray | Routes) -> np.ndarray | Routes:
    """The routes of a response's beginning, then those of its rest."""
    joined = JoinedRoutes((*(begun.parts if isinstance(begun, JoinedRoutes) else (begun,)), rest))
    local = all(isinstance(part, np.ndarray) for part in joined.parts)
    return joined.fetch() if local else joined


def repeats_expert(routes: np.ndarray) -> bool:
    """Whether a token has the same expert twice in a layer; `routes` is uint8 [tokens, layers, K].

    Compares columns with each other, because sorting many short rows takes 15 times as long.
    """
    columns = np.ascontiguousarray(routes.reshape(-1, routes.shape[-1]).T)
    return any((columns[shift:] == columns[:-shift]).any() for shift in range(1, len(columns)))
