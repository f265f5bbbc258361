"""Collectors of replies beside their engines: another node's, whose routes stay there; and their deaths."""

from __future__ import annotations

import os
import signal
import threading
import time

import numpy as np
import pytest
import ray
from ray.experimental import get_object_locations

from megatron_vespo.cluster import reply_collectors
from megatron_vespo.cluster.placement import place
from megatron_vespo.cluster.reply_collectors import ReplyCollectors
from megatron_vespo.cluster.stored_routes import RoutesLostError, StoredRoutes
from megatron_vespo.rollout import router, sampler
from megatron_vespo.rollout.collector import Collector
from megatron_vespo.rollout.generate_reply import GenerateReplyError
from megatron_vespo.rollout.router import CollectError, LostRequests
from megatron_vespo.system.http import EngineRequestError
from megatron_vespo.types import Completion, SamplingParams
from tests.cluster.programs.owner import Owner
from tests.support.builders import make_prompt
from tests.support.engine_stub import EngineStub
from tests.support.routed_engine import ROUTES, Engine, routes

SAMPLING = SamplingParams(1.0, 400, (1,))
PROMPTS = [make_prompt(number, range(number + 2)) for number in range(4)]
LIMIT_S = 60.0


@pytest.fixture(scope="module")
def placement(fake_nodes):
    """Two engines on a node of theirs, apart from the driver's."""
    fake_nodes.add(0)
    fake_nodes.add(2)
    placement = place(0, {}, 2, 1, on_gpus=True)
    yield placement
    placement.release()


@pytest.fixture
def replies(placement, tmp_path):
    collectors = ReplyCollectors(placement, tmp_path, None)
    yield collectors
    collectors.stop()


@pytest.fixture
def engines(monkeypatch):
    monkeypatch.setattr(sampler, "CHECK_INTERVAL_S", 0.02)
    monkeypatch.setattr(router, "AVOID_S", 0.2)
    with Engine() as one, Engine() as other:
        yield one, other


def collector(engines, replies: ReplyCollectors, **changes) -> Collector:
    options = {"routes": ROUTES, "request_timeout_s": LIMIT_S, "max_attempts": 3} | changes
    return Collector([engine.url for engine in engines], remote=replies, **options)


def collected(engines, replies, **changes) -> list[Completion]:
    groups = collector(engines, replies, **changes).collect(PROMPTS, SAMPLING, num_completions=3, seed=1)
    return [completion for group in groups for completion in group]


def process(replies: ReplyCollectors, number: int) -> int:
    """Process id of the collector of engine `number`."""
    return ray.get(replies.actor(number).__ray_call__.remote(lambda self: os.getpid()), timeout=LIMIT_S)


def test_completions_are_those_of_the_engines_and_routes_stay_on_their_node(engines, replies, fake_nodes):
    completions = collected(engines, replies)
    assert all(engine.requests for engine in engines)
    _, engines_node = fake_nodes.gpus
    for completion in completions:
        assert completion.token_ids.tolist() == list(range(1, 401))
        assert np.allclose(completion.log_probs, -np.arange(1, 401) / 10)
        assert completion.log_probs.flags.owndata and completion.token_ids.flags.owndata
        assert completion.policy_versions.are_all(0) and completion.finish_reason == "stop"
        assert completion.prompt is PROMPTS[completion.prompt.prompt_id]
        assert isinstance(completion.routed_experts, StoredRoutes)
    stored = [completion.routed_experts.ref for completion in completions]
    places = get_object_locations(stored)
    assert all(places[ref]["node_ids"] == [engines_node] for ref in stored)
    for completion in completions:
        entered = len(completion.prompt.token_ids) + 399
        np.testing.assert_array_equal(completion.routed_experts.fetch(), routes(0, entered))


def test_without_routes_none_are_asked_for(engines, replies):
    assert all(completion.routed_experts is None for completion in collected(engines, replies, routes=None))
    assert not any(body["return_routed_experts"] for engine in engines for body in engine.requests)


def test_a_response_goes_on_with_the_routes_that_it_has(engines, replies):
    """Each piece's routes come from its own pass; they are joined where they are needed."""
    for engine in engines:
        engine.length, engine.unfinished = 150, 8
    for completion in collected(engines, replies):
        assert len(completion.token_ids) in (150, 300, 400)
        np.testing.assert_array_equal(
            completion.routed_experts.fetch(),
            routes(0, len(completion.prompt.token_ids) + len(completion.token_ids) - 1),
        )
    starts = {body.get("routed_experts_start_len", 0) for engine in engines for body in engine.requests}
    assert len(starts) > 1


def test_requests_of_a_collector_that_dies_go_to_another_engine(engines, replies):
    said: list[str] = []
    victim = process(replies, 0)
    for engine in engines:
        engine.waits.clear()

    def kill() -> None:
        while not all(engine.requests for engine in engines):
            time.sleep(0.02)
        os.kill(victim, signal.SIGKILL)
        for engine in engines:
            engine.waits.set()

    threading.Thread(target=kill).start()
    completions = collected(engines, replies, lost=LostRequests(said.append))
    assert len(completions) == 12
    assert said[0].startswith(f"engine {engines[0].url}: connection lost at prompt ")
    assert "the collector of engine 0's replies died" in said[0]
    assert len(collected(engines, replies)) == 12  # by a new one
    assert process(replies, 0) != victim


def test_routes_outlive_their_collector(engines, replies):
    completions = collected(engines[:1], replies)
    os.kill(process(replies, 0), signal.SIGKILL)
    time.sleep(1.0)
    assert {completion.routed_experts.fetch().shape[1:] for completion in completions} == {ROUTES}


def test_a_collector_that_hangs_is_replaced(engines, replies, monkeypatch):
    assert len(collected(engines, replies)) == 12
    monkeypatch.setattr(reply_collectors, "ANSWER_TIMEOUT_S", 3.0)
    victim = process(replies, 1)
    os.kill(victim, signal.SIGSTOP)
    said: list[str] = []
    start = time.monotonic()
    assert len(collected(engines, replies, lost=LostRequests(said.append))) == 12
    assert time.monotonic() - start < 30
    assert "connection lost at prompt" in said[0] and "it does not answer" in said[0]


def test_errors_come_as_the_engine_client_raises_them(engines, replies):
    for engine in engines:
        engine.refuses = True
    with pytest.raises(GenerateReplyError, match="^prompt 0: not a reply of /generate"):
        collected(engines, replies)


def test_an_engine_that_refuses_the_key(placement, replies):
    with EngineStub(api_key="secret") as engine:
        with pytest.raises(EngineRequestError, match=r"/generate answered 401: prompt 0: ") as error:
            collected([engine], replies)
    assert (error.value.status, error.value.url) == (401, engine.url)


def test_an_engine_that_does_not_answer_in_time(engines, replies):
    engines[0].waits.clear()
    try:
        with pytest.raises(CollectError, match=r"no completion of prompt \d within 1 s; 2 engines in a row"):
            collected(engines[:1], replies, request_timeout_s=1.0, max_attempts=2)
    finally:
        engines[0].waits.set()


def test_routes_that_are_lost_say_so(placement):
    owner = ray.remote(Owner).options(num_cpus=0).remote()
    [ref] = ray.get(owner.put.remote(), timeout=LIMIT_S)
    ray.kill(owner)
    time.sleep(1.0)
    with pytest.raises(RoutesLostError, match="^routes of a response are lost with their node: "):
        StoredRoutes(ref).fetch()
