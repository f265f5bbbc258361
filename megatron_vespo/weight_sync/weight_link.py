"""Connects all trainer ranks with all engines and syncs the weights.

Every method is a collective: it returns on all ranks, or raises the same error on all of them. Ranks exchange
their errors before any of them continues, so that none waits for a rank that has failed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch.distributed as dist
from torch import Tensor

from megatron_vespo.weight_sync.bucket_sender import BucketSender, SyncBackend
from megatron_vespo.weight_sync.engine_admin import EngineAdmin, EnginesLostError, PauseMode, WeightSyncError
from megatron_vespo.weight_sync.verify import Sums, forget_weights


class WeightLink:
    """One rank's end. `stage` is its pipeline stage of `num_stages`; each stage has one rank that sends.

    Rank 0 of the trainer sends for the first stage and makes the calls that are not broadcasts.
    """

    def __init__(
        self,
        *,
        rank: int,
        stage: int,
        num_stages: int,
        is_sender: bool,
        engine_size: int,
        host: str,
        backend: SyncBackend,
        timeout_s: float,
        pause: PauseMode | None,
        api_key: str | None = None,
    ):
        self._rank, self._stage, self._num_stages, self._is_sender = rank, stage, num_stages, is_sender
        self._engine_size, self._host, self._timeout_s, self._api_key = engine_size, host, timeout_s, api_key
        self._backend: SyncBackend = backend
        self._pause: PauseMode | None = pause
        self._sender: BucketSender | None = None
        self._admin: EngineAdmin | None = None
        self.loaded: dict[str, Sums] = {}  # on rank 0: what engines without a policy had loaded, by url

    @property
    def admin(self) -> EngineAdmin:
        """Of the engines that are connected; on ranks that send."""
        assert self._admin is not None, "connect comes first, and on other ranks there is none"
        return self._admin

    def connect(self, urls: list[str], fresh: list[str], number: int) -> None:
        """Rebuild all broadcast groups with the engines at `urls`, stage after stage to avoid a deadlock.

        `number` is one more than at the last call, which may have been an earlier trainer's. The weights of
        the engines in `fresh` are made random: the first sync has to bring all of them.
        """
        if self._sender is not None:
            self._sender.close()
            self._sender = None
        if self._is_sender:
            if self._admin is not None:
                self._admin.close()
            self._admin = EngineAdmin(urls, self._timeout_s, self._pause, self._api_key)
        self.together(self._rank == 0, self._leave_old_groups, number - 1)
        for stage in range(self._num_stages):
            mine = self._is_sender and stage == self._stage
            self.together(mine, self._join, group_name(number, stage))
        self.together(self._rank == 0, self._forget, fresh)

    def sync(self, buckets: Iterable[dict[str, Tensor]], policy_version: int) -> None:
        """Make every engine serve the weights of all stages' `buckets` as `policy_version`.

        Iterating over `buckets` is a collective of the stage's ranks: all of them do it to the end.
        """
        self.together(self._rank == 0, self._begin)
        last_stage = self._num_stages - 1
        for stage in range(self._num_stages):
            error = None
            if stage == self._stage:
                error = self._send_all(buckets, policy_version if stage == last_stage else None)
            self._agree(error)
        self.together(self._rank == 0, self._finish, policy_version)

    def together(self, mine: bool, action: Callable[..., Any], *arguments: Any) -> Any:
        """Run `action` on the ranks where `mine` is true; all ranks raise if it fails on one of them."""
        result = error = None
        if mine:
            try:
                result = action(*arguments)
            except WeightSyncError as failure:
                error = failure
        self._agree(error)
        return result

    def _agree(self, error: WeightSyncError | None) -> None:
        errors: list[WeightSyncError | None] = [None] * dist.get_world_size()
        dist.all_gather_object(errors, error)
        failures = [failure for failure in errors if failure is not None]
        if failures:
            lost: dict[str, str] = {}
            for failure in failures:
                lost |= failure.lost if isinstance(failure, EnginesLostError) else {}
            raise EnginesLostError(lost) if lost else failures[0]

    def _leave_old_groups(self, number: int) -> None:
        """Leave the old groups, and close an update that failed. Engines that hang in one do not answer.

        Requests are paused from here to the end of the next sync: SGLang allows none of this while they run.
        """
        self.admin.stop_generation()
        self.admin.settle("/end_weight_update", {})
        for stage in range(self._num_stages):
            self.admin.settle("/destroy_weights_update_group", {"group_name": group_name(number, stage)})

    def _join(self, name: str) -> None:
        self._sender = BucketSender(self.admin, self._engine_size, name, self._host, self._backend)

    def _forget(self, fresh: list[str]) -> None:
        if fresh:
            sums = forget_weights(self.admin.of(fresh))
            for url, loaded in zip(fresh, sums, strict=True):
                self.loaded.setdefault(url, loaded)  # the second time these are what a failed sync has left

    def _begin(self) -> None:
        self.admin.begin()

    def _finish(self, policy_version: int) -> None:
        self.admin.finish(policy_version)

    def _send_all(
        self, buckets: Iterable[dict[str, Tensor]], policy_version: int | None
    ) -> WeightSyncError | None:
        """The last bucket carries the version: each is sent when the next one is known."""
        held: dict[str, Tensor] | None = None
        error: WeightSyncError | None = None
        for bucket in buckets:
            if held is not None:
                error = error or self._send(held, None)
            held = bucket
        return error or self._send(held, policy_version)

    def _send(self, bucket: dict[str, Tensor] | None, policy_version: int | None) -> WeightSyncError | None:
        if self._is_sender:
            assert self._sender is not None and bucket is not None
            try:
                self._sender.send(bucket, policy_version)
            except WeightSyncError as error:
                return error
        return None


def group_name(number: int, stage: int) -> str:
    return f"megatron_vespo_{number}_stage_{stage}"
