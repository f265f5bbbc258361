"""The buffer of asynchronous rollouts against engines that are slow, fail and change their weights."""

import heapq
import random
from collections import Counter
from itertools import count

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vespo.rollout.buffer import RolloutBuffer
from megatron_vespo.types import Completion, Prompt
from tests.support.builders import make_completion, make_prompt


def completion(prompt: Prompt, versions: list[int]) -> Completion:
    return make_completion(prompt, len(versions), versions)


def make_buffer(**changes) -> RolloutBuffer:
    numbers = count()
    options = {
        "batch_size": 4,
        "steps_per_rollout": 2,
        "max_staleness": 3,
        "requeue": True,
        "max_attempts": 3,
    }
    return RolloutBuffer(lambda: make_prompt(next(numbers), [1]), **(options | changes))


def finish(buffer: RolloutBuffer, number: int) -> None:
    for _ in range(number):
        in_flight = buffer.dispatch()
        buffer.finish(in_flight, [completion(in_flight.prompt, [in_flight.version])])


def test_room_is_what_the_steps_up_to_the_bound_can_train():
    buffer = make_buffer()
    assert buffer.room() == 8  # steps 0..3, two groups each
    finish(buffer, 4)
    assert buffer.room() == 4
    assert len(buffer.take()) == 4
    assert buffer.room() == 4  # steps 2 and 3, while 0 and 1 are trained
    finish(buffer, 4)
    assert buffer.room() == 0
    buffer.weights_synced(2)
    assert buffer.room() == 4  # steps 2..5, less the four that wait


def test_older_groups_come_first_and_too_old_ones_not_at_all():
    """Version 0 may be trained up to step 3: at step 2, 2, 3, 3 of the batch that starts at 2."""
    buffer = make_buffer(requeue=False)
    dispatched = [buffer.dispatch() for _ in range(8)]
    for in_flight in dispatched[:4]:
        buffer.finish(in_flight, [completion(in_flight.prompt, [0])])
    assert [group[0].prompt.prompt_id for group in buffer.take()] == [0, 1, 2, 3]
    buffer.weights_synced(2)
    for in_flight in dispatched[4:6]:
        buffer.finish(in_flight, [completion(in_flight.prompt, [1, 2])])
    for in_flight in dispatched[6:]:
        buffer.finish(in_flight, [completion(in_flight.prompt, [0, 1, 2]), completion(in_flight.prompt, [2])])
    assert [group[0].prompt.prompt_id for group in buffer.take()] == [6, 7, 4, 5]
    assert buffer.counts.stale_dropped == 0
    assert buffer.take() is None


@pytest.mark.parametrize("requeue", [True, False])
def test_a_finished_group_that_is_too_old_is_dropped_or_generated_again(requeue):
    buffer = make_buffer(requeue=requeue, max_staleness=2)
    late = [buffer.dispatch() for _ in range(2)]
    finish(buffer, 4)
    assert len(buffer.take()) == 4
    buffer.weights_synced(2)
    finish(buffer, 4)
    assert len(buffer.take()) == 4  # next step: 4, version 0 is out of reach
    for in_flight in late:
        buffer.finish(in_flight, [completion(in_flight.prompt, [0])])
    assert buffer.take() is None
    assert (buffer.counts.stale_dropped, buffer.counts.stale_requeued) == ((0, 2) if requeue else (2, 0))
    again = buffer.dispatch().prompt.prompt_id
    assert again == (late[0].prompt.prompt_id if requeue else 10)


def test_what_cannot_finish_in_time_is_generated_again_until_the_cap():
    buffer = make_buffer(max_staleness=1, max_attempts=2)
    slow = buffer.dispatch()
    buffer.next_step, buffer.policy_version = 2, 2
    assert buffer.expire() == [slow]
    second = buffer.dispatch()
    assert (second.prompt, second.attempts) == (slow.prompt, 2)
    buffer.next_step, buffer.policy_version = 4, 4
    assert buffer.expire() == [second]
    assert buffer.counts.given_up == 1 and slow.serial not in [p.serial for p in buffer.pending()]


class Simulation:
    """Engines with random latencies and failures, a trainer that takes batches, weight syncs in between."""

    def __init__(
        self, seed, *, steps_per_rollout, per_step, max_staleness, sync_interval, requeue=True, failures, tail
    ):
        self.random = random.Random(seed)
        self.steps_per_rollout, self.per_step, self.max_staleness = steps_per_rollout, per_step, max_staleness
        self.sync_interval, self.failures, self.tail = sync_interval, failures, tail
        self.buffer = make_buffer(
            batch_size=steps_per_rollout * per_step, steps_per_rollout=steps_per_rollout,
            max_staleness=max_staleness, requeue=requeue,
        )  # fmt: skip
        self.now, self.served_at = 0.0, [(0.0, 0)]
        self.running = []  # (end, number, group)
        self.trained = Counter()
        self.requests = 0

    def fill(self) -> None:
        late = {in_flight.number for in_flight in self.buffer.expire()}
        self.running = [entry for entry in self.running if entry[1] not in late]
        heapq.heapify(self.running)
        while self.buffer.room():
            in_flight = self.buffer.dispatch()
            seconds = self.random.expovariate(1.0) * (self.tail if self.random.random() < 0.05 else 1.0)
            heapq.heappush(self.running, (self.now + seconds, in_flight.number, (in_flight, self.now)))
            self.requests += 1

    def one_ends(self) -> None:
        self.now, _, (in_flight, started) = heapq.heappop(self.running)
        if self.random.random() < self.failures:
            self.buffer.fail(in_flight)
            return
        # in place: the tokens before a sync keep their version
        first = max(version for when, version in self.served_at if when <= started)
        later = [version for when, version in self.served_at if started < when <= self.now]
        self.buffer.finish(in_flight, [completion(in_flight.prompt, [first, *later])])

    def run(self, num_batches: int) -> None:
        step = 0
        for _ in range(num_batches):
            self.fill()
            attempts = 0
            while (batch := self.buffer.take()) is None:
                self.fill()  # take may have dropped some
                assert self.running, "nothing is in flight and the batch is not full"
                self.one_ends()
                self.fill()
                attempts += 1
                assert attempts < 20_000, "does not end"
            assert len(batch) == self.steps_per_rollout * self.per_step
            for index in range(self.steps_per_rollout):
                for group in batch[index * self.per_step : (index + 1) * self.per_step]:
                    versions = np.concatenate([c.policy_versions.array() for c in group])
                    assert 0 <= step - versions.min() <= self.max_staleness
                    self.trained[group[0].prompt.prompt_id] += 1
                self.train(step := step + 1)

    def train(self, step: int) -> None:
        until = self.now + self.random.expovariate(1.0)
        self.fill()
        while self.running and self.running[0][0] <= until:
            self.one_ends()
            self.fill()
        self.now = until
        if step % self.sync_interval == 0:
            self.served_at.append((self.now, step))
            self.buffer.weights_synced(step)

    def check_that_nothing_is_lost(self) -> None:
        counts, pending = self.buffer.counts, Counter(p.serial for p in self.buffer.pending())
        assert max(self.trained.values()) == 1 and max(pending.values(), default=1) == 1
        assert not self.trained.keys() & pending.keys()
        assert sum(self.trained.values()) == counts.trained
        assert counts.taken == counts.trained + counts.stale_dropped + counts.given_up + pending.total()
        assert counts.dispatched == self.requests
        assert len({entry[1] for entry in self.running}) == len(self.running) == self.buffer.num_in_flight


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_nothing_is_lost_or_twice_or_too_old_and_it_ends(data):
    steps_per_rollout = data.draw(st.sampled_from([1, 2, 4]))
    interval = steps_per_rollout * data.draw(st.sampled_from([1, 2]))
    if data.draw(st.booleans()):
        interval = data.draw(st.sampled_from([k for k in (1, 2, 4) if steps_per_rollout % k == 0]))
    simulation = Simulation(
        data.draw(st.integers(0, 2**32)),
        steps_per_rollout=steps_per_rollout,
        per_step=data.draw(st.integers(1, 4)),
        max_staleness=max(steps_per_rollout, interval) - 1 + data.draw(st.integers(0, 9)),
        sync_interval=interval,
        requeue=data.draw(st.booleans()),
        failures=data.draw(st.sampled_from([0.0, 0.1, 0.4])),
        tail=data.draw(st.sampled_from([1.0, 30.0])),
    )
    simulation.run(data.draw(st.integers(1, 30)))
    simulation.check_that_nothing_is_lost()


def test_thousands_of_requests():
    sizes = {"steps_per_rollout": 4, "per_step": 8, "max_staleness": 8, "sync_interval": 4}
    simulation = Simulation(1, **sizes, failures=0.05, tail=40.0)
    simulation.run(150)
    simulation.check_that_nothing_is_lost()
    counts = simulation.buffer.counts
    assert counts.dispatched > 5000 and counts.failed > 200 and counts.expired > 50
    # admission: what finishes in the order it started is never too old
    assert counts.stale_dropped == 0


def test_without_tail_and_failures_nothing_is_generated_in_vain():
    sizes = {"steps_per_rollout": 2, "per_step": 4, "max_staleness": 3, "sync_interval": 2}
    simulation = Simulation(2, **sizes, failures=0.0, tail=1.0)
    simulation.random.expovariate = lambda rate: 1.0
    simulation.run(50)
    counts = simulation.buffer.counts
    assert counts.expired == counts.stale_requeued == 0
    assert (
        counts.dispatched == counts.trained + simulation.buffer.num_in_flight + simulation.buffer.num_finished
    )


def test_what_is_pending_goes_on_after_a_resume():
    """Two finished groups, one of them scored, one in flight that has come some way, one that waits."""
    buffer = make_buffer()
    finish(buffer, 4)
    scored, unscored, flying, failed = (buffer.dispatch() for _ in range(4))
    for in_flight in (scored, unscored):
        buffer.finish(in_flight, [completion(in_flight.prompt, [0, 0])])
    group = buffer._finished[-2][2]
    group[0].reward = 1.0
    begun = completion(flying.prompt, [0])
    begun.finish_reason = "abort"
    flying.partials.extend([None, begun])
    buffer.fail(failed)
    assert len(buffer.take()) == 4
    state = buffer.pending()
    assert [(p.serial, p.attempts) for p in state] == [(4, 0), (5, 0), (6, 0), (7, 1)]
    resumed = make_buffer(policy_version=2, serial=8)
    resumed.restore(state)
    assert resumed.num_finished == 1 and resumed.counts.taken == 4
    in_flight = [resumed.dispatch() for _ in range(3)]
    assert [(t.serial, t.attempts, t.version) for t in in_flight] == [(5, 1, 0), (6, 1, 0), (7, 2, 2)]
    assert in_flight[1].partials == [None, begun]
    assert resumed.dispatch().serial == 8
    assert {p.serial for p in resumed.pending()} == {4, 5, 6, 7, 8}


def test_a_failed_group_keeps_what_it_has_and_one_that_is_too_old_does_not():
    buffer = make_buffer(max_staleness=2)
    in_flight = buffer.dispatch()
    done = completion(in_flight.prompt, [0])
    in_flight.partials.extend([done, None])
    buffer.weights_synced(1)
    assert buffer.fail(in_flight)
    again = buffer.dispatch()
    assert (again.partials, again.version) == ([done, None], 0)  # its bound is the partial's
    buffer.next_step, buffer.policy_version = 3, 3
    assert buffer.expire() == [again]
    anew = buffer.dispatch()
    assert (anew.partials, anew.version, anew.serial) == ([], 3, in_flight.serial)


def test_groups_that_teach_nothing_are_left_out_up_to_the_cap():
    buffer = make_buffer(has_reward_variance=lambda group: group[0].prompt.prompt_id % 2 == 0, max_left_out=3)
    for _ in range(2):
        finish(buffer, 7)
        # of serials 0..6 and 7..13: three odd ones are left out, then everything fills the batch
        assert len(buffer.take()) == 4
    assert buffer.counts.left_out == 6 and buffer.num_finished == 0
    assert buffer.counts.taken == 14 == buffer.counts.trained + buffer.counts.left_out


def test_over_subscription_bounds_what_is_held():
    buffer = make_buffer(max_held=6)
    assert buffer.room() == 6
    finish(buffer, 5)
    assert buffer.room() == 1
    assert len(buffer.take()) == 4
    assert buffer.room() == 3  # version 0 reaches steps 2 and 3, four places, and one is finished
