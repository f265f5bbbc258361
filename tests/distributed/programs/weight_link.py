"""Weight syncs of two stages of two ranks, without engines: what each rank gets when one cannot send."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.distributed as dist
from common import hand_back, join_ranks
from torch import Tensor

from megatron_vespo.weight_sync.broadcast import Broadcast
from megatron_vespo.weight_sync.engine_admin import EnginesLostError, WeightSyncError
from megatron_vespo.weight_sync.weight_link import WeightLink, Weights

NUM_BUCKETS = 4


class Sender:
    """Fails from the second bucket on while it has an error to raise."""

    def __init__(self):
        self.error: WeightSyncError | None = None
        self.sent: list[int | None] = []

    def send(self, bucket: dict[str, Tensor], version: int | None) -> None:
        if self.error is not None and self.sent:
            raise self.error
        self.sent.append(version)


class Admin:
    def __init__(self):
        self.error: WeightSyncError | None = None

    def begin(self, in_session: bool) -> None:
        pass

    def finish(self, version: int, in_session: bool) -> None:
        if self.error is not None:
            raise self.error


def main() -> None:
    rank = join_ranks()
    stages = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    stage, sends = rank // 2, rank % 2 == 0
    broadcast = Broadcast(stage, 2, sends, engine_size=1, host="127.0.0.1", backend="gloo")
    link = WeightLink(rank=rank, broadcast=broadcast, exact="no plan", timeout_s=1.0, pause=None)
    broadcast._sender, link._admin = sender, admin = Sender(), Admin()
    gathered = 0

    def buckets() -> Iterator[dict[str, Tensor]]:
        nonlocal gathered
        for number in range(NUM_BUCKETS):
            dist.all_reduce(torch.ones(1), group=stages[stage])  # as the gathers of a stage's ranks
            gathered += 1
            yield {f"weight {number}": torch.zeros(1)}

    def said(version: int) -> str:
        try:
            link.sync(Weights(buckets, dict), version)
        except WeightSyncError as error:
            return f"{type(error).__name__}: {error}"
        return "served"

    outcomes = [said(1)]
    if rank == 2:
        sender.error = EnginesLostError({"http://b": "engine http://b: gone"})
    sender.sent.clear()
    outcomes.append(said(2))
    sent = [-1 if version is None else version for version in sender.sent]
    sender.error = None
    outcomes.append(said(3))
    if rank == 0:
        admin.error = WeightSyncError("refused")
    outcomes.append(said(4))
    hand_back(outcomes=outcomes, gathered=gathered, sent=np.array(sent, int))


if __name__ == "__main__":
    main()
