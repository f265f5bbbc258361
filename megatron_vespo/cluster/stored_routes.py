"""Routes in Ray's object store, on the node of the engine that made them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import ray
import ray.exceptions

FETCH_TIMEOUT_S = 300.0


class RoutesLostError(RuntimeError):
    """Routes cannot be fetched: the node that had them is gone, or does not answer."""


@dataclass(frozen=True)
class StoredRoutes:
    """One response's routes, or a part of them; see `types.Routes`. The owner of `ref` is the driver."""

    ref: ray.ObjectRef

    def fetch(self) -> np.ndarray:
        """Returns uint8 [tokens, layers, K], read-only. RoutesLostError if that is not possible."""
        try:
            return ray.get(self.ref, timeout=FETCH_TIMEOUT_S)
        except ray.exceptions.GetTimeoutError as error:
            raise RoutesLostError(f"routes of a response: not here within {FETCH_TIMEOUT_S:g} s") from error
        except ray.exceptions.RayError as error:
            reason = str(error).strip().splitlines()[0]
            raise RoutesLostError(f"routes of a response are lost with their node: {reason}") from error
