"""Connects all trainer ranks with all engines and syncs the weights.

Every method is a collective: it returns on all ranks, or raises the same error on all of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from megatron_vespo.weight_sync.agreement import together
from megatron_vespo.weight_sync.broadcast import Broadcast
from megatron_vespo.weight_sync.disk import Disk
from megatron_vespo.weight_sync.engine_admin import EngineAdmin, PauseMode
from megatron_vespo.weight_sync.exact import Exact, NotExactError
from megatron_vespo.weight_sync.verify import Sums, forget_weights


@dataclass(frozen=True)
class Weights:
    """How the policy's weights are read.

    `buckets`: full HF tensors of the rank's stage, a collective of the stage's ranks. `held`: the rank's own
    parameters by their first HF tensor.
    """

    buckets: Callable[[], Iterable[dict[str, Tensor]]]
    held: Callable[[], Mapping[str, Tensor]]


class WeightLink:
    """One rank's end. Rank 0 of the trainer makes the calls that go to all engines.

    Weights take the way of `exact`: shard to shard, where its plan holds for the engines, or through files.
    Else they are broadcast, and `why_broadcast` says why.
    """

    def __init__(
        self,
        *,
        rank: int,
        broadcast: Broadcast,
        exact: Exact | Disk | str,
        timeout_s: float,
        pause: PauseMode | None,
        api_key: str | None = None,
    ):
        """`exact` may be the reason why there is none."""
        self._rank, self._broadcast = rank, broadcast
        self._exact = None if isinstance(exact, str) else exact
        self.why_broadcast = exact if isinstance(exact, str) else None
        self._timeout_s, self._api_key = timeout_s, api_key
        self._pause: PauseMode | None = pause
        self._admin: EngineAdmin | None = None
        self.loaded: dict[str, Sums] = {}  # on rank 0: what engines without a policy had loaded, by url

    @property
    def admin(self) -> EngineAdmin:
        """Of the engines that are connected."""
        assert self._admin is not None, "connect comes first"
        return self._admin

    def connect(self, urls: list[str], fresh: list[str], number: int) -> None:
        """Connect with the engines at `urls` anew.

        `number` is one more than at the last call, which may have been an earlier trainer's. The weights of
        the engines in `fresh` are made random: the first sync has to bring all of them.
        """
        self.close()
        self._admin = EngineAdmin(urls, self._timeout_s, self._pause, self._api_key)
        together(self._rank == 0, self._leave, number - 1)
        self._connect_exactly(number)
        if self.why_broadcast is not None:
            self._broadcast.connect(self._admin, number)
        together(self._rank == 0, self._forget, fresh)

    def sync(self, weights: Weights, policy_version: int) -> float:
        """Make every engine serve the current weights as `policy_version`.

        Returns the seconds in which engines generated nothing.
        """
        exact = self._exact if self.why_broadcast is None else None
        held = weights.held() if exact is not None else {}
        if exact is not None:
            exact.stage(held)
        began = time.monotonic()
        in_session = exact is None or exact.in_session
        together(self._rank == 0, self.admin.begin, in_session)
        if exact is not None:
            exact.send(held, policy_version)
        else:
            self._broadcast.send(weights.buckets(), policy_version)
        together(self._rank == 0, self.admin.finish, policy_version, in_session)
        return time.monotonic() - began

    @property
    def way(self) -> str:
        """How weights go to the engines that are connected, for people."""
        if self._exact is not None and self.why_broadcast is None:
            return self._exact.way
        return f"weights are broadcast to the engines: {self.why_broadcast}"

    @property
    def written_bytes(self) -> int | None:
        """What the last sync has written into files; None where weights take another way."""
        return self._exact.written_bytes if isinstance(self._exact, Disk) else None

    def close(self) -> None:
        """Leave the engines as they are."""
        self._broadcast.close()
        if self._exact is not None:
            self._exact.close()
        if self._admin is not None:
            self._admin.close()

    def _connect_exactly(self, number: int) -> None:
        if self._exact is None:
            return
        self.why_broadcast = None
        together(self._rank == 0, self.admin.call, "/begin_weight_update", {})
        try:
            self._exact.connect(self.admin, number)
        except NotExactError as error:
            self.why_broadcast = str(error)
            self._exact.close()
        together(self._rank == 0, self.admin.call, "/end_weight_update", {})

    def _leave(self, number: int) -> None:
        """Leave the old groups, and close an update that failed. Engines that hang in one do not answer.

        Requests are paused from here to the end of the next sync: SGLang allows none of this while they run.
        """
        self.admin.stop_generation()
        self.admin.settle("/end_weight_update", {})
        self._broadcast.leave(self.admin, number)

    def _forget(self, fresh: list[str]) -> None:
        if fresh:
            sums = forget_weights(self.admin.of(fresh))
            for url, loaded in zip(fresh, sums, strict=True):
                self.loaded.setdefault(url, loaded)  # the second time these are what a failed sync has left
