"""Routes of responses that engines make in several pieces: each token keeps those of its own pass."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_vespo.rollout.collector import Collector
from megatron_vespo.rollout.generate_function import CustomGeneration, GenerateContext
from megatron_vespo.types import SamplingParams, Segments
from tests.support.builders import make_prompt
from tests.support.routed_engine import ROUTES, Engine, routes

PROMPT = make_prompt(3, range(5))
SAMPLING = SamplingParams(1.0, 400, (1,))


def drawn(engine: Engine):
    collector = Collector([engine.url], routes=ROUTES, request_timeout_s=30.0)
    return collector.collect([PROMPT], SAMPLING, num_completions=1, seed=1)[0][0]


@pytest.mark.parametrize("pieces", [1, 2, 3])
def test_a_continued_request_asks_for_its_new_routes_only(pieces):
    with Engine(length=100) as engine:
        engine.unfinished = pieces - 1
        completion = drawn(engine)
    assert len(completion.token_ids) == 100 * pieces
    # the last token of a piece enters a pass only when the next piece begins
    starts = [0, *(5 + 100 * piece - 1 for piece in range(1, pieces))]
    assert [body.get("routed_experts_start_len", 0) for body in engine.requests] == starts
    np.testing.assert_array_equal(completion.routed_experts, routes(0, 5 + 100 * pieces - 1))


def test_given_tokens_get_the_routes_of_the_turn_after_them():
    async def two_turns(draw, prompt, sampling, seed, context):
        first = await draw(prompt, sampling, seed)
        return await draw(prompt, sampling, seed, begun=first.with_given([7, 8, 9], "tool"))

    maker = CustomGeneration(two_turns, GenerateContext(None, None, False))
    with Engine(length=100) as engine:
        collector = Collector([engine.url], routes=ROUTES, request_timeout_s=30.0, maker=maker)
        completion = collector.collect([PROMPT], SAMPLING, num_completions=1, seed=1)[0][0]
    assert [body.get("routed_experts_start_len", 0) for body in engine.requests] == [0, 5 + 100 - 1]
    assert engine.requests[1]["input_ids"] == [*range(5), *range(1, 101), 7, 8, 9]
    assert completion.segments == Segments(("policy", "tool", "policy"), (100, 3, 100))
    assert len(completion.log_probs) == len(completion.policy_versions) == 200
    np.testing.assert_array_equal(completion.routed_experts, routes(0, 5 + 203 - 1))


class RetractingEngine(Engine):
    def reply(self, body: dict) -> dict:
        answer = super().reply(body)
        answer["meta_info"]["num_retractions"] = int(len(self.requests) == 1)
        return answer


def test_a_response_that_has_lost_its_routes_asks_for_none():
    with RetractingEngine(length=100) as engine:
        engine.unfinished = 1
        completion = drawn(engine)
    assert (len(completion.token_ids), completion.num_retractions) == (200, 1)
    assert completion.routed_experts is None
    assert [body["return_routed_experts"] for body in engine.requests] == [True, False]
