"""The controller's asynchronous path; what generates and trains is a stand-in."""

from contextlib import contextmanager

import numpy as np
import pytest
from test_on_alarm import COMPLETIONS, MINI_BATCHES, PROMPTS, controller

from megatron_vespo.observability.metrics import batch_records, read_metrics
from megatron_vespo.rollout.buffer import RolloutBuffer
from megatron_vespo.types import Completion


class Stream:
    """Finishes what it dispatches at once, as far ahead as the bound allows."""

    def __init__(self, max_staleness: int):
        self.log: list[str] = []
        self.buffer = RolloutBuffer(
            lambda: PROMPTS[0], batch_size=len(PROMPTS), mini_batches=MINI_BATCHES,
            max_staleness=max_staleness, requeue=True, max_dispatches=1,
        )  # fmt: skip

    def start(self) -> None:
        self.log.append("start")

    def take(self, timeout_s: float):
        batch = self.buffer.take()
        while self.buffer.room():
            ticket = self.buffer.dispatch()
            versions = np.full(3, ticket.version)
            zeros = np.zeros(3, np.float32)
            group = [
                Completion(ticket.prompt, [5, 6, 7], zeros, versions, None, "stop", 1.0)
                for _ in range(COMPLETIONS)
            ]
            self.buffer.finish(ticket, group)
        return batch or self.buffer.take()

    def serve(self, version: int) -> None:
        self.log.append(f"serve {version}")
        self.buffer.serve(version)

    def messages(self) -> list[str]:
        return []

    @contextmanager
    def held(self):
        yield self.buffer

    def stop(self, timeout_s: float) -> None:
        self.log.append("stop")


@pytest.mark.parametrize(
    ("interval", "max_staleness", "served"),
    [(None, 3, [0, 2, 4, 6]), (1, 3, [0, 1, 2, 3, 4, 5, 6]), (4, 5, [0, 4, 6])],
)
def test_weights_are_synced_at_the_interval_and_at_the_end(tmp_path, interval, max_staleness, served):
    flags = {"sync_interval": interval, "max_staleness": max_staleness}
    run = controller(tmp_path, "warn", 3, set(), train_timeout=1.0, generate_timeout=1.0, **flags)
    run.stream = stream = Stream(max_staleness)
    recorded = []
    run.record = lambda groups, metrics, consumed: recorded.append((len(groups), metrics["reward/mean"]))
    assert run.train().iteration == 6
    first, *others = (f"serve {version}" for version in served)
    assert stream.log == [first, "start", *others, "stop"]
    records = batch_records(read_metrics(tmp_path / "metrics.jsonl"))
    assert max(record["staleness/total_max"] for record in records) == max_staleness
    # all syncs but the first, before any batch, are in the batch that they follow
    ends = [record["step"] for record in records]
    assert [record.get("sync/weight_check_seconds", 0.0) for record in records] == [
        sum(end - MINI_BATCHES < version <= end for version in served[1:]) for end in ends
    ]
    assert [record["policy/version"] for record in records] == [
        max(version for version in served if version <= end) for end in ends
    ]
    assert recorded == [(len(PROMPTS), record["reward/mean"]) for record in records]
    [saved] = run.trainer.saved
    assert saved["pending_prompts"] == [0] * stream.buffer.num_finished


def test_engines_that_wait_for_weights_get_those_of_now(tmp_path):
    run = controller(tmp_path, "warn", 3, set())
    run.stream, run.state.iteration = Stream(3), 2
    asked = []

    def is_wanted(while_others_serve: bool) -> bool:
        asked.append(while_others_serve)
        return while_others_serve

    run.engine_sync.is_wanted = is_wanted
    run.heal(while_others_serve=False)
    assert run.stream.log == [] and run.served == 0
    run.heal(while_others_serve=True)
    assert run.stream.log == ["serve 2"] and run.served == 2
    assert asked == [False, True]
