"""Plays episodes: turns of the policy, and an environment's answers between them.

    prompt | turn (sampled) | observation (given) | turn (sampled) | observation (given) | ...
             from an engine   by the chat template

Every turn continues the same tokens, so the tokens that are trained on are those that were sampled.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from megatron_vespo.data.turns import TurnTemplate
from megatron_vespo.rollout.environment import Environment, Step, checked_step, messages_of_step, writer_of
from megatron_vespo.types import Completion, Prompt, SamplingParams

# draws until an engine ends the turn, which continues the completion; see Sampler
Turn = Callable[[SamplingParams, Completion | None], Awaitable[Completion]]


class EnvironmentFailedError(RuntimeError):
    """An environment failed before the policy's first turn; names the prompt."""


class _Failure(Exception):
    """What an environment did wrong, in one line."""


@dataclass(frozen=True)
class EpisodeLimits:
    """When an episode ends without the environment's `done`."""

    max_turns: int  # of the policy
    max_turn_tokens: int | None  # sampled tokens per turn; None: --max-completion-tokens is the only limit
    timeout_s: float  # for one answer of the environment


class _Replayed(NamedTuple):
    """What an unfinished episode's turns gave when they were replayed."""

    rewards: tuple[float, ...]
    turn_start: int  # tokens before the turn that has not been answered


@dataclass(frozen=True)
class Episodes:
    """Plays the episodes of one environment class; every episode has its own object."""

    make_environment: Callable[[], Environment]
    turns: TurnTemplate
    tokenizer: Any
    limits: EpisodeLimits

    async def play(
        self, prompt: Prompt, sampling: SamplingParams, turn: Turn, begun: Completion | None = None
    ) -> Completion:
        """Return the finished episode of `prompt`; it goes on from `begun` if the environment is replayable.

        It ends with the environment's `done` (finish reason "stop"), at `sampling.max_new_tokens` tokens of
        turns and observations or at the limit of a turn ("length"), or after the last turn that is allowed
        ("turns"). If the environment fails, the completion says so in `environment_error`.
        Raises EnvironmentFailedError if it fails before the first turn, and what `turn` raises.
        """
        try:
            environment = self.make_environment()
        except Exception as error:  # a user's code may raise anything
            raise EnvironmentFailedError(
                f"the environment failed at prompt {prompt.prompt_id}: {_one_line(error)}"
            ) from error
        try:
            completion = await self._play(environment, prompt, sampling, turn, begun)
        finally:
            problem = await self._close(environment)
        return replace(completion, environment_error=completion.environment_error or problem)

    async def _play(
        self,
        environment: Environment,
        prompt: Prompt,
        sampling: SamplingParams,
        turn: Turn,
        state: Completion | None,
    ) -> Completion:
        try:
            await self._answer(environment.reset(prompt))
        except _Failure as failure:
            raise EnvironmentFailedError(
                f"the environment failed at prompt {prompt.prompt_id}: reset: {failure}"
            ) from None
        if not getattr(environment, "replayable", False):
            state = None
        try:
            rewards, start = _Replayed((), 0)
            if state is not None:
                rewards, start = await self._replay(environment, state, sampling.stop_token_ids)
        except _Failure as failure:
            assert state is not None
            end = len(state.token_ids) - state.num_given_at_end  # given tokens at the end have no routes
            begun = _beginning(state, end) if state.segments else state
            return replace(begun, finish_reason="stop", environment_error=f"replay: {failure}")
        while True:
            completion = await self._turn(sampling, turn, state, start)
            if completion.finish_reason == "length":
                return self._finished(environment, completion, rewards)
            try:
                step = await self._step(environment, completion, sampling.stop_token_ids)
                rewards += () if step.reward is None else (float(step.reward),)
                if step.done:
                    return self._finished(environment, completion, rewards)
                if _num_turns(completion) >= self.limits.max_turns:
                    return self._finished(environment, replace(completion, finish_reason="turns"), rewards)
                state = self._observed(completion, step)
            except _Failure as failure:
                failed = replace(completion, environment_error=str(failure))
                return self._finished(environment, failed, rewards)
            start = len(state.token_ids)
            if start >= sampling.max_new_tokens:  # no room for another turn
                return self._finished(environment, replace(completion, finish_reason="length"), rewards)

    async def _turn(
        self, sampling: SamplingParams, turn: Turn, state: Completion | None, start: int
    ) -> Completion:
        """Return the episode up to the end of the turn that begins after `start` tokens."""
        most = sampling.max_new_tokens
        if self.limits.max_turn_tokens is not None:
            most = min(most, start + self.limits.max_turn_tokens)
        if state is not None and len(state.token_ids) > start:
            if state.token_ids[-1] in sampling.stop_token_ids:
                return replace(state, finish_reason="stop")
            if len(state.token_ids) >= most:
                return replace(state, finish_reason="length")
        return await turn(replace(sampling, max_new_tokens=most), state)

    def _observed(self, completion: Completion, step: Step) -> Completion:
        messages = messages_of_step(step)
        try:
            given = self.turns.next_turn(messages, int(completion.token_ids[-1]))
        except Exception as error:  # what a template or a tokenizer refuses
            raise _Failure(f"its observation cannot follow: {_one_line(error)}") from error
        return completion.with_given(given, writer_of(messages))

    async def _step(
        self, environment: Environment, completion: Completion, stop_token_ids: Sequence[int]
    ) -> Step:
        token_ids = completion.last_turn()
        if token_ids[-1] in stop_token_ids:  # not every tokenizer counts it as special
            token_ids = token_ids[:-1]
        text = self.tokenizer.decode(token_ids, skip_special_tokens=True)
        answer = await self._answer(environment.step(text))
        try:
            return checked_step(answer)
        except ValueError as error:
            raise _Failure(str(error)) from error

    async def _replay(
        self, environment: Environment, state: Completion, stop_token_ids: Sequence[int]
    ) -> _Replayed:
        """Give the environment the turns of `state` again, whose observations it must repeat."""
        rewards: tuple[float, ...] = ()
        start = 0
        for end, following in _answered_turns(state):
            turn = _beginning(state, end)
            step = await self._step(environment, turn, stop_token_ids)
            rewards += () if step.reward is None else (float(step.reward),)
            repeated = None if step.done else self._observed(turn, step)
            start = following
            if repeated is None or repeated.token_ids.tolist() != state.token_ids[:start].tolist():
                raise _Failure("the environment is `replayable`, but gave another observation than before")
        return _Replayed(rewards, start)

    async def _answer(self, answer: Awaitable[Any]) -> Any:
        try:
            return await asyncio.wait_for(answer, self.limits.timeout_s)
        except TimeoutError:
            raise _Failure(f"it did not answer within {self.limits.timeout_s:g} s") from None
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise  # the episode itself is cancelled
            raise _Failure(_one_line(error)) from error
        except (Exception, SystemExit) as error:  # a user's code may raise anything; the run must go on
            raise _Failure(_one_line(error)) from error

    async def _close(self, environment: Environment) -> str:
        """Let the environment free what it holds; return what went wrong."""
        if (close := getattr(environment, "close", None)) is None:
            return ""
        try:
            await self._answer(close())
        except _Failure as failure:
            return f"close: {failure}"
        return ""

    def _finished(
        self, environment: Environment, completion: Completion, rewards: tuple[float, ...]
    ) -> Completion:
        data, problem = _reward_data(environment)
        if not math.isfinite(sum(rewards)):
            problem, rewards = f"its rewards add up to {sum(rewards)}", ()
        return replace(
            completion,
            turn_rewards=rewards,
            reward_data=data,
            environment_error=completion.environment_error or problem,
        )


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _reward_data(environment: Environment) -> tuple[dict[str, Any], str]:
    """Return what the environment hands to the reward function, and what is wrong with it."""
    get = getattr(environment, "reward_data", None)
    if get is None:
        return {}, ""
    try:
        data = json.loads(json.dumps(get()))
    except Exception as error:  # a user's code may raise anything
        return {}, f"reward_data: {_one_line(error)}"
    return (data, "") if isinstance(data, dict) else ({}, "reward_data must return a dict")


def _num_turns(completion: Completion) -> int:
    return 1 if completion.segments is None else completion.segments.num_turns


def _answered_turns(state: Completion) -> list[tuple[int, int]]:
    """Return for each turn with an observation: the end of the turn, and that of its observation."""
    if state.segments is None:
        return []
    answered, end = [], 0
    for writer, length in state.segments.spans():
        if writer != "policy":
            answered.append((end, end + length))
        end += length
    return answered


def _beginning(state: Completion, end: int) -> Completion:
    """Return the tokens and segments of `state` up to `end`: what an environment is told."""
    assert state.segments is not None
    spans, left = [], end
    for writer, length in state.segments.spans():
        spans.append((writer, min(length, left)))
        left -= spans[-1][1]
    segments = replace(
        state.segments,
        writers=tuple(writer for writer, n in spans if n),
        lengths=tuple(n for _, n in spans if n),
    )
    return replace(state, token_ids=state.token_ids[:end], segments=segments)
