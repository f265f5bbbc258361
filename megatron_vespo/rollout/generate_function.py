"""Makes completions with a user's function, for example the best of several draws or an agent of its own.

    async def generate(draw, prompt, sampling, seed):
        first, second = [await draw(prompt, sampling, seed + i) for i in range(2)]
        return min(first, second, key=lambda completion: completion.num_sampled)

`draw(prompt, sampling, seed)` gives one finished Completion of an engine. The function may draw several,
also of other prompts, and returns one of them or a combination. Every sampled token of the result is trained
on. So each needs the log-prob and the policy version with which an engine has sampled it. Every draw needs
the temperature, top_p, top_k and min_p of `sampling`. The result may have `sampling.max_new_tokens` tokens.

A function with a fifth parameter gets a GenerateContext. It can then add tokens that are not trained on, and
let the engine continue:

    async def generate(draw, prompt, sampling, seed, context):
        first = await draw(prompt, sampling, seed)
        again = [{"role": "user", "content": "Are you sure?"}]
        given = context.turns.next_turn(again, first.token_ids[-1])
        return await draw(prompt, sampling, seed, begun=first.with_given(given, "environment"))

The function's time counts as generation. If a run is saved while the function runs, the function starts from
the beginning after the resume.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from megatron_vespo.data.turns import TurnTemplate
from megatron_vespo.rollout.sampled_distribution import other_distribution
from megatron_vespo.system.import_path import import_function
from megatron_vespo.types import Completion, Prompt, SamplingParams

GenerateFunction = Callable[..., Awaitable[Completion]]


class Draw(Protocol):
    """Gives one finished completion of an engine; with `begun`, which includes it, its continuation."""

    def __call__(
        self, prompt: Prompt, sampling: SamplingParams, seed: int, begun: Completion | None = None
    ) -> Awaitable[Completion]: ...


class GenerateFunctionError(RuntimeError):
    """The user's function raised, or returned something that cannot be trained on; names the prompt."""


@dataclass(frozen=True)
class GenerateContext:
    """What a generate function may need beside its prompt."""

    tokenizer: Any
    turns: TurnTemplate | None  # None without a chat template, or if it rewrites earlier turns
    is_evaluation: bool


def load_generate_function(import_path: str) -> GenerateFunction:
    """The coroutine function named "package.module:function"; ValueError if there is none."""
    function = import_function(import_path, "generate function")
    if not inspect.iscoroutinefunction(function):
        raise ValueError(f"generate function {import_path!r}: must be defined with async def")
    if _num_arguments(function) is None:
        raise ValueError(
            f"generate function {import_path!r}: it is called with (draw, prompt, sampling, seed), or with "
            f"(draw, prompt, sampling, seed, context), which {inspect.signature(function)} does not fit"
        )
    return function


def _num_arguments(function: GenerateFunction) -> int | None:
    """Return how many arguments the function is called with, 5 or 4; None if neither fits."""
    signature = inspect.signature(function)
    for number in (5, 4):
        try:
            signature.bind(*range(number))
        except TypeError:
            continue
        return number
    return None


@dataclass(frozen=True)
class CustomGeneration:
    """Makes completions with a user's function."""

    function: GenerateFunction
    context: GenerateContext

    async def run(
        self, draw: Draw, prompt: Prompt, sampling: SamplingParams, seed: int, is_evaluation: bool
    ) -> Completion:
        """Return the function's completion. Raises GenerateFunctionError, or what an engine raises."""

        async def checked_draw(
            of: Prompt, asked: SamplingParams, own_seed: int, begun: Completion | None = None
        ) -> Completion:
            if other := other_distribution(asked, sampling):
                raise GenerateFunctionError(
                    f"the generate function draws with {other} at prompt {prompt.prompt_id}: its log-probs "
                    "would not be those of the distribution that is trained on"
                )
            if begun is not None and len(begun.token_ids) >= asked.max_new_tokens:
                raise GenerateFunctionError(
                    f"the generate function continues {len(begun.token_ids)} tokens at prompt "
                    f"{prompt.prompt_id}, and may have {asked.max_new_tokens}"
                )
            return await draw(of, asked, own_seed, begun)

        context = replace(self.context, is_evaluation=is_evaluation)
        arguments = (checked_draw, prompt, sampling, seed, context)
        try:
            completion = await self.function(*arguments[: _num_arguments(self.function)])
        except Exception as error:  # it may raise anything; engine errors have clear messages already
            if type(error).__module__.startswith("megatron_vespo."):
                raise
            raise GenerateFunctionError(
                f"the generate function failed at prompt {prompt.prompt_id}: {type(error).__name__}: {error}"
            ) from error
        problem = _problem(completion, prompt, sampling)
        if problem:
            raise GenerateFunctionError(
                f"the generate function returned for prompt {prompt.prompt_id} {problem}"
            )
        return replace(completion)  # lists that the function has assigned become arrays


def _problem(completion: Completion, prompt: Prompt, sampling: SamplingParams) -> str | None:
    if not isinstance(completion, Completion):
        return f"a {type(completion).__name__}, not a Completion"
    length, most = len(completion.token_ids), sampling.max_new_tokens
    if completion.prompt.prompt_id != prompt.prompt_id:
        return f"a completion of prompt {completion.prompt.prompt_id}"
    if length == 0:
        return "no tokens"
    if length > most:
        return f"{length} tokens, more than --max-completion-tokens {most}"
    if completion.segments is not None and len(completion.segments) != length:
        return f"{length} tokens and segments of {len(completion.segments)}"
    if (sampled := completion.num_sampled) == 0:
        return "no sampled token"
    if completion.finish_reason == "abort":
        return "a completion that an engine has not finished"
    for name in ["log_probs", "policy_versions"] + ["supports"] * sampling.with_supports:
        column = getattr(completion, name)
        if (number := 0 if column is None else len(column)) != sampled:
            return f"{sampled} sampled tokens and {number} {name}"
    if not np.isfinite(completion.log_probs).all():
        return "log-probs that are not finite"
    try:
        json.dumps(completion.reward_data)
    except (TypeError, ValueError) as error:
        return f"reward_data that are not JSON: {error}"
    return None
