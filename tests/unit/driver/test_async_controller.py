"""Batches of the background through the controller's loop; what generates and trains is a stand-in."""

from contextlib import contextmanager

import pytest

from megatron_vespo.observability.metrics import batch_records, read_metrics
from megatron_vespo.observability.progress import RunDisplay
from megatron_vespo.rollout.background_batches import BackgroundBatches
from megatron_vespo.rollout.buffer import RolloutBuffer
from megatron_vespo.rollout.buffer_state import unpack_pending
from tests.support.builders import make_completion
from tests.support.controllers import COMPLETIONS, MINI_BATCHES, PROMPTS, Cursor, controller


class Background:
    """Finishes what it attempts at once, as far ahead as the bound allows."""

    def __init__(self, max_staleness: int):
        self.log: list[str] = []
        self.buffer = RolloutBuffer(
            lambda: PROMPTS[0], batch_size=len(PROMPTS), steps_per_rollout=MINI_BATCHES,
            max_staleness=max_staleness, requeue=True, max_attempts=1,
        )  # fmt: skip

    def start(self) -> None:
        self.log.append("start")

    def take(self, timeout_s: float):
        batch = self.buffer.take()
        while self.buffer.room():
            in_flight = self.buffer.dispatch()
            group = [
                make_completion(in_flight.prompt, 3, in_flight.version, reward=float(i))
                for i in range(COMPLETIONS)
            ]
            self.buffer.finish(in_flight, group)
        return batch or self.buffer.take()

    def weights_synced(self, version: int) -> None:
        self.log.append(f"serve {version}")
        self.buffer.weights_synced(version)

    def suspend(self, timeout_s: float) -> None:
        self.log.append("suspend")

    def resume(self) -> None:
        self.log.append("resume")

    def messages(self) -> list[str]:
        return []

    @contextmanager
    def held(self):
        yield self.buffer

    def stop(self, timeout_s: float) -> None:
        self.log.append("stop")


def asynchronous(tmp_path, max_staleness: int, interval: int | None = None, stop: bool = False):
    """A controller, and what generates for it."""
    background = Background(max_staleness)
    source = BackgroundBatches(
        background, Cursor(), steps_per_rollout=MINI_BATCHES, max_staleness=max_staleness,
        stop_while_training=stop, advantage_estimator="group-mean", display=RunDisplay("test", 1),
        batch_timeout_s=1.0, suspend_timeout_s=1.0, stop_timeout_s=1.0,
    )  # fmt: skip
    return controller(tmp_path, "warn", 3, set(), source=source, sync_interval=interval), background


@pytest.mark.parametrize(
    ("interval", "max_staleness", "served"),
    [(None, 3, [0, 2, 4, 6]), (1, 3, [0, 1, 2, 3, 4, 5, 6]), (4, 5, [0, 4, 6])],
)
def test_weights_are_synced_at_the_interval_and_at_the_end(tmp_path, interval, max_staleness, served):
    run, background = asynchronous(tmp_path, max_staleness, interval)
    recorded = []
    run.record = lambda batch: recorded.append((len(batch.groups), batch.metrics["reward/mean"]))
    assert run.train().iteration == 6
    first, *others = (f"serve {version}" for version in served)
    assert [entry for entry in background.log if entry[:5] in ("serve", "start", "stop")] == [
        first, "start", *others, "stop",
    ]  # fmt: skip
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
    [saved] = run.trainer.saved_buffers
    pending = unpack_pending(saved, {0: PROMPTS[0]})
    assert len(pending) == background.buffer.num_finished > 0
    assert all(p.is_finished for p in pending)


@pytest.mark.parametrize("stop", [False, True])
def test_generation_stops_for_a_save_and_where_it_is_to_stop_while_there_is_training(tmp_path, stop):
    run, background = asynchronous(tmp_path, 3, stop=stop)
    run.train()
    log = [entry for entry in background.log if not entry.startswith("serve")]
    batch = ["resume", "suspend"] if stop else ["resume"]
    save = ["suspend"] if stop else ["suspend", "resume"]
    assert log == ["start", *batch * 3, *save, "stop"]


def test_engines_that_wait_for_weights_get_those_of_now(tmp_path):
    run, background = asynchronous(tmp_path, 3)
    run.state.iteration = 2
    asked = []

    def is_wanted(while_others_serve: bool) -> bool:
        asked.append(while_others_serve)
        return while_others_serve

    run.engine_sync.is_wanted = is_wanted
    run.on_wait(while_others_serve=False)
    assert background.log == [] and run.policy_version == 0
    run.on_wait(while_others_serve=True)
    assert background.log == ["serve 2"] and run.policy_version == 2
    assert asked == [False, True]
