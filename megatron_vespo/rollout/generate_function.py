"""Makes completions with a user's function, for example the best of several draws or a multi-turn episode.

    async def generate(draw, prompt, sampling, seed):
        first, second = [await draw(prompt, sampling, seed + i) for i in range(2)]
        return min(first, second, key=lambda completion: len(completion.token_ids))

`draw(prompt, sampling, seed)` gives one finished Completion of an engine. The function may draw several,
also of other prompts, and returns one of them or a combination. Every token of the result is trained on. So
every token needs the log-prob and the policy version with which an engine has sampled it. Every draw needs
the temperature, top_p and top_k of `sampling`. The function's time counts as generation. If a run is saved
while the function runs, the function starts from the beginning after the resume.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from dataclasses import replace

import numpy as np

from megatron_vespo.rollout.sampled_distribution import other_distribution
from megatron_vespo.system.import_path import import_function
from megatron_vespo.types import Completion, Prompt, SamplingParams

Draw = Callable[[Prompt, SamplingParams, int], Awaitable[Completion]]
GenerateFunction = Callable[[Draw, Prompt, SamplingParams, int], Awaitable[Completion]]


class GenerateFunctionError(RuntimeError):
    """The user's function raised, or returned something that cannot be trained on; names the prompt."""


def load_generate_function(import_path: str) -> GenerateFunction:
    """The coroutine function named "package.module:function"; ValueError if there is none."""
    function = import_function(import_path, "generate function")
    if not inspect.iscoroutinefunction(function):
        raise ValueError(f"generate function {import_path!r}: must be defined with async def")
    return function


async def run_generate_function(
    function: GenerateFunction, draw: Draw, prompt: Prompt, sampling: SamplingParams, seed: int
) -> Completion:
    async def checked_draw(of: Prompt, asked: SamplingParams, own_seed: int) -> Completion:
        if other := other_distribution(asked, sampling):
            raise GenerateFunctionError(
                f"the generate function draws with {other} at prompt {prompt.prompt_id}: its log-probs would "
                "not be those of the distribution that is trained on"
            )
        return await draw(of, asked, own_seed)

    try:
        completion = await function(checked_draw, prompt, sampling, seed)
    except Exception as error:  # it may raise anything; engine errors have clear messages already
        if type(error).__module__.startswith("megatron_vespo."):
            raise
        raise GenerateFunctionError(
            f"the generate function failed at prompt {prompt.prompt_id}: {type(error).__name__}: {error}"
        ) from error
    problem = _problem(completion, prompt)
    if problem:
        raise GenerateFunctionError(f"the generate function returned for prompt {prompt.prompt_id} {problem}")
    return replace(completion)  # lists that the function has assigned become arrays


def _problem(completion: Completion, prompt: Prompt) -> str | None:
    if not isinstance(completion, Completion):
        return f"a {type(completion).__name__}, not a Completion"
    length = len(completion.token_ids)
    if completion.prompt.prompt_id != prompt.prompt_id:
        return f"a completion of prompt {completion.prompt.prompt_id}"
    if length == 0:
        return "no tokens"
    for name in ("log_probs", "policy_versions"):
        if len(getattr(completion, name)) != length:
            return f"{length} tokens and {len(getattr(completion, name))} {name}"
    if not np.isfinite(completion.log_probs).all():
        return "log-probs that are not finite"
    return None
