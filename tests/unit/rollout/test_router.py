"""Requests whose engine is lost, against servers of our own that hang or break the connection."""

import asyncio
import threading
import time

import pytest

from megatron_vespo.rollout import router, sampler
from megatron_vespo.rollout.collector import Collector
from megatron_vespo.rollout.router import CollectError, LostRequests
from tests.support.builders import SAMPLING, make_prompt
from tests.support.engine_stub import EngineStub, sglang_reply

PROMPTS = [make_prompt(number) for number in range(6)]


class Engine(EngineStub):
    """One token a request, unless the test wants it to hang, or to break the connection so many times."""

    def __init__(self):
        super().__init__()
        self.hanging, self.breaking, self.answered = False, 0, 0

    @property
    def asked(self) -> int:
        return len(self.requests)

    async def respond(self, path, body):
        if self.hanging:
            await asyncio.sleep(60)
        if self.breaking > 0:
            self.breaking -= 1
            await asyncio.sleep(0.02)
            raise ConnectionResetError
        await asyncio.sleep(0.01)
        self.answered += 1
        return sglang_reply([7], "stop")


@pytest.fixture()
def engines(monkeypatch):
    monkeypatch.setattr(sampler, "CHECK_INTERVAL_S", 0.02)
    monkeypatch.setattr(router, "POLL_S", 0.02)
    with Engine() as one, Engine() as other:
        yield one, other


def collector(urls: list[str | None], said: list[str], timeout_s: float = 30.0, **changes) -> Collector:
    options = {"max_attempts": 3} | changes
    return Collector(
        urls,
        request_timeout_s=timeout_s,
        lost=LostRequests(said.append),
        **options,
    )


def all_answered(groups) -> bool:
    return [group[0].prompt.prompt_id for group in groups] == list(range(6)) and all(map(len, groups))


def later(seconds: float, action) -> None:
    threading.Timer(seconds, action).start()


def test_requests_with_a_broken_connection_go_to_another_engine(engines, monkeypatch):
    monkeypatch.setattr(sampler, "CHECK_INTERVAL_S", 60.0)  # all in one line, at the end
    said = []
    engines[0].breaking = 10**9
    run = collector([engine.url for engine in engines], said)
    assert all_answered(run.collect(PROMPTS, SAMPLING, num_completions=2, seed=1))
    assert engines[1].answered == 12
    # the engine that lost some is asked no others
    assert run._lost.number == engines[0].asked == 6
    [line] = said
    assert line.startswith(f"engine {engines[0].url}: connection lost at prompt ")
    assert line.endswith("; 6 of its requests are sent again")


def test_requests_of_an_engine_out_of_service_go_to_another(engines):
    """What hangs breaks no connection."""
    said, urls = [], [engine.url for engine in engines]
    engines[0].hanging = True
    later(0.2, lambda: urls.__setitem__(0, None))
    began = time.monotonic()
    assert all_answered(collector(urls, said).collect(PROMPTS, SAMPLING, num_completions=2, seed=1))
    assert time.monotonic() - began < 5
    assert engines[1].answered == 12
    assert "taken out of service at prompt" in said[0]


def test_no_answer_within_the_deadline_is_a_lost_request(engines):
    said = []
    engines[0].hanging = True
    urls = [engine.url for engine in engines]
    assert all_answered(collector(urls, said, 0.3).collect(PROMPTS, SAMPLING, num_completions=1, seed=1))
    assert all(": no completion of prompt " in line and " within 0.3 s; " in line for line in said)
    assert engines[0].asked == 3 and engines[1].answered == 6


def test_requests_wait_where_no_engine_serves(engines):
    urls: list[str | None] = [None, None]
    later(0.3, lambda: urls.__setitem__(1, engines[1].url))
    assert all_answered(collector(urls, []).collect(PROMPTS, SAMPLING, num_completions=1, seed=1))
    assert engines[0].asked == 0
    with pytest.raises(CollectError, match="^prompt 0: no engine has served for 0.2 s$"):
        collector([None], [], 0.2).collect(PROMPTS[:1], SAMPLING, num_completions=1, seed=1)


def test_a_callback_may_bring_an_engine_back(engines):
    urls: list[str | None] = [None]
    run = collector(urls, [])

    def heal() -> None:
        urls[0] = engines[0].url

    run.on_wait = heal
    assert all_answered(run.collect(PROMPTS, SAMPLING, num_completions=1, seed=1))


def test_a_request_that_loses_every_engine_is_given_up(engines, monkeypatch):
    monkeypatch.setattr(router, "AVOID_S", 0.0)
    for engine in engines:
        engine.breaking = 10**9
    run = collector([engine.url for engine in engines], [])
    with pytest.raises(CollectError, match=r"connection lost at prompt 0 \(.*\); 3 engines in a row$"):
        run.collect(PROMPTS[:1], SAMPLING, num_completions=1, seed=1)
    assert sum(engine.asked for engine in engines) == 3
    assert run._lost.number == 2


def test_what_ends_the_run_is_raised_instead(engines):
    def over() -> None:
        raise RuntimeError("engine died for good")

    engines[0].hanging = True
    with pytest.raises(RuntimeError, match="^engine died for good$"):
        collector([engines[0].url], [], check=over).collect(PROMPTS, SAMPLING, num_completions=1, seed=1)


def test_a_timeline_has_engines_by_number(engines):
    spans = []
    run = collector([None, engines[1].url], [], on_requests=lambda *span: spans.append(span))
    run.collect(PROMPTS, SAMPLING, num_completions=2, seed=1)
    assert [(number, count) for number, _, _, count in spans] == [(1, 12)]
