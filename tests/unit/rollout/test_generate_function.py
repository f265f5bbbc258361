"""A user's own way of making a completion, around a stand-in for the engine."""

import asyncio
from dataclasses import replace

import numpy as np
import pytest

from megatron_vespo.rollout.generate_function import (
    CustomGeneration,
    GenerateContext,
    GenerateFunctionError,
    load_generate_function,
)
from megatron_vespo.types import Completion, Segments, VersionSpans
from tests.support import custom_generate
from tests.support.builders import SAMPLING, make_completion, make_prompt

PROMPT = make_prompt(7, [1, 2])


def run(function, is_evaluation: bool = False) -> tuple[Completion, list[int]]:
    seeds = []

    async def draw(prompt, sampling, seed, begun=None):
        seeds.append(seed)
        if begun is not None:
            return continued(begun)
        return make_completion(prompt, 3 - len(seeds))  # the second one is shorter

    generation = CustomGeneration(function, GenerateContext("a tokenizer", None, False))
    return asyncio.run(generation.run(draw, PROMPT, SAMPLING, 40, is_evaluation)), seeds


def continued(begun: Completion) -> Completion:
    """With one token more."""
    assert begun.segments is not None
    return replace(
        begun,
        token_ids=np.append(begun.token_ids, 8).astype(np.int32),
        log_probs=np.append(begun.log_probs, 0).astype(np.float32),
        policy_versions=VersionSpans.single(0, begun.num_sampled + 1),
        segments=Segments.joined([begun.segments, Segments.single("policy", 1)]),
        finish_reason="stop",
    )


def test_it_may_draw_as_often_as_it_wants():
    completion, seeds = run(load_generate_function("tests.support.custom_generate:shorter_of_two"))
    assert len(completion.token_ids) == 1 and seeds == [40, 41]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (custom_generate.raises, "^the generate function failed at prompt 7: KeyError: 'no key'$"),
        (custom_generate.forgets, "returned for prompt 7 3 sampled tokens and 2 log_probs$"),
        (custom_generate.given_alone, "returned for prompt 7 no sampled token$"),
        (custom_generate.other_segments, "returned for prompt 7 2 tokens and segments of 3$"),
        (custom_generate.too_long, "returned for prompt 7 9 tokens, more than --max-completion-tokens 8$"),
        (custom_generate.unfinished, "returned for prompt 7 a completion that an engine has not finished$"),
        (custom_generate.no_json, "returned for prompt 7 reward_data that are not JSON: Object of type set"),
        (custom_generate.nothing, "returned for prompt 7 a NoneType, not a Completion$"),
    ],
)
def test_what_cannot_be_trained_on_is_said(function, message):
    with pytest.raises(GenerateFunctionError, match=message):
        run(function)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (
            "tests.support.custom_generate",
            "generate function 'tests.support.custom_generate': write \"package.module:function\"",
        ),
        ("tests.support.custom_generate:no_coroutine", "must be defined with async def"),
        ("no_such_module:f", "PYTHONPATH must hold its folder"),
    ],
)
def test_a_wrong_name_is_a_line(path, message):
    with pytest.raises(ValueError, match=message):
        load_generate_function(path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"temperature": 0.7}, "temperature 0.7 and not the run's 1"),
        ({"top_p": 0.9}, "top_p 0.9 and not the run's 1"),
        ({"top_k": 20}, "top_k 20 and not the run's -1"),
        ({"min_p": 0.1}, "min_p 0.1 and not the run's 0"),
    ],
)
def test_draws_from_another_distribution_are_refused(change, said):
    async def other(draw, prompt, sampling, seed):
        return await draw(prompt, replace(sampling, **change), seed)

    with pytest.raises(
        GenerateFunctionError, match=f"^the generate function draws with {said} at prompt 7: "
    ):
        run(other)


def test_a_draw_may_be_shorter():
    async def short(draw, prompt, sampling, seed):
        return await draw(prompt, replace(sampling, max_new_tokens=2, stop_token_ids=(3,)), seed)

    assert len(run(short)[0].token_ids) == 2


def test_it_may_add_tokens_and_draw_on():
    completion, _ = run(load_generate_function("tests.support.custom_generate:asks_again"), True)
    assert completion.token_ids.tolist() == [5, 5, 6, 7, 8]
    assert completion.segments == Segments(("policy", "environment", "policy"), (2, 2, 1))
    assert completion.reward_data == {"tokenizer": "a tokenizer", "is_evaluation": True}


def test_a_draw_needs_room_for_a_token():
    async def full(draw, prompt, sampling, seed, context):
        first = await draw(prompt, sampling, seed)
        return await draw(prompt, sampling, seed, begun=first.with_given([6] * 6, "tool"))

    with pytest.raises(GenerateFunctionError, match="continues 8 tokens at prompt 7, and may have 8$"):
        run(full)


def test_other_parameters_are_refused():
    with pytest.raises(ValueError, match=r"called with .*, which \(draw, prompt\) does not fit$"):
        load_generate_function("tests.support.custom_generate:two_parameters")
