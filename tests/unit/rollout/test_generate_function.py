"""A user's own way of making a completion, around a stand-in for the engine."""

import asyncio
from dataclasses import replace

import pytest

from megatron_vespo.rollout.generate_function import (
    GenerateFunctionError,
    load_generate_function,
    run_generate_function,
)
from megatron_vespo.types import Completion
from tests.support import custom_generate
from tests.support.builders import SAMPLING, make_completion, make_prompt

PROMPT = make_prompt(7, [1, 2])


def run(function) -> tuple[Completion, list[int]]:
    seeds = []

    async def draw(prompt, sampling, seed):
        seeds.append(seed)
        return make_completion(prompt, 3 - len(seeds))  # the second one is shorter

    return asyncio.run(run_generate_function(function, draw, PROMPT, SAMPLING, 40)), seeds


def test_it_may_draw_as_often_as_it_wants():
    completion, seeds = run(load_generate_function("tests.support.custom_generate:shorter_of_two"))
    assert len(completion.token_ids) == 1 and seeds == [40, 41]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (custom_generate.raises, "^the generate function failed at prompt 7: KeyError: 'no key'$"),
        (custom_generate.forgets, "returned for prompt 7 3 tokens and 2 log_probs$"),
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
