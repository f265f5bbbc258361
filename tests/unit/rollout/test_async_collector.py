"""Background generation against a server of our own that is slow, fails and changes its version."""

import asyncio
import threading
import time
from itertools import count

import pytest
from aiohttp import web

from megatron_vespo.rewards.pool import RewardResult
from megatron_vespo.rollout import async_collector
from megatron_vespo.rollout.async_collector import AsyncCollector
from megatron_vespo.rollout.buffer import RolloutBuffer
from megatron_vespo.rollout.collector import Collector
from megatron_vespo.rollout.router import CollectError, LostRequests
from megatron_vespo.rollout.teachers import TeacherEngines, Teachers
from megatron_vespo.types import VersionSpans
from tests.support.builders import SAMPLING, make_prompt
from tests.support.engine_stub import EngineStub, sglang_reply
from tests.support.waiting import until

COMPLETIONS = 2


class Engine(EngineStub):
    """One token a request; the test decides what fails and what hangs until it is aborted."""

    def __init__(self):
        super().__init__()
        self.version, self.failures, self.hanging = 0, 0, set()
        self.cancelled = 0
        self.writing: dict[int, asyncio.Event] = {}  # requests of `hanging` prompts, by their number

    @property
    def asked(self) -> list[int]:
        """First prompt token of each request."""
        return [body["input_ids"][0] for body in self.requests]

    @property
    def begun(self) -> list[int]:
        """How many tokens each request goes on from."""
        return [len(body["input_ids"]) - 1 for body in self.requests]

    async def respond(self, path, body):
        if path == "/abort_request":
            assert body == {"abort_all": True}
            for event in self.writing.values():
                event.set()
            return {}
        if self.failures > 0:
            self.failures -= 1
            raise web.HTTPInternalServerError(text="out of luck")
        if body["input_ids"][0] in self.hanging:
            try:
                event = self.writing[len(self.requests)] = asyncio.Event()
                await asyncio.wait_for(event.wait(), 60)
                return sglang_reply([3, 4], "abort", self.version)
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
        await asyncio.sleep(0.002)
        return sglang_reply([7], "stop", self.version)


@pytest.fixture()
def engine():
    with Engine() as engine:
        yield engine


@pytest.fixture()
def start(engine):
    started = []

    def start(max_staleness=3, check=None, on_requests=None, **changes) -> AsyncCollector:
        numbers = count()
        buffer = RolloutBuffer(
            lambda: make_prompt(next(numbers)),
            batch_size=4, steps_per_rollout=2, max_staleness=max_staleness, requeue=True, max_attempts=2,
        )  # fmt: skip
        collector = Collector(
            [engine.url], request_timeout_s=30.0, check=check,
            on_requests=on_requests,
        )  # fmt: skip
        score = changes.pop("score", lambda group: [])
        run = AsyncCollector(
            collector, buffer, SAMPLING, score, num_completions=COMPLETIONS, seed=1, **changes
        )
        run.start()
        started.append(run)
        return run

    yield start
    for run in started:
        run.stop(10)


def metrics(run: AsyncCollector) -> dict[str, float]:
    with run.held() as buffer:
        return buffer.metrics()


def test_it_generates_ahead_as_far_as_the_bound_allows_and_no_further(engine, start):
    run = start()
    batch = run.take(10)
    assert [group[0].prompt.prompt_id for group in batch] == [0, 1, 2, 3]
    assert {len(group) for group in batch} == {COMPLETIONS}
    until(lambda: metrics(run)["staleness/finished_groups"] == 4)
    assert len(engine.asked) == 8 * COMPLETIONS  # steps 0..3 of two groups each
    time.sleep(0.1)
    assert len(engine.asked) == 8 * COMPLETIONS
    engine.version = 2
    run.weights_synced(2)
    until(lambda: metrics(run)["staleness/finished_groups"] == 8)
    second = run.take(10)
    assert {c.policy_versions.versions[0] for group in second for c in group} == {0}
    assert {c.policy_versions.versions[0] for group in run.take(10) for c in group} == {2}
    with run.held() as buffer:
        assert buffer.pending() == []
    assert metrics(run)["staleness/in_flight_groups"] == 0


def test_the_engines_work_is_told_request_by_request(engine, start):
    spans = []
    before = time.time_ns()
    run = start(on_requests=lambda *span: spans.append(span))
    run.take(10)
    until(lambda: metrics(run)["staleness/finished_groups"] == 4)
    after = time.time_ns()
    assert [(number, count) for number, _, _, count in spans] == [(0, 1)] * (8 * COMPLETIONS)
    times = [before, *(moment for _, start, end, _ in spans for moment in (start, end)), after]
    assert times == sorted(times)  # one after the other: a row of the timeline


def test_a_batch_does_not_wait_for_the_longest(engine, start):
    engine.hanging = {1, 2}
    run = start()
    assert [group[0].prompt.prompt_id for group in run.take(10)] == [0, 3, 4, 5]


def test_a_failed_request_is_repeated_and_said(engine, start):
    engine.failures = 1
    run = start()
    numbers = [group[0].prompt.prompt_id for group in run.take(10) + run.take(10)]
    assert sorted(numbers) == list(range(8))
    [message] = run.messages()
    assert "generated again: engine http" in message and "answered 500" in message
    assert metrics(run)["staleness/failed_groups"] == 1 and run.messages() == []


def test_an_engine_that_always_fails_ends_it(engine, start):
    engine.failures = 10**9
    run = start(max_failures=12)
    with pytest.raises(CollectError, match="^12 groups in a row have failed; the last one: engine http"):
        run.take(20)


def test_what_would_be_too_old_is_cancelled_and_dispatched_again(engine, start):
    engine.hanging = {1}
    run = start(max_staleness=2)
    for version in (2, 4):
        run.take(10)
        run.weights_synced(version)
        engine.version = version
        until(lambda: metrics(run)["staleness/in_flight_groups"] == 1)
    engine.hanging = set()
    until(lambda: engine.asked.count(1) == 2 * COMPLETIONS and engine.cancelled == COMPLETIONS)
    assert metrics(run)["staleness/expired_groups"] == 1


def test_a_dead_engine_and_a_deadline_are_raised(engine, start):
    def dead() -> None:
        raise RuntimeError("engine died")

    engine.hanging = set(range(100))
    with pytest.raises(
        CollectError, match="^no rollout batch within 0.2 s: 0 groups have finished, 8 are in"
    ):
        start().take(0.2)
    with pytest.raises(RuntimeError, match="engine died"):
        start(check=dead).take(10)


def test_a_take_that_waits_lets_others_work(engine, start, monkeypatch):
    """`on_wait` may call what the collector offers."""
    monkeypatch.setattr(async_collector, "ON_WAIT_INTERVAL_S", 0.01)
    engine.hanging = {1}
    seen = []

    def on_wait() -> None:
        seen.append(metrics(run)["staleness/in_flight_groups"])
        run.weights_synced(0)

    run = start(max_staleness=1, on_wait=on_wait)
    with pytest.raises(CollectError, match="no rollout batch within 0.3 s"):
        run.take(0.3)
    assert len(seen) > 3


def test_stop_cancels_what_is_in_flight(engine, start):
    engine.hanging = set(range(100))
    run = start()
    until(lambda: len(engine.asked) == 8 * COMPLETIONS)
    began = time.monotonic()
    run.stop(5)
    assert time.monotonic() - began < 2
    until(lambda: engine.cancelled == 8 * COMPLETIONS)
    run.stop(5)


def test_responses_go_on_from_where_a_suspended_run_has_stopped(engine, start):
    engine.hanging = {2}
    run = start()
    until(lambda: len(engine.asked) == 8 * COMPLETIONS and metrics(run)["staleness/finished_groups"] == 7)
    run.suspend(5)
    with run.held() as buffer:
        [pending] = [p for p in buffer.pending() if p.serial == 2]
    assert [(d.token_ids.tolist(), d.finish_reason) for d in pending.partials] == [
        ([3, 4], "abort")
    ] * COMPLETIONS
    asked = len(engine.asked)
    time.sleep(0.1)
    assert len(engine.asked) == asked  # it rests
    engine.hanging, engine.version = set(), 2
    run.weights_synced(2)
    run.resume()
    groups = run.take(10) + run.take(10)
    assert engine.begun[asked : asked + COMPLETIONS] == [2] * COMPLETIONS
    [group] = [group for group in groups if group[0].prompt.prompt_id == 2]
    for completion in group:
        assert completion.prompt.token_ids.tolist() == [2] and completion.finish_reason == "stop"
        assert completion.token_ids.tolist() == [3, 4, 7]
        assert completion.policy_versions == VersionSpans((0, 2), (2, 1))
        assert completion.log_probs == pytest.approx([-0.3, -0.4, -0.7])


def test_groups_are_scored_in_the_background_and_failures_said_once(engine, start):
    def score(group):
        for completion in group:
            completion.reward = 2.0
        return [RewardResult(0.0, "timeout", "no reward within 1 s")]

    run = start(score=score)
    assert {c.reward for group in run.take(10) for c in group} == {2.0}
    until(lambda: metrics(run)["staleness/finished_groups"] == 4)
    assert run.messages() == ["8 rewards failed, the first one: timeout no reward within 1 s"]


def test_groups_may_be_scored_at_once(engine, start):
    together = threading.Barrier(4, timeout=5.0)

    def score(group):
        together.wait()
        for completion in group:
            completion.reward = 2.0
        return []

    run = start(score=score, scored_at_once=4)
    assert {c.reward for group in run.take(10) for c in group} == {2.0}


def test_an_error_of_the_reward_pool_ends_it(start):
    def score(group):
        raise RuntimeError("a reward worker did not start")

    with pytest.raises(RuntimeError, match="did not start"):
        start(score=score).take(10)


def test_waiting_for_a_batch_keeps_no_core_busy(engine, start):
    engine.hanging = set(range(100))
    run = start()
    until(lambda: len(engine.asked) == 8 * COMPLETIONS)
    began = time.process_time()
    with pytest.raises(CollectError):
        run.take(1.0)
    assert time.process_time() - began < 0.3


class Teacher(EngineStub):
    """Gives the score -0.5 to every token, unless the test wants it to refuse."""

    def __init__(self):
        super().__init__()
        self.refusing = 0

    async def respond(self, path, body):
        if self.refusing > 0:
            self.refusing -= 1
            raise web.HTTPInternalServerError(text="out of memory")
        entries = [[-0.5, token, None] for token in body["input_ids"][body["logprob_start_len"] :]]
        return {"meta_info": {"input_token_logprobs": [[None, *entries[0][1:]], *entries[1:]]}}


def teachers(url: str | None, check=lambda: None) -> Teachers:
    """One teacher of all prompts."""
    engines = TeacherEngines("teacher", None, [url], LostRequests(), check)
    return Teachers([engines], "data_source", timeout_s=30.0, max_attempts=2)


def test_a_group_is_scored_by_its_teacher_before_its_reward(start):
    seen = []

    def score(group):
        seen.extend(completion.teacher_log_probs is not None for completion in group)
        return []

    with Teacher() as teacher:
        batch = start(teachers=teachers(teacher.url), score=score).take(10)
    assert seen and all(seen)
    assert [c.teacher_log_probs.tolist() for group in batch for c in group] == [[-0.5]] * 8


def test_a_group_whose_teacher_refuses_is_generated_again(start):
    with Teacher() as teacher:
        teacher.refusing = 1
        run = start(teachers=teachers(teacher.url))
        batch = run.take(10)
    assert all(c.teacher_log_probs is not None for group in batch for c in group)
    [said] = [line for line in run.messages() if "generated again" in line]
    assert teacher.url in said and "scoring of prompt" in said and "out of memory" in said


def test_a_teacher_that_is_lost_for_good_ends_generation(start, monkeypatch):
    monkeypatch.setattr("megatron_vespo.rollout.teachers.CHECK_INTERVAL_S", 0.05)

    def check():
        raise CollectError("the teacher is gone")

    with pytest.raises(CollectError, match="the teacher is gone"):
        start(teachers=teachers(None, check)).take(10)
