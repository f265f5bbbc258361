"""Weights as full HF tensors: every pipeline stage has a rank that sends them to all engines."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from megatron_vespo.weight_sync.agreement import agree, together
from megatron_vespo.weight_sync.bucket_sender import BucketSender, SyncBackend
from megatron_vespo.weight_sync.engine_admin import EngineAdmin, WeightSyncError


class Broadcast:
    """One trainer rank's part. `stage` is its pipeline stage of `num_stages`."""

    def __init__(
        self, stage: int, num_stages: int, is_sender: bool, engine_size: int, host: str, backend: SyncBackend
    ):
        self._stage, self._num_stages, self._is_sender = stage, num_stages, is_sender
        self._engine_size, self._host = engine_size, host
        self._backend: SyncBackend = backend
        self._sender: BucketSender | None = None

    def connect(self, admin: EngineAdmin, number: int) -> None:
        """Rebuild all groups, stage after stage to avoid a deadlock; a collective."""
        for stage in range(self._num_stages):
            mine = self._is_sender and stage == self._stage
            together(mine, self._join, admin, group_name(number, stage))

    def send(self, buckets: Iterable[dict[str, Tensor]], policy_version: int) -> None:
        """The weights of all stages. Iterating over `buckets` is a collective of the stage's ranks."""
        last_stage = self._num_stages - 1
        for stage in range(self._num_stages):
            error = None
            if stage == self._stage:
                error = self._send_all(buckets, policy_version if stage == last_stage else None)
            agree(error)

    def leave(self, admin: EngineAdmin, number: int) -> None:
        """Have the engines leave the groups of an earlier connection; on one rank."""
        for stage in range(self._num_stages):
            admin.settle("/destroy_weights_update_group", {"group_name": group_name(number, stage)})

    def close(self) -> None:
        if self._sender is not None:
            self._sender.close()
            self._sender = None

    def _join(self, admin: EngineAdmin, name: str) -> None:
        self._sender = BucketSender(admin, self._engine_size, name, self._host, self._backend)

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
